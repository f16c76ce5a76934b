"""EViT: keep the tokens that the class token attends to (Liang et al., ICLR 2022)."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch

from mctf_compile.methods.base import Choice, Count, Evidence, Method, Need, Site, register_method
from mctf_compile.methods.combining import highest
from mctf_compile.narrowing import present
from mctf_compile.options.fields import flag, one_of, option, share
from mctf_compile.options.schedule import Removal, quarters


@register_method
@dataclass(frozen=True)
class EViT(Method):
    """Keeps the most attentive share of the patches in three blocks, and one token for all the others.

    Options:
        keep_rate: share of the patches that stay, in each of ``layers``.
        fuse_token: append the sum of the others, each times its attention (section 3.2); else drop them.
        score: ``class_attention``, or ``mean_attention`` for models without a class token.
    """

    name: ClassVar[str] = "evit"
    source: ClassVar[str] = "Liang et al., ICLR 2022, arXiv 2202.07800"
    site: ClassVar[Site] = Site.BETWEEN
    sized: ClassVar[bool] = False
    hint: ClassVar[str] = "score='mean_attention' does without"

    keep_rate: float = option(0.7, share)
    fuse_token: bool = option(True, flag)
    score: str = option("class_attention", one_of("class_attention", "mean_attention"))

    @property
    def needs(self) -> Collection[Need]:  # type: ignore[override]  # it depends on an option
        return (Need.CLASS_ATTENTION if self.score == "class_attention" else Need.IMPORTANCE,)

    def default_layers(self, depth: int) -> Collection[int]:
        return quarters(depth)

    def removal(self, index: int, depth: int, count: Count) -> Removal:
        away = count.free - math.ceil(self.keep_rate * count.free)
        if away == 0:
            return Removal(0, f"keep_rate={self.keep_rate} of {count.free} tokens keeps all")
        # A single token that is not attentive becomes the fused token, in the official code too.
        return Removal(away - self.fuse_token, acts=True)

    def choose(self, evidence: Evidence, r: int) -> Choice:
        score = present(evidence.class_attention if self.score == "class_attention" else evidence.importance)
        if not self.fuse_token:
            return highest(score, evidence, r)
        away = highest(score, evidence, r + 1)
        keep, gone = away.keep, away.gone
        # The first that is not attentive carries the others, at the end of the patches; padding comes last.
        place = keep.shape[1] - evidence.tail
        # An index of one from a number that is one as it is traced would be all of it.
        keep = torch.cat([keep[:, :place], gone.narrow(1, 0, 1), keep[:, place:]], 1)
        gone = gone[:, 1:]
        total = score.gather(1, keep[:, place : place + 1]) + score.gather(1, gone).sum(1, keepdim=True)
        gain = torch.where(torch.arange(keep.shape[1], device=keep.device) == place, total, 1.0)
        return Choice(keep, gone, torch.full_like(gone, place), score, gain=gain, mixed=True)
