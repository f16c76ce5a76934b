"""A convolution of tokens on their grid, place by place."""

import torch
from torch import Tensor


def neighbours(x: Tensor, weight: Tensor, lead: int, rows: int, columns: int) -> Tensor:
    """The reference of ``torch.ops.mctf.neighbours``; see there."""
    found, reach = torch.zeros_like(x, dtype=torch.float64), weight.shape[-1] // 2
    kernel = weight.double().view(x.shape[1], x.shape[3], *weight.shape[2:])
    for row in range(rows):
        for column in range(columns):
            for i in range(max(row - reach, 0), min(row + reach + 1, rows)):
                for j in range(max(column - reach, 0), min(column + reach + 1, columns)):
                    weights = kernel[:, :, i - row + reach, j - column + reach]
                    found[:, :, lead + row * columns + column] += weights * x[:, :, lead + i * columns + j].double()
    return found.to(x.dtype)
