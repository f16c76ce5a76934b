"""The page and the plots of results, made of their files alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from mctf_compile.measuring.candidates import CANDIDATES, DENSE, FUSED
from mctf_compile.measuring.machine import same
from mctf_compile.measuring.results import Result
from mctf_compile.measuring.workload import BenchmarkRow
from mctf_compile.packages import figure_class

Suites = Mapping[str, Sequence[BenchmarkRow]]

PREFACE = """\
# Measured

Written by `python -m benchmarks report`; the results are in the JSON files beside this page. All weights are random,
all images noise. A row's candidates ran in turn in one process, A B C A B C, after their outputs had been checked;
times are medians and, in brackets, interquartile ranges in milliseconds per batch. Speed-up: of the fastest mctf over
the fastest dense candidate, with its quartiles over the rounds. Realized: speed-up over the ratio of
multiply-accumulates. Over static: the speed-up over the fastest dense candidate that is compiled for one batch size.
"""

ALONE = """\
Each candidate in processes of its own: seconds of `torch.compile` and the first call with empty caches of Inductor and
with those that the first process filled, the kernels that Inductor generated, and what a later call holds at its
highest beyond weights and inputs. In brackets: over the row's first compiled dense one.
"""

SPEED = (
    "row",
    "model",
    "batch",
    "threads",
    "dtype",
    "r",
    "dense eager",
    "dense Inductor",
    "fastest dense",
    "mctf",
    "fastest mctf",
    "MACs ratio",
    "speed-up",
    "realized",
    "over static",
)
COST = ("row", "candidate", "first call, cold s", "warm s", "kernels", "peak MiB")


def write(results: Sequence[Result], folder: Path, suites: Suites) -> list[Path]:
    """Write ``README.md`` and a plot for each suite into ``folder``; returns the files.

    ``suites``: the rows of each suite, which give the page its order.
    """
    page = folder / "README.md"
    page.write_text(markdown(results, suites))
    paths = [page]
    for suite in _suites(results, suites):
        paths.append(folder / f"{suite}.png")
        draw(_ordered((r for r in results if r.suite == suite), _order(suite, suites)), paths[-1])
    return paths


def markdown(results: Sequence[Result], suites: Suites) -> str:
    """The results as a Markdown page: by suite, and by machine."""
    parts = [PREFACE]
    for suite in _suites(results, suites):
        parts.append(f"## {suite}\n\n![speed-up against the ratio of multiply-accumulates]({suite}.png)\n")
        for rows in _machines((r for r in results if r.suite == suite), _order(suite, suites)):
            alone = [cells for result in rows for cells in _cost(result)]
            parts.append(f"{_described(rows)}\n")
            parts.append(_table(SPEED, [_speed(result) for result in rows]))
            if alone:
                parts += [ALONE, _table(COST, alone)]
    return "\n".join(parts)


def _suites(results: Iterable[Result], suites: Suites) -> list[str]:
    found = {r.suite for r in results}
    return [*(s for s in suites if s in found), *sorted(found - suites.keys())]


def _order(suite: str, suites: Suites) -> list[str]:
    return [row.name for row in suites.get(suite, ())]


def _ordered(results: Iterable[Result], order: Sequence[str]) -> list[Result]:
    """The results in the order of their rows' names; those of other rows last."""
    return sorted(results, key=lambda r: order.index(r.row.name) if r.row.name in order else len(order))


def _machines(results: Iterable[Result], order: Sequence[str]) -> list[list[Result]]:
    """The results of each machine, in the order of the suite's rows."""
    groups: list[list[Result]] = []
    for result in results:
        group = next((g for g in groups if same(g[0].machine, result.machine)), None)
        if group is None:
            groups.append(group := [])
        group.append(result)
    return [_ordered(group, order) for group in groups]


def _described(rows: Sequence[Result]) -> str:
    """A machine, the days of its measurements and how busy it was before them, in one line."""
    m = rows[0].machine
    parts = [
        m.get("gpu"),
        m["cpu"],
        f"{m['cores']} cores",
        m["simd"],
        f"{m['memory_gib']} GiB",
        m["system"],
        m["compiler"],
        f"Python {m['python']}",
        *(f"{k} {v}" for k, v in m["versions"].items() if v),
    ]
    if m.get("cuda"):
        parts.append(f"CUDA {m['cuda']}")
    days = sorted({r.date for r in rows})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    loads = [r.machine["load"] for r in rows if r.machine["load"] is not None]
    load = f" Load before a row: {min(loads)} to {max(loads)}." if loads else ""
    return f"{', '.join(str(p) for p in parts if p)}; {when}.{load}"


def _speed(result: Result) -> list[str]:
    work, m = result.row.work, result.measured
    timings = m["candidates"]
    low, high = m["speedup_quartiles"]
    static = min(
        timing["median_ms"] for name, timing in timings.items() if name in DENSE and not CANDIDATES[name].dynamic
    )
    size = "" if work.image_size is None else f" at {work.image_size}"
    options = {k: v for k, v in work.options.items() if k != "inner"}
    return [
        result.row.name,
        work.model + size,
        str(work.batch),
        str(work.threads),
        work.dtype,
        str(work.r) + (f" {options}" if options else ""),
        *(_milliseconds(timings.get(name)) for name in ("eager", "inductor")),
        f"{_milliseconds(timings[m['best_dense']])} {m['best_dense']}",
        _milliseconds(timings.get("mctf")),
        f"{_milliseconds(timings[m['best_fused']])} {m['best_fused']}",
        f"{m['macs_ratio']:.2f}",
        f"{m['speedup_over_best_dense']:.2f} ({low:.2f} to {high:.2f})",
        f"{m['realized_over_best_dense']:.2f}",
        f"{static / timings[m['best_fused']]['median_ms']:.2f}",
    ]


def _milliseconds(timing: Mapping[str, Any] | None) -> str:
    return "" if timing is None else f"{timing['median_ms']:.1f} ({timing['spread_ms']:.1f})"


def _cost(result: Result) -> list[list[str]]:
    alone = result.isolated
    base = next((values for name, values in alone.items() if name != "eager" and name not in FUSED), None)
    return [
        [
            result.row.name,
            name,
            *(_over(values, base, key, 1, 1) for key in ("cold_s", "warm_s")),
            str(values["kernels"]),
            _over(values, base, "peak_bytes", 2**20, 1),
        ]
        for name, values in alone.items()
    ]


def _over(values: Mapping[str, Any], base: Mapping[str, Any] | None, key: str, unit: int, digits: int) -> str:
    """A number, with its ratio to that of another candidate where there is another."""
    ratio = "" if base is None or base is values or not base[key] else f" ({values[key] / base[key]:.2f}x)"
    return f"{values[key] / unit:.{digits}f}{ratio}"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in rows)]) + "\n"


def draw(results: Sequence[Result], path: Path) -> None:
    """Write a figure of speed-up against the ratio of multiply-accumulates, with the line on which they are equal.

    Bars are the quartiles of the speed-up. Raises ``ImportError`` where matplotlib is missing, naming what installs it.
    """
    figure = figure_class()(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    # Rows of one model have nearly the same ratio, so names at the points would overlap.
    styles = zip(cycle("osD^vP<>X"), cycle(f"C{i}" for i in range(10)))
    for result, (marker, colour) in zip(results, styles):
        m = result.measured
        x, y, (low, high) = m["macs_ratio"], m["speedup_over_best_dense"], m["speedup_quartiles"]
        bars = [[max(y - low, 0)], [max(high - y, 0)]]
        name = f"{result.row.name}: {m['realized_over_best_dense']:.0%}"
        axes.errorbar([x], [y], yerr=bars, fmt=marker, color=colour, markersize=8, capsize=4, alpha=0.85, label=name)
    reach = max(value for r in results for value in (r.measured["macs_ratio"], r.measured["speedup_over_best_dense"]))
    axes.plot([1, 1.05 * reach], [1, 1.05 * reach], "k--", linewidth=1, label="ideal: time falls as MACs do")
    axes.axhline(1, color="0.5", linewidth=1)
    axes.set_xlabel("multiply-accumulates, dense / fused")
    axes.set_ylabel("speed-up over the fastest dense candidate")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", title="row: realized efficiency")
    figure.savefig(path, dpi=150)
