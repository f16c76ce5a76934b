"""Ways to combine matched tokens that several methods offer."""

from __future__ import annotations

import torch
from torch import Tensor

from mctf_compile.methods.base import Choice, Combine, Evidence

SIMILARITY = (1.0, 0.0, 0.0)


def match(
    evidence: Evidence,
    metric: Tensor,
    r: int,
    taus: tuple[float, float, float] = SIMILARITY,
    both: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Bipartite matching of a metric [B, N, D]: (keep, gone, into), as of ``mctf::match``.

    ``taus``: the temperatures of similarity, informativeness and size. Tokens leave from even positions, with ``both``
    from odd ones too; where one token of each tile receives the others, from all other places.
    """
    tiles, a, kind = evidence.tiles, evidence.importance, evidence.kind
    if tiles is None:
        keep, gone, into = torch.ops.mctf.match(
            metric, a, evidence.size, r, evidence.lead, evidence.tail, *taus, both, kind
        )
    else:
        grid = (tiles.height, tiles.width, tiles.tile, tiles.seed)
        keep, gone, into = torch.ops.mctf.match_tiles(
            metric, a, evidence.size, r, evidence.lead, evidence.tail, *grid, taus, kind
        )
    return keep, gone, into


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
