"""``mctf::group`` and ``mctf::pool``: from a matching to fused tokens."""

from torch import Tensor

from mctf_compile.kernels.library import composite
from mctf_compile.kernels.pooling import aten


@composite(
    "group(Tensor raw, Tensor size, Tensor keep, Tensor gone, Tensor into) -> (Tensor, Tensor, Tensor)"
)
def group(raw: Tensor, size: Tensor, keep: Tensor, gone: Tensor, into: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The map, the pooling weights and the new sizes that a matching gives; constants for autograd.

    Args:
        raw: [B, N] pooling weights before normalisation (MCTF: informativeness times size), raised to the
            least positive number of their dtype.
        size: [B, N] token sizes.
        keep [B, M], gone [B, r], into [B, r]: a matching, as ``mctf::match`` returns it.

    Returns:
        index: int64 [B, N], the new position of every old token.
        weight: [B, N], ``raw`` normalised to sum to 1 in each group.
        size: [B, M], the sums of the sizes.
    """
    return aten.group(raw.detach(), size.detach(), keep, gone, into)


@composite("pool(Tensor x, Tensor? weight, Tensor keep, Tensor gone, Tensor into, int dim) -> Tensor")
def pool(x: Tensor, weight: Tensor | None, keep: Tensor, gone: Tensor, into: Tensor, dim: int) -> Tensor:
    """Combine the tokens of each group: the weighted sum, or the maximum where ``weight`` is None.

    A mask has no mean: of a boolean ``x`` each group has its carrier's value.

    Args:
        x: [B, ..., N, ...] with the tokens at ``dim`` (not 0), floating (differentiable) or bool.
        weight: [B, N] normalised pooling weights, from ``mctf::group``.
        keep, gone, into: the matching.

    Returns:
        [B, ..., M, ...] in the dtype of ``x``.

    Source: Lee et al., CVPR 2024, eq. 7.
    """
    return aten.pool(x, weight, keep, gone, into, dim)
