"""Sorting whose result every compiler and every runtime agrees on."""

import torch
from torch import Tensor


def descending(score: Tensor) -> Tensor:
    """The positions of ``score`` [B, N] by descending score, int64 [B, N]; of equal ones the lower comes first.

    A stable sort has no ONNX form, and other sorts leave equal scores in an order of their own. So what the first one
    gives is sorted again, by numbers of which no two are equal.
    """
    values, order = score.sort(1, descending=True)
    before = torch.cat([values[:, :1], values[:, :-1]], 1)
    n = score.shape[1]
    # What is no number equals another such.
    other = (values != before) & ~(values.isnan() & before.isnan())
    key = other.long().cumsum(1) * n + order
    return key.sort(1).values % n
