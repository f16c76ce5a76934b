"""Pass: settle what the options leave open: ``r`` for a target, and the blocks where fusing does not pay."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from mctf_compile.errors import ConfigError
from mctf_compile.options.schedule import GMACS, SPEEDUP, Target, least, spread
from mctf_compile.passes.axes import hint_of
from mctf_compile.passes.pipeline import State, graph_pass
from mctf_compile.passes.planning.macs import count_macs, macs_by_counts
from mctf_compile.passes.planning.plan import PlannedBlock, make_plan, tokens_left


@graph_pass("budget", requires=("result",))
def run(state: State) -> str | None:
    if not state.unsettled:
        return None
    if state.counts is None:
        raise ConfigError("r='auto' and profit='model' need the tokens that are removed, and a model in training keeps "
                          "all; set r while it trains.")
    declined = state.findings.declined
    settle(state, macs_by_counts(state.result, state.counts), estimated(state))
    # Where blocks dropped out, what a target takes is found anew without them.
    state.unsettled = state.unsolved is not None
    return None if state.adjustable and state.findings.declined == declined else "plan"


# Of a run, from the tokens that each fusing block leaves: multiply-accumulates, or seconds.
Measure = Callable[[Sequence[int]], float]


@dataclass(frozen=True)
class Costs:
    """What work takes on a device, in seconds.

    ``per_mac``: a multiply-accumulate, with all that grows and shrinks with it. ``fusion``: by block, what fusing
    adds whatever it removes. ``source``: where the numbers come from, for the report.
    """

    per_mac: float
    fusion: Mapping[int, float]
    source: str


@dataclass(frozen=True)
class Device:
    """Orders of magnitude of a kind of device: MACs, bytes and operator calls per second."""

    macs: float
    bytes: float
    calls: float


# A CPU per thread with AVX2 or AVX-512 in float32; a data-centre GPU in bfloat16.
DEVICES = {"cpu": Device(4e10, 1e10, 2e5), "cuda": Device(2e14, 2e12, 2e5)}
# What a fusion adds: generated kernels and library calls, passes over the residual stream, passes over the map.
CALLS, STREAM_PASSES, MAP_PASSES = 12, 6, 2


def nominal(blocks: Sequence[PlannedBlock]) -> Costs:
    """Costs from the kind of device and the shapes, for ``profit="model"``."""
    entry = blocks[0].block.entry.meta["val"]
    device = DEVICES.get(entry.device.type, DEVICES["cpu"])
    threads = torch.get_num_threads() if entry.device.type == "cpu" else 1
    fusion = {}
    for planned in blocks:
        share = (planned.tokens_in or 0) / planned.block.tokens.total
        traffic = STREAM_PASSES * share * _bytes(planned.block.entry) + MAP_PASSES * share**2 * _map_bytes(planned)
        fusion[planned.index] = CALLS / device.calls + traffic / (device.bytes * threads)
    return Costs(1 / (device.macs * threads), fusion, f"estimated for {entry.device.type}")


def estimated(state: State) -> Costs | None:
    """What ``profit="model"`` weighs; None where the option is another."""
    return nominal(state.plan.fusing) if state.config.lowering.profit == "model" else None


def _bytes(node: fx.Node) -> float:
    value = node.meta["val"]
    size = value.element_size()
    for s in value.shape:
        size *= hint_of(s)
    return size


def _map_bytes(planned: PlannedBlock) -> float:
    """Of the attention map over the original tokens."""
    query = planned.block.attention.query
    return _bytes(query) / hint_of(query.meta["val"].shape[-1]) * planned.block.tokens.total


def settle(state: State, macs: Measure, costs: Costs | None = None) -> None:
    """Put into ``state.findings`` the ``r`` that meets a target in multiply-accumulates, and with ``costs`` the blocks
    where fusing takes more time than it saves.

    ``state`` has an adjustable result, ``macs`` counts it. Raises ``ConfigError`` for a target out of reach.
    """
    target = state.unsolved
    if target is not None:
        found = _for_macs(state, target, macs)
        if found is None:
            return
        state.findings = replace(state.findings, r=tuple(found), met=str(target))
    declined = unprofitable(state, macs, costs) if costs is not None else {}
    if declined:
        # A target is met by the other blocks then.
        unsolved = None if state.config.method.solved_for else state.findings.r
        state.findings = replace(state.findings, declined=state.findings.declined | declined, r=unsolved)


def _for_macs(state: State, target: Target, macs: Measure) -> list[int] | None:
    """The removal per block that meets a target; None, and every block declined, where the dense graph does."""
    dense = count_macs(state.normal)
    images = _images(state)
    goal = {GMACS: lambda: target.value * 1e9 * images, SPEEDUP: lambda: dense / target.value}[target.quantity]()
    if dense <= goal:
        met = f"the dense model meets the target {target}"
        declined = state.findings.declined | {b.index: met for b in state.plan.fusing}
        state.findings = replace(state.findings, declined=declined)
        return None
    found = solve(state, lambda left: macs(left) <= goal)
    if found is None:
        reached = macs(tokens_left(state, requests=everything(state)))
        raise ConfigError(
            f"target={str(target)!r} is out of reach: the most tokens that method {state.plan.method.name!r} can "
            f"remove leave {reached / images / 1e9:.3f} GMACs per image, {dense / reached:.2f}x fewer."
        )
    return found


def solve(state: State, meets: Callable[[Sequence[int]], bool]) -> list[int] | None:
    """The evenest removal per block, of the fewest tokens in all, that meets a goal; None where none does."""
    per_tower = max(sum(b.tower == t for b in state.plan.fusing) for t in range(len(state.towers)))
    total = least(lambda k: meets(tokens_left(state, requests=evenly(state, k))), most_of_any(state) * per_tower)
    return None if total is None else evenly(state, total)


def evenly(state: State, total: int) -> list[int]:
    """``total`` tokens spread over the fusing blocks of each tower, by block: towers that are alike get the same."""
    requests = [0] * len(state.blocks)
    for t, tower in enumerate(state.towers):
        fusing = [b.number for b in state.plan.fusing if b.tower == t]
        for i, request in zip(tower.blocks, spread(total, fusing, len(tower.blocks))):
            requests[i] = request
    return requests


def most_of_any(state: State) -> int:
    """As many tokens as no block can remove more of."""
    return max(b.tokens_in for b in state.plan.fusing) // 2


def everything(state: State) -> list[int]:
    """A request that every block can but fall short of."""
    fusing, most = {b.index for b in state.plan.fusing}, most_of_any(state)
    return [most if i in fusing else 0 for i in range(len(state.blocks))]


def unprofitable(state: State, macs: Measure, costs: Costs) -> dict[int, str]:
    """The blocks whose fusion takes longer than it saves in all, here and in later blocks, with the reasons."""
    planned = make_plan(state, state.config.method, state.findings.r, adjustable=True)
    removed = [block.removed for block in planned.blocks]
    declined: dict[int, str] = {}
    while any(removed):
        now = macs(tokens_left(state, requests=removed))
        verdicts = []
        for i in (i for i, r in enumerate(removed) if r):
            without = [0 if j == i else r for j, r in enumerate(removed)]
            saved = (macs(tokens_left(state, requests=without)) - now) * costs.per_mac
            verdicts.append((saved - costs.fusion[i], i, saved))
        balance, i, saved = min(verdicts)
        if balance >= 0:
            break
        declined[i] = (f"fusing {removed[i]} tokens here would save {1e3 * saved:.3f} ms and cost "
                       f"{1e3 * costs.fusion[i]:.3f} ms ({costs.source})")
        removed[i] = 0
    return declined


def _images(state: State) -> int:
    """The number of images in a batch."""
    block = state.plan.fusing[0].block
    alone = [d for d, dim in enumerate(state.axes.of(block.entry)) if dim == block.tokens.batch]
    if alone and block.tokens.batch:
        return hint_of(block.entry.meta["val"].shape[alone[0]])
    sizes = [axis.size for axis in block.tokens.batch]
    if not all(isinstance(size, int) for size in sizes):
        raise ConfigError("the number of images is symbolic and shares a dimension with others, so gmacs per image "
                          "cannot be told; give target='speedup=...' instead.")
    return math.prod(sizes)
