"""``mctf::select`` and ``mctf::nearest``: which tokens stay, and which of those stands for one that does not."""

import torch
from torch import Tensor

from mctf_compile.kernels.library import composite
from mctf_compile.kernels.selection import aten


@composite("select(Tensor score, int count, int lead, int tail) -> (Tensor, Tensor)")
def select(score: Tensor, count: int, lead: int, tail: int) -> tuple[Tensor, Tensor]:
    """Keep the ``count`` unprotected tokens with the highest scores.

    Args:
        score: [B, N], floating.
        count: unprotected tokens that stay.
        lead, tail: protected tokens at either end.

    Returns:
        keep: int64 [B, lead + count + tail]: the prefix, the others by descending score, the suffix.
        gone: int64 [B, r], the tokens that leave, by descending score.
        Both are constants for autograd. Of equal scores, the token at the lower position comes first.
    """
    free = score.shape[1] - lead - tail
    torch._check(0 <= count <= free, lambda: f"select: {count} of {free} tokens is out of range")
    return aten.select(score.detach(), count, lead, tail)


@composite("nearest(Tensor x, Tensor keep, Tensor gone) -> Tensor")
def nearest(x: Tensor, keep: Tensor, gone: Tensor) -> Tensor:
    """The kept token most similar (by cosine) to each one that left.

    Args:
        x: [B, N, C], floating.
        keep: int64 [B, M], gone: int64 [B, r]: the selection.

    Returns:
        int64 [B, r]: positions in ``keep``; a constant for autograd.
    """
    return aten.nearest(x.detach(), keep, gone)
