"""Selection by score in ATen."""

import torch
from torch import Tensor

from mctf_compile.kernels.library import without_autocast, working_dtype
from mctf_compile.kernels.ordering import descending


def select(score: Tensor, count: int, lead: int, tail: int) -> tuple[Tensor, Tensor]:
    """``torch.ops.mctf.select`` in ATen. A tie goes to the token at the lower position."""
    n = score.shape[1]
    position = torch.arange(n, device=score.device).expand_as(score)
    order = descending(score[:, lead : n - tail]) + lead
    return torch.cat([position[:, :lead], order[:, :count], position[:, n - tail :]], 1), order[:, count:]


def nearest(x: Tensor, keep: Tensor, gone: Tensor, lead: int, tail: int) -> Tensor:
    """``torch.ops.mctf.nearest`` in ATen; cosines in float32 or wider, and a tie goes to the first of ``keep``."""
    with without_autocast():
        unit = torch.nn.functional.normalize(x.to(working_dtype(x.dtype)), dim=-1, eps=1e-8)
        keep = keep[:, lead : keep.shape[1] - tail]
        of = unit.gather(1, gone[:, :, None].expand(-1, -1, x.shape[2]))
        to = unit.gather(1, keep[:, :, None].expand(-1, -1, x.shape[2]))
        return (of @ to.transpose(1, 2)).argmax(-1) + lead
