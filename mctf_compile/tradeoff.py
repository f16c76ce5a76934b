"""What each ``r`` would save, from plans and one graph whose numbers of tokens are symbols."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch._dynamo.convert_frame import compile_lock

from mctf_compile.errors import ConfigError, PassError, UnsupportedGraph
from mctf_compile.methods import Merging
from mctf_compile.narrowing import present
from mctf_compile.passes import REWRITING, Findings, State, run_passes
from mctf_compile.passes.planning.budget import most_of_any
from mctf_compile.passes.planning.macs import count_macs, macs_by_block, work_by_counts
from mctf_compile.passes.planning.plan import PlannedBlock, make_plan
from mctf_compile.report import AtR, BlockReport, BranchReport, Tradeoff

# As many values of r are looked at, about.
POINTS = 128


def tradeoff(state: State) -> Tradeoff:
    """What each ``r`` would save of a graph that the passes have been through."""
    method = state.config.method
    if not isinstance(method, Merging):
        return Tradeoff([], f"method {method.name!r} has no option r")
    with compile_lock:
        try:
            # What was found of the graph holds for every r.
            planned = run_passes(REWRITING, _afresh(state))
        except (ConfigError, PassError, UnsupportedGraph) as error:
            return Tradeoff([], str(error))
        if not present(planned.plan).fusing:
            return Tradeoff([], "no block can fuse")
        if planned.counts is None:
            return Tradeoff([], "a model in training keeps all its tokens")
        at = _AtAnyR(planned, method)
        return Tradeoff([at(r) for r in _chosen(most_of_any(planned), method.r)], at=at)


def _afresh(state: State) -> State:
    """The state as it was before anything was planned, for a graph that serves every ``r``."""
    before: dict[str, Any] = dict.fromkeys(("counts", "plan", "result", "lowered", "frozen", "cut", "dumps"))
    return replace(
        state, **before, adjustable=True, undecided=False, findings=Findings(), unmerges=[], remarks=[], seconds={}
    )


class _AtAnyR:
    """What any ``r`` would do to a graph whose numbers of tokens are symbols."""

    def __init__(self, state: State, method: Merging) -> None:
        self.state, self.method = state, method
        self.normal = present(state.normal)
        self.fusing = [b.index for b in present(state.plan).fusing]
        self.found = [b.block for b in present(state.plan).blocks]
        self.work = work_by_counts(self.normal, present(state.result), self.found, present(state.counts))

    def __call__(self, r: Any) -> AtR:
        """Raises ``ConfigError`` for an ``r`` that is not valid, or does not fit the model."""
        planned = make_plan(self.state, replace(self.method, r=r, target=None)).blocks
        if any(block.removed for block in planned):
            macs, by_block = self.work([present(planned[i].tokens_out) for i in self.fusing])
        else:
            macs = count_macs(self.normal)
            by_block = [of_block and of_block[0] for of_block in macs_by_block(self.normal, None, self.found)]
        return AtR(r, block_reports(planned), macs, by_block)


def _chosen(most: int, asked: Any) -> list[int]:
    """The values of ``r`` to look at: 0, the largest that makes a difference, what was asked for, and some between."""
    step = -(-most // POINTS)
    own = {asked} if isinstance(asked, int) and 0 <= asked <= most else set()
    return sorted({*range(0, most, step), most, *own})


def block_reports(
    planned: Sequence[PlannedBlock], macs: Mapping[tuple[int, str], tuple[int, int]] = MappingProxyType({})
) -> list[BlockReport]:
    """The entries of a report for planned blocks; ``macs``: of their branches, by block and kind, before and after."""
    return [
        BlockReport(
            b.number,
            b.tokens_in,
            b.tokens_out,
            b.reason,
            b.note,
            b.tower,
            b.block.module,
            b.tokens,
            tuple(BranchReport(branch.kind, *macs.get((b.index, branch.kind), ())) for branch in b.branches)
            if b.reason is None
            else (),
        )
        for b in planned
    ]
