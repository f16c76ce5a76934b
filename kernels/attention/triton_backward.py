"""The gradients of attention over tokens that have sizes, in Triton, from the log-sum-exp that the forward saved.

dq by tiles of queries, dk and dv by tiles of keys, dbias by tiles of the bias. Logits are base-2, as in the forward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from mctf_compile.kernels.attention.triton import (
    LOG2_E,
    add_terms,
    expanded,
    load_lse,
    load_rows,
    optional_strides,
    padded,
    store_rows,
    through,
    token_major,
)
from mctf_compile.kernels.device import Launch, architecture, dot_precision


@triton.jit
def load_gradient(
    do,
    queries,
    index,
    weight,
    stride_in,
    stride_wn,
    stride_on,
    stride_od,
    nq,
    mq,
    DV: tl.constexpr,
    PDV: tl.constexpr,
    first=0,
):
    """The gradient of the rows at ``queries``: do itself, or that of their group, before and after its weight."""
    whole = load_rows(do, through(index, queries, stride_in, nq, mq), stride_on, stride_od, mq, DV, PDV, first)
    part = whole
    if index is not None:
        share = tl.load(weight + queries * stride_wn, mask=queries < nq, other=0.0).to(tl.float32)
        part = (whole.to(tl.float32) * share[:, None]).to(whole.dtype)
    return whole, part


@triton.jit(do_not_specialize=["nq", "nk", "m"])
def _backward_queries(
    q,
    k,
    v,
    log_size,
    bias,
    index,
    weight,
    o,
    do,
    lse,
    delta,
    dq,
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
    stride_gb,
    stride_gh,
    stride_gn,
    stride_gd,
    stride_db,
    stride_dh,
    stride_dn,
    stride_dd,
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
    nq,
    nk,
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
    """One tile of queries of one head: dq, and delta = Σ do·o, which the other kernels of the backward need."""
    tiles = tl.cdiv(nq, BQ)
    plane = tl.program_id(0) // tiles
    b, h = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    queries = (tl.program_id(0) % tiles) * BQ + tl.arange(0, BQ)
    k += b * stride_kb + h * stride_kh
    v += b * stride_vb + h * stride_vh
    if log_size is not None:
        log_size += b * stride_sb
    if bias is not None:
        bias += b * stride_bb + h * stride_bh
    if index is not None:
        index += b * stride_ib
        weight += b * stride_wb
    row = plane.to(tl.int64) * nq
    q_tile = load_rows(q + b * stride_qb + h * stride_qh, queries, stride_qn, stride_qd, nq, D, PD)  # [BQ, PD]
    o_tile = load_rows(o + b * stride_ob + h * stride_oh, queries, stride_on, stride_od, nq, DV, PDV)  # [BQ, PDV]
    whole, do_tile = load_gradient(
        do + b * stride_gb + h * stride_gh,
        queries,
        index,
        weight,
        stride_in,
        stride_wn,
        stride_gn,
        stride_gd,
        nq,
        nq if index is None else m,
        DV,
        PDV,
    )  # [BQ, PDV]
    deltas = tl.sum(whole.to(tl.float32) * o_tile.to(tl.float32), 1)
    tl.store(delta + row + queries, deltas, mask=queries < nq)
    level = load_lse(lse + row, queries, nq)

    acc = tl.zeros([BQ, PD], tl.float32)
    for start in range(0, nk, BK):
        keys = start + tl.arange(0, BK)
        k_tile = load_rows(k, keys, stride_kn, stride_kd, nk, D, PD)  # [BK, PD]
        v_tile = load_rows(
            v, through(index, keys, stride_in, nk, m), stride_vn, stride_vd, nk if index is None else m, DV, PDV
        )  # [BK, PDV]
        logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2_E)  # [BQ, BK]
        logits = add_terms(
            logits, queries[:, None], keys[None, :], log_size, stride_sn, bias, stride_bq, stride_bk, nq, nk
        )
        slope = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)  # [BQ, BK]
        slope = tl.exp2(logits - level[:, None]) * (slope - deltas[:, None])
        acc = tl.dot(slope.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
    store_rows(dq + b * stride_db + h * stride_dh, acc * scale, queries, stride_dn, stride_dd, nq, D, PD)


@triton.jit(do_not_specialize=["nq", "nk", "m"])
def _backward_keys(
    q,
    k,
    v,
    log_size,
    bias,
    index,
    weight,
    do,
    lse,
    delta,
    dk,
    dv,
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
    stride_gb,
    stride_gh,
    stride_gn,
    stride_gd,
    stride_db,
    stride_dh,
    stride_dn,
    stride_dd,
    stride_eb,
    stride_eh,
    stride_en,
    stride_ed,
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
    nq,
    nk,
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
    """One tile of keys of one head: dk, and dv before the keys of a group are added up."""
    tiles = tl.cdiv(nk, BK)
    plane = tl.program_id(0) // tiles
    b, h = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    keys = (tl.program_id(0) % tiles) * BK + tl.arange(0, BK)
    q += b * stride_qb + h * stride_qh
    do += b * stride_gb + h * stride_gh
    if log_size is not None:
        log_size += b * stride_sb
    if bias is not None:
        bias += b * stride_bb + h * stride_bh
    if index is not None:
        index += b * stride_ib
        weight += b * stride_wb
    row = plane.to(tl.int64) * nq
    k_tile = load_rows(k + b * stride_kb + h * stride_kh, keys, stride_kn, stride_kd, nk, D, PD)  # [BK, PD]
    v_tile = load_rows(
        v + b * stride_vb + h * stride_vh,
        through(index, keys, stride_in, nk, m),
        stride_vn,
        stride_vd,
        nk if index is None else m,
        DV,
        PDV,
    )  # [BK, PDV]

    dk_acc = tl.zeros([BK, PD], tl.float32)
    dv_acc = tl.zeros([BK, PDV], tl.float32)
    for start in range(0, nq, BQ):
        queries = start + tl.arange(0, BQ)
        q_tile = load_rows(q, queries, stride_qn, stride_qd, nq, D, PD)  # [BQ, PD]
        _, do_tile = load_gradient(
            do,
            queries,
            index,
            weight,
            stride_in,
            stride_wn,
            stride_gn,
            stride_gd,
            nq,
            nq if index is None else m,
            DV,
            PDV,
        )  # [BQ, PDV]
        logits = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * (scale * LOG2_E)  # [BK, BQ]
        logits = add_terms(
            logits, queries[None, :], keys[:, None], log_size, stride_sn, bias, stride_bq, stride_bk, nq, nk
        )
        weights = tl.exp2(logits - load_lse(lse + row, queries, nq)[None, :])
        dv_acc = tl.dot(weights.to(do_tile.dtype), do_tile, dv_acc, input_precision=PRECISION)
        deltas = tl.load(delta + row + queries, mask=queries < nq, other=0.0)
        slope = weights * (tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION) - deltas[None, :])
        dk_acc = tl.dot(slope.to(q_tile.dtype), q_tile, dk_acc, input_precision=PRECISION)
    store_rows(dk + b * stride_db + h * stride_dh, dk_acc * scale, keys, stride_dn, stride_dd, nk, D, PD)
    store_rows(dv + b * stride_eb + h * stride_eh, dv_acc, keys, stride_en, stride_ed, nk, DV, PDV)


@triton.jit(do_not_specialize=["nq", "nk", "m"])
def _backward_bias(
    q,
    k,
    v,
    log_size,
    bias,
    index,
    weight,
    do,
    lse,
    delta,
    dbias,
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
    stride_gb,
    stride_gh,
    stride_gn,
    stride_gd,
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
    nq,
    nk,
    m,
    scale,
    bias_heads,
    sum_batch,
    sum_heads,
    D: tl.constexpr,
    DV: tl.constexpr,
    PART: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    SUM_QUERIES: tl.constexpr,
):
    """One tile of dbias [., ., Nq or 1, Nk], over the images, heads and queries that the bias is broadcast to."""
    key_tiles = tl.cdiv(nk, BK)
    query_tiles = 1 if SUM_QUERIES else tl.cdiv(nq, BQ)
    steps = tl.cdiv(nq, BQ) if SUM_QUERIES else 1
    plane = tl.program_id(0) // (key_tiles * query_tiles)
    tile = tl.program_id(0) % (key_tiles * query_tiles)
    keys = (tile % key_tiles) * BK + tl.arange(0, BK)
    own = tl.arange(0, BQ)
    first_batch, first_head = plane // bias_heads, plane % bias_heads

    acc = tl.zeros([BQ, BK], tl.float32)
    for step in range(0, sum_batch * sum_heads * steps):
        image, head = first_batch + step // (sum_heads * steps), first_head + step // steps % sum_heads
        b, h = image.to(tl.int64), head.to(tl.int64)
        queries = (tile // key_tiles + step % steps) * BQ + own
        row = (b * heads + h) * nq
        at_index, at_weight, at_size, at_bias = index, weight, log_size, bias + b * stride_bb + h * stride_bh
        if index is not None:
            at_index += b * stride_ib
            at_weight += b * stride_wb
        if log_size is not None:
            at_size += b * stride_sb
        # By parts of the channels: nothing else needs the rows, and all of them do not fit the registers.
        logits = tl.zeros([BQ, BK], tl.float32)
        for first in range(0, D, PART):
            q_tile = load_rows(
                q + b * stride_qb + h * stride_qh, queries, stride_qn, stride_qd, nq, D, PART, first
            )  # [BQ, PART]
            k_tile = load_rows(
                k + b * stride_kb + h * stride_kh, keys, stride_kn, stride_kd, nk, D, PART, first
            )  # [BK, PART]
            logits = tl.dot(q_tile, tl.trans(k_tile), logits, input_precision=PRECISION)
        slope = tl.zeros([BQ, BK], tl.float32)
        for first in range(0, DV, PART):
            v_tile = load_rows(
                v + b * stride_vb + h * stride_vh,
                through(at_index, keys, stride_in, nk, m),
                stride_vn,
                stride_vd,
                nk if index is None else m,
                DV,
                PART,
                first,
            )  # [BK, PART]
            _, do_tile = load_gradient(
                do + b * stride_gb + h * stride_gh,
                queries,
                at_index,
                at_weight,
                stride_in,
                stride_wn,
                stride_gn,
                stride_gd,
                nq,
                nq if index is None else m,
                DV,
                PART,
                first,
            )  # [BQ, PART]
            slope = tl.dot(do_tile, tl.trans(v_tile), slope, input_precision=PRECISION)
        logits *= scale * LOG2_E
        logits = add_terms(
            logits, queries[:, None], keys[None, :], at_size, stride_sn, at_bias, stride_bq, stride_bk, nq, nk
        )
        deltas = tl.load(delta + row + queries, mask=queries < nq, other=0.0)
        acc += tl.exp2(logits - load_lse(lse + row, queries, nq)[:, None]) * (slope - deltas[:, None])

    if SUM_QUERIES:
        at = dbias + plane.to(tl.int64) * nk + keys
        tl.store(at, tl.sum(acc, 0).to(dbias.dtype.element_ty), mask=keys < nk)
    else:
        queries = (tile // key_tiles) * BQ + own
        at = dbias + (plane.to(tl.int64) * nq + queries[:, None]) * nk + keys[None, :]
        tl.store(at, acc.to(dbias.dtype.element_ty), mask=(queries < nq)[:, None] & (keys < nk)[None, :])


def backward_launch(width: int, itemsize: int, arch: str) -> tuple[Launch, Launch]:
    """As ``forward_launch``, for dq and dk, whose ``rows`` are the program's own, and for dbias."""
    rare = Launch(32, 32, 8 if itemsize == 2 and 64 < width <= 128 else 4, 1)
    if itemsize == 4:
        return Launch(32 if width <= 64 and arch.startswith("sm") else 16, 16, 8, 1), rare
    if arch.startswith("gfx"):
        return (Launch(64 if width <= 64 else 32, 32, 4, 1) if width <= 128 else Launch(16, 16, 4, 1)), rare
    if width > 64:
        return Launch(64 if width <= 128 else 32, 32, 8, 2), rare
    return Launch(64, 32 if arch.startswith(("sm_7", "sm_8")) else 64, 4, 1), rare


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_size: Tensor | None,
    bias: Tensor | None,
    scale: float,
    o: Tensor,
    lse: Tensor,
    bias_gradient: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv, and, where asked for, dbias in the shape of ``bias``; each in the dtype of its operand."""
    return backward(do, q, k, v, log_size, bias, scale, o, lse, bias_gradient, None, None)


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_size: Tensor | None,
    bias: Tensor | None,
    scale: float,
    o: Tensor,
    lse: Tensor,
    bias_gradient: bool,
    index: Tensor | None,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of ``attention_forward``, or of it through a fusion map.

    Through a map, v and do have the m rows of the fused tokens: query i has the gradient do[index_i] weight_i,
    o holds the rows weighted so, and dv has one row for each key, to be added up by the map.
    """
    batch, heads, nq, d = q.shape
    nk, m, dv = k.shape[2], v.shape[2], v.shape[3]
    wide = expanded(bias, q, k)
    delta = torch.empty_like(lse)
    grads = token_major(q, heads, nq, d), token_major(q, heads, nk, d), token_major(q, heads, nk, dv)
    pd, pdv = padded(d), padded(dv)
    arch = architecture(q.device)
    launch, rare = backward_launch(max(pd, pdv), q.element_size(), arch)
    precision = dot_precision(arch)
    terms = (
        *optional_strides(log_size, 2),
        *optional_strides(wide, 4),
        *optional_strides(index, 2),
        *optional_strides(weight, 2),
        heads,
        nq,
        nk,
        m,
        scale,
    )
    operands = q, k, v, log_size, wide, index, weight
    strides = *q.stride(), *k.stride(), *v.stride()
    wrap_triton(_backward_queries)[(batch * heads * triton.cdiv(nq, launch.rows),)](
        *operands,
        o,
        do,
        lse,
        delta,
        grads[0],
        *strides,
        *o.stride(),
        *do.stride(),
        *grads[0].stride(),
        *terms,
        d,
        dv,
        pd,
        pdv,
        launch.rows,
        launch.columns,
        precision,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    wrap_triton(_backward_keys)[(batch * heads * triton.cdiv(nk, launch.rows),)](
        *operands,
        do,
        lse,
        delta,
        *grads[1:],
        *strides,
        *do.stride(),
        *grads[1].stride(),
        *grads[2].stride(),
        *terms,
        d,
        dv,
        pd,
        pdv,
        launch.columns,
        launch.rows,
        precision,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    if not bias_gradient or bias is None:
        return *grads, None
    shape = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    if shape[3] != nk:
        # Added to all logits of a row alike, a bias changes no weight.
        return *grads, torch.zeros_like(bias)
    dbias = bias.new_empty(shape)
    sum_queries = shape[2] != nq
    query_tiles = 1 if sum_queries else triton.cdiv(nq, rare.rows)
    wrap_triton(_backward_bias)[(shape[0] * shape[1] * query_tiles * triton.cdiv(nk, rare.columns),)](
        *operands,
        do,
        lse,
        delta,
        dbias,
        *strides,
        *do.stride(),
        *terms,
        shape[1],
        batch // shape[0],
        heads // shape[1],
        d,
        dv,
        min(pd, pdv, 32),
        rare.rows,
        rare.columns,
        precision,
        sum_queries,
        num_warps=rare.warps,
        num_stages=rare.stages,
    )
    return *grads, dbias.reshape(bias.shape)
