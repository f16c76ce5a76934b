"""``mctf::match`` and ``mctf::match_tiles``: which tokens leave, and into which."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mctf_compile.kernels.library import composite, opaque
from mctf_compile.kernels.matching import aten


def shapes(
    x: Tensor,
    importance: Tensor | None,
    size: Tensor,
    r: int,
    lead: int,
    tail: int,
    tau_sim: float,
    tau_info: float,
    tau_size: float,
    bidirectional: bool,
    kind: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty keep [B, N - r], gone and into [B, r] of ``mctf::match``; raises what that raises for other tokens."""
    _check_tokens(x, importance=importance, size=size, kind=kind)
    return _matching(x, x.shape[1], r)


def _check_tokens(x: Tensor, **others: Tensor | None) -> None:
    """Raise ``RuntimeError`` where operands speak of other tokens than those of ``x``."""
    for name, other in others.items():
        if other is not None and (other.dim() != 2 or other.shape[1] != x.shape[1]):
            raise RuntimeError(f"match: {name} {list(other.shape)} is not of the tokens of x {list(x.shape)}")


def _matching(x: Tensor, n: int, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Empty keep, gone and into, for the images of ``x``."""
    keep, gone, into = (x.new_empty(x.shape[0], count, dtype=torch.long) for count in (n - r, r, r))
    return keep, gone, into


def _macs(
    x: Tensor, importance: Tensor | None, size: Tensor, r: int, lead: int, tail: int, tau_sim: float, *_: object
) -> int:
    """Those of the scores, which with ``tau_sim=1`` are products of vectors with an entry more."""
    free = x.shape[1] - lead - tail
    even = (free + 1 - lead % 2) // 2
    return x.shape[0] * even * (free - even) * (x.shape[2] + (tau_sim == 1)) if tau_sim else 0


@composite(
    "match(Tensor x, Tensor? importance, Tensor size, SymInt r, int lead, int tail, float tau_sim, "
    "float tau_info, float tau_size, bool bidirectional, Tensor? kind=None) -> (Tensor, Tensor, Tensor)",
    shapes,
    _macs,
)
def match(
    x: Tensor,
    importance: Tensor | None,
    size: Tensor,
    r: int,
    lead: int,
    tail: int,
    tau_sim: float,
    tau_info: float,
    tau_size: float,
    bidirectional: bool,
    kind: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Match tokens by similarity, informativeness and size, and choose ``r`` that leave.

    Args:
        x: [B, N, C] residual stream, any floating dtype; scores are computed in float32 or wider.
        importance: [B, N] informativeness (mean attention received), or None to leave it out.
        size: [B, N] token sizes.
        r: tokens that leave, 0 <= r <= (N - lead - tail) // 2.
        lead: protected tokens at the start; they neither leave nor receive.
        tail: those at the end.
        tau_sim: the temperature of similarity; 0 turns a criterion off.
        tau_info: that of informativeness.
        tau_size: that of the sizes.
        bidirectional: r // 2 even-position tokens leave into odd ones, then the others the other way;
            else all leave from even positions.
        kind: [B, N] of any dtype, or None. Tokens of two kinds (padding and others) go together only where
            ``r`` leaves no choice.

    Returns:
        keep: int64 [B, N - r], the old position of each new token's carrier. Order: protected prefix,
            even positions ascending (by descending score where nothing is protected, as the official
            code has it), odd positions by descending score (one-way: ascending), suffix. With r = 0 the
            tokens stay in their order.
        gone: int64 [B, r], old positions of the tokens that left.
        into: int64 [B, r], the new position each went into.
        All three are constants for autograd. Of equal scores, the token at the lower position wins.

    Raises ``RuntimeError`` where ``importance``, ``size`` or ``kind`` are of other tokens than ``x``.

    Source: Lee et al., CVPR 2024 (arXiv 2403.10030), section 3.2 and 3.3.
    """
    _check_tokens(x, importance=importance, size=size, kind=kind)
    importance = None if importance is None else importance.detach()
    scores = aten.scores(x.detach(), importance, size.detach(), lead, tail, tau_sim, tau_info, tau_size, kind)
    # Counts that are inputs of a graph are for every number of tokens: no part of it may ask how many there are.
    counted = isinstance(r, torch.SymInt) or isinstance(x.shape[1], torch.SymInt)
    choose = torch.ops.mctf.assign if counted else assign
    keep, gone, into = choose(scores, x.shape[1], r, lead, tail, bidirectional)
    return keep, gone, into


def _assign_shapes(
    scores: Tensor, n: int, r: int, lead: int, tail: int, bidirectional: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _matching(scores, n, r)


@opaque(
    "assign(Tensor scores, SymInt n, SymInt r, int lead, int tail, bool bidirectional) -> (Tensor, Tensor, Tensor)",
    _assign_shapes,
)
def assign(scores: Tensor, n: int, r: int, lead: int, tail: int, bidirectional: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The part of ``mctf::match`` that is no arithmetic: which of ``n`` tokens leave by the scores of their pairs.

    Args:
        scores: [B, alpha, beta], of the unprotected tokens at even positions with those at odd ones.
        n: tokens of an image.
        r: tokens that leave; as for ``mctf::match``, like the rest.
        lead: protected tokens at the start.
        tail: those at the end.
        bidirectional: whether tokens leave from odd positions too.

    Returns:
        keep, gone, into: as for ``mctf::match``. Raises ``RuntimeError`` for an ``r`` out of range.
    """
    torch._check(0 <= 2 * r <= max(n - lead - tail, 0), lambda: f"match: r={r} of {n} tokens is out of range")
    return aten.assign(scores, n, r, lead, tail, bidirectional)


def _tiles_shapes(
    x: Tensor, importance: Tensor | None, size: Tensor, r: int, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    return _matching(x, x.shape[1], r)


def _tiles_macs(
    x: Tensor,
    importance: Tensor | None,
    size: Tensor,
    r: int,
    lead: int,
    tail: int,
    height: int,
    width: int,
    tile: Sequence[int],
    seed: int | None,
    taus: Sequence[float],
    *_: object,
) -> int:
    receivers = -(-height // tile[0]) * -(-width // tile[1])
    return x.shape[0] * receivers * (height * width - receivers) * x.shape[2] if taus[0] else 0


@composite(
    "match_tiles(Tensor x, Tensor? importance, Tensor size, SymInt r, int lead, int tail, int height, int width, "
    "int[] tile, int? seed, float[] taus, Tensor? kind=None) -> (Tensor, Tensor, Tensor)",
    _tiles_shapes,
    _tiles_macs,
)
def match_tiles(
    x: Tensor,
    importance: Tensor | None,
    size: Tensor,
    r: int,
    lead: int,
    tail: int,
    height: int,
    width: int,
    tile: Sequence[int],
    seed: int | None,
    taus: Sequence[float],
    kind: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Match tokens of a grid, of which one in every tile receives others and never leaves.

    Args:
        x: [B, N, C], as for ``mctf::match``; N is lead + height * width + tail.
        importance: see ``mctf::match``.
        size: see there.
        r: tokens that leave, of those that do not receive.
        lead: protected tokens at the start; they neither leave nor receive.
        tail: those at the end.
        height: rows of the grid.
        width: columns of the grid.
        tile: rows and columns of a tile.
        seed: of the random place in each tile that receives; None for its first.
        taus: the temperatures of similarity, informativeness and size; 0 turns a criterion off.
        kind: see ``mctf::match``.

    Returns:
        keep, gone and into as of ``mctf::match``. Order of the tokens: protected prefix, those that might have left
        by position, those that receive by position, suffix.

    Source: Bolya & Hoffman, CVPR Workshops 2023 (arXiv 2303.17604), section 4.
    """
    _check_tokens(x, importance=importance, size=size, kind=kind)
    receive, leave = (
        torch.tensor(places, dtype=torch.long, device=x.device) + lead
        for places in aten.tiles(height, width, tile, seed)
    )
    torch._check(0 <= r <= leave.shape[0], lambda: f"match_tiles: r={r} of {leave.shape[0]} tokens is out of range")
    importance = None if importance is None else importance.detach()
    return aten.match_tiles(x.detach(), importance, size.detach(), r, lead, tail, receive, leave, taus, kind)


def _best_shapes(a: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape[:2]), a.new_empty(a.shape[:2], dtype=torch.long)


def _best_macs(a: Tensor, b: Tensor, of_a: Tensor, of_b: Tensor, tau_sim: float, *_: object) -> int:
    return a.shape[0] * a.shape[1] * b.shape[1] * a.shape[2] if tau_sim else 0


@opaque(
    "best(Tensor a, Tensor b, Tensor of_a, Tensor of_b, float tau_sim, Tensor? kind_a, Tensor? kind_b) "
    "-> (Tensor, Tensor)",
    _best_shapes,
    _best_macs,
)
def best(
    a: Tensor, b: Tensor, of_a: Tensor, of_b: Tensor, tau_sim: float, kind_a: Tensor | None, kind_b: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The partner with the highest score for each token that may leave; the scores are never in memory together.

    Args:
        a: [B, S, C], tokens of length 1.
        b: [B, D, C], those that may receive them.
        of_a: [B, S], the factor that other criteria give each.
        of_b: [B, D], the same.
        tau_sim: the temperature of similarity; 0 leaves it out.
        kind_a: [B, S] or None; tokens of two kinds have a score of -inf.
        kind_b: [B, D] or None.

    Returns:
        The highest score of each [B, S], and the position of its partner, int64 [B, S]; of equal ones the lowest.
    """
    return aten.best(a, b, of_a, of_b, tau_sim, kind_a, kind_b)
