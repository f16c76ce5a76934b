"""MCTF's matching in batched ATen."""

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
    dtype = working_dtype(x.dtype)
    # The outer products of two criteria factor into one number per token.
    emphasis = torch.ones_like(s, dtype=dtype)
    for criterion, tau in ((a, tau_info), (s, tau_size)):
        if tau and criterion is not None:
            criterion = criterion.to(dtype).clamp(min=torch.finfo(dtype).tiny)
            # The least one over each: at most 1, whatever the temperature.
            emphasis = emphasis * (criterion.amin(-1, keepdim=True) / criterion) ** (1 / tau)
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
