"""The search for a schedule: which block removes how many tokens, at a given number of multiply-accumulates."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from mctf_compile.tuning.trials import Removals, Trials, Work

# The images that a schedule is first tried on; one that is worse there, by this many standard errors, is given up.
FIRST, ERRORS = 4, 2.0


class Divergence:
    """How far the classes of a schedule are from those of the dense model, on images in memory.

    The Kullback-Leibler divergence of each image: it needs no labels, and changes with every token, where the images
    lost are a whole number. ``dense``: logits [N, K] of the dense model.
    """

    def __init__(self, trials: Trials, images: Tensor, dense: Tensor) -> None:
        self.trials, self.images = trials, images
        self.dense = dense.double().log_softmax(1)
        self.known: dict[Removals, Tensor] = {}
        self.first = max(len(images) // FIRST, 1)

    def of(self, r: Removals) -> Tensor:
        """The divergence of each image, [N]."""
        if r not in self.known:
            self.known[r] = self._of(r, slice(None))
        return self.known[r]

    def mean(self, r: Removals) -> float:
        """The mean over all images."""
        return float(self.of(r).mean())

    def better(self, r: Removals, than: Removals) -> bool:
        """Whether a schedule is nearer to the dense model; told on the first images alone where these will do."""
        if r not in self.known:
            first = slice(0, self.first)
            worse = self._of(r, first) - self.of(than)[first]
            if len(worse) > 1 and float(worse.mean()) > ERRORS * float(worse.std()) / len(worse) ** 0.5:
                return False
        return self.mean(r) < self.mean(than)

    def _of(self, r: Removals, part: slice) -> Tensor:
        found = self.trials.logits(self.images[part], r).double().log_softmax(1)
        dense = self.dense[part]
        return (dense.exp() * (dense - found)).sum(1)


@dataclass(frozen=True)
class Found:
    """A schedule, and the number of schedules that were tried for it."""

    r: Removals
    tried: int


def search(
    work: Work,
    divergence: Divergence,
    goal: float,
    attempts: int,
    seed: int = 0,
    progress: Callable[[int], None] = lambda tried: None,
) -> Found:
    """A schedule of at most ``goal`` MACs that is near the dense model.

    From the even one on, tokens are moved from block to block, many at a time and then fewer, as long as that helps.
    The same seed finds the same schedule.
    """
    chance, best = random.Random(seed), work.even(goal)
    tried, seen = 0, {best}
    step = max(max(best) // 3, 1)
    while step and tried < attempts:
        moves = [(i, j) for i in work.fusing for j in work.fusing if i != j]
        chance.shuffle(moves)
        helped = False
        for source, into in moves:
            if tried >= attempts:
                break
            r = work.moved(best, source, into, step, goal)
            if r is None or r in seen:
                continue
            seen.add(r)
            tried += 1
            progress(tried)
            if divergence.better(r, best):
                best, helped = r, True
        if not helped:
            step //= 2
    return Found(best, tried)
