"""MCTF's matching in batched ATen."""

import torch
from torch import Tensor

from mctf_compile.kernels.library import working_dtype


def scores(
    x: Tensor, a: Tensor | None, s: Tensor, tau_sim: float, tau_info: float, tau_size: float
) -> Tensor:
    """W of every alpha (even) against every beta (odd) position: [B, ceil(N/2), floor(N/2)]."""
    dtype = working_dtype(x.dtype)
    # The two outer products factor into one number per token.
    emphasis = torch.ones_like(s, dtype=dtype)
    for criterion, tau in ((a, tau_info), (s, tau_size)):
        if tau and criterion is not None:
            criterion = criterion.to(dtype)
            emphasis = emphasis * (criterion.amin(-1, keepdim=True) / criterion) ** (1 / tau)
    w = emphasis[:, ::2, None] * emphasis[:, None, 1::2]
    if tau_sim:
        x = torch.nn.functional.normalize(x.to(dtype), dim=-1, eps=1e-8)
        similarity = torch.clamp((x[:, ::2] @ x[:, 1::2].transpose(1, 2) + 1) / 2, min=0)
        w = w * (similarity if tau_sim == 1 else similarity ** (1 / tau_sim))
    return w


def match(
    x: Tensor, a: Tensor | None, s: Tensor, r: int, lead: int, tail: int,
    tau_sim: float, tau_info: float, tau_size: float, bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.ops.mctf.match`` in ATen. A tie goes to the token at the lower position."""
    with torch.autocast(x.device.type, enabled=False):
        w = scores(x, a, s, tau_sim, tau_info, tau_size)
    n = x.shape[1]
    position = torch.arange(n, device=x.device)
    # A protected token neither leaves nor receives.
    fixed = (position < lead) | (position >= n - tail)
    if lead or tail:
        w = w.masked_fill(fixed[::2, None] | fixed[None, 1::2], float("-inf"))

    r1 = r // 2 if bidirectional else r
    best, column = w.max(-1)
    order = best.argsort(stable=True, dim=-1, descending=True)
    row_gone, row_kept = order[:, :r1], order[:, r1:]
    if lead or tail:
        row_kept = row_kept.sort(-1).values
    keep = [2 * row_kept]
    gone = [2 * row_gone]
    target = [2 * column.gather(1, row_gone) + 1]
    if bidirectional:
        w = w.gather(1, row_kept[:, :, None].expand(-1, -1, w.shape[2]))
        best, row = w.max(1)
        order = best.argsort(stable=True, dim=-1, descending=True)
        column_gone, column_kept = order[:, : r - r1], order[:, r - r1 :]
        keep.append(2 * column_kept + 1)
        gone.append(2 * column_gone + 1)
        target.append(2 * row_kept.gather(1, row.gather(1, column_gone)))
    else:
        keep.append(position[1::2].expand(x.shape[0], -1))

    kept = fixed_outside(torch.cat(keep, 1), n, lead, tail)
    place = new_positions(kept, n)
    # Second pass first: a beta that left has passed on what it had received.
    into = [place.gather(1, target[-1])]
    if bidirectional:
        place = place.scatter(1, gone[1], into[0])
        into.insert(0, place.gather(1, target[0]))
    return kept, torch.cat(gone, 1), torch.cat(into, 1)


def fixed_outside(keep: Tensor, n: int, lead: int, tail: int) -> Tensor:
    """Move the protected prefix to the front and the protected suffix to the back of ``keep`` [B, M]."""
    if lead <= 1 and not tail:
        return keep
    middle = torch.arange(keep.shape[1], device=keep.device) + n
    rank = torch.where(keep < lead, keep, torch.where(keep >= n - tail, keep + 2 * n, middle))
    return keep.gather(1, rank.argsort(-1))


def new_positions(keep: Tensor, n: int) -> Tensor:
    """[B, N]: where each kept token went; 0 for the others."""
    m = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
    return keep.new_zeros(keep.shape[0], n).scatter(1, keep, m)
