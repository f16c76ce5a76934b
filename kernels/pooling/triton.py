"""Grouping, pooling and its gradient in Triton.

Every new token looks for its members, in their order, so that sums need no atomics and come out the same every time.
Only the rows of members are read.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

FLOATING = (torch.float32, torch.bfloat16, torch.float16)
# Matched tokens that are looked through at a time.
LOOK = 16


def supported(x: Tensor, weight: Tensor | None) -> bool:
    """Whether ``pool`` and ``pool_backward`` take ``x``: weighted sums of at most 32 bits, no maxima, no masks."""
    return weight is not None and x.dtype in FLOATING and weight.dtype in FLOATING


def supported_group(raw: Tensor, size: Tensor) -> bool:
    """Whether ``group`` takes these operands: weights and sizes of at most 32 bits."""
    return raw.dtype in FLOATING and size.dtype in FLOATING


def tile(q: int) -> tuple[int, int]:
    """Tokens and channels of one program, for ``q`` channels. By comparisons alone: a symbolic ``q`` stays symbolic."""
    channels = next((size for size in (1, 16, 64) if q <= size), 128)
    return min(1024 // channels, 32), channels


@triton.jit
def _group(
    raw, size, keep, gone, into, index, weight, sizes, n, m, r, tiny,
    BM: tl.constexpr, LOOK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    raw, size, index, weight = raw + image * n, size + image * n, index + image * n, weight + image * n
    gone, into = gone + image * r, into + image * r
    new = tl.program_id(1) * BM + tl.arange(0, BM)
    inside = new < m
    carrier = tl.load(keep + image * m + new, inside, 0)
    share = tl.load(raw + carrier, inside, 0).to(tl.float32)
    share = tl.where(share < tiny, tiny, share)  # a NaN stays one
    total = share
    count = tl.load(size + carrier, inside, 0).to(tl.float32)
    for start in range(0, r, LOOK):
        place = start + tl.arange(0, LOOK)
        old = tl.load(gone + place, place < r, 0)
        member = tl.load(into + place, place < r, -1)[None, :] == new[:, None]  # [BM, LOOK]
        leaving = tl.load(raw + old).to(tl.float32)
        total += tl.sum(tl.where(member, tl.where(leaving < tiny, tiny, leaving)[None, :], 0.0), 1)
        count += tl.sum(tl.where(member, tl.load(size + old).to(tl.float32)[None, :], 0.0), 1)
    tl.store(sizes + image * m + new, count, inside)
    tl.store(index + carrier, new, inside)
    tl.store(weight + carrier, share / tl.where(inside, total, 1.0), inside)
    for start in range(0, r, LOOK):
        place = start + tl.arange(0, LOOK)
        old = tl.load(gone + place, place < r, 0)
        goal = tl.load(into + place, place < r, -1)
        member = (goal[None, :] == new[:, None]) & inside[:, None]
        mine = tl.max(member.to(tl.int32), 0) > 0
        leaving = tl.load(raw + old).to(tl.float32)
        tl.store(index + old, goal, mine)
        whole = tl.where(mine, tl.sum(tl.where(member, total[:, None], 0.0), 0), 1.0)
        tl.store(weight + old, tl.where(leaving < tiny, tiny, leaving) / whole, mine)


def group(raw: Tensor, size: Tensor, keep: Tensor, gone: Tensor, into: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.ops.mctf.group``; sums are taken in float32."""
    raw, size, keep, gone, into = (t.contiguous() for t in (raw, size, keep, gone, into))
    (b, m), r = keep.shape, gone.shape[1]
    index, weight, sizes = keep.new_empty(raw.shape), torch.empty_like(raw), size.new_empty(b, m)
    wrap_triton(_group)[b, triton.cdiv(m, 32)](
        raw, size, keep, gone, into, index, weight, sizes, m + r, m, r, torch.finfo(raw.dtype).tiny,
        BM=32, LOOK=LOOK, num_warps=4,
    )  # fmt: skip
    return index, weight, sizes


@triton.jit
def rows(x, weight, token, channel, stride_n, stride_q, inside, q):
    """The rows of ``x`` at ``token`` [BM] in float32 [BM, BQ], weighted where there are weights; else 0."""
    mask = inside[:, None] & (channel < q)[None, :]
    row = tl.load(x + token[:, None] * stride_n + channel[None, :] * stride_q, mask, 0).to(tl.float32)
    if weight is not None:
        row *= tl.load(weight + token, inside, 0).to(tl.float32)[:, None]
    return row


@triton.jit
def _collect(
    x, weight, keep, gone, into, out, parts, n, m, q, r, stride_b, stride_p, stride_n, stride_q,
    BM: tl.constexpr, BQ: tl.constexpr, LOOK: tl.constexpr,
):  # fmt: skip
    """Out [B, P, M, Q]: the rows at ``keep``, if any, plus those at ``gone`` (or 0, 1, ...) that go ``into`` each."""
    image, part = (tl.program_id(0) // parts).to(tl.int64), (tl.program_id(0) % parts).to(tl.int64)
    new = tl.program_id(1) * BM + tl.arange(0, BM)
    channel = (tl.program_id(2) * BQ + tl.arange(0, BQ)).to(tl.int64)
    x += image * stride_b + part * stride_p
    inside = new < m
    if weight is not None:
        weight += image * n
    if keep is not None:
        carrier = tl.load(keep + image * m + new, inside, 0)
        total = rows(x, weight, carrier, channel, stride_n, stride_q, inside, q)
    else:
        total = tl.zeros([BM, BQ], tl.float32)
    look = tl.arange(0, LOOK)
    for start in range(0, r, LOOK):
        goal = tl.load(into + image * r + start + look, start + look < r, -1)
        member = goal[None, :] == new[:, None]  # [BM, LOOK]
        first = tl.min(tl.where(member, look[None, :], LOOK), 1)
        # One member of each new token at a time, for as long as any has one.
        while tl.min(first, 0) < LOOK:
            found = inside & (first < LOOK)
            if gone is not None:
                old = tl.load(gone + image * r + start + first, found, 0)
            else:
                old = (start + first).to(tl.int64)
            total += rows(x, weight, old, channel, stride_n, stride_q, found, q)
            member = member & (look[None, :] > first[:, None])
            first = tl.min(tl.where(member, look[None, :], LOOK), 1)
    row = (tl.program_id(0).to(tl.int64) * m + new) * q
    tl.store(out + row[:, None] + channel[None, :], total, inside[:, None] & (channel < q)[None, :])


@triton.jit
def _expand_groups(
    y, weight, keep, gone, into, out, parts, m, n, q, r, stride_b, stride_p, stride_m, stride_q,
    BM: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """Out [B, P, N, Q]: every old token's row of ``y``, weighted where there are weights.

    Row i of the matching is old token keep[i] in new token i, then gone[i - M] in into[i - M]. Where there is
    no ``keep``, old token i is in new token into[i].
    """
    image, part = (tl.program_id(0) // parts).to(tl.int64), (tl.program_id(0) % parts).to(tl.int64)
    i = tl.program_id(1) * BM + tl.arange(0, BM)
    channel = (tl.program_id(2) * BQ + tl.arange(0, BQ)).to(tl.int64)
    y += image * stride_b + part * stride_p
    inside = i < n
    if keep is not None:
        carries = i < m
        leaving = inside & (i >= m)
        old = tl.where(
            carries, tl.load(keep + image * m + i, carries, 0), tl.load(gone + image * r + i - m, leaving, 0)
        )  # fmt: skip
        new = tl.where(carries, i, tl.load(into + image * r + i - m, leaving, 0))
    else:
        old = i.to(tl.int64)
        new = tl.load(into + image * n + i, inside, 0)
    mask = inside[:, None] & (channel < q)[None, :]
    row = tl.load(y + new[:, None] * stride_m + channel[None, :] * stride_q, mask, 0)
    if weight is not None:
        row = row.to(tl.float32) * tl.load(weight + image * n + old, inside, 0).to(tl.float32)[:, None]
    to = (tl.program_id(0).to(tl.int64) * n + old) * q
    tl.store(out + to[:, None] + channel[None, :], row, mask)


def parted(x: Tensor, dim: int) -> Tensor:
    """``x`` as [B, P, N, Q], tokens at ``dim``: a view of whatever layout allows one."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:dim]), x.shape[dim], math.prod(x.shape[dim + 1 :]))


def collect(
    x: Tensor, weight: Tensor | None, keep: Tensor | None, gone: Tensor | None, into: Tensor, m: int, dim: int
) -> Tensor:
    """The sums over the members of each of ``m`` new tokens, at ``dim`` of ``x``: see ``_collect``."""
    x4 = parted(x, dim)
    b, p, n, q = x4.shape
    weight, keep, gone = (None if t is None else t.contiguous() for t in (weight, keep, gone))
    into = into.contiguous()
    out = x.new_empty(*x.shape[:dim], m, *x.shape[dim + 1 :])
    tokens, channels = tile(q)
    wrap_triton(_collect)[b * p, triton.cdiv(m, tokens), triton.cdiv(q, channels)](
        x4, weight, keep, gone, into, out, p, n, m, q, into.shape[1], *x4.stride(),
        BM=tokens, BQ=channels, LOOK=LOOK, num_warps=4,
    )  # fmt: skip
    return out


def expand_groups(
    y: Tensor, weight: Tensor | None, keep: Tensor | None, gone: Tensor | None, into: Tensor, n: int, dim: int
) -> Tensor:
    """The row of the new token that each of ``n`` old ones is in, at ``dim`` of ``y``: see ``_expand_groups``."""
    y4 = parted(y, dim)
    b, p, m, q = y4.shape
    weight, keep, gone = (None if t is None else t.contiguous() for t in (weight, keep, gone))
    into = into.contiguous()
    out = y.new_empty(*y.shape[:dim], n, *y.shape[dim + 1 :])
    tokens, channels = tile(q)
    wrap_triton(_expand_groups)[b * p, triton.cdiv(n, tokens), triton.cdiv(q, channels)](
        y4, weight, keep, gone, into, out, p, m, n, q, into.shape[1], *y4.stride(),
        BM=tokens, BQ=channels, num_warps=4,
    )  # fmt: skip
    return out


def pool(x: Tensor, weight: Tensor, keep: Tensor, gone: Tensor, into: Tensor, dim: int) -> Tensor:
    """``torch.ops.mctf.pool`` of what ``supported`` admits; weighted and summed in float32 and rounded once."""
    return collect(x, weight, keep, gone, into, keep.shape[1], dim)


def pool_backward(dy: Tensor, weight: Tensor, keep: Tensor, gone: Tensor, into: Tensor, dim: int) -> Tensor:
    """The gradient of ``pool`` to ``x`` from the one to its result."""
    return expand_groups(dy, weight, keep, gone, into, weight.shape[1], dim)
