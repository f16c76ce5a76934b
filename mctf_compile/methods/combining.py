"""Ways to combine matched tokens that several methods offer."""

from __future__ import annotations

import torch
from torch import Tensor

from mctf_compile.methods.base import Choice, Combine, Evidence


def highest(score: Tensor, evidence: Evidence, r: int) -> Choice:
    """A choice that drops the ``r`` unprotected tokens with the lowest scores [B, N]."""
    count = score.shape[1] - evidence.lead - evidence.tail - r
    keep, gone = torch.ops.mctf.select(score, count, evidence.lead, evidence.tail)
    return Choice(keep, gone, None, combine=Combine.DROP)


def combined(how: str, evidence: Evidence, keep: Tensor, gone: Tensor, into: Tensor, sized: bool = False) -> Choice:
    """A choice that combines by ``how``: ``size`` (the size-weighted mean), ``mean`` (the plain one) or ``mlerp``.

    ``mlerp`` is the direction of a mean (weighted by size where ``sized``) with the largest norm of the group.
    Source: Kim et al., WACV 2024 (arXiv 2312.01026), section 3.3.
    """
    weight = evidence.size if how == "size" or sized else torch.ones_like(evidence.size)
    if how != "mlerp":
        return Choice(keep, gone, into, weight)
    return Choice(keep, gone, into, weight, combine=Combine.MLERP)
