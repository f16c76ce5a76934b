"""``mctf::ahead``: one-step-ahead attention through the fusion map."""

from math import prod

import torch
from torch import Tensor

from mctf_compile.kernels.library import composite
from mctf_compile.kernels.pooling import aten as pooling
from mctf_compile.kernels.unmerge.op import unmerge


def _shapes(weights: Tensor, norm: Tensor, v: Tensor, *_: object) -> Tensor:
    return v.new_empty(v.shape)


def _macs(weights: Tensor, norm: Tensor, v: Tensor, index: Tensor, weight: Tensor | None, *_: object) -> int:
    """Those of A (Sᵀ V), or of A' V where A' is built."""
    rows, columns = (v.shape[2], v.shape[2]) if weight is None else weights.shape[2:]
    return prod((*v.shape[:2], rows, columns, v.shape[3]))


@composite(
    "ahead(Tensor weights, Tensor norm, Tensor v, Tensor index, Tensor? weight, Tensor keep, Tensor gone, Tensor into, "
    "float dropout_p) -> Tensor",
    _shapes,
    _macs,
)
def ahead(
    weights: Tensor,
    norm: Tensor,
    v: Tensor,
    index: Tensor,
    weight: Tensor | None,
    keep: Tensor,
    gone: Tensor,
    into: Tensor,
    dropout_p: float,
) -> Tensor:
    """A' V, where A' = R A S is the attention of the unfused tokens pooled to the fused ones.

    S sums the columns of each group and R pools the rows, so A' V = R (A (Sᵀ V)), and Sᵀ V repeats each
    fused value for its members: one attention pass, and A' is never built. Pooling by the maximum takes
    maxima over the rows of A S instead, which is no linear map: there A' is built.

    Args:
        weights: [B, H, N, N], A = weights * norm, from ``mctf::importance``; differentiable.
        norm: [B, H, N, 1]; differentiable.
        v: [B, H, M, D], values of the fused tokens; differentiable.
        index: int64 [B, N], the map, from ``mctf::group``.
        weight: [B, N], its pooling weights; None pools by the maximum.
        keep: int64 [B, M], the matching, as for ``mctf::group``.
        gone: int64 [B, r].
        into: int64 [B, r].
        dropout_p: dropout probability of the attention weights.

    Returns:
        [B, H, M, D] in the dtype of ``v``.

    Source: Lee et al., CVPR 2024, section 3.4, eq. 9-10.
    """
    if dropout_p:
        weights = torch.nn.functional.dropout(weights, dropout_p)
    if weight is None:
        columns = pooling.combine(weights * norm.to(weights.dtype), keep, gone, into, 3, "sum")
        return (pooling.combine(columns, keep, gone, into, 2, "amax") @ v).to(v.dtype)
    rows = (weights @ unmerge(v, index, 2)) * norm
    return pooling.pool(rows, weight, keep, gone, into, 2).to(v.dtype)
