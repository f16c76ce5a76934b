"""Grouping and pooling in ATen: the kept tokens are gathered, and only the r others are added to them."""

import torch
from torch import Tensor


def along(index: Tensor, like: Tensor, dim: int) -> Tensor:
    """``index`` [B, K] as a view that gathers along ``dim`` of ``like`` [B, ...]."""
    shape = [1] * like.dim()
    shape[0], shape[dim] = index.shape
    full = list(like.shape)
    full[0], full[dim] = index.shape
    return index.reshape(shape).expand(full)


def combine(y: Tensor, keep: Tensor, gone: Tensor, into: Tensor, dim: int, how: str) -> Tensor:
    """Gather the kept slices of ``y`` and add (``how="sum"``) or max the others into them."""
    kept = y.gather(dim, along(keep, y, dim))
    leaving = y.gather(dim, along(gone, y, dim))
    if how == "sum":
        return kept.scatter_add(dim, along(into, y, dim), leaving)
    return kept.scatter_reduce(dim, along(into, y, dim), leaving, how)


def index_of(keep: Tensor, gone: Tensor, into: Tensor) -> Tensor:
    """int64 [B, N]: the new position of every token."""
    m = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
    index = keep.new_zeros(keep.shape[0], keep.shape[1] + gone.shape[1])
    return index.scatter(1, keep, m).scatter(1, gone, into)


def group(raw: Tensor, size: Tensor, keep: Tensor, gone: Tensor, into: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.ops.mctf.group`` in ATen."""
    index = index_of(keep, gone, into)
    # Attention can underflow for every token of a group, which has a mean nevertheless.
    raw = raw.clamp(min=torch.finfo(raw.dtype).tiny)
    total = combine(raw, keep, gone, into, 1, "sum")
    return index, raw / total.gather(1, index), combine(size, keep, gone, into, 1, "sum")


def pool(x: Tensor, weight: Tensor | None, keep: Tensor, gone: Tensor, into: Tensor, dim: int) -> Tensor:
    """``torch.ops.mctf.pool`` in ATen; weighted in the dtype that x and weight promote to, and rounded once."""
    if weight is None:
        return combine(x, keep, gone, into, dim, "amax")
    shape = [1] * x.dim()
    shape[0], shape[dim] = weight.shape
    # Weighted in the working dtype and rounded once.
    return combine(x * weight.reshape(shape), keep, gone, into, dim, "sum").to(x.dtype)


def mlerp(x: Tensor, weight: Tensor, keep: Tensor, gone: Tensor, into: Tensor) -> Tensor:
    """``torch.ops.mctf.mlerp`` in ATen."""
    _, weight, _ = group(weight, weight, keep, gone, into)
    length = torch.linalg.vector_norm(pool(x, weight, keep, gone, into, 1), dim=-1)
    longest = combine(torch.linalg.vector_norm(x, dim=-1), keep, gone, into, 1, "amax")
    # A mean of length 0 has no direction, and stays 0 whatever the factor.
    return torch.where(length > 0, longest / torch.where(length > 0, length, 1.0), 1.0)
