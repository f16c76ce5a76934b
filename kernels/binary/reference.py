"""Linear attention on binary queries and keys, spelled out with its map."""

import math

import torch
from torch import Tensor


def binary(x: Tensor) -> Tensor:
    """Zeros and ones of [..., D] in float64: whether a channel is above the mean of its vector."""
    return (x.double() > x.double().mean(-1, keepdim=True)).double()


def coefficients(q: Tensor, k: Tensor, size: Tensor | None) -> Tensor:
    """I / 2 + Q Kᵀ diag(s) / π, [B, H, Nq, N] in float64; without I / 2 where queries are other tokens."""
    found: Tensor = torch.einsum("bhqd,bhkd->bhqk", binary(q), binary(k)) / math.pi
    if size is not None:
        found = found * size.double()[:, None, None, :]
    if q.shape[2] == k.shape[2]:
        found = found + torch.eye(k.shape[2], dtype=torch.float64) / 2
    return found


def binary_attention(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None) -> Tensor:
    """The reference of ``torch.ops.mctf.binary_attention`` and ``sized_binary_attention``; see there."""
    y: Tensor = torch.einsum("bhqk,bhkd->bhqd", coefficients(q, k, size), v.double())
    length: Tensor = y.norm(dim=-1, keepdim=True)
    return (y / length).to(v.dtype)


def binary_importance(q: Tensor, k: Tensor, size: Tensor | None) -> Tensor:
    """The reference of ``torch.ops.mctf.binary_importance``; see there."""
    weights = coefficients(q, k, size)
    total = weights.sum(-1, keepdim=True)
    received: Tensor = torch.where(total > 0, weights / total, 0).mean((1, 2))
    return received
