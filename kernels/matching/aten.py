"""MCTF's matching in batched ATen."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from mctf_compile.kernels.library import without_autocast, working_dtype
from mctf_compile.kernels.ordering import descending


def scores(
    x: Tensor,
    a: Tensor | None,
    s: Tensor,
    lead: int,
    tail: int,
    tau_sim: float,
    tau_info: float,
    tau_size: float,
    kind: Tensor | None,
) -> Tensor:
    """W [B, |alpha|, |beta|] up to a positive factor, which no choice depends on.

    Protected tokens neither leave nor receive: they take no part, and only the order knows them.
    """
    n = x.shape[1]
    first, second = _sides(lead)
    split = (n - tail - first + 1) // 2
    # Both sides in one gather, even positions first: one kernel, which knows no odd and even counts.
    place = torch.arange(n - lead - tail, device=x.device)
    order = torch.where(place < split, first + 2 * place, second + 2 * (place - split))
    with without_autocast():
        w = _products(x, a, s, order, split, tau_sim, tau_info, tau_size)
    if kind is None:
        return w
    kind = kind[:, order]
    return w.masked_fill(kind[:, :split, None] != kind[:, None, split:], float("-inf"))


def _sides(lead: int) -> tuple[int, int]:
    """The first unprotected even position, and the first odd one."""
    return lead + lead % 2, lead + 1 - lead % 2


def _products(
    x: Tensor,
    a: Tensor | None,
    s: Tensor,
    order: Tensor,
    split: int,
    tau_sim: float,
    tau_info: float,
    tau_size: float,
) -> Tensor:
    emphasis = _emphasis(x, a, s, tau_info, tau_size)
    dtype = emphasis.dtype
    if not tau_sim:
        emphasis = emphasis[:, order]
        return emphasis[:, :split, None] * emphasis[:, None, split:]
    x = torch.nn.functional.normalize(x.to(dtype), dim=-1, eps=1e-8)
    if tau_sim == 1:
        # (cos + 1) e e' is one product of vectors with an entry more: no pass over the matrix.
        x = (torch.cat([x, torch.ones_like(x[..., :1])], -1) * emphasis[..., None])[:, order]
        return x[:, :split] @ x[:, split:].transpose(1, 2)
    x, emphasis = x[:, order], emphasis[:, order]
    similarity = torch.clamp((x[:, :split] @ x[:, split:].transpose(1, 2) + 1) / 2, min=0)
    return similarity ** (1 / tau_sim) * (emphasis[:, :split, None] * emphasis[:, None, split:])


def _emphasis(x: Tensor, a: Tensor | None, s: Tensor, tau_info: float, tau_size: float) -> Tensor:
    """[B, N]: the outer products of two criteria factor into one number per token."""
    dtype = working_dtype(x.dtype)
    emphasis = torch.ones_like(s, dtype=dtype)
    for criterion, tau in ((a, tau_info), (s, tau_size)):
        if tau and criterion is not None:
            criterion = criterion.to(dtype).clamp(min=torch.finfo(dtype).tiny)
            # The least one over each: at most 1, whatever the temperature.
            emphasis = emphasis * (criterion.amin(-1, keepdim=True) / criterion) ** (1 / tau)
    return emphasis


def assign(w: Tensor, n: int, r: int, lead: int, tail: int, bidirectional: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.ops.mctf.assign`` in ATen. A tie goes to the token at the lower position."""
    position = torch.arange(n, device=w.device).expand(w.shape[0], -1)
    if not r:
        return position.clone(), position.new_empty(w.shape[0], 0), position.new_empty(w.shape[0], 0)
    first, second = _sides(lead)
    r1 = r // 2 if bidirectional else r
    best, column = w.max(-1)
    order = descending(best)
    row_gone, row_kept = order[:, :r1], order[:, r1:]
    if lead or tail:
        row_kept = row_kept.sort(-1).values
    kept = [position[:, :lead], first + 2 * row_kept]
    gone = [first + 2 * row_gone]
    target = [second + 2 * column.gather(1, row_gone)]
    if bidirectional:
        # Whole rows at a time; a gather goes number by number.
        images, rows, columns = w.shape
        start = torch.arange(images, device=w.device)[:, None] * rows
        w = w.reshape(-1, columns).index_select(0, (row_kept + start).flatten()).view(images, -1, columns)
        best, row = w.max(1)
        order = descending(best)
        column_gone, column_kept = order[:, : r - r1], order[:, r - r1 :]
        kept.append(second + 2 * column_kept)
        gone.append(second + 2 * column_gone)
        target.append(first + 2 * row_kept.gather(1, row.gather(1, column_gone)))
    else:
        kept.append(position[:, second : n - tail : 2])
    keep = torch.cat([*kept, position[:, n - tail :]], 1)

    place = torch.zeros_like(position).scatter(1, keep, position[:, : n - r])
    # Second pass first: a beta that left has passed on what it had received.
    into = [place.gather(1, target[-1])]
    if bidirectional:
        place = place.scatter(1, gone[1], into[0])
        into.insert(0, place.gather(1, target[0]))
    return keep, torch.cat(gone, 1), torch.cat(into, 1)


# As many scores are in memory at once, about: those of a few leaving tokens with all that may receive them.
SCORES = 1 << 20


def tiles(height: int, width: int, tile: Sequence[int], seed: int | None) -> tuple[list[int], list[int]]:
    """The positions in a grid that receive tokens, one in each tile, and all the others, both ascending.

    That is its first one, or with a ``seed`` a random one. Tiles at the far edges may be smaller.
    Source: Bolya & Hoffman, CVPR Workshops 2023 (arXiv 2303.17604), section 4.
    """
    draw = None if seed is None else random.Random(seed)
    receive = []
    for top in range(0, height, tile[0]):
        for left in range(0, width, tile[1]):
            row = 0 if draw is None else draw.randrange(min(tile[0], height - top))
            column = 0 if draw is None else draw.randrange(min(tile[1], width - left))
            receive.append((top + row) * width + left + column)
    received = set(receive)
    return sorted(receive), [i for i in range(height * width) if i not in received]


def best(
    a: Tensor, b: Tensor, of_a: Tensor, of_b: Tensor, tau_sim: float, kind_a: Tensor | None, kind_b: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``torch.ops.mctf.best`` in ATen."""
    step = max(SCORES // (len(a) * b.shape[1]), 1)
    values, places = [], []
    for start in range(0, a.shape[1], step):
        rows = slice(start, start + step)
        scores = of_a[:, rows, None] * of_b[:, None]
        if tau_sim:
            similarity = torch.baddbmm(scores.new_ones(()), a[:, rows], b.transpose(1, 2)).mul_(0.5).clamp_(min=0)
            scores.mul_(similarity if tau_sim == 1 else similarity ** (1 / tau_sim))
        if kind_a is not None and kind_b is not None:
            scores.masked_fill_(kind_a[:, rows, None] != kind_b[:, None], float("-inf"))
        value, place = scores.max(-1)
        values.append(value)
        places.append(place)
    return torch.cat(values, 1), torch.cat(places, 1)


def match_tiles(
    x: Tensor,
    a: Tensor | None,
    s: Tensor,
    r: int,
    lead: int,
    tail: int,
    receive: Tensor,
    leave: Tensor,
    taus: Sequence[float],
    kind: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.ops.mctf.match_tiles`` in ATen. A tie goes to the token at the lower position."""
    tau_sim, tau_info, tau_size = taus
    with without_autocast():
        emphasis = _emphasis(x, a, s, tau_info, tau_size)
        unit = torch.nn.functional.normalize(x.to(emphasis.dtype), dim=-1, eps=1e-8)
        kinds = (None, None) if kind is None else (kind[:, leave], kind[:, receive])
        value, place = torch.ops.mctf.best(
            unit[:, leave], unit[:, receive], emphasis[:, leave], emphasis[:, receive], tau_sim, *kinds
        )
    position = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
    order = descending(value)
    gone, stays = order[:, :r], order[:, r:].sort(-1).values
    receivers = receive.expand(len(x), -1)
    keep = torch.cat([position[:, :lead], leave[stays], receivers, position[:, x.shape[1] - tail :]], 1)
    return keep, leave[gone], place.gather(1, gone) + lead + stays.shape[1]
