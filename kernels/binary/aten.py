"""Linear attention on binary queries and keys, in ATen."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mctf_compile.kernels.library import without_autocast, working_dtype


def binary(x: Tensor) -> Tensor:
    """1 where a channel of [..., D] is above the mean of its vector, else 0; in float32 or wider.

    The gradient is that of clamp(x / ‖x‖, 0, 1) (straight-through).
    """
    x = x.to(working_dtype(x.dtype))
    soft = F.normalize(x, dim=-1).clamp(0, 1)
    hard = (x > x.mean(-1, keepdim=True)).to(x.dtype)
    return hard + (soft - soft.detach()) if torch.is_grad_enabled() else hard


def binary_attention(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None) -> Tensor:
    """``torch.ops.mctf.binary_attention``, and ``sized_binary_attention`` with sizes; all sums in float32 or wider."""
    with without_autocast():
        values = v.to(working_dtype(v.dtype))
        counted = values if size is None else values * size[:, None, :, None].to(values.dtype)
        read = binary(q) @ (binary(k).transpose(-2, -1) @ counted)
        return F.normalize(values / 2 + read / math.pi, dim=-1).to(v.dtype)


@torch.no_grad()
def binary_importance(q: Tensor, k: Tensor, size: Tensor | None) -> Tensor:
    """``torch.ops.mctf.binary_importance``, from sums over tokens, without the map."""
    with without_autocast():
        queries, keys = binary(q) / math.pi, binary(k)
        if size is not None:
            keys = keys * size[:, None, :, None].to(keys.dtype)
        own = 0.5 if q.shape[2] == k.shape[2] else 0.0
        total = queries @ keys.sum(2)[..., None] + own
        share = torch.where(total > 0, 1 / total, 0)
        received = keys @ (queries * share).sum(2)[..., None]
        if own:
            received = received + own * share
        return received.squeeze(-1).mean(1) / q.shape[2]
