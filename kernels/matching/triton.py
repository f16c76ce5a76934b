"""MCTF's matching in Triton.

A token's rank is the number of tokens before it: those with a higher score, and of the same score those at a lower
position. Counting them needs no sort and is the same in every run; so ties go to the lower position, as the official
order has it, and a NaN counts as the highest score.

The scores [B, N / 2, N / 2] are written once, in float32, and read twice. Up to 256 tokens on either side, one program
matches an image, a chunk of columns at a time; beyond, each step is a kernel over tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

FLOATING = (torch.float32, torch.bfloat16, torch.float16)
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


def supported(x: Tensor) -> bool:
    """Whether ``match`` takes tokens, and ``assign`` scores, of this dtype: at most 32 bits."""
    return x.dtype in FLOATING


@triton.jit
def least_of(c, n):
    """The least of ``c`` [n], each at least ``TINY``."""
    least = float("inf")
    for start in range(0, n, 256):
        token = start + tl.arange(0, 256)
        least = tl.minimum(least, tl.min(tl.load(c + token, token < n, float("inf")).to(tl.float32), 0))
    return tl.maximum(least, TINY)


@triton.jit
def power(base, EXPONENT: tl.constexpr):
    """``base`` ** EXPONENT, of a ``base`` that is not negative."""
    return base if EXPONENT == 1 else tl.exp2(tl.log2(base) * EXPONENT)


@triton.jit
def emphasis(c, token, inside, least, EXPONENT: tl.constexpr):
    """The factor of each token in the outer product of criterion ``c``, at most 1 whatever the temperature."""
    return power(least / tl.maximum(tl.load(c + token, inside, 1.0).to(tl.float32), TINY), EXPONENT)


@triton.jit(do_not_specialize=["n", "first", "second", "alpha", "beta"])
def _scores(
    x, a, s, kind, scores, n, c, first, second, alpha, beta, stride_b, stride_n,
    SIM: tl.constexpr, INFO: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Scores [B, alpha, beta] float32 of even positions with odd ones, up to a positive factor for each image.

    SIM, INFO and SIZE are the exponents of the criteria, 0 for one that is left out.
    """
    image = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    row, column = first + 2 * i.to(tl.int64), second + 2 * j.to(tl.int64)
    in_row, in_column = i < alpha, j < beta
    w = tl.full([BLOCK, BLOCK], 1.0, tl.float32)
    if SIM != 0:
        product = tl.zeros([BLOCK, BLOCK], tl.float32)
        square_row, square_column = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        x_row = x + image * stride_b + row[:, None] * stride_n
        x_column = x + image * stride_b + column[None, :] * stride_n
        for start in range(0, c, BK):
            channel = start + tl.arange(0, BK)
            inside = channel < c
            u = tl.load(x_row + channel[None, :], in_row[:, None] & inside[None, :], 0.0)  # [BLOCK, BK]
            v = tl.load(x_column + channel[:, None], in_column[None, :] & inside[:, None], 0.0)  # [BK, BLOCK]
            product = tl.dot(u, v, product, input_precision="ieee")
            u, v = u.to(tl.float32), v.to(tl.float32)
            square_row += tl.sum(u * u, 1)
            square_column += tl.sum(v * v, 0)
        cosine = product / tl.maximum(tl.sqrt(square_row), 1e-8)[:, None]
        cosine = cosine / tl.maximum(tl.sqrt(square_column), 1e-8)[None, :]
        w = cosine + 1 if SIM == 1 else power(tl.maximum((cosine + 1) / 2, 0.0), SIM)
    if INFO != 0:
        least = least_of(a + image * n, n)
        w *= emphasis(a + image * n, row, in_row, least, INFO)[:, None]
        w *= emphasis(a + image * n, column, in_column, least, INFO)[None, :]
    if SIZE != 0:
        least = least_of(s + image * n, n)
        w *= emphasis(s + image * n, row, in_row, least, SIZE)[:, None]
        w *= emphasis(s + image * n, column, in_column, least, SIZE)[None, :]
    if kind is not None:
        own = tl.load(kind + image * n + row, in_row, 0)
        alike = own[:, None] == tl.load(kind + image * n + column, in_column, 0)[None, :]
        w = tl.where(alike, w, float("-inf"))
    tl.store(scores + (image * alpha + i)[:, None] * beta + j[None, :], w, in_row[:, None] & in_column[None, :])


@triton.jit
def given(scores, i, j, alpha, beta):
    """Scores from memory; -inf outside."""
    row = scores + i.to(tl.int64) * beta
    w = tl.load(row[:, None] + j[None, :], (i < alpha)[:, None] & (j < beta)[None, :], float("-inf")).to(tl.float32)
    return tl.where(w == w, w, float("inf"))


@triton.jit
def first_best(w, key, AXIS: tl.constexpr):
    """The maximum along an axis, and of those that have it the least ``key``."""
    best = tl.max(w, AXIS)
    return best, tl.min(tl.where(w == tl.expand_dims(best, AXIS), key, 2**31 - 1), AXIS)


@triton.jit
def turn_key(score, i):
    """int64, of all tokens different: the higher, the earlier; by score, and of equal scores by position ``i``."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)  # -0 equals 0
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (bits.to(tl.int64) << 32) - i


@triton.jit
def count_before(key, others, inside):
    """How many of ``others``, where they are ``inside``, come before each."""
    return tl.sum(((others[None, :] > key[:, None]) & inside[None, :]).to(tl.int32), 1)


@triton.jit
def keep_protected(keep, n, r, lead, tail):
    """The protected tokens, at either end."""
    for start in range(0, lead + tail, 64):
        place = start + tl.arange(0, 64)
        token = tl.where(place < lead, place, n - tail - lead + place)
        tl.store(keep + tl.where(place < lead, token, token - r), token, place < lead + tail)


@triton.jit
def store_places(keep, gone, into, token, inside, leaves, slot, turn, goal, r):
    """Tokens that leave, the ``turn``-th of all, go to new position ``goal``; the others to ``slot``."""
    tl.store(keep + tl.where(r == 0, token, slot), token, inside & (leaves == 0))
    tl.store(gone + turn, token, inside & leaves)
    tl.store(into + turn, goal, inside & leaves)


@triton.jit
def chunk_of(vector, i, j):
    """``vector`` at ``i``, at those of its positions that are ``j``."""
    return tl.sum(tl.where(i[:, None] == j[None, :], vector[:, None], 0), 0)


@triton.jit
def ranks_of(best, i, count, BC: tl.constexpr):
    """How many of all come before each, ``BC`` at a time."""
    key = turn_key(best, i)
    rank = tl.zeros(i.shape, tl.int32)
    for start in range(0, count, BC):
        j = start + tl.arange(0, BC)
        rank += count_before(key, turn_key(chunk_of(best, i, j), j), j < count)
    return rank


@triton.jit(do_not_specialize=["n", "r", "lead", "tail", "first", "second", "alpha", "beta"])
def _assign_image(
    scores, keep, gone, into, n, r, lead, tail, first, second, alpha, beta,
    TWO_WAY: tl.constexpr, PROTECTED: tl.constexpr, BLOCK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The matching of one image, whose scores are looked at [BLOCK, BC] at a time."""
    image = tl.program_id(0).to(tl.int64)
    scores, keep = scores + image * alpha * beta, keep + image * (n - r)
    gone, into = gone + image * r, into + image * r
    i = tl.arange(0, BLOCK)
    r1 = r // 2 if TWO_WAY else r

    best, choice = tl.full([BLOCK], float("-inf"), tl.float32), tl.zeros([BLOCK], tl.int32)
    for start in range(0, beta, BC):
        j = start + tl.arange(0, BC)
        found, key = first_best(given(scores, i, j, alpha, beta), j[None, :], 1)
        choice = tl.where(found > best, key, choice)
        best = tl.maximum(best, found)
    rank = ranks_of(best, i, alpha, BC)
    leaves = (rank < r1) & (i < alpha)
    # Survivors come in the order of their positions where tokens are protected, else of their ranks.
    place = i - tl.cumsum(leaves.to(tl.int32), 0) if PROTECTED else rank - r1

    if TWO_WAY:
        stays = ((rank >= r1) & (i < alpha))[:, None]
        best, host = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.int32)
        for start in range(0, beta, BC):
            j = start + tl.arange(0, BC)
            w = tl.where(stays, given(scores, i, j, alpha, beta), float("-inf"))
            found, key = first_best(w, tl.where(stays, place[:, None], 2**31 - 1), 0)
            here = i[:, None] == j[None, :]
            best += tl.sum(tl.where(here, found[None, :], 0.0), 1)
            host += tl.sum(tl.where(here, key[None, :], 0), 1)
        turn = ranks_of(best, i, beta, BC)
        follows = turn < r - r1
        end = lead + tl.where(follows, host, alpha - r + turn)
    else:
        turn = i
        follows = i < 0
        end = lead + alpha - r + i
    # An odd position that leaves passes on what it has received.
    goal = tl.zeros([BLOCK], tl.int32)
    for start in range(0, beta, BC):
        j = start + tl.arange(0, BC)
        goal += tl.sum(tl.where(choice[:, None] == j[None, :], chunk_of(end, i, j)[None, :], 0), 1)

    keep_protected(keep, n, r, lead, tail)
    store_places(keep, gone, into, first + 2 * i, i < alpha, leaves, lead + place, rank, goal, r)
    store_places(keep, gone, into, second + 2 * i, i < beta, follows, end, r1 + turn, end, r)


@triton.jit(do_not_specialize=["alpha", "beta"])
def _rows(
    scores, best, choice, alpha, beta, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Best [B, alpha] and choice [B, alpha]: the first best column of each row."""
    image = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BR + tl.arange(0, BR)
    highest = tl.full([BR], float("-inf"), tl.float32)
    column = tl.zeros([BR], tl.int32)
    for start in range(0, beta, BC):
        j = start + tl.arange(0, BC)
        w = given(scores + image * alpha * beta, i, j, alpha, beta)
        found, key = first_best(w, j[None, :], 1)
        column = tl.where(found > highest, key, column)
        highest = tl.maximum(highest, found)
    tl.store(best + image * alpha + i, highest, i < alpha)
    tl.store(choice + image * alpha + i, column, i < alpha)


@triton.jit(do_not_specialize=["alpha", "beta", "r1"])
def _columns(
    scores, rank, best, host, alpha, beta, r1,
    PROTECTED: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Best [B, beta] and host [B, beta]: the first best surviving row of each column.

    First in the order of survivors: by position where tokens are protected, else by rank; host is that number.
    """
    image = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BC + tl.arange(0, BC)
    highest = tl.full([BC], float("-inf"), tl.float32)
    row = tl.full([BC], 2**31 - 1, tl.int32)
    for start in range(0, alpha, BR):
        i = start + tl.arange(0, BR)
        order = tl.load(rank + image * alpha + i, i < alpha, -1)
        stays = (order >= r1)[:, None]
        w = given(scores + image * alpha * beta, i, j, alpha, beta)
        key = i if PROTECTED else order
        found, key = first_best(tl.where(stays, w, float("-inf")), tl.where(stays, key[:, None], 2**31 - 1), 0)
        row = tl.where(found > highest, key, tl.where(found == highest, tl.minimum(row, key), row))
        highest = tl.maximum(highest, found)
    tl.store(best + image * beta + j, highest, j < beta)
    tl.store(host + image * beta + j, row, j < beta)


@triton.jit(do_not_specialize=["count"])
def _ranks(best, rank, count, BLOCK: tl.constexpr):
    """Rank [B, count]: how many come before each."""
    image = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    own = turn_key(tl.load(best + image * count + i, i < count, 0.0), i)
    before = tl.zeros([BLOCK], tl.int32)
    for start in range(0, count, BLOCK):
        j = start + tl.arange(0, BLOCK)
        others = turn_key(tl.load(best + image * count + j, j < count, 0.0), j)
        before += count_before(own, others, j < count)
    tl.store(rank + image * count + i, before, i < count)


@triton.jit
def place_of(key, rank, alpha, r1, PROTECTED: tl.constexpr, BLOCK: tl.constexpr):
    """Position among the surviving rows: of the row at ``key`` where tokens are protected, else of rank ``key``."""
    if PROTECTED:
        place = key
        for start in range(0, alpha, BLOCK):
            i = start + tl.arange(0, BLOCK)
            leaves = tl.load(rank + i, i < alpha, r1) < r1
            place -= tl.sum((leaves[None, :] & (i[None, :] < key[:, None])).to(tl.int32), 1)
    else:
        place = key - r1
    return place


@triton.jit
def end_of(j, inside, host, turn, rank, lead, alpha, r, r1, TWO_WAY: tl.constexpr, PROTECTED: tl.constexpr,
         BLOCK: tl.constexpr):  # fmt: skip
    """The new position in which each column ``j`` ends up."""
    if TWO_WAY:
        number = tl.load(turn + j, inside, 0)
        place = place_of(tl.load(host + j, inside, 0), rank, alpha, r1, PROTECTED, BLOCK)
        end = tl.where(number < r - r1, place, alpha - r + number)
    else:
        end = alpha - r + j
    return lead + end


@triton.jit(do_not_specialize=["n", "r", "lead", "tail", "first", "second", "alpha", "beta"])
def _finish(
    choice, rank, host, turn, keep, gone, into, n, r, lead, tail, first, second, alpha, beta,
    TWO_WAY: tl.constexpr, PROTECTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The matching, from choice and rank [B, alpha] of rows, host and turn [B, beta] of columns."""
    image = tl.program_id(0).to(tl.int64)
    keep, gone, into = keep + image * (n - r), gone + image * r, into + image * r
    choice, rank = choice + image * alpha, rank + image * alpha
    if TWO_WAY:
        host, turn = host + image * beta, turn + image * beta
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_row, in_column = i < alpha, i < beta
    r1 = r // 2 if TWO_WAY else r
    number = tl.load(rank + i, in_row, 0)
    place = place_of(i if PROTECTED else number, rank, alpha, r1, PROTECTED, BLOCK)
    target = tl.load(choice + i, in_row, 0)
    goal = end_of(target, in_row, host, turn, rank, lead, alpha, r, r1, TWO_WAY, PROTECTED, BLOCK)
    store_places(keep, gone, into, first + 2 * i, in_row, number < r1, lead + place, number, goal, r)
    end = end_of(i, in_column, host, turn, rank, lead, alpha, r, r1, TWO_WAY, PROTECTED, BLOCK)
    number = tl.load(turn + i, in_column, 0) if TWO_WAY else i
    follows = number < (r - r1 if TWO_WAY else 0)
    store_places(keep, gone, into, second + 2 * i, in_column, follows, end, r1 + number, end, r)
    if tl.program_id(1) == 0:
        keep_protected(keep, n, r, lead, tail)


def block_for(alpha: int, beta: int) -> int | None:
    """What one program takes of either side of an image; None if too many. A symbolic count stays symbolic."""
    return next((size for size in (16, 32, 64, 128, 256) if alpha <= size and beta <= size), None)


def chunk_for(block: int) -> int:
    """Columns that one program looks at at a time."""
    return min(4096 // block, block)


def warps_for(block: int) -> int:
    """Warps of a program that matches an image of up to ``block`` tokens on either side."""
    return min(max(block // 8, 4), 16)


def scores_tile(itemsize: int) -> tuple[int, int, int]:
    """Tokens of either side, channels that are multiplied at a time, and warps: what fits the registers."""
    return (64, 32, 8) if itemsize == 2 else (32, 16, 4)


def sides(n: int, lead: int, tail: int) -> tuple[int, int, int, int]:
    """The first unprotected even position, the first odd one, and how many there are of each."""
    alpha = (n - tail - lead + 1 - lead % 2) // 2
    return lead + lead % 2, lead + 1 - lead % 2, alpha, n - lead - tail - alpha


def scores(
    x: Tensor,
    a: Tensor | None,
    s: Tensor,
    lead: int,
    tail: int,
    tau_sim: float,
    tau_info: float,
    tau_size: float,
    kind: Tensor | None = None,
) -> Tensor:
    """W [B, alpha, beta] float32: products in the dtype of ``x``, summed in float32 (and never in TF32)."""
    (b, n, c), (first, second, alpha, beta) = x.shape, sides(x.shape[1], lead, tail)
    sim, info, size = (1 / tau if tau else 0.0 for tau in (tau_sim, 0.0 if a is None else tau_info, tau_size))
    x = x if x.stride(2) == 1 else x.contiguous()
    a, kind = (None if t is None else t.contiguous() for t in (a, kind))
    s = s.contiguous()
    w = x.new_empty(b, alpha, beta, dtype=torch.float32)
    block, channels, warps = scores_tile(x.itemsize)
    wrap_triton(_scores)[b, triton.cdiv(alpha, block), triton.cdiv(beta, block)](
        x, a, s, kind, w, n, c, first, second, alpha, beta, *x.stride()[:2],
        SIM=sim, INFO=info, SIZE=size, BLOCK=block, BK=channels, num_warps=warps, num_stages=2,
    )  # fmt: skip
    return w


def match(
    x: Tensor,
    a: Tensor | None,
    s: Tensor,
    r: int,
    lead: int,
    tail: int,
    tau_sim: float,
    tau_info: float,
    tau_size: float,
    bidirectional: bool,
    kind: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.ops.mctf.match``. The scores are in memory, N² / 4 of them, for as long as it takes."""
    return assign(
        scores(x, a, s, lead, tail, tau_sim, tau_info, tau_size, kind), x.shape[1], r, lead, tail, bidirectional
    )


def assign(scores: Tensor, n: int, r: int, lead: int, tail: int, bidirectional: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.ops.mctf.assign``: comparisons alone, so the very same result."""
    torch._check(0 <= 2 * r <= max(n - lead - tail, 0), lambda: f"match: r={r} of {n} tokens is out of range")
    first, second, alpha, beta = sides(n, lead, tail)
    scores, b = scores.contiguous(), scores.shape[0]
    keep, gone, into = (scores.new_empty(b, count, dtype=torch.long) for count in (n - r, r, r))
    counts = n, r, lead, tail, first, second, alpha, beta
    exact = {"TWO_WAY": bidirectional, "PROTECTED": lead + tail > 0}
    block = block_for(alpha, beta)
    if block:
        wrap_triton(_assign_image)[b,](
            scores, keep, gone, into, *counts, **exact, BLOCK=block, BC=chunk_for(block), num_warps=warps_for(block)
        )
        return keep, gone, into

    best, choice, rank, host, turn = (scores.new_empty(b, alpha + 1, dtype=torch.int32) for _ in range(5))
    best = best.view(torch.float32)
    tile = {"BR": 32, "BC": 128, "num_warps": 4}
    wrap_triton(_rows)[b, triton.cdiv(alpha, 32)](scores, best, choice, alpha, beta, **tile)
    wrap_triton(_ranks)[b, triton.cdiv(alpha, 64)](best, rank, alpha, BLOCK=64, num_warps=4)
    if bidirectional:
        wrap_triton(_columns)[b, triton.cdiv(beta, 128)](
            scores, rank, best, host, alpha, beta, r // 2, PROTECTED=exact["PROTECTED"], **tile
        )
        wrap_triton(_ranks)[b, triton.cdiv(beta, 64)](best, turn, beta, BLOCK=64, num_warps=4)
    # There is at most one token more at even or at odd positions.
    wrap_triton(_finish)[b, triton.cdiv(alpha + 1, 64)](
        choice, rank, host, turn, keep, gone, into, *counts, **exact, BLOCK=64, num_warps=4
    )
    return keep, gone, into
