"""A linear layer that has two weights, token by token."""

import torch
from torch import Tensor


def routed_linear(
    x: Tensor, second: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor, other_bias: Tensor | None
) -> Tensor:
    """The reference of ``torch.ops.mctf.routed_linear``; see there."""
    rows = []
    for token, takes_second in zip(x.reshape(-1, x.shape[-1]).double(), second.flatten().tolist()):
        w, b = (other, other_bias) if takes_second else (weight, bias)
        rows.append((w.double() * token).sum(1) + (0 if b is None else b.double()))
    return torch.stack(rows).view(*x.shape[:-1], -1).to(x.dtype)
