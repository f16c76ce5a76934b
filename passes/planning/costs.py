"""What work and fusing take on a device, and where fusing does not pay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import fx

from mctf_compile.kernels.device import device_of
from mctf_compile.narrowing import present
from mctf_compile.passes.axes import hint_of
from mctf_compile.passes.pipeline import State
from mctf_compile.passes.planning.plan import PlannedBlock, make_plan, tokens_remaining

# Of a run, from the tokens that each fusing block leaves: multiply-accumulates, or seconds.
Measure = Callable[[Sequence[int]], float]


class Clock(Protocol):
    """Times a graph as a function of the tokens that its fusing blocks leave."""

    def seconds(self, *variants: Sequence[int] | None) -> list[float]:
        """Of a run of each variant; None is the graph without fusions."""


@dataclass(frozen=True)
class Costs:
    """What work takes on a device, in seconds.

    ``per_mac``: a multiply-accumulate, with all that grows and shrinks with it. ``fusion``: by block, what fusing
    adds whatever it removes. ``source``: where the numbers come from, for the report.
    """

    per_mac: float
    fusion: Mapping[int, float]
    source: str


# What a fusion adds: generated kernels and library calls, passes over the residual stream, passes over the map.
CALLS, STREAM_PASSES, MAP_PASSES = 12, 6, 2


def nominal(blocks: Sequence[PlannedBlock]) -> Costs:
    """Costs from the kind of device and the shapes."""
    kind = present(blocks[0].block.entry).meta["val"].device
    device = device_of(kind)
    fusion = {}
    for planned in blocks:
        share, entry = (planned.tokens_in or 0) / present(planned.block.tokens).total, present(planned.block.entry)
        traffic = STREAM_PASSES * share * _bytes(entry) + MAP_PASSES * share**2 * _map_bytes(planned)
        fusion[planned.index] = CALLS / device.calls + traffic / (device.bytes * device.threads)
    return Costs(1 / (device.macs * device.threads), fusion, f"estimated for {kind.type}")


def _bytes(node: fx.Node) -> float:
    value = node.meta["val"]
    size = value.element_size()
    for s in value.shape:
        size *= hint_of(s)
    return float(size)


def _map_bytes(planned: PlannedBlock) -> float:
    """Of the attention map over the original tokens."""
    query = planned.block.attention.query
    width: int = hint_of(query.meta["val"].shape[-1])
    return _bytes(query) / width * present(planned.block.tokens).total


def measured(state: State, clock: Clock, macs: Measure) -> Costs:
    """Costs from three runs: dense, with fusions of no token, and as planned."""
    fusing = present(state.plan).fusing
    counts = [tokens_remaining(state, requests=r) for r in ([0] * len(present(state.blocks)), state.findings.r)]
    dense, none, planned = clock.seconds(None, *counts)
    more, fewer = map(macs, counts)
    each = max(none - dense, 0.0) / len(fusing)
    return Costs(max(none - planned, 0.0) / max(more - fewer, 1), {b.index: each for b in fusing}, "measured")


def unprofitable(state: State, macs: Measure, costs: Costs) -> dict[int, str]:
    """The blocks whose fusion takes longer than it saves in all, here and in later blocks, with the reasons."""
    planned = make_plan(state, state.config.method, state.findings.r, adjustable=True)
    removed = [block.removed for block in planned.blocks]
    declined: dict[int, str] = {}
    while any(removed):
        now = macs(tokens_remaining(state, requests=removed))
        verdicts = []
        for i in (i for i, r in enumerate(removed) if r):
            without = [0 if j == i else r for j, r in enumerate(removed)]
            saved = (macs(tokens_remaining(state, requests=without)) - now) * costs.per_mac
            verdicts.append((saved - costs.fusion[i], i, saved))
        balance, i, saved = min(verdicts)
        if balance >= 0:
            break
        declined[i] = (
            f"fusing {removed[i]} tokens here would save {1e3 * saved:.3f} ms and cost "
            f"{1e3 * costs.fusion[i]:.3f} ms ({costs.source})"
        )
        removed[i] = 0
    return declined
