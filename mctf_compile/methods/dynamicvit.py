"""DynamicViT: learned predictors drop tokens in stages (Rao et al., NeurIPS 2021)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mctf_compile.methods.attached import Attached
from mctf_compile.methods.base import (
    Choice,
    Count,
    Evidence,
    Method,
    Need,
    Reads,
    Relaxed,
    Site,
    register_method,
)
from mctf_compile.methods.combining import highest
from mctf_compile.narrowing import present
from mctf_compile.options.fields import option, share
from mctf_compile.options.schedule import Removal, quarters


class Predictor(Attached):
    """The logarithms of the probabilities that each token is kept (channel 0) or dropped, [B, N, 2] (section 3.2).

    Half of the features are a token's own, half the mean over the tokens that are still there. In training it
    gives decisions instead, [B, N, 1]: 1 for a token that is kept, drawn by Gumbel-softmax, with the gradient of
    the probability; a token that was dropped before stays dropped. ``decision`` [B, patches] is that of the last
    call, for the loss (``mctf_compile.losses.dynamicvit``).
    """

    method = "dynamicvit"

    def __init__(self, width: int, lead: int, tail: int, before: Predictor | None) -> None:
        super().__init__()
        self.lead, self.tail = lead, tail
        # In a tuple it is no submodule of this one.
        self.before = (before,)
        self.decision: Tensor | None = None
        self.enter = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.score = nn.Sequential(
            nn.Linear(width, width // 2),
            nn.GELU(),
            nn.Linear(width // 2, width // 4),
            nn.GELU(),
            nn.Linear(width // 4, 2),
            nn.LogSoftmax(-1),
        )

    def forward(self, x: Tensor) -> Tensor:
        patches = x[:, self.lead : x.shape[1] - self.tail]
        if not self.training:
            return self._with_ends(self.scores(patches))
        (before,) = self.before
        kept = patches.new_ones(patches.shape[:2]) if before is None else present(before.decision)
        self.decision = drawn(self.scores(patches, kept)) * kept
        return self._with_ends(self.decision[..., None])

    def scores(self, patches: Tensor, kept: Tensor | None = None) -> Tensor:
        """[B, n, 2] of patches [B, n, C]; ``kept`` [B, n] weighs them in the mean, None counts all."""
        local, features = self.enter(patches).chunk(2, -1)
        if kept is None:
            mean = features.mean(1, keepdim=True)
        else:
            mean = (features * kept[..., None]).sum(1, keepdim=True) / kept.sum(1)[:, None, None]
        scores: Tensor = self.score(torch.cat([local, mean.expand_as(local)], -1))
        return scores

    def _with_ends(self, score: Tensor) -> Tensor:
        """[B, N, K], with ones for the protected tokens."""
        batch, _, k = score.shape
        return torch.cat([score.new_ones(batch, self.lead, k), score, score.new_ones(batch, self.tail, k)], 1)


def drawn(scores: Tensor) -> Tensor:
    """Keep (1) or drop (0), [B, n], drawn from log-probabilities [B, n, 2] by straight-through Gumbel-softmax."""
    noise = torch.rand_like(scores).clamp(min=torch.finfo(scores.dtype).tiny)
    soft = (scores - (-noise.log()).log()).softmax(-1)[..., 0]
    return (soft > 0.5).to(soft.dtype) + (soft - soft.detach())


@register_method
@dataclass(frozen=True)
class DynamicViT(Method):
    """Keeps ρ, ρ², ρ³ of all patches before three blocks, by the predictors that ``mctf_compile.attach`` adds.

    Options:
        keep_ratio: ρ.
    """

    name: ClassVar[str] = "dynamicvit"
    source: ClassVar[str] = "Rao et al., NeurIPS 2021, arXiv 2106.02034"
    site: ClassVar[Site] = Site.BEFORE
    needs: ClassVar[Collection[Need]] = (Need.LEARNED,)
    reads: ClassVar[Reads] = Reads.STREAM
    sized: ClassVar[bool] = False

    keep_ratio: float = option(0.7, share)

    def default_layers(self, depth: int) -> Collection[int]:
        return quarters(depth)

    def module(self, width: int, lead: int, tail: int, before: Attached | None) -> Attached:
        assert before is None or isinstance(before, Predictor)
        return Predictor(width, lead, tail, before)

    def relax(self, evidence: Evidence, n: int, r: int) -> Relaxed:
        """Every token stays; one that was dropped counts for itself alone (section 3.3)."""
        return Relaxed(present(evidence.learned)[..., 0], whole_to_itself=True)

    def removal(self, index: int, depth: int, count: Count) -> Removal:
        kept = int(count.first * self.keep_ratio ** (1 + self.acts_on(depth).index(index)))
        return Removal(max(count.free - kept, 0), None if kept < count.free else "keeps all tokens")

    def choose(self, evidence: Evidence, r: int) -> Choice:
        return highest(present(evidence.learned)[..., 0], evidence, r)
