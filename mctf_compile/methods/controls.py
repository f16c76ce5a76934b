"""Controls: what a method must beat."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch

from mctf_compile.methods.base import Choice, Count, Evidence, Merging, Method, Site, register_method
from mctf_compile.methods.combining import highest
from mctf_compile.options.schedule import Removal


@register_method
@dataclass(frozen=True)
class Random(Merging):
    """Drops tokens at random, others at every call (``torch.manual_seed`` repeats them), and padding first."""

    name: ClassVar[str] = "random"
    source: ClassVar[str] = "a control"
    site: ClassVar[Site] = Site.BETWEEN
    sized: ClassVar[bool] = False

    def choose(self, evidence: Evidence, r: int) -> Choice:
        score = torch.rand_like(evidence.size)
        # An image of which padding alone stays is none.
        return highest(score if evidence.padding is None else score + ~evidence.padding, evidence, r)


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
