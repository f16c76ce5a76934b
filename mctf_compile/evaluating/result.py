"""An evaluation as a table, as values for JSON and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from mctf_compile.evaluating.run import Evaluated, Evaluation
from mctf_compile.evaluating.settings import NONE
from mctf_compile.narrowing import present
from mctf_compile.packages import figure_class

MIB = 2**20


def to_dict(found: Evaluation) -> dict[str, Any]:
    """Plain values for JSON."""
    return {
        "images": found.images,
        "batch": found.batch,
        "confidence": found.confidence,
        "parameters": found.parameters,
        "rows": [
            {
                "label": row.setting.label,
                "method": row.setting.method,
                "options": row.setting.options,
                "gmacs": row.gmacs,
                "median_ms": row.milliseconds,
                "images_per_second": _throughput(row, found.batch),
                "peak_bytes": row.peak_bytes,
                "quality": {name: asdict(quality) for name, quality in row.qualities.items()},
                "reason": row.reason,
            }
            for row in found.rows
        ],
    }


def _throughput(row: Evaluated, batch: int) -> float | None:
    return None if row.milliseconds is None else 1e3 * batch / row.milliseconds


def table(found: Evaluation, title: str | None = None, caption: str = "") -> Table:
    """The evaluation as a rich table; its caption ends with the reasons of settings that were not measured."""
    scale, unit = _unit(found)
    reasons: dict[str, list[str]] = {}
    for row in found.rows:
        if row.reason is not None:
            reasons.setdefault(row.reason, []).append(row.setting.label)
    notes = [caption, *(f"{', '.join(labels)}: {reason}" for reason, labels in reasons.items())]
    # As Text, in which brackets are no markup.
    below = Text("\n".join(filter(None, notes)))
    result = Table(title=title, title_justify="left", caption=below, caption_justify="left")
    timed = found.dense.milliseconds is not None
    columns = ["", "top-1", "change", "lost/won", "top-5", "agree", "ECE", unit, "fewer"]
    for name in (*columns, *(("ms", "img/s", "MiB") if timed else ())):
        result.add_column(name, justify="right" if name else "left", no_wrap=True)
    for before, row in zip([found.dense, *found.rows], found.rows):
        if row.setting.method != before.setting.method:
            result.add_section()
        cells = _cells(row, found, scale) if row.reason is None else ["-"] * (len(result.columns) - 1)
        result.add_row(Text(row.setting.label), *cells)
    return result


def _cells(row: Evaluated, found: Evaluation, scale: float) -> list[str]:
    """The cells after the label, as text."""
    quality, dense = row.clean, found.dense
    cells = [f"{quality.top1:.1%}", "", "", f"{quality.top5:.1%}", "", f"{quality.calibration:.1%}"]
    cells += [f"{present(row.gmacs) * scale:.3f}", ""]
    if row is not dense:
        low, high = quality.interval
        cells[1] = f"{100 * (quality.top1 - dense.clean.top1):+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
        cells[2] = f"{quality.lost}/{quality.won}"
        cells[4] = f"{quality.agreement:.1%}"
        cells[7] = f"{present(dense.gmacs) / present(row.gmacs):.2f}x"
    if row.milliseconds is not None:
        cells.append(f"{row.milliseconds:.1f}")
        cells.append(f"{present(_throughput(row, found.batch)):.1f}")
        cells.append(f"{present(row.peak_bytes) / MIB:.1f}")
    return cells


def robustness(found: Evaluation) -> Table | None:
    """Top-1 under each corruption and on average, as a rich table; None where there were none."""
    names = list(found.dense.qualities)
    if len(names) < 2:
        return None
    result = Table(title="top-1 under corruptions", title_justify="left")
    for name in ("", *names, "mean"):
        result.add_column(name, justify="right" if name else "left")
    for row in found.rows:
        if row.reason is None:
            values = [quality.top1 for quality in row.qualities.values()]
            mean = sum(values[1:]) / len(values[1:])
            result.add_row(Text(row.setting.label), *(f"{value:.1%}" for value in (*values, mean)))
    return result


def front(rows: Sequence[Evaluated]) -> list[Evaluated]:
    """The rows that none beats in accuracy at as few multiply-accumulates, by these."""
    best: list[Evaluated] = []
    measured = [row for row in rows if row.reason is None]
    for row in sorted(measured, key=lambda row: (present(row.gmacs), -row.clean.top1)):
        if not best or row.clean.top1 > best[-1].clean.top1:
            best.append(row)
    return best


def draw(found: Evaluation, path: Path, title: str | None = None) -> None:
    """Write a figure of accuracy against multiply-accumulates: a line for each method, and the Pareto front of all.

    Raises ``ImportError`` where matplotlib is missing, naming what installs it.
    """
    figure = figure_class()(figsize=(7.5, 5), layout="constrained")
    axes = figure.add_subplot()
    dense, (scale, unit) = found.dense, _unit(found)

    def places(rows: Sequence[Evaluated]) -> tuple[list[float], list[float]]:
        return [present(row.gmacs) * scale for row in rows], [100 * row.clean.top1 for row in rows]

    axes.axhline(100 * dense.clean.top1, color="black", linestyle="--", linewidth=1, zorder=1)
    axes.plot(*places([dense]), "k*--", linewidth=1, markersize=12, label="dense")
    lines: dict[str, list[Evaluated]] = {}
    for row in found.rows[1:]:
        # Without a reduction the point would lie on that of the dense model.
        if row.reason is None and row.setting.method != NONE:
            lines.setdefault(row.setting.method, []).append(row)
    for marker, (method, line) in zip("osD^vPX<>" * len(found.rows), lines.items()):
        line = sorted(line, key=lambda row: present(row.gmacs))
        axes.plot(*places(line), marker + "-", label=method, markersize=6, alpha=0.9)
    axes.plot(*places(front(found.rows)), color="0.6", linewidth=5, alpha=0.4, zorder=0, label="Pareto front")
    axes.set_xlabel(f"{unit} per image")
    axes.set_ylabel("top-1 accuracy (%)")
    if title is not None:
        axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _unit(found: Evaluation) -> tuple[float, str]:
    """What to count multiply-accumulates in, and how many of it a GMAC is; a small model's would be all zeros."""
    return (1.0, "GMACs") if present(found.dense.gmacs) >= 0.1 else (1e3, "MMACs")
