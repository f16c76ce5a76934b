"""``Report.plot``: the tokens and the work of each block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mctf_compile.packages import figure_class

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    from mctf_compile.report import Report

FUSED, DENSE, BEFORE = "#c2571a", "#8a8f98", "#d9dce1"


def plot(report: Report) -> Figure:
    """A figure of two panels over the blocks: tokens that each leaves, and its multiply-accumulates.

    Behind each bar is a pale one: the tokens that come in, and the multiply-accumulates of the dense model.
    """
    count = len(report.blocks)
    figure = figure_class()(figsize=(max(6.0, 2 + 0.45 * count), 5.5), layout="constrained")
    tokens, macs = figure.subplots(2, 1, sharex=True)
    figure.suptitle(report.summary, fontsize=10, wrap=True)
    _bars(tokens, report, [(b.tokens_in, b.tokens_out) for b in report.blocks])
    tokens.set_ylabel("tokens out (pale: in)")
    unit, scale = ("GMACs", 1e9) if report.macs_before >= 1e8 else ("MMACs", 1e6)
    counted: list[tuple[float | None, float | None]] = [
        (None, None) if work is None else (work[0] / scale, work[1] / scale) for work in report.macs_by_block
    ]
    _bars(macs, report, counted)
    macs.set_ylabel(f"{unit} (pale: dense)")
    macs.set_xlabel("block")
    macs.set_xticks(range(count), [str(b.index) for b in report.blocks], fontsize=8)
    figure.legend(*_legend(), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def _bars(axes: Axes, report: Report, pairs: list[tuple[float | None, float | None]]) -> None:
    """For each block a pale bar of the first number and a narrower one of the second; a question mark for None."""
    axes.bar(range(len(pairs)), [before or 0 for before, _ in pairs], width=0.9, color=BEFORE)
    colours = [DENSE if block.reason is not None else FUSED for block in report.blocks]
    axes.bar(range(len(pairs)), [after or 0 for _, after in pairs], width=0.6, color=colours)
    for i, (before, _) in enumerate(pairs):
        if before is None:
            axes.annotate("?", (i, 0), ha="center", va="bottom", color=DENSE)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend() -> tuple[list[Patch], list[str]]:
    from matplotlib.patches import Patch

    return [Patch(color=FUSED), Patch(color=DENSE)], ["tokens fuse in this block", "none fuses in it"]
