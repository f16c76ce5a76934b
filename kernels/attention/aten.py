"""Attention over tokens that have sizes, in ATen."""

import torch
from torch import Tensor

from mctf_compile.kernels.library import without_autocast, working_dtype

# Keeps the gradient finite where a token attends to nothing but itself.
POLICY_EPS = 1e-6


def importance(
    q: Tensor, k: Tensor, log_size: Tensor | None, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention weights are left unnormalised: dividing the output of N x D is cheaper than the map of N x N."""
    dtype = working_dtype(q.dtype)
    logits = (q @ k.transpose(-2, -1)).to(dtype) * scale
    if bias is not None:
        logits = logits + bias
    if log_size is not None:
        logits = logits + log_size[:, None, None, :]
    peak = logits.detach().amax(-1, keepdim=True)
    if bias is None:
        weights = torch.exp(logits - peak)
        norm = weights.sum(-1, keepdim=True).reciprocal()
    else:
        # A row that is masked out as a whole attends to nothing.
        weights = torch.exp(logits - peak.clamp(min=torch.finfo(dtype).min))
        total = weights.sum(-1, keepdim=True)
        norm = (total + (total == 0)).reciprocal()
    with without_autocast():
        received = norm.detach().flatten(1, 2).transpose(1, 2) @ weights.detach().flatten(1, 2)
    heads, queries = weights.shape[1:3]
    return received[:, 0] / (heads * queries), weights.to(q.dtype), norm


def attention(
    q: Tensor, k: Tensor, v: Tensor, log_size: Tensor | None, bias: Tensor | None, scale: float, dropout_p: float
) -> Tensor:
    """``torch.ops.mctf.attention`` in ATen: the sizes are a mask of ``scaled_dot_product_attention``."""
    mask = bias
    if log_size is not None:
        mask = log_size[:, None, None, :] if bias is None else bias + log_size[:, None, None, :]
    mask = None if mask is None else mask.to(q.dtype)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout_p, scale=scale)


def policy_attention(q: Tensor, k: Tensor, v: Tensor, policy: Tensor, scale: float) -> Tensor:
    """``torch.ops.mctf.policy_attention`` in ATen; weights are computed in float32 or wider."""
    dtype = working_dtype(q.dtype)
    logits = (q @ k.transpose(-2, -1)).to(dtype) * scale
    n = policy.shape[1]
    counts = policy.to(dtype)[:, None, None, :]
    itself = torch.eye(n, dtype=dtype, device=q.device)
    weights = torch.exp(logits - logits.amax(-1, keepdim=True)) * (counts + (1 - counts) * itself)
    weights = (weights + POLICY_EPS / n) / (weights.sum(-1, keepdim=True) + POLICY_EPS)
    return weights.to(v.dtype) @ v
