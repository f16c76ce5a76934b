"""Times the blocks of a dense graph and of the fused one, each block as the backend would compile it."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, detect_fake_mode, tracing

from mctf_compile.errors import MctfError
from mctf_compile.inner.clock import copies, dense_graph, synchronized
from mctf_compile.inner.lowering import region_compiler
from mctf_compile.inner.regional import Run, compile_regions
from mctf_compile.narrowing import present
from mctf_compile.passes import LOWERING, State, run_passes
from mctf_compile.passes.lowering.regions import split
from mctf_compile.passes.planning.segments import owners


class NotTimed(MctfError):
    """A graph whose blocks cannot be timed one by one; the message says why."""


@dataclass(frozen=True)
class Measured:
    """Seconds of one call, by block and in all; None for a block whose ends are not known."""

    blocks: list[float | None]
    total: float


class BlockClock:
    """A dense graph and the fused one, cut at their blocks.

    Args:
        state: what the passes made, with inputs that have data among its examples; ``whole``.

    Raises ``ConfigError`` for inputs without data, and ``NotTimed``.
    """

    def __init__(self, state: State) -> None:
        self._inputs = copies(state.examples)
        blocks = [planned.block for planned in present(state.plan).blocks]
        self._owner, self._count = owners(present(state.normal).graph, blocks), len(blocks)
        self._seconds: defaultdict[int, float] = defaultdict(float)
        self._wait = synchronized(self._inputs)
        self._fused = self._cut(state)
        with tracing(TracingContext(detect_fake_mode(state.inputs))):
            dense = run_passes(LOWERING, replace(state, result=dense_graph(state), lowered=None, frozen=None))
        self._dense = self._cut(dense)

    def _cut(self, state: State) -> Callable[..., Any]:
        cut = split(state.frozen or present(state.lowered), joined=False)
        if cut is None:
            raise NotTimed("the graph holds parts of its own (regions of autocast, say), at which it cannot be cut")
        return compile_regions(cut, region_compiler(state), self._watched)

    def _watched(self, segment: int, run: Run) -> Run:
        def timed(instance: int, operands: list[Any]) -> Any:
            start = time.perf_counter()
            result = run(instance, operands)
            self._wait()
            self._seconds[segment] += time.perf_counter() - start
            return result

        return timed

    def measure(self, rounds: int, progress: Callable[[int], None]) -> tuple[Measured, Measured]:
        """Medians of interleaved calls, of the dense graph and of the fused one; ``progress`` counts the rounds.

        The first round of each compiles, and the second warms up: neither is counted.
        """
        seen: tuple[list[dict[int, float]], list[dict[int, float]]] = ([], [])
        devices = {x.device for x in self._inputs if isinstance(x, Tensor) and x.device.type != "cpu"}
        kind = next((device.type for device in devices), "cuda")
        with torch.no_grad(), torch.random.fork_rng(devices, device_type=kind):
            for i in range(-2, rounds):
                for run, kept in zip((self._dense, self._fused), seen, strict=True):
                    self._seconds.clear()
                    run(*self._inputs)
                    if i >= 0:
                        kept.append(dict(self._seconds))
                progress(max(i + 1, 0))
        dense, fused = (self._medians(kept) for kept in seen)
        return dense, fused

    def _medians(self, rounds: Sequence[Mapping[int, float]]) -> Measured:
        known = set(self._owner.values())
        of_blocks: list[float | None] = [
            statistics.median(sum(s for n, s in seconds.items() if self._owner.get(n) == i) for seconds in rounds)
            if i in known
            else None
            for i in range(self._count)
        ]
        return Measured(of_blocks, statistics.median(sum(seconds.values()) for seconds in rounds))
