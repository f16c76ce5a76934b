"""``mctf::neighbours``: a convolution of tokens on their grid, channel by channel."""

from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from mctf_compile.kernels.library import autocast_dtype, composite


def _shapes(x: Tensor, weight: Tensor, lead: int, rows: int, columns: int) -> Tensor:
    inside = lead + rows * columns
    torch._check(inside <= x.shape[2], lambda: f"a grid of {rows}x{columns} tokens does not fit into {x.shape[2]}")
    recorded = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return x.new_empty(x.shape, dtype=autocast_dtype(x)).requires_grad_(recorded)


def _macs(x: Tensor, weight: Tensor, lead: int, rows: int, columns: int) -> int:
    return x.shape[0] * rows * columns * prod(weight.shape)


@composite("neighbours(Tensor x, Tensor weight, int lead, int rows, int columns) -> Tensor", _shapes, _macs)
def neighbours(x: Tensor, weight: Tensor, lead: int, rows: int, columns: int) -> Tensor:
    """Each token's channels as a weighted sum over the places around it, with zeros around the grid.

    Args:
        x: [B, H, N, D], of which the tokens from ``lead`` on fill a grid row by row; differentiable.
        weight: [H·D, 1, K, K] with an odd K; differentiable.
        lead: tokens before those of the grid.
        rows: of the grid.
        columns: of the grid.

    Returns:
        [B, H, N, D] in the dtype of ``x``, or in that of autocast; 0 at tokens outside the grid.

    Source: the depthwise convolution of values in linear attention of ShiftAddViT (You et al., NeurIPS 2023).
    """
    batch, heads, tokens, width = x.shape
    inside = x[:, :, lead : lead + rows * columns]
    grid = inside.transpose(2, 3).reshape(batch, heads * width, rows, columns)
    found = F.conv2d(grid, weight, padding=weight.shape[-1] // 2, groups=heads * width)
    found = found.reshape(batch, heads, width, rows * columns).transpose(2, 3)
    return F.pad(found, (0, 0, lead, tokens - lead - rows * columns))
