"""Measure one row: the comparison in a process of its own, then each candidate alone."""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mctf_compile.measuring.bench import Progress, bench
from mctf_compile.measuring.fresh_process import isolate
from mctf_compile.measuring.machine import machine
from mctf_compile.measuring.results import Result
from mctf_compile.measuring.subprocesses import run_in_process
from mctf_compile.measuring.workload import BenchmarkRow, Workload


def measure_row(row: BenchmarkRow, suite: str, rounds: int, progress: Progress | None = None) -> Result:
    """Measure a row; raises ``MctfError`` where an output is not right or a process fails."""
    work = row.work
    arguments = {"work": asdict(work), "candidates": list(row.candidates), "rounds": rounds}
    with tempfile.TemporaryDirectory(prefix="mctf-") as cache:
        found = run_in_process(f"{__name__}:time_candidates", arguments, work.threads, cache, progress)
    isolated = {name: asdict(isolate(work, name, progress)) for name in row.isolated}
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return Result(suite, row, today, found["machine"], found["measured"], isolated)


def time_candidates(
    work: Mapping[str, Any], candidates: Sequence[str], rounds: int, progress: Progress
) -> dict[str, Any]:
    """The comparison, for a process of its own."""
    workload = Workload(**work)
    progress(f"load {workload.model}", 0, 1)
    model, images = workload.load()
    found = machine(workload.device)
    options, autocast = workload.all_options, workload.autocast
    result = bench(model, images, options, rounds, progress, autocast=autocast, candidates=candidates)
    return {"machine": found, "measured": result.to_dict()}
