"""MCTF's matching in batched ATen."""

import torch
from torch import Tensor

from mctf_compile.kernels.library import without_autocast, working_dtype


def scores(
    x: Tensor, a: Tensor | None, s: Tensor, alpha: slice, beta: slice,
    tau_sim: float, tau_info: float, tau_size: float,
) -> Tensor:
    """W [B, |alpha|, |beta|] up to a positive factor, which no choice depends on."""
    dtype = working_dtype(x.dtype)
    # The outer products of two criteria factor into one number per token.
    emphasis = torch.ones_like(s, dtype=dtype)
    for criterion, tau in ((a, tau_info), (s, tau_size)):
        if tau and criterion is not None:
            criterion = criterion.to(dtype).clamp(min=torch.finfo(dtype).tiny)
            # The least one over each: at most 1, whatever the temperature.
            emphasis = emphasis * (criterion.amin(-1, keepdim=True) / criterion) ** (1 / tau)
    if not tau_sim:
        return emphasis[:, alpha, None] * emphasis[:, None, beta]
    x = torch.nn.functional.normalize(x.to(dtype), dim=-1, eps=1e-8)
    if tau_sim == 1:
        # (cos + 1) e e' is one product of vectors with an entry more: no pass over the matrix.
        x = torch.cat([x, torch.ones_like(x[..., :1])], -1) * emphasis[..., None]
        return x[:, alpha] @ x[:, beta].transpose(1, 2)
    similarity = torch.clamp((x[:, alpha] @ x[:, beta].transpose(1, 2) + 1) / 2, min=0)
    return similarity ** (1 / tau_sim) * (emphasis[:, alpha, None] * emphasis[:, None, beta])


def match(
    x: Tensor, a: Tensor | None, s: Tensor, r: int, lead: int, tail: int,
    tau_sim: float, tau_info: float, tau_size: float, bidirectional: bool, kind: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.ops.mctf.match`` in ATen. A tie goes to the token at the lower position.

    Protected tokens neither leave nor receive: they take no part, and only the order knows them.
    """
    n = x.shape[1]
    first, second = lead + lead % 2, lead + 1 - lead % 2
    with without_autocast(x.device.type):
        alpha, beta = slice(first, n - tail, 2), slice(second, n - tail, 2)
        w = scores(x, a, s, alpha, beta, tau_sim, tau_info, tau_size)
    if kind is not None:
        w = w.masked_fill(kind[:, alpha, None] != kind[:, None, beta], float("-inf"))
    position = torch.arange(n, device=x.device).expand(x.shape[0], -1)
    if 0 in w.shape[1:]:
        # Fewer than two tokens are free: the order alone is left to settle.
        sides = [position[:, :lead], position[:, first : n - tail : 2], position[:, second : n - tail : 2]]
        nothing = position[:, :0]
        return torch.cat([*sides, position[:, n - tail :]], 1), nothing, nothing

    r1 = r // 2 if bidirectional else r
    best, column = w.max(-1)
    order = best.argsort(stable=True, dim=-1, descending=True)
    row_gone, row_kept = order[:, :r1], order[:, r1:]
    if lead or tail:
        row_kept = row_kept.sort(-1).values
    kept = [position[:, :lead], first + 2 * row_kept]
    gone = [first + 2 * row_gone]
    target = [second + 2 * column.gather(1, row_gone)]
    if bidirectional:
        w = w.gather(1, row_kept[:, :, None].expand(-1, -1, w.shape[2]))
        best, row = w.max(1)
        order = best.argsort(stable=True, dim=-1, descending=True)
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
