"""Attention over tokens that have sizes: softmax over a multiset, spelled out."""

import torch
from torch import Tensor


def probabilities(q: Tensor, k: Tensor, log_size: Tensor | None, bias: Tensor | None, scale: float) -> Tensor:
    """A = softmax(q kᵀ·scale + bias + log s) [B, H, Nq, Nk] in float64."""
    logits = torch.einsum("bhqd,bhkd->bhqk", q.double(), k.double()) * scale
    if bias is not None:
        logits = logits + bias.double()
    if log_size is not None:
        logits = logits + log_size.double()[:, None, None, :]
    return logits.softmax(-1)


def attention(q: Tensor, k: Tensor, v: Tensor, log_size: Tensor | None, bias: Tensor | None, scale: float) -> Tensor:
    """The reference of ``torch.ops.mctf.attention`` without dropout; see there."""
    return torch.einsum("bhqk,bhkd->bhqd", probabilities(q, k, log_size, bias, scale), v.double()).to(q.dtype)


def importance(q: Tensor, k: Tensor, log_size: Tensor | None, bias: Tensor | None, scale: float) -> Tensor:
    """The reference of the first result of ``torch.ops.mctf.importance``; see there."""
    return probabilities(q, k, log_size, bias, scale).mean((1, 2))


def policy_attention(q: Tensor, k: Tensor, v: Tensor, policy: Tensor, scale: float) -> Tensor:
    """The reference of ``torch.ops.mctf.policy_attention``; see there. Query by query."""
    out = torch.zeros_like(v, dtype=torch.float64)
    n = policy.shape[1]
    for b in range(q.shape[0]):
        for i in range(n):
            logits = torch.einsum("hd,hkd->hk", q[b, :, i].double(), k[b].double()) * scale
            counts = policy[b].double().clone()
            counts[i] = 1
            e = (logits - logits.amax(-1, keepdim=True)).exp() * counts
            out[b, :, i] = torch.einsum("hk,hkd->hd", (e + 1e-6 / n) / (e.sum(-1, keepdim=True) + 1e-6), v[b].double())
    return out.to(v.dtype)
