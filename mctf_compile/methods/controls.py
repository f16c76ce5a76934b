"""Controls: what a method must beat."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch

from mctf_compile.methods.base import Choice, Combine, Count, Evidence, Merging, Method, Site, register_method
from mctf_compile.schedule import Removal


@register_method
@dataclass(frozen=True)
class Random(Merging):
    """Drops tokens at random, others at every call (``torch.manual_seed`` repeats them)."""

    name: ClassVar[str] = "random"
    source: ClassVar[str] = "a control"
    site: ClassVar[Site] = Site.BETWEEN
    sized: ClassVar[bool] = False

    def choose(self, evidence: Evidence, r: int) -> Choice:
        free = evidence.x.shape[1] - evidence.lead - evidence.tail
        score = torch.rand_like(evidence.size)
        keep, gone = torch.ops.mctf.select(score, free - r, evidence.lead, evidence.tail)
        return Choice(keep, gone, None, combine=Combine.DROP)


@register_method
@dataclass(frozen=True)
class NoReduction(Method):
    """Leaves every token: the dense model by the same way."""

    name: ClassVar[str] = "none"
    source: ClassVar[str] = "a control"
    site: ClassVar[Site] = Site.BETWEEN

    @property
    def active(self) -> bool:
        return False

    def default_layers(self, depth: int) -> Collection[int]:
        return ()

    def removal(self, index: int, depth: int, count: Count) -> Removal:
        return Removal(0, "method 'none' removes no tokens")
