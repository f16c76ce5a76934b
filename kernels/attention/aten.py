"""Attention over tokens that have sizes, in ATen."""

import torch
from torch import Tensor

from mctf_compile.kernels.library import working_dtype


def probabilities(q: Tensor, k: Tensor, log_size: Tensor | None, bias: Tensor | None, scale: float) -> Tensor:
    """A [B, H, Nq, Nk] in the working dtype."""
    logits = ((q * scale) @ k.transpose(-2, -1)).to(working_dtype(q.dtype))
    if bias is not None:
        logits = logits + bias
    if log_size is not None:
        logits = logits + log_size[:, None, None, :]
    return logits.softmax(-1)


def importance(
    q: Tensor, k: Tensor, log_size: Tensor | None, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    a = probabilities(q, k, log_size, bias, scale)
    return a.detach().mean((1, 2)), a.to(q.dtype)


def attention(
    q: Tensor, k: Tensor, v: Tensor, log_size: Tensor | None, bias: Tensor | None, scale: float, dropout_p: float
) -> Tensor:
    mask = bias
    if log_size is not None:
        mask = log_size[:, None, None, :] if bias is None else bias + log_size[:, None, None, :]
    mask = None if mask is None else mask.to(q.dtype)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout_p, scale=scale)
