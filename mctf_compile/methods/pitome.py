"""PiToMe: merge the tokens that many others resemble, and protect the rest (Tran et al., NeurIPS 2024)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from mctf_compile.methods.base import Choice, Evidence, Merging, Need, Site, register_method
from mctf_compile.methods.combining import combined
from mctf_compile.options.fields import option, share

# Less than any cosine: the similarity of tokens that must not be combined.
APART = -2.0


@register_method
@dataclass(frozen=True)
class PiToMe(Merging):
    """Splits the 2r tokens of the highest energy in turn, and each of one half goes into the nearest of the other.

    Energy is the mean similarity of a token's key to those of all others, where one below a margin counts little.

    Options:
        margin: the similarity from which tokens count as alike, in the first block; it falls linearly to 0.
        alpha: how much similarities below the margin count: none counts less than -alpha.
    """

    name: ClassVar[str] = "pitome"
    source: ClassVar[str] = "Tran et al., NeurIPS 2024, arXiv 2405.16148"
    site: ClassVar[Site] = Site.BETWEEN

    margin: float = option(0.9, share)
    alpha: float = option(1.0, share)

    @property
    def needs(self) -> Collection[Need]:  # type: ignore[override]  # it depends on an option
        return () if self.in_branch else (Need.KEYS,)

    def choose(self, evidence: Evidence, r: int) -> Choice:
        alike = similarity(evidence)
        margin = self.margin * (1 - evidence.index / evidence.depth)
        low = self.alpha * ((alike - margin).exp() - 1)
        # What is apart from a token adds as much to it as to the others: their order is that of the energy.
        energy = torch.where(alike >= margin, alike, low).mean(-1)
        if evidence.padding is not None:
            energy = padding_first(energy, evidence.padding, evidence.lead, evidence.tail)

        ranked, rest = torch.ops.mctf.select(energy, 2 * r, evidence.lead, evidence.tail)
        front, candidates, back = ranked.tensor_split((evidence.lead, ranked.shape[1] - evidence.tail), dim=1)
        gone, receive = candidates[:, ::2], candidates[:, 1::2]
        pairs = alike.gather(1, gone[:, :, None].expand(-1, -1, alike.shape[1]))
        pairs = pairs.gather(2, receive[:, None].expand(-1, gone.shape[1], -1))  # [B, r, r]
        # One column more, which is never the largest, so that there is one where r is 0.
        into = pad(pairs, (0, 1), value=float("-inf")).argmax(-1) + evidence.lead
        return combined("size", evidence, torch.cat([front, receive, rest, back], 1), gone, into)


def similarity(evidence: Evidence) -> Tensor:
    """The cosines of all pairs of keys, [B, N, N]; ``APART`` for a token with itself, and for padding with others."""
    unit = normalize(evidence.metric.detach().to(evidence.size.dtype), dim=-1)
    cosine = unit @ unit.transpose(1, 2)
    apart = torch.eye(cosine.shape[1], dtype=torch.bool, device=cosine.device)
    if evidence.padding is not None:
        apart = apart | (evidence.padding[:, :, None] != evidence.padding[:, None])
    return cosine.masked_fill(apart, APART)


def padding_first(energy: Tensor, padding: Tensor, lead: int, tail: int) -> Tensor:
    """Energies [B, N] by which padding is merged first, which costs nothing, and always with padding.

    The candidates are split in turn, so an even number of them is padding: an odd one comes last. Beside a single
    other token it stays, and that one comes last.
    """
    n = padding.shape[1]
    free = pad(padding[:, lead : n - tail], (lead, tail))
    rank = free.cumsum(1)
    count = rank[:, -1:]
    left_over = free & (rank == count) & (count % 2 == 1) & (count < n - lead - tail - 1)
    return energy.masked_fill(free, float("inf")).masked_fill(left_over, float("-inf"))
