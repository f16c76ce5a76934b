"""DTEM: merging by an embedding that is learned for it alone (Lee & Hong, NeurIPS 2024)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from mctf_compile.methods.attached import Attached
from mctf_compile.methods.base import Choice, Evidence, Merging, Need, Reads, Relaxed, Site, register_method
from mctf_compile.methods.combining import combined, match
from mctf_compile.narrowing import present
from mctf_compile.options.fields import integer, one_of, option, share


class Embedding(Attached):
    """z = W x + b of a block's normalised tokens, from which no gradient goes back into the model."""

    method = "dtem"

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, features)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.linear(x.detach())
        return features


@register_method
@dataclass(frozen=True)
class DTEM(Merging):
    """ToMe's matching on a decoupled embedding of each block, which ``mctf_compile.attach`` adds.

    Options:
        features: width of the embedding; None for 64, or 128 from 1024 channels on.
        pooling: ``size`` (the size-weighted mean), ``mean`` or ``mlerp``.
        neighbours, temperature: of the soft merging in training (k = 3 and τ = 0.1 in the paper).
    """

    name: ClassVar[str] = "dtem"
    source: ClassVar[str] = "Lee & Hong, NeurIPS 2024, arXiv 2412.10569"
    site: ClassVar[Site] = Site.BETWEEN
    keeps_images_apart: ClassVar[bool] = True
    needs: ClassVar[Collection[Need]] = (Need.LEARNED,)
    reads: ClassVar[Reads] = Reads.PROJECTION

    features: int | None = option(None, integer(1, None))
    pooling: str = option("size", one_of("size", "mean", "mlerp"))
    neighbours: int = option(3, integer(1))
    temperature: float = option(0.1, share)

    def module(self, width: int, lead: int, tail: int, before: Attached | None) -> Attached:
        return Embedding(width, self.features or (128 if width >= 1024 else 64))

    def choose(self, evidence: Evidence, r: int) -> Choice:
        return combined(self.pooling, evidence, *match(evidence, present(evidence.learned), r))

    def relax(self, evidence: Evidence, n: int, r: int) -> Relaxed:
        """Soft merging (section 3.3): a share of each odd token goes into its nearest even ones.

        Of the ``n`` tokens that take part, those that gave most come last, and take no part in the next block.
        """
        x, m, z, p = evidence.x, evidence.size, present(evidence.learned), evidence.lead
        end = n - evidence.tail
        odd, even = slice(p, end, 2), slice(p + 1, end, 2)
        given = assignment(z[:, odd], z[:, even], min(r, (end - p) // 2), self.neighbours, self.temperature)
        rest = 1 - given.sum(2)
        given = given * m[:, odd, None]
        received = given.sum(1)
        grown = m[:, even] + received
        merged = (m[:, even, None] * x[:, even] + given.transpose(1, 2) @ x[:, odd]) / grown[..., None]
        # Rounding may leave the rest a little below 0, where the gradient goes on.
        staying = m[:, odd] * (rest + (rest.clamp(0, 1) - rest).detach())

        position = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        sizes = torch.cat([staying, grown], 1)
        order = by_size(sizes)
        taking_part = torch.cat([position[:, odd], position[:, even]], 1).gather(1, order)
        ordered = torch.cat([x[:, odd], merged.to(x.dtype)], 1).gather(1, order[..., None].expand(-1, -1, x.shape[2]))
        return Relaxed(
            torch.cat([m[:, :p], sizes.gather(1, order), m[:, end:]], 1),
            torch.cat([position[:, :p], taking_part, position[:, end:]], 1),
            torch.cat([x[:, :p], ordered, x[:, end:]], 1),
        )


def by_size(size: Tensor) -> Tensor:
    """The order of falling sizes [B, K]; of equal ones the first comes first."""
    return size.argsort(dim=1, descending=True, stable=True)


def assignment(a: Tensor, b: Tensor, r: int, neighbours: int, temperature: float) -> Tensor:
    """The share of each token of ``a`` [B, A, D] that goes into each of ``b`` [B, K, D]: [B, A, K].

    ``r`` times one token in all is assigned, softly, to the most similar pairs among the ``neighbours`` nearest
    of each row; what a row has given away counts against it. Source: Lee & Hong, section 3.3.
    """
    similarity = normalize(a, dim=-1) @ normalize(b, dim=-1).transpose(1, 2) / temperature
    near, column = similarity.topk(min(neighbours, similarity.shape[2]), -1)
    total = torch.zeros_like(near)
    for _ in range(r):
        chosen = (near / temperature).flatten(1).softmax(1).view_as(near)
        total = total + chosen
        near = near + (1 - chosen.sum(-1, keepdim=True)).clamp(min=torch.finfo(torch.float32).eps).log()
    total = total / total.sum(-1, keepdim=True).clamp(min=1).detach()
    return torch.zeros_like(similarity).scatter(2, column, total)
