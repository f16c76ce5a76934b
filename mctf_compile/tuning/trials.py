"""Schedules tried on a model: one compilation, and one forward pass over the images for each."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mctf_compile.compiler import explain
from mctf_compile.dynamic import set_r
from mctf_compile.errors import ConfigError, MctfError
from mctf_compile.evaluating.images import Images, padded
from mctf_compile.evaluating.outcomes import Outcomes
from mctf_compile.measuring.bench import timed
from mctf_compile.narrowing import present
from mctf_compile.report import AtR

# The tokens that each block is to remove.
Removals = tuple[int, ...]


class Work:
    """What each schedule of a model saves: counted from one graph, without running it.

    Args:
        model: in eval mode.
        image: [1, C, H, W].
        options: of the backend, without r.

    Raises:
        MctfError: nothing fuses, or the model has several towers, whose schedules one list cannot say.
    """

    def __init__(self, model: nn.Module, image: Tensor, options: Mapping[str, Any]) -> None:
        report = explain(model, image, **options, r=2)
        if len(report.towers) > 1:
            raise MctfError("the model has several towers; choose the modules of one: modules='...'")
        if not report.fused:
            raise MctfError(f"there is nothing to tune: {report.reason}")
        if report.tradeoff.at is None:
            raise MctfError(f"there is nothing to tune: {report.tradeoff.reason}")
        self.compute, self.known = report.tradeoff.at, dict[Removals, AtR]()
        self.dense = report.macs_before
        self.depth = len(report.blocks)
        self.tokens = max(present(block.tokens) for block in report.blocks if block.tokens is not None)
        self.fusing = [i for i, block in enumerate(report.blocks) if block.reason is None]
        # Multiply-accumulates with as many tokens removed as can be, as early as can be.
        self.least = self.macs([self.tokens if i in self.fusing else 0 for i in range(self.depth)])

    def at(self, r: Sequence[int]) -> AtR:
        """What a schedule does, block by block."""
        key = tuple(r)
        if key not in self.known:
            self.known[key] = self.compute(list(key))
        return self.known[key]

    def macs(self, r: Sequence[int]) -> int:
        """Multiply-accumulates of an image; looking for tokens is counted where a block removes none, too."""
        return self.at(r).macs

    def effective(self, r: Sequence[int]) -> Removals:
        """The tokens that each block does remove: what was asked for, clamped."""
        return tuple(block.removed for block in self.at(r).blocks)

    def scaled(self, weights: Sequence[float], goal: float) -> Removals | None:
        """The least multiple of some weights, one for each block, with at most ``goal`` MACs; None where none has."""
        top = max(weights)

        def multiple(largest: int) -> list[int]:
            return [round(largest * w / top) for w in weights]

        low, high = -1, self.tokens
        if self.macs(multiple(high)) > goal:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.macs(multiple(middle)) <= goal else (middle, high)
        return self._trimmed(self.effective(multiple(high)), goal)

    def _trimmed(self, r: Removals, goal: float) -> Removals:
        """Without what is removed beyond the goal, a token of an early block at a time."""
        for i in self.fusing:
            less = (*r[:i], max(r[i] - 1, 0), *r[i + 1 :])
            if self.macs(less) <= goal:
                r = less
        return r

    def even(self, goal: float) -> Removals:
        """As many tokens from every block that fuses; raises ``ConfigError`` for a goal out of reach."""
        found = self.scaled([float(i in self.fusing) for i in range(self.depth)], goal)
        if found is None:
            raise ConfigError(
                f"a budget of {goal / 1e9:.3f} GMACs is out of reach: {self.least / 1e9:.3f} are the fewest"
            )
        return found

    def moved(self, r: Removals, source: int, into: int, tokens: int, goal: float) -> Removals | None:
        """Fewer tokens from one block, and from another as many more as the goal takes; None where that is none."""
        less = list(r)
        less[source] = max(r[source] - tokens, 0)
        low, high = less[into] - 1, self.tokens

        def with_more(count: int) -> list[int]:
            return [count if i == into else value for i, value in enumerate(less)]

        if less == list(r) or self.macs(with_more(high)) > goal:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.macs(with_more(middle)) <= goal else (middle, high)
        return self.effective(with_more(high))


class Trials:
    """A model that runs at any schedule of some options, and the dense model beside it.

    Args:
        model: a classifier in eval mode.
        options: of the backend, without r.
        batch: images per call; every call has as many.
    """

    def __init__(self, model: nn.Module, options: Mapping[str, Any], batch: int) -> None:
        self.model, self.batch, self.compiled = model, batch, False
        self.options: dict[str, Any] = {"inner": "eager", **options, "dynamic_r": True, "r": 2}
        self.module = torch.compile(model, backend="mctf", options=self.options, dynamic=False)

    def logits(self, images: Tensor, r: Removals | None) -> Tensor:
        """[N, K] of the images at a schedule; of the dense model for None."""
        parts = [part for part in images.split(self.batch)]
        with self._at(r) as call:
            return torch.cat([call(padded(part, self.batch))[: len(part)] for part in parts])

    def outcomes(self, images: Images, r: Removals | None) -> Outcomes:
        """The outcomes of images that are read as they are needed."""
        starts = range(0, len(images), self.batch)
        with self._at(r) as call:
            parts = (images[start : start + self.batch] for start in starts)
            return Outcomes.together(Outcomes.of(call(padded(part, self.batch))[: len(part)]) for part in parts)

    def milliseconds(self, image: Tensor, r: Removals, rounds: int = 7) -> float:
        """The median time of a call."""
        full = padded(image, self.batch)
        with self._at(r) as call:
            call(full)
            return 1e3 * statistics.median(timed(lambda: call(full), full.device.type)[1] for _ in range(rounds))

    @contextmanager
    def _at(self, r: Removals | None) -> Iterator[Any]:
        """What runs the model at a schedule. After its first call Dynamo compiles nothing more, or it is an error."""
        with torch.no_grad():
            if r is None:
                yield self.model
                return
            set_r(self.module, list(r))
            with torch._dynamo.config.patch(error_on_recompile=self.compiled):
                yield self.module
            self.compiled = True
