"""ToMe: token merging by the similarity of keys (Bolya et al., ICLR 2023)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch

from mctf_compile.methods.base import Choice, Evidence, Merging, Need, Site, register_method
from mctf_compile.methods.combining import combined
from mctf_compile.narrowing import present
from mctf_compile.options.fields import one_of, option


@register_method
@dataclass(frozen=True)
class ToMe(Merging):
    """Matches keys, averaged over heads, from even to odd positions, after attention in every block.

    Options:
        pooling: ``size`` (the size-weighted mean), ``mean`` or ``mlerp``.
    """

    name: ClassVar[str] = "tome"
    source: ClassVar[str] = "Bolya et al., ICLR 2023, arXiv 2210.09461"
    site: ClassVar[Site] = Site.BETWEEN
    keeps_images_apart: ClassVar[bool] = True
    needs: ClassVar[Collection[Need]] = (Need.KEYS,)

    pooling: str = option("size", one_of("size", "mean", "mlerp"))

    def choose(self, evidence: Evidence, r: int) -> Choice:
        return combined(self.pooling, evidence, *match(evidence, present(evidence.keys), r))


def match(evidence: Evidence, metric: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bipartite soft matching of a metric [B, N, D] (section 3): (keep, gone, into)."""
    keep, gone, into = torch.ops.mctf.match(
        metric, None, evidence.size, r, evidence.lead, evidence.tail, 1.0, 0.0, 0.0, False, evidence.kind
    )
    return keep, gone, into
