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
    left = y.gather(dim, along(gone, y, dim))
    if how == "sum":
        return kept.scatter_add(dim, along(into, y, dim), left)
    return kept.scatter_reduce(dim, along(into, y, dim), left, how)


def group(raw: Tensor, size: Tensor, keep: Tensor, gone: Tensor, into: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    m = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
    index = torch.zeros_like(raw, dtype=torch.long).scatter(1, keep, m).scatter(1, gone, into)
    # Attention can underflow for every token of a group, which has a mean nevertheless.
    raw = raw.clamp(min=torch.finfo(raw.dtype).tiny)
    total = combine(raw, keep, gone, into, 1, "sum")
    return index, raw / total.gather(1, index), combine(size, keep, gone, into, 1, "sum")


def pool(x: Tensor, weight: Tensor | None, keep: Tensor, gone: Tensor, into: Tensor, dim: int) -> Tensor:
    if x.dtype is torch.bool:
        return x.gather(dim, along(keep, x, dim))
    if weight is None:
        return combine(x, keep, gone, into, dim, "amax")
    shape = [1] * x.dim()
    shape[0], shape[dim] = weight.shape
    # Weighted in the working dtype and rounded once.
    return combine(x * weight.reshape(shape), keep, gone, into, dim, "sum").to(x.dtype)
