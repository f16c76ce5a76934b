"""``mctf::unmerge``: give every token its group's value back."""

from torch import Tensor

from mctf_compile.kernels.library import composite, resized
from mctf_compile.kernels.pooling.aten import along


def _shapes(y: Tensor, index: Tensor, dim: int) -> Tensor:
    return resized(y, dim, index.shape[1])


@composite("unmerge(Tensor y, Tensor index, int dim) -> Tensor", _shapes)
def unmerge(y: Tensor, index: Tensor, dim: int) -> Tensor:
    """Gather fused tokens through a map.

    Args:
        y: [B, ..., M, ...] with the fused tokens at ``dim`` (not 0); differentiable.
        index: int64 [B, N], the position in ``y`` of every token, from ``mctf::group`` (or composed).
        dim: the dimension of the tokens.

    Returns:
        [B, ..., N, ...]: token n has the value of its group.
    """
    return y.gather(dim, along(index, y, dim))
