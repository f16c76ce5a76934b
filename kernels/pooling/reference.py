"""Grouping and pooling with explicit assignment matrices."""

import torch
from torch import Tensor


def assignment(keep: Tensor, gone: Tensor, into: Tensor) -> Tensor:
    """The 0/1 matrix G [B, M, N]: new token m holds old token n."""
    batch, m = keep.shape
    g = torch.zeros(batch, m, m + gone.shape[1], dtype=torch.float64)
    for b in range(batch):
        for new, old in enumerate(keep[b]):
            g[b, new, old] = 1
        for old, new in zip(gone[b], into[b]):
            g[b, new, old] = 1
    return g


def group(raw: Tensor, size: Tensor, keep: Tensor, gone: Tensor, into: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The reference of ``torch.ops.mctf.group``; see there."""
    g = assignment(keep, gone, into)
    index = g.argmax(1)
    floored = raw.double().clamp(min=torch.finfo(raw.dtype).tiny)
    total = torch.einsum("bmn,bn->bm", g, floored)
    weight = floored / torch.einsum("bmn,bm->bn", g, total)
    return index, weight.to(raw.dtype), torch.einsum("bmn,bn->bm", g, size.double()).to(size.dtype)


def pool(x: Tensor, weight: Tensor | None, keep: Tensor, gone: Tensor, into: Tensor, dim: int) -> Tensor:
    """The reference of ``torch.ops.mctf.pool``; see there."""
    g = assignment(keep, gone, into)
    x = x.movedim(dim, 1)
    if weight is None:
        members = (g > 0).reshape(*g.shape, *[1] * (x.dim() - 2))
        y = x[:, None].masked_fill(~members, float("-inf")).amax(2)
    else:
        y = torch.einsum("bmn,bn...->bm...", g * weight.double()[:, None], x.double()).to(x.dtype)
    return y.movedim(1, dim)


def keep(x: Tensor, keep: Tensor, dim: int) -> Tensor:
    """The reference of ``torch.ops.mctf.keep``; see there."""
    return torch.stack([row[index] for row, index in zip(x.movedim(dim, 1), keep)]).movedim(1, dim)


def mlerp(x: Tensor, weight: Tensor, keep: Tensor, gone: Tensor, into: Tensor) -> Tensor:
    """The reference of ``torch.ops.mctf.mlerp``; see there. Group by group."""
    g = assignment(keep, gone, into) > 0
    factor = torch.ones(g.shape[:2], dtype=torch.float64)
    for b in range(g.shape[0]):
        for m in range(g.shape[1]):
            members, w = x[b, g[b, m]].double(), weight[b, g[b, m]].double()
            mean = (members * w[:, None]).sum(0) / w.sum()
            if mean.norm() > 0:
                factor[b, m] = members.norm(dim=1).max() / mean.norm()
    return factor.to(x.dtype)
