"""Codes to weights, one by one."""

import torch
from torch import Tensor


def powers(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The reference of ``torch.ops.mctf.powers``; see there."""
    weights = [0.0 if c == 0 else (1 if c > 0 else -1) * 2.0 ** (abs(c) - 15) for c in codes.flatten().tolist()]
    return torch.tensor(weights, dtype=dtype).view(codes.shape)
