"""What was measured, and the files that keep it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mctf_compile.errors import MctfError
from mctf_compile.measuring.machine import same
from mctf_compile.measuring.workload import BenchmarkRow, Workload


@dataclass(frozen=True)
class Result:
    """One row, measured once.

    Attributes:
        suite: the suite that it was run as part of.
        date: the day, in UTC.
        machine: see ``mctf_compile.measuring.machine``.
        measured: what ``BenchResult.to_dict`` gives.
        isolated: by candidate, the fields of ``mctf_compile.measuring.fresh_process.FreshProcess``.
    """

    suite: str
    row: BenchmarkRow
    date: str
    machine: Mapping[str, Any]
    measured: Mapping[str, Any]
    isolated: Mapping[str, Mapping[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Result:
        row = dict(values["row"])
        work = Workload(**row.pop("work"))
        candidates, isolated = (tuple(row.pop(key)) for key in ("candidates", "isolated"))
        return cls(**{**values, "row": BenchmarkRow(**row, work=work, candidates=candidates, isolated=isolated)})


def append(result: Result, folder: Path) -> Path:
    """Add a result to its row's file, which is whole at every moment; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.row.name}.json"
    results = [r.to_dict() for r in read(path)] if path.exists() else []
    new = path.with_suffix(".new")
    new.write_text(json.dumps([*results, result.to_dict()], indent=1) + "\n")
    os.replace(new, path)
    return path


def read(path: Path) -> list[Result]:
    """The results of one row, the oldest first; raises ``MctfError`` for a file that has something else."""
    try:
        return [Result.from_dict(values) for values in json.loads(path.read_text())]
    except (ValueError, TypeError, KeyError) as error:
        raise MctfError(f"{path} is no file of results: {type(error).__name__}: {error}") from error


def latest(folder: Path) -> list[Result]:
    """The last result of each row on each machine, in the order of the files."""
    found: list[Result] = []
    for path in sorted(folder.glob("*.json")):
        for result in read(path):
            found = [r for r in found if r.row.name != result.row.name or not same(r.machine, result.machine)]
            found.append(result)
    return found
