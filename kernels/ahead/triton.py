"""One-step-ahead attention through the fusion map, in Triton: neither the map A nor its pooled form is in memory.

Rows of A V[index] first, each times its pooling weight; then the rows of a group are added up: the kept row
and, by a product with a 0/1 matrix, those that left into it. Every sum has a fixed order.
"""

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from mctf_compile.kernels.attention import triton as attention
from mctf_compile.kernels.attention import triton_backward as gradients
from mctf_compile.kernels.attention.triton import (
    LOG2_E,
    add_terms,
    expanded,
    forward_launch,
    load_lse,
    load_rows,
    optional_strides,
    padded,
    store_rows,
    through,
    token_major,
)
from mctf_compile.kernels.device import Launch, architecture, dot_precision


def supported(q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, dropout_p: float = 0.0) -> bool:
    """Whether the kernels take these operands: as for attention, and no pooling by the maximum."""
    return weight is not None and attention.supported(q, k, v, dropout_p)


@triton.jit(do_not_specialize=["n", "m"])
def _rows(
    q,
    k,
    v,
    log_size,
    bias,
    index,
    weight,
    lse,
    o,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_vd,
    stride_ob,
    stride_oh,
    stride_on,
    stride_od,
    stride_sb,
    stride_sn,
    stride_bb,
    stride_bh,
    stride_bq,
    stride_bk,
    stride_ib,
    stride_in,
    stride_wb,
    stride_wn,
    heads,
    n,
    m,
    scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    PD: tl.constexpr,
    PDV: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of queries of one head: rows of A V[index], each times its pooling weight."""
    tiles = tl.cdiv(n, BQ)
    plane = tl.program_id(0) // tiles
    b, h = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    queries = (tl.program_id(0) % tiles) * BQ + tl.arange(0, BQ)
    k += b * stride_kb + h * stride_kh
    v += b * stride_vb + h * stride_vh
    index += b * stride_ib
    if log_size is not None:
        log_size += b * stride_sb
    if bias is not None:
        bias += b * stride_bb + h * stride_bh
    q_tile = load_rows(q + b * stride_qb + h * stride_qh, queries, stride_qn, stride_qd, n, D, PD)  # [BQ, PD]
    level = load_lse(lse + plane.to(tl.int64) * n, queries, n)

    acc = tl.zeros([BQ, PDV], tl.float32)
    for start in range(0, n, BK):
        keys = start + tl.arange(0, BK)
        k_tile = load_rows(k, keys, stride_kn, stride_kd, n, D, PD)  # [BK, PD]
        v_tile = load_rows(v, through(index, keys, stride_in, n, m), stride_vn, stride_vd, m, DV, PDV)  # [BK, PDV]
        logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2_E)  # [BQ, BK]
        logits = add_terms(
            logits, queries[:, None], keys[None, :], log_size, stride_sn, bias, stride_bq, stride_bk, n, n
        )
        weights = tl.exp2(logits - level[:, None])
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)

    share = tl.load(weight + b * stride_wb + queries * stride_wn, mask=queries < n, other=0.0).to(tl.float32)
    acc = acc * share[:, None]
    store_rows(o + b * stride_ob + h * stride_oh, acc, queries, stride_on, stride_od, n, DV, PDV)


@triton.jit(do_not_specialize=["n", "m", "r"])
def _add_groups(
    x,
    y,
    keep,
    gone,
    into,
    stride_xb,
    stride_xh,
    stride_xn,
    stride_xd,
    stride_yb,
    stride_yh,
    stride_yn,
    stride_yd,
    stride_kb,
    stride_kn,
    stride_gb,
    stride_gn,
    stride_ib,
    stride_in,
    heads,
    n,
    m,
    r,
    DV: tl.constexpr,
    PDV: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
):
    """One tile of fused rows of one head: the sums of the rows of x in each group."""
    tiles = tl.cdiv(m, BM)
    plane = tl.program_id(0) // tiles
    b, h = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    fused = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)
    x += b * stride_xb + h * stride_xh
    kept = through(keep + b * stride_kb, fused, stride_kn, m, n)
    acc = load_rows(x, kept, stride_xn, stride_xd, n, DV, PDV).to(tl.float32)  # [BM, PDV]
    for start in range(0, r, BR):
        leaving = start + tl.arange(0, BR)
        x_tile = load_rows(x, through(gone + b * stride_gb, leaving, stride_gn, r, n), stride_xn, stride_xd, n, DV, PDV)
        group = through(into + b * stride_ib, leaving, stride_in, r, m)
        member = (fused[:, None] == group[None, :]).to(x_tile.dtype)  # [BM, BR]
        acc = tl.dot(member, x_tile, acc, input_precision="ieee")
    store_rows(y + b * stride_yb + h * stride_yh, acc, fused, stride_yn, stride_yd, m, DV, PDV)


def groups_launch(width: int, itemsize: int) -> Launch:
    """``rows`` of fused tokens, ``columns`` of those that left."""
    return Launch(32 if width > 128 or itemsize == 4 else 64, 16, 4, 1)


def add_groups(x: Tensor, keep: Tensor, gone: Tensor, into: Tensor) -> Tensor:
    """[B, H, M, D]: the rows of x [B, H, N, D] added up in each group of the matching, and rounded once."""
    batch, heads, n, width = x.shape
    m, r = keep.shape[1], gone.shape[1]
    y = token_major(x, heads, m, width)
    launch = groups_launch(padded(width), x.element_size())
    wrap_triton(_add_groups)[(batch * heads * triton.cdiv(m, launch.rows),)](
        x,
        y,
        keep,
        gone,
        into,
        *x.stride(),
        *y.stride(),
        *keep.stride(),
        *gone.stride(),
        *into.stride(),
        heads,
        n,
        m,
        r,
        width,
        padded(width),
        launch.rows,
        launch.columns,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return y


def ahead_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_size: Tensor | None,
    bias: Tensor | None,
    scale: float,
    lse: Tensor,
    index: Tensor,
    weight: Tensor,
    keep: Tensor,
    gone: Tensor,
    into: Tensor,
) -> tuple[Tensor, Tensor]:
    """A' V [B, H, M, D] as ``mctf::ahead`` gives it, and the rows [B, H, N, D] that it adds up, for the backward.

    Args:
        q: [B, H, N, D], what ``importance`` read, as are k, log_size, bias and scale.
        k: [B, H, N, D].
        v: [B, H, M, D], values of the fused tokens.
        log_size: [B, N], or None for sizes of one.
        bias: broadcastable to [B, H, N, N], or None.
        scale: usually D ** -0.5.
        lse: float32 [B, H, N], the log-sum-exp that ``importance`` gave.
        index: int64 [B, N], the map, as for ``mctf::ahead``; so are the next four.
        weight: [B, N].
        keep: int64 [B, M].
        gone: int64 [B, r].
        into: int64 [B, r].
    """
    batch, heads, n, d = q.shape
    m, dv = v.shape[2:]
    wide = expanded(bias, q, k)
    rows = token_major(v, heads, n, dv)
    pd, pdv = padded(d), padded(dv)
    arch = architecture(q.device)
    launch = forward_launch(max(pd, pdv), q.element_size(), arch)
    wrap_triton(_rows)[(batch * heads * triton.cdiv(n, launch.rows),)](
        q,
        k,
        v,
        log_size,
        wide,
        index,
        weight,
        lse,
        rows,
        *q.stride(),
        *k.stride(),
        *v.stride(),
        *rows.stride(),
        *optional_strides(log_size, 2),
        *optional_strides(wide, 4),
        *index.stride(),
        *weight.stride(),
        heads,
        n,
        m,
        scale,
        d,
        dv,
        pd,
        pdv,
        launch.rows,
        launch.columns,
        dot_precision(arch),
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return add_groups(rows, keep, gone, into), rows


def ahead_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_size: Tensor | None,
    bias: Tensor | None,
    scale: float,
    lse: Tensor,
    index: Tensor,
    weight: Tensor,
    keep: Tensor,
    gone: Tensor,
    into: Tensor,
    rows: Tensor,
    bias_gradient: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv, and, where asked for, dbias: through the weights A, and through v; the map is constant."""
    dq, dk, dv, dbias = gradients.backward(do, q, k, v, log_size, bias, scale, rows, lse, bias_gradient, index, weight)
    return dq, dk, add_groups(dv, keep, gone, into), dbias
