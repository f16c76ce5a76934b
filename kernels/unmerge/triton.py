"""Unmerging and its gradient in Triton."""

from torch import Tensor

from mctf_compile.kernels.pooling.triton import FLOATING, collect, expand_groups


def supported(y: Tensor) -> bool:
    """Whether ``unmerge_backward`` takes gradients like ``y``; ``unmerge`` takes any."""
    return y.dtype in FLOATING


def unmerge(y: Tensor, index: Tensor, dim: int) -> Tensor:
    """``torch.ops.mctf.unmerge``."""
    return expand_groups(y, None, None, None, index, index.shape[1], dim)


def unmerge_backward(dx: Tensor, index: Tensor, m: int, dim: int) -> Tensor:
    """The gradient of ``unmerge`` to its ``m`` fused tokens, from the one to its result.

    The sum over the members of each token, in their order, in float32.
    """
    return collect(dx, None, None, None, index, m, dim)
