"""Pass: decide what the options leave open: ``r`` for a target, and the blocks where fusing does not pay."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mctf_compile.errors import ConfigError
from mctf_compile.narrowing import present
from mctf_compile.options.schedule import GMACS, LATENCY, SPEEDUP, Target, distribute, least
from mctf_compile.passes.axes import hint_of
from mctf_compile.passes.pipeline import State, graph_pass
from mctf_compile.passes.planning.costs import Clock, Measure, measured, nominal, unprofitable
from mctf_compile.passes.planning.macs import count_macs, macs_by_counts
from mctf_compile.passes.planning.plan import tokens_remaining

# Refinements of a latency, and how close to the goal is good enough.
ATTEMPTS, CLOSE = 4, 0.97


@graph_pass("budget", requires=("result",))
def run(state: State) -> str | None:
    if not state.undecided:
        return None
    if state.counts is None:
        raise ConfigError(
            "r='auto' and profit need the tokens that are removed, and a model in training keeps all; "
            "set r while it trains."
        )
    declined = state.findings.declined
    choose_counts(state)
    # Where blocks dropped out, what a target takes is found anew without them.
    state.undecided = state.unsolved is not None
    return None if state.adjustable and state.findings.declined == declined else "plan"


def choose_counts(state: State) -> None:
    """Put into ``state.findings`` what the options leave open, as far as they ask for it.

    That is the ``r`` that meets the target, and the blocks where fusing takes longer than it saves. ``state`` has an
    adjustable result. Raises ``ConfigError`` for a target out of reach.
    """
    macs = macs_by_counts(present(state.result), present(state.counts))
    clock = present(state.clock)(state) if state.config.by_running else None
    target, profit = state.unsolved, state.config.lowering.profit
    if target is not None:
        timed = target.quantity == LATENCY
        found = _for_latency(state, target, present(clock), macs) if timed else _for_macs(state, target, macs)
        if isinstance(found, str):
            _decline(state, {b.index: found for b in present(state.plan).fusing})
            return
        state.findings = replace(state.findings, r=tuple(found.r), met=found.met)
    if profit == "off":
        return
    costs = nominal(present(state.plan).fusing) if profit == "model" else measured(state, present(clock), macs)
    declined = unprofitable(state, macs, costs)
    if declined:
        _decline(state, declined)
        if target is not None:
            # It is met by the other blocks then.
            state.findings = replace(state.findings, r=None)


def _decline(state: State, reasons: dict[int, str]) -> None:
    state.findings = replace(state.findings, declined=state.findings.declined | reasons)


@dataclass(frozen=True)
class Solution:
    """The removal per block that meets a target, and what it meets, for the report."""

    r: list[int]
    met: str


def _for_macs(state: State, target: Target, macs: Measure) -> Solution | str:
    """What meets a target in multiply-accumulates; why no block need fuse, where the dense graph does."""
    dense = count_macs(present(state.normal))
    images = _images(state)
    goal = {GMACS: lambda: target.value * 1e9 * images, SPEEDUP: lambda: dense / target.value}[target.quantity]()
    if dense <= goal:
        return f"the dense model meets the target {target}"
    found = solve(state, lambda remaining: macs(remaining) <= goal)
    if found is None:
        reached = macs(tokens_remaining(state, requests=everything(state)))
        name = present(state.plan).method.name
        raise ConfigError(
            f"target={str(target)!r} is out of reach: the most tokens that method {name!r} can "
            f"remove leave {reached / images / 1e9:.3f} GMACs per image, {dense / reached:.2f}x fewer."
        )
    return Solution(found, str(target))


def _for_latency(state: State, target: Target, clock: Clock, macs: Measure) -> Solution | str:
    """As ``_for_macs``, for a latency: time is about linear in multiply-accumulates."""
    goal = target.value / 1e3
    none, most = ([0] * len(present(state.blocks)), everything(state))
    counts = [tokens_remaining(state, requests=r) for r in (none, most)]
    dense, slow, fast = clock.seconds(None, *counts)
    if dense <= goal:
        return f"the dense model meets the target {target}: {1e3 * dense:.2f} ms"
    if fast > goal:
        raise ConfigError(
            f"target={str(target)!r} is out of reach: with the most tokens that method "
            f"{present(state.plan).method.name!r} can remove, a call takes {1e3 * fast:.2f} ms."
        )
    high, low = map(macs, counts)
    per_mac = max(slow - fast, 0.0) / max(high - low, 1)
    best, taken, offset = most, fast, fast - per_mac * low
    for _ in range(ATTEMPTS):

        def meets(remaining: Sequence[int], offset: float = offset) -> bool:
            return offset + per_mac * macs(remaining) <= goal

        found = solve(state, meets) or most
        remaining = tokens_remaining(state, requests=found)
        (seconds,) = clock.seconds(remaining)
        if seconds <= goal and sum(found) < sum(best):
            best, taken = found, seconds
        if CLOSE * goal <= seconds <= goal:
            break
        offset = seconds - per_mac * macs(remaining)
    return Solution(best, f"{target}: {1e3 * taken:.2f} ms measured")


def solve(state: State, meets: Callable[[Sequence[int]], bool]) -> list[int] | None:
    """The evenest removal per block, of the fewest tokens in all, that meets a goal; None where none does."""
    per_tower = max(sum(b.tower == t for b in present(state.plan).fusing) for t in range(len(present(state.towers))))
    total = least(lambda k: meets(tokens_remaining(state, requests=evenly(state, k))), most_of_any(state) * per_tower)
    return None if total is None else evenly(state, total)


def evenly(state: State, total: int) -> list[int]:
    """``total`` tokens spread over the fusing blocks of each tower, by block: towers that are alike get the same."""
    requests = [0] * len(present(state.blocks))
    for t, tower in enumerate(present(state.towers)):
        fusing = [b.number for b in present(state.plan).fusing if b.tower == t]
        for i, request in zip(tower.blocks, distribute(total, fusing, len(tower.blocks))):
            requests[i] = request
    return requests


def most_of_any(state: State) -> int:
    """As many tokens as no block can remove more of."""
    return max(present(b.tokens_in) for b in present(state.plan).fusing) // 2


def everything(state: State) -> list[int]:
    """A request that every block can but fall short of."""
    fusing, most = {b.index for b in present(state.plan).fusing}, most_of_any(state)
    return [most if i in fusing else 0 for i in range(len(present(state.blocks)))]


def _images(state: State) -> int:
    """The number of images in a batch."""
    block = present(state.plan).fusing[0].block
    entry, batch = present(block.entry), present(block.tokens).batch
    alone = [d for d, dim in enumerate(present(state.axes).of(entry)) if dim == batch]
    if alone and batch:
        images: int = hint_of(entry.meta["val"].shape[alone[0]])
        return images
    sizes = [axis.size for axis in batch]
    if not all(isinstance(size, int) for size in sizes):
        raise ConfigError(
            "the number of images is symbolic and shares a dimension with others, so gmacs per image "
            "cannot be told; give target='speedup=...' instead."
        )
    return math.prod(sizes)
