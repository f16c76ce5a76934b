"""``mctf::binary_attention`` and what belongs to it: attention in which queries and keys are zeros and ones."""

from math import prod

import torch
from torch import Tensor

from mctf_compile.kernels.binary import aten
from mctf_compile.kernels.library import composite, working_dtype


def _shapes(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None = None) -> Tensor:
    torch._check(q.shape == k.shape, lambda: f"binary attention of queries {q.shape} and keys {k.shape}")
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return v.new_empty(v.shape).requires_grad_(recorded)


def _macs(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None = None) -> int:
    """Those of Kᵀ V and of its product with Q."""
    return 2 * prod(q.shape[:-1]) * q.shape[-1] * v.shape[-1]


@composite("binary_attention(Tensor query, Tensor key, Tensor value) -> Tensor", _shapes, _macs)
def binary_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The unit vectors of y = v / 2 + Q (Kᵀ V) / π, Q and K being 1 where q and k are above the mean of their vector.

    Elsewhere they are 0. It is linear in the number of tokens. A vector is the D channels of one token and head.

    Args:
        query: q [..., N, D], floating; its gradient is that of clamp(q / ‖q‖, 0, 1) (straight-through).
        key: k [..., N, D], likewise.
        value: v [..., N, Dv], differentiable.

    Returns:
        [..., N, Dv] in the dtype of ``value``, of norm 1; 0 where y is.

    Source: You et al., ShiftAddViT, NeurIPS 2023 (arXiv 2306.06446); the angular kernel is that of Castling-ViT (You
    et al., CVPR 2023).
    """
    return aten.binary_attention(query, key, value, None)


@composite("sized_binary_attention(Tensor q, Tensor k, Tensor v, Tensor size) -> Tensor", _shapes, _macs)
def sized_binary_attention(q: Tensor, k: Tensor, v: Tensor, size: Tensor) -> Tensor:
    """``mctf::binary_attention`` in which key j occurs s_j times: y = v / 2 + Q (Kᵀ diag(s) V) / π.

    Args:
        q: [B, H, N, D].
        k: [B, H, N, D].
        v: [B, H, N, Dv].
        size: [B, N] sizes s.

    Returns: as ``mctf::binary_attention``.
    """
    return aten.binary_attention(q, k, v, size)


def _importance_shapes(q: Tensor, k: Tensor, size: Tensor | None) -> Tensor:
    return q.new_empty(k.shape[0], k.shape[2], dtype=working_dtype(q.dtype))


def _importance_macs(q: Tensor, k: Tensor, size: Tensor | None) -> int:
    """Those of the sums over keys, and of the sums over queries with keys."""
    return prod(q.shape) + prod(k.shape)


@composite("binary_importance(Tensor q, Tensor k, Tensor? size) -> Tensor", _importance_shapes, _importance_macs)
def binary_importance(q: Tensor, k: Tensor, size: Tensor | None) -> Tensor:
    """The mean attention that each token receives in ``mctf::binary_attention``, before any value is computed.

    The map is A = diag(1 / Z) (I / 2 + Q Kᵀ diag(s) / π), with rows that sum to 1.

    Args:
        q: [B, H, Nq, D]; where Nq is not N, queries are other tokens, and I / 2 is left out.
        k: [B, H, N, D].
        size: [B, N] sizes s, or None for sizes of one.

    Returns:
        [B, N], mean over heads and queries of A, of which a row without keys is 0; a constant for autograd; float32 or
        wider.
    """
    return aten.binary_importance(q, k, size)
