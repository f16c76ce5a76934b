"""``mctf::select`` and ``mctf::nearest``: which tokens stay, and which of those stands for one that does not."""

import torch
from torch import Tensor

from mctf_compile.kernels.library import composite
from mctf_compile.kernels.selection import aten


def _select_shapes(score: Tensor, count: int, lead: int, tail: int) -> tuple[Tensor, Tensor]:
    kept = lead + count + tail
    keep, gone = (score.new_empty(score.shape[0], m, dtype=torch.long) for m in (kept, score.shape[1] - kept))
    return keep, gone


@composite("select(Tensor score, SymInt count, int lead, int tail) -> (Tensor, Tensor)", _select_shapes)
def select(score: Tensor, count: int, lead: int, tail: int) -> tuple[Tensor, Tensor]:
    """Keep the ``count`` unprotected tokens with the highest scores.

    Args:
        score: [B, N], floating.
        count: unprotected tokens that stay.
        lead: protected tokens at the start.
        tail: those at the end.

    Returns:
        keep: int64 [B, lead + count + tail]: the prefix, the others by descending score, the suffix.
        gone: int64 [B, r], the tokens that leave, by descending score.
        Both are constants for autograd. Of equal scores, the token at the lower position comes first.
    """
    free = score.shape[1] - lead - tail
    torch._check(0 <= count <= free, lambda: f"select: {count} of {free} tokens is out of range")
    return aten.select(score.detach(), count, lead, tail)


def _nearest_shapes(x: Tensor, keep: Tensor, gone: Tensor, *_: object) -> Tensor:
    return gone.new_empty(gone.shape)


def _nearest_macs(x: Tensor, keep: Tensor, gone: Tensor, lead: int, tail: int) -> int:
    return gone.shape[0] * gone.shape[1] * (keep.shape[1] - lead - tail) * x.shape[2]


@composite("nearest(Tensor x, Tensor keep, Tensor gone, int lead, int tail) -> Tensor", _nearest_shapes, _nearest_macs)
def nearest(x: Tensor, keep: Tensor, gone: Tensor, lead: int, tail: int) -> Tensor:
    """The unprotected kept token most similar (by cosine) to each one that left.

    Args:
        x: [B, N, C], floating.
        keep: int64 [B, M], the tokens that stay.
        gone: int64 [B, r], those that left.
        lead: protected tokens at the start of ``keep``.
        tail: those at its end; one token at least is between them.

    Returns:
        int64 [B, r]: positions in ``keep``; a constant for autograd.
    """
    return aten.nearest(x.detach(), keep, gone, lead, tail)
