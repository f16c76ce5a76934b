"""What a candidate costs in a process of its own: the first call, with and without caches, and memory."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from mctf_compile.measuring.bench import Call, Progress, inference, timed
from mctf_compile.measuring.candidates import candidate, compiling, label
from mctf_compile.measuring.subprocesses import run_in_process
from mctf_compile.measuring.workload import Workload

# Processes that start with filled caches, for their median: of some seconds, one in six was 40 % longer.
WARM = 3


@dataclass(frozen=True)
class FreshProcess:
    """One candidate alone.

    Attributes:
        cold_s: seconds of ``torch.compile`` and the first call, with empty caches of Inductor. Loading Inductor is
            part of them: ``torch.compile`` does that itself for its own backend, and the first call for others.
        warm_s: the same in later processes, with the caches that the first one filled; their median.
        peak_bytes: what a later call holds at its highest, beyond the weights and the inputs; see ``peak_bytes``.
        kernels: that Inductor generated.
        misses: graphs that a later process did not find in the caches, at most.
    """

    cold_s: float
    warm_s: float
    peak_bytes: int
    kernels: int
    misses: int


def isolate(work: Workload, name: str, progress: Progress | None = None) -> FreshProcess:
    """Measure a candidate of ``candidates.CANDIDATES`` in ``1 + WARM`` processes, one after the other.

    Raises ``MctfError`` where one of them fails.
    """
    with tempfile.TemporaryDirectory(prefix="mctf-") as cache:
        cold, *warm = (
            run_in_process(
                f"{__name__}:first_call",
                {"work": asdict(work), "name": name, "state": state},
                work.threads,
                cache,
                progress,
            )
            for state in ("cold", *["warm"] * WARM)
        )
    return FreshProcess(
        cold["seconds"],
        statistics.median(found["seconds"] for found in warm),
        max(found["peak_bytes"] for found in warm),
        cold["kernels"],
        max(found["misses"] for found in warm),
    )


def first_call(work: Mapping[str, Any], name: str, state: str, progress: Progress) -> dict[str, Any]:
    """Make a workload and call a candidate for the first time; what was measured. For a process of its own."""
    from torch._dynamo.utils import counters
    from torch._inductor import metrics

    workload = Workload(**work)
    model, inputs = workload.load()
    progress(f"{label(name)} alone, caches {state}", 0, 1)
    with inference(workload.device, workload.autocast):
        start = time.perf_counter()
        run = candidate(name, model, inputs, workload.all_options)
        seconds = time.perf_counter() - start
        call: Call = lambda: run(*inputs)
        held = _reserved(workload.device)
        with compiling(name):
            seconds += timed(call, workload.device)[1]
        misses = counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_bypass"]
        kernels = metrics.generated_kernel_count
        call()
        return {
            "seconds": seconds,
            "peak_bytes": peak_bytes(call, workload.device) - held,
            "kernels": kernels,
            "misses": misses,
        }


def peak_bytes(call: Call, device: str = "cpu") -> int:
    """What PyTorch's allocator has given out at the highest point of a call.

    On a CPU: beyond what it had given out before the call, from the profiler's record of every allocation, which is the
    same each time. Scratch memory that oneDNN and MKL get elsewhere is not in it. On CUDA: all that the process
    has reserved, since a CUDA graph keeps its memory from call to call.
    """
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        timed(call, device)
        return torch.cuda.max_memory_reserved()
    # Else it tells stderr of every start and stop.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        # The output lives until the record ends.
        output = call()
    del output
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(accumulate(sizes), default=0)


def _reserved(device: str) -> int:
    if device != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()
