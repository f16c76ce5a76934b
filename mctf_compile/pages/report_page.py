"""``Report.html``: one page that needs nothing else, neither a network nor a package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

if TYPE_CHECKING:
    from mctf_compile.measuring.blocks import BlockTimes
    from mctf_compile.report import AtR, BlockReport, Report

# Of a drawing: pixels from one block to the next, and the height of a block.
STEP, HEIGHT = 26, 20


@dataclass(frozen=True)
class Scale:
    """How multiply-accumulates are written, here and by the page's script."""

    unit: str
    divisor: float
    digits: int = 3

    def write(self, macs: float | None) -> str:
        return "?" if macs is None else f"{macs / self.divisor:.{self.digits}f}"


def report_page(
    report: Report, title: str | None = None, times: BlockTimes | None = None, facts: Mapping[str, str] | None = None
) -> str:
    """The page as HTML. See ``Report.html``."""
    scale = Scale("GMACs", 1e9) if report.macs_before >= 1e8 else Scale("MMACs", 1e6)
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    points = report.tradeoff.points
    chosen = _nearest(report, points)
    return pages.get_template("report.html").render(
        report=report,
        title=title or f"Token fusion by {report.method}",
        facts=facts or {},
        scale=scale,
        times=times,
        towers=list(_towers(report, scale, times)),
        rest=_rest(report),
        rest_times=times and _rest_times(times),
        points=points,
        chosen=chosen,
        curve=_curve(points, report.macs_before),
        as_reported=bool(points) and _remarks(points[chosen].blocks) == _remarks(report.blocks),
        data=_data(report, scale, points, chosen),
        ratio=report.macs_before / max(report.macs_after, 1),
        counted_seconds=sum(report.seconds.values()),
        remark=remark,
    )


def remark(block: BlockReport) -> str:
    """What is to be said of a block beside its numbers."""
    return block.note or "" if block.reason is None else f"dense: {block.reason}"


def _remarks(blocks: Sequence[BlockReport]) -> list[tuple[int | None, int | None, str]]:
    return [(b.tokens_in, b.tokens_out, remark(b)) for b in blocks]


def _towers(report: Report, scale: Scale, times: BlockTimes | None) -> Iterator[dict[str, Any]]:
    """What the template needs of each tower: its name, its drawing, and its rows."""
    most_macs = max((max(work) for work in report.macs_by_block if work is not None), default=1) or 1
    seconds = [*times.dense.blocks, *times.fused.blocks] if times else []
    most_seconds = max((s for s in seconds if s is not None), default=1.0) or 1.0
    for number, name in enumerate(report.towers or [""]):
        of_tower = [(i, b) for i, b in enumerate(report.blocks) if b.tower == number]
        widest = max((b.tokens or 0 for _, b in of_tower), default=0) or 1
        rows = []
        for place, (i, block) in enumerate(of_tower):
            before, after = report.macs_by_block[i] or (None, None)
            dense, fused = (times.dense.blocks[i], times.fused.blocks[i]) if times else (None, None)
            rows.append(
                {
                    "place": i,
                    "y": place * STEP,
                    "block": block,
                    # A path may be broken behind its dots.
                    "module": Markup(".<wbr>").join((block.module or "").split(".")),
                    "remark": remark(block),
                    "before": shape(block.tokens, block.tokens, widest),
                    "after": shape(block.tokens_in, block.tokens_out, widest),
                    "macs": (scale.write(before), scale.write(after)),
                    "macs_bars": _bars(before, after, most_macs),
                    "times": (_milliseconds(dense), _milliseconds(fused)),
                    "times_bars": _bars(dense, fused, most_seconds),
                }
            )
        yield {"name": name, "rows": rows, "height": max(len(rows) * STEP, STEP), "widest": widest}


def shape(tokens_in: int | None, tokens_out: int | None, widest: int) -> str:
    """The points of a block whose width are its tokens, in a box of 100 by 20: from above in, and down out."""
    if tokens_in is None or tokens_out is None:
        return ""
    a, b = 50 * tokens_in / widest, 50 * tokens_out / widest
    corners = [
        (50 - a, 0),
        (50 + a, 0),
        (50 + a, 9),
        (50 + b, 13),
        (50 + b, 20),
        (50 - b, 20),
        (50 - b, 13),
        (50 - a, 9),
    ]
    return " ".join(f"{x:.2f},{y}" for x, y in corners)


def _bars(before: float | None, after: float | None, most: float) -> tuple[float, float]:
    """Per cent of the longest bar."""
    return round(100 * (before or 0) / most, 2), round(100 * (after or 0) / most, 2)


def _milliseconds(seconds: float | None) -> str:
    return "?" if seconds is None else f"{1e3 * seconds:.2f}"


def _rest(report: Report) -> tuple[int, int]:
    """Multiply-accumulates outside the blocks, before and after."""
    known = [work for work in report.macs_by_block if work is not None]
    return report.macs_before - sum(w[0] for w in known), report.macs_after - sum(w[1] for w in known)


def _rest_times(times: BlockTimes) -> tuple[str, str]:
    dense, fused = (m.total - sum(s or 0 for s in m.blocks) for m in (times.dense, times.fused))
    return _milliseconds(max(dense, 0)), _milliseconds(max(fused, 0))


def _nearest(report: Report, points: Sequence[AtR]) -> int:
    """The place of the point that is the report's, or the one that saves about as much."""
    wanted = _remarks(report.blocks)
    same = [i for i, point in enumerate(points) if _remarks(point.blocks) == wanted]
    if same:
        return same[0]
    return min(range(len(points)), key=lambda i: abs(points[i].macs - report.macs_after), default=0)


def _curve(points: Sequence[AtR], dense: int) -> str:
    """The points of the line of multiply-accumulates over r, in a box of 100 by 100."""
    most = points[-1].r if points else 0
    return " ".join(f"{100 * p.r / max(most, 1):.2f},{100 - 100 * p.macs / max(dense, 1):.2f}" for p in points)


def _data(report: Report, scale: Scale, points: Sequence[AtR], chosen: int) -> dict[str, Any]:
    """What the script reads: for each r the multiply-accumulates, and of each block the tokens and what is said."""
    said = list(dict.fromkeys(remark(b) for blocks in (report.blocks, *(p.blocks for p in points)) for b in blocks))
    number = {text: i for i, text in enumerate(said)}
    work = [after for _, after in (w or (None, None) for w in report.macs_by_block)]

    def state(r: int | None, blocks: Sequence[BlockReport], macs: int, by_block: Sequence[int | None]) -> list[Any]:
        of_blocks = [
            [b.tokens_in, b.tokens_out, m, number[remark(b)], b.reason is None] for b, m in zip(blocks, by_block)
        ]
        return [r, macs, sum(b.removed for b in blocks), of_blocks]

    return {
        "dense": report.macs_before,
        "blocks": len(report.blocks),
        "divisor": scale.divisor,
        "digits": scale.digits,
        "unit": scale.unit,
        "said": said,
        "chosen": chosen,
        "report": state(None, report.blocks, report.macs_after, work),
        "points": [state(p.r, p.blocks, p.macs, p.macs_by_block) for p in points],
        "widest": [
            max((b.tokens or 0 for b in report.blocks if b.tower == block.tower), default=0) or 1
            for block in report.blocks
        ],
        "mostMacs": max((max(w) for w in report.macs_by_block if w is not None), default=1) or 1,
    }
