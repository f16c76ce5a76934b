"""Unmerging, token by token."""

import torch
from torch import Tensor


def unmerge(y: Tensor, index: Tensor, dim: int) -> Tensor:
    """The reference of ``torch.ops.mctf.unmerge``; see there."""
    y = y.movedim(dim, 1)
    x = torch.stack([torch.stack([y[b, m] for m in index[b].tolist()]) for b in range(len(y))])
    return x.movedim(1, dim)
