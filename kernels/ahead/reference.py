"""One-step-ahead attention as the paper has it: the pooled map A' = R A S, then A' V."""

import torch
from torch import Tensor

from mctf_compile.kernels.pooling.reference import assignment


def ahead(a: Tensor, v: Tensor, weight: Tensor | None, keep: Tensor, gone: Tensor, into: Tensor) -> Tensor:
    """The reference of ``torch.ops.mctf.ahead`` without dropout; see there. Builds the pooled map."""
    members = assignment(keep, gone, into)
    if weight is None:
        columns = torch.einsum("bhqk,bnk->bhqn", a.double(), members)
        outside = members[:, None, :, :, None] == 0
        pooled = columns[:, :, None].masked_fill(outside, float("-inf")).amax(3)
        return torch.einsum("bhmn,bhnd->bhmd", pooled, v.double()).to(v.dtype)
    rows = members * weight.double()[:, None]
    pooled = torch.einsum("bmq,bhqk,bnk->bhmn", rows, a.double(), members)
    return torch.einsum("bhmn,bhnd->bhmd", pooled, v.double()).to(v.dtype)
