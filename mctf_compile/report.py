"""What was fused, what was not and why, and what it saves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.table import Table

from mctf_compile.narrowing import present
from mctf_compile.passes.planning.macs import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mctf_compile.measuring.blocks import BlockTimes


@dataclass(frozen=True)
class BranchReport:
    """A branch that alone runs on fused tokens: ``attention``, ``cross`` or ``mlp``.

    ``macs_before`` and ``macs_after``: multiply-accumulates of one run at the inputs' batch size, those of the matching
    that was made for it among them; None where the numbers of tokens are inputs of the graph.
    """

    kind: str
    macs_before: int | None = None
    macs_after: int | None = None

    def __str__(self) -> str:
        name = {"attention": "attention", "cross": "cross-attention", "mlp": "MLP"}[self.kind]
        if self.macs_before is None or self.macs_after is None:
            return f"{name} alone"
        return f"{name} alone, {shown(self.macs_before)} -> {shown(self.macs_after)}"


@dataclass(frozen=True)
class BlockReport:
    """One attention block. ``reason`` is None where it fused; token counts include protected tokens.

    ``index`` is its number in its ``tower``; ``module`` the path of the module that attention runs in, where known;
    ``tokens`` those that it has in the dense model. ``branches``: what alone runs on fused tokens, where tokens do not
    stay fused for all that follows.
    """

    index: int
    tokens_in: int | None
    tokens_out: int | None
    reason: str | None = None
    note: str | None = None
    tower: int = 0
    module: str | None = None
    tokens: int | None = None
    branches: tuple[BranchReport, ...] = ()

    def __str__(self) -> str:
        place = f"block {self.index}" + (f", {self.module}" if self.module else "")
        if self.reason is not None:
            return f"{place}: {self.tokens_in}, dense: {self.reason}"
        return f"{place}: {self.tokens_in} -> {self.tokens_out}" + (f" ({self.remark})" if self.remark else "")

    @property
    def remark(self) -> str:
        """What there is to say of a block that fuses."""
        return "; ".join([*map(str, self.branches), *([self.note] if self.note else [])])

    @property
    def removed(self) -> int:
        return 0 if self.reason is not None else present(self.tokens_in) - present(self.tokens_out)


@dataclass(frozen=True)
class AtR:
    """What another ``r`` would do to the same graph.

    Attributes:
        r: as the option ``r``: the tokens that each block is to remove, or another form of it.
        blocks: as in the report; those that remove none have a reason.
        macs: multiply-accumulates of one run at the inputs' batch size.
        macs_by_block: of each block; None where that is not known.
    """

    r: Any
    blocks: list[BlockReport]
    macs: int
    macs_by_block: list[int | None]

    @property
    def removed(self) -> int:
        """Tokens removed in total."""
        return sum(block.removed for block in self.blocks)


@dataclass(frozen=True)
class Tradeoff:
    """What each ``r`` would save: counted from plans and from one graph, without running the model.

    ``points`` are in the order of ``r``, from 0; ``reason`` says why there are none, if so. ``at`` gives that of any
    other ``r``, a list with an entry per block among them.
    """

    points: list[AtR]
    reason: str | None = None
    at: Callable[[Any], AtR] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Report:
    """The outcome for one graph.

    Attributes:
        blocks: one entry per self-attention, in order of execution.
        count: gives the multiply-accumulates of one run at the inputs' batch size, before and after.
        unmerged: where, and why, the original tokens were given back before an operator.
        kept_fused: the numbers of the graph's outputs that keep their fused tokens, with ``outputs="fused"``.
        towers: what to call each chain of blocks along one residual stream; their numbers start at 0 in each.
        reason: why the whole graph stayed dense, or None.
        method: the reduction method.
        target: what ``r="auto"`` was solved for, and what was measured for that, if so.
        remarks: what else the user should know.
        seconds: time spent in each pass.
        count_blocks: gives the multiply-accumulates of each block, before and after; None for a block whose end is
            not known.
        count_tradeoff: gives what each ``r`` would save.
    """

    blocks: list[BlockReport]
    count: Callable[[], tuple[int, int]] = field(repr=False)
    unmerged: list[str] = field(default_factory=list)
    towers: list[str] = field(default_factory=list)
    reason: str | None = None
    method: str = "mctf"
    target: str | None = None
    remarks: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    count_blocks: Callable[[], list[tuple[int, int] | None]] | None = field(default=None, repr=False)
    count_tradeoff: Callable[[], Tradeoff] | None = field(default=None, repr=False)
    kept_fused: list[int] = field(default_factory=list)

    @cached_property
    def _macs(self) -> tuple[int, int]:
        # Counted when first asked for: it takes as long as a pass, and a compile does not need it.
        return self.count()

    @property
    def macs_before(self) -> int:
        """Multiply-accumulates of the original graph."""
        return self._macs[0]

    @property
    def macs_after(self) -> int:
        """Multiply-accumulates of the rewritten graph."""
        return self._macs[1]

    @cached_property
    def macs_by_block(self) -> list[tuple[int, int] | None]:
        """Multiply-accumulates of each of ``blocks`` in the original graph and in the rewritten one.

        From behind the residual stream that it reads to the one that it leaves; None where that is not known. The
        embedding, the head and what else is in no block make up the rest of ``macs_before`` and ``macs_after``.
        """
        return [None] * len(self.blocks) if self.count_blocks is None else self.count_blocks()

    @cached_property
    def tradeoff(self) -> Tradeoff:
        """What every ``r`` from 0 on would save, block by block; the options are otherwise the same.

        A ``target`` and ``profit`` are not applied: each ``r`` is looked at as if it had been asked for. Of a block
        that removes nothing at some ``r``, looking for tokens to fuse is counted all the same.
        """
        if self.count_tradeoff is None:
            return Tradeoff([], "the graph could not be followed")
        return self.count_tradeoff()

    @property
    def removed(self) -> int:
        """Tokens removed in total."""
        return sum(block.removed for block in self.blocks)

    @property
    def fused(self) -> bool:
        return any(block.reason is None for block in self.blocks)

    @property
    def summary(self) -> str:
        """One line: what was fused and what it saves."""
        before, after = self.macs_before / 1e9, self.macs_after / 1e9
        if not self.fused:
            return f"dense: {self.reason or 'nothing to fuse'} ({before:.3f} GMACs)"
        count = sum(block.reason is None for block in self.blocks)
        return (
            f"{self.method}: {count} of {len(self.blocks)} blocks fuse, {self.removed} tokens removed, "
            f"{before:.3f} -> {after:.3f} GMACs ({self.macs_before / max(self.macs_after, 1):.2f}x fewer)"
            + (f", for {self.target}" if self.target else "")
        )

    @property
    def lines(self) -> list[str]:
        """What is to be said beside the blocks."""
        kept = ", ".join(map(str, self.kept_fused))
        outputs = [f"returned with fused tokens: output {kept} of the graph"] if kept else []
        return [*(f"unmerged before {line}" for line in self.unmerged), *outputs, *self.remarks]

    def by_tower(self) -> list[tuple[str, list[BlockReport]]]:
        """The name of each tower, with its blocks."""
        return [(name, [b for b in self.blocks if b.tower == t]) for t, name in enumerate(self.towers or [""])]

    def __str__(self) -> str:
        lines = [self.summary]
        for name, blocks in self.by_tower():
            if len(self.towers) > 1:
                lines.append(f"  {name}")
            lines.extend(f"  {block}" for block in blocks)
        lines.extend(f"  {line}" for line in self.lines)
        return "\n".join(lines)

    def table(self) -> Table:
        """The report as a rich table."""
        table = Table(title=self.summary, title_justify="left")
        columns: tuple[tuple[str, JustifyMethod], ...] = (
            ("block", "right"),
            ("module", "left"),
            ("tokens in", "right"),
            ("out", "right"),
            ("", "left"),
        )
        for name, justify in columns:
            table.add_column(name, justify=justify)
        for name, blocks in self.by_tower():
            if len(self.towers) > 1:
                table.add_row("", f"[bold]{escape(name)}[/bold]", "", "", "")
            for b in blocks:
                remark = f"dense: {b.reason}" if b.reason is not None else b.remark
                table.add_row(
                    str(b.index),
                    escape(b.module or ""),
                    str(b.tokens_in or "?"),
                    str(b.tokens_out or "?"),
                    escape(remark),
                )
        if self.lines:
            table.caption, table.caption_justify = escape("\n".join(self.lines)), "left"
        return table

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        blocks = [
            {
                "index": block.index,
                "tower": block.tower,
                "module": block.module,
                "tokens": block.tokens,
                "tokens_in": block.tokens_in,
                "tokens_out": block.tokens_out,
                "reason": block.reason,
                "note": block.note,
                "branches": [asdict(branch) for branch in block.branches],
                "macs_before": None if work is None else work[0],
                "macs_after": None if work is None else work[1],
            }
            for block, work in zip(self.blocks, self.macs_by_block, strict=True)
        ]
        return {
            "summary": self.summary,
            "method": self.method,
            "target": self.target,
            "reason": self.reason,
            "macs_before": self.macs_before,
            "macs_after": self.macs_after,
            "removed": self.removed,
            "towers": self.towers,
            "blocks": blocks,
            "unmerged": self.unmerged,
            "kept_fused": self.kept_fused,
            "remarks": self.remarks,
            "seconds": self.seconds,
        }

    def plot(self) -> Figure:
        """A figure of the tokens and of the multiply-accumulates of each block, for ``figure.savefig("report.png")``.

        Raises ``ImportError`` where matplotlib is missing, naming what installs it.
        """
        from mctf_compile.plot import plot

        return plot(self)

    def html(
        self, title: str | None = None, times: BlockTimes | None = None, facts: Mapping[str, str] | None = None
    ) -> str:
        """One self-contained page: towers, blocks and reasons, a drawing before and after, and the trade-off over r.

        It needs no network: ``Path("report.html").write_text(report.html(), encoding="utf-8")``.

        Args:
            title: its heading, a model's name say.
            times: what ``mctf_compile.measuring.blocks.block_times`` measured; without, the page has no times.
            facts: what else it is to say at its top, by name: options, versions.
        """
        from mctf_compile.pages.report_page import report_page

        return report_page(self, title, times, facts)

    def print(self, console: Console | None = None) -> None:
        (console or Console()).print(self.table())
