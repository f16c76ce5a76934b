"""Attention over tokens that have sizes, in Triton: the N x N map is never in memory.

The logits of the kernels are base-2: l = (q kᵀ·scale + bias + log s)·log2 e, and so is the log-sum-exp that goes
from one to the next, log2 Σ exp2 l. A bias of -inf, or one so low that this factor makes it -inf (the lowest
float32 or bfloat16, which many models mask with), masks a key. A row that is masked out as a whole has a
log-sum-exp of -inf, and 0 as its output and gradients. Every sum is made by one program in a fixed order:
results are the same in every run.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from mctf_compile.kernels.device import Launch, architecture, dot_precision

LOG2_E = tl.constexpr(math.log2(math.e))


def supported(q: Tensor, k: Tensor, v: Tensor | None, dropout_p: float = 0.0) -> bool:
    """Whether the kernels take these operands: no dropout, no float64, heads of at most 256 channels.

    In float32 at most 128: the registers of a program do not hold more.
    """
    width = q.shape[3] if v is None else max(q.shape[3], v.shape[3])
    widest = {torch.bfloat16: 256, torch.float16: 256, torch.float32: 128}.get(q.dtype, 0)
    return q.dtype == k.dtype and (v is None or v.dtype == q.dtype) and width <= widest and not dropout_p


@triton.jit
def load_rows(base, rows, stride_row, stride_column, n, WIDTH: tl.constexpr, PADDED: tl.constexpr, first=0):
    """[len(rows), PADDED], of the columns from ``first`` on, 0 outside of [n, WIDTH]."""
    columns = first + tl.arange(0, PADDED)
    at = base + rows.to(tl.int64)[:, None] * stride_row + columns[None, :] * stride_column
    return tl.load(at, mask=(rows < n)[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def store_rows(base, tile, rows, stride_row, stride_column, n, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Store ``tile`` [len(rows), PADDED], in the dtype of memory, where it is inside of [n, WIDTH]."""
    columns = tl.arange(0, PADDED)
    at = base + rows.to(tl.int64)[:, None] * stride_row + columns[None, :] * stride_column
    tl.store(at, tile.to(base.dtype.element_ty), mask=(rows < n)[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def load_bias(bias, queries, keys, stride_query, stride_key, nq, nk):
    """Base-2 bias at ``queries`` x ``keys``, whichever of them is the column; 0 outside."""
    at = bias + queries.to(tl.int64) * stride_query + keys.to(tl.int64) * stride_key
    return tl.load(at, mask=(queries < nq) & (keys < nk), other=0.0).to(tl.float32) * LOG2_E


@triton.jit
def add_terms(logits, queries, keys, log_size, stride_size, bias, stride_bias_q, stride_bias_k, nq, nk):
    """Base-2 logits with the bias and the log-size of their keys, and -inf for keys beyond the last.

    ``queries`` and ``keys`` are a column and a row, or a row and a column: the logits may be transposed.
    """
    if bias is not None:
        logits += load_bias(bias, queries, keys, stride_bias_q, stride_bias_k, nq, nk)
    if log_size is not None:
        logits += tl.load(log_size + keys * stride_size, mask=keys < nk, other=0.0).to(tl.float32) * LOG2_E
    return tl.where(keys < nk, logits, float("-inf"))


@triton.jit
def load_lse(lse, queries, nq):
    """Log-sum-exp; inf in rows that are masked out or beyond the last: their weights are exp2(-inf) = 0."""
    row = tl.load(lse + queries, mask=queries < nq, other=float("inf"))
    return tl.where(row == float("-inf"), float("inf"), row)


@triton.jit
def through(index, rows, stride, n, m):
    """The rows of m fused tokens that hold ``rows``, m for rows beyond n; ``rows`` itself without a map."""
    if index is not None:
        rows = tl.load(index + rows * stride, mask=rows < n, other=m)
    return rows


@triton.jit(do_not_specialize=["nq", "nk"])
def _forward(
    q,
    k,
    v,
    log_size,
    bias,
    o,
    lse,
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
    heads,
    nq,
    nk,
    scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    PD: tl.constexpr,
    PDV: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of queries of one head: o, and the log-sum-exp; the latter alone where there is no v."""
    tiles = tl.cdiv(nq, BQ)
    plane = tl.program_id(0) // tiles
    b, h = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    queries = (tl.program_id(0) % tiles) * BQ + tl.arange(0, BQ)
    k += b * stride_kb + h * stride_kh
    if v is not None:
        v += b * stride_vb + h * stride_vh
    if log_size is not None:
        log_size += b * stride_sb
    if bias is not None:
        bias += b * stride_bb + h * stride_bh
    q_tile = load_rows(q + b * stride_qb + h * stride_qh, queries, stride_qn, stride_qd, nq, D, PD)  # [BQ, PD]

    peak = tl.full([BQ], float("-inf"), tl.float32)
    total = tl.zeros([BQ], tl.float32)
    acc = tl.zeros([BQ, PDV], tl.float32)
    for start in range(0, nk, BK):
        keys = start + tl.arange(0, BK)
        k_tile = load_rows(k, keys, stride_kn, stride_kd, nk, D, PD)  # [BK, PD]
        logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2_E)  # [BQ, BK]
        logits = add_terms(
            logits, queries[:, None], keys[None, :], log_size, stride_sn, bias, stride_bq, stride_bk, nq, nk
        )
        higher = tl.maximum(peak, tl.max(logits, 1))
        # Until a row has met a key that is not masked, its peak is -inf, and nothing must be subtracted.
        level = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(logits - level[:, None])
        shrink = tl.exp2(peak - level)
        total = total * shrink + tl.sum(weights, 1)
        if v is not None:
            v_tile = load_rows(v, keys, stride_vn, stride_vd, nk, DV, PDV)  # [BK, PDV]
            acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision=PRECISION)
        peak = higher

    row = plane.to(tl.int64) * nq
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    tl.store(lse + row + queries, tl.where(empty, float("-inf"), peak + tl.log2(total)), mask=queries < nq)
    if v is not None:
        acc = acc / total[:, None]
        store_rows(o + b * stride_ob + h * stride_oh, acc, queries, stride_on, stride_od, nq, DV, PDV)


@triton.jit(do_not_specialize=["nq", "nk"])
def _received(
    q,
    k,
    log_size,
    bias,
    lse,
    received,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_kd,
    stride_sb,
    stride_sn,
    stride_bb,
    stride_bh,
    stride_bq,
    stride_bk,
    heads,
    nq,
    nk,
    scale,
    D: tl.constexpr,
    PD: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of keys of one head: the attention that they receive from all queries, over heads and queries."""
    tiles = tl.cdiv(nk, BK)
    plane = tl.program_id(0) // tiles
    b, h = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    keys = (tl.program_id(0) % tiles) * BK + tl.arange(0, BK)
    q += b * stride_qb + h * stride_qh
    if log_size is not None:
        log_size += b * stride_sb
    if bias is not None:
        bias += b * stride_bb + h * stride_bh
    row = plane.to(tl.int64) * nq
    k_tile = load_rows(k + b * stride_kb + h * stride_kh, keys, stride_kn, stride_kd, nk, D, PD)  # [BK, PD]

    acc = tl.zeros([BK, BQ], tl.float32)
    for start in range(0, nq, BQ):
        queries = start + tl.arange(0, BQ)
        q_tile = load_rows(q, queries, stride_qn, stride_qd, nq, D, PD)  # [BQ, PD]
        logits = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * (scale * LOG2_E)  # [BK, BQ]
        logits = add_terms(
            logits, queries[None, :], keys[:, None], log_size, stride_sn, bias, stride_bq, stride_bk, nq, nk
        )
        acc += tl.exp2(logits - load_lse(lse + row, queries, nq)[None, :])
    tl.store(received + plane.to(tl.int64) * nk + keys, tl.sum(acc, 1) / (heads * nq), mask=keys < nk)


@triton.jit(do_not_specialize=["nq", "nk"])
def _received_at_once(
    q,
    k,
    log_size,
    bias,
    lse,
    received,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_kd,
    stride_sb,
    stride_sn,
    stride_bb,
    stride_bh,
    stride_bq,
    stride_bk,
    heads,
    nq,
    nk,
    scale,
    D: tl.constexpr,
    PD: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of queries, all keys of one head: log-sum-exp, and the attention given, over heads and queries."""
    tiles = tl.cdiv(nq, BQ)
    plane = tl.program_id(0) // tiles
    b, h = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    queries, keys = (tl.program_id(0) % tiles) * BQ + tl.arange(0, BQ), tl.arange(0, BK)
    if log_size is not None:
        log_size += b * stride_sb
    if bias is not None:
        bias += b * stride_bb + h * stride_bh
    q_tile = load_rows(q + b * stride_qb + h * stride_qh, queries, stride_qn, stride_qd, nq, D, PD)  # [BQ, PD]
    k_tile = load_rows(k + b * stride_kb + h * stride_kh, keys, stride_kn, stride_kd, nk, D, PD)  # [BK, PD]
    logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2_E)  # [BQ, BK]
    logits = add_terms(logits, queries[:, None], keys[None, :], log_size, stride_sn, bias, stride_bq, stride_bk, nq, nk)
    peak = tl.max(logits, 1)
    empty = peak == float("-inf")
    weights = tl.exp2(logits - tl.where(empty, 0.0, peak)[:, None])
    total = tl.where(empty, 1.0, tl.sum(weights, 1))
    tl.store(lse + plane.to(tl.int64) * nq + queries, peak + tl.log2(total), mask=queries < nq)
    given = tl.sum(weights * tl.where(queries < nq, 1 / (total * heads * nq), 0.0)[:, None], 0)
    tl.store(received + tl.program_id(0).to(tl.int64) * nk + keys, given, mask=keys < nk)


def padded(width: int) -> int:
    """The tile's width for up to 256 channels or keys; by comparisons alone, so that a symbolic one stays symbolic."""
    return next(size for size in (16, 32, 64, 128, 256) if width <= size)


def token_major(like: Tensor, heads: int, n: int, width: int) -> Tensor:
    """Uninitialised [B, H, N, D] laid out [B, N, H, D], so that joining the heads copies nothing."""
    return like.new_empty(like.shape[0], n, heads, width).transpose(1, 2)


def optional_strides(t: Tensor | None, dims: int) -> tuple[int, ...]:
    """The strides of ``t``, or as many zeros as it would have dimensions."""
    return (0,) * dims if t is None else t.stride()


def expanded(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """``bias`` as a view [B, H, Nq, Nk], with strides of zero where it is broadcast."""
    return None if bias is None else bias.expand(*q.shape[:3], k.shape[2])


def forward_launch(width: int, itemsize: int, arch: str) -> Launch:
    """For the padded ``width`` of a head and the bytes of a value: the largest tiles that no target spills."""
    if itemsize == 4:
        return Launch(32, 32 if width <= 64 else 16, 8, 1)
    if arch.startswith("gfx"):
        return Launch(64, 64, 4, 1) if width <= 64 else Launch(64 if width <= 128 else 32, 32, 4, 1)
    return Launch(64, 64, 4 if width <= 64 else 8, 2) if width <= 128 else Launch(64, 32, 8, 2)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor | None, log_size: Tensor | None, bias: Tensor | None, scale: float
) -> tuple[Tensor | None, Tensor]:
    """O [B, H, Nq, Dv] in the dtype of ``q``, and the base-2 log-sum-exp of its logits, float32 [B, H, Nq].

    The operands are those of ``mctf::attention``, of any strides. Without ``v`` there is no o.
    """
    batch, heads, nq, d = q.shape
    nk, dv = k.shape[2], d if v is None else v.shape[3]
    bias = expanded(bias, q, k)
    lse = q.new_empty(batch, heads, nq, dtype=torch.float32)
    o = None if v is None else token_major(q, heads, nq, dv)
    pd, pdv = padded(d), padded(dv)
    arch = architecture(q.device)
    launch = forward_launch(max(pd, pdv), q.element_size(), arch)
    wrap_triton(_forward)[(batch * heads * triton.cdiv(nq, launch.rows),)](
        q,
        k,
        v,
        log_size,
        bias,
        o,
        lse,
        *q.stride(),
        *k.stride(),
        *optional_strides(v, 4),
        *optional_strides(o, 4),
        *optional_strides(log_size, 2),
        *optional_strides(bias, 4),
        heads,
        nq,
        nk,
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
    return o, lse


def importance_launch(width: int, itemsize: int, nk: int, arch: str) -> tuple[Launch, bool]:
    """``rows`` of queries, ``columns`` of keys, and whether these are all keys: logits are then computed once."""
    if itemsize == 2 and width <= 128 and nk <= 256 and not arch.startswith("gfx"):
        # By comparisons alone, so that a symbolic nk stays symbolic.
        return Launch(32, next(side for side in (16, 32, 64, 128, 256) if nk <= side), 4 if width <= 64 else 8, 1), True
    side = 64 if itemsize == 2 and width <= 128 else 32 if itemsize == 2 or width <= 64 else 16
    return Launch(side, side, 4 if width <= 128 else 8, 1), False


def importance(
    q: Tensor, k: Tensor, log_size: Tensor | None, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The mean attention that each key receives, float32 [B, Nk], and the base-2 log-sum-exp, float32 [B, H, Nq].

    The operands are those of ``mctf::importance``, of any strides.
    """
    batch, heads, nq, d = q.shape
    nk, pd = k.shape[2], padded(d)
    arch = architecture(q.device)
    launch, at_once = importance_launch(pd, q.element_size(), nk, arch)
    if at_once:
        tiles = triton.cdiv(nq, launch.rows)
        lse = q.new_empty(batch, heads, nq, dtype=torch.float32)
    else:
        tiles = triton.cdiv(nk, launch.columns)
        _, lse = attention_forward(q, k, None, log_size, bias, scale)
    received = q.new_empty(batch, heads * tiles if at_once else heads, nk, dtype=torch.float32)
    wide = expanded(bias, q, k)
    wrap_triton(_received_at_once if at_once else _received)[(batch * heads * tiles,)](
        q,
        k,
        log_size,
        wide,
        lse,
        received,
        *q.stride(),
        *k.stride(),
        *optional_strides(log_size, 2),
        *optional_strides(wide, 4),
        heads,
        nq,
        nk,
        scale,
        d,
        pd,
        launch.rows,
        launch.columns,
        dot_precision(arch),
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return received.sum(1), lse
