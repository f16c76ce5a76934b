"""``mctf::group`` and ``mctf::pool``: from a matching to fused tokens."""

from torch import Tensor

from mctf_compile.kernels.library import composite, resized
from mctf_compile.kernels.pooling import aten


def group_shapes(raw: Tensor, size: Tensor, keep: Tensor, gone: Tensor, into: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Empty results of ``mctf::group``: index and weight [B, N], size [B, M]."""
    return keep.new_empty(raw.shape), raw.new_empty(raw.shape), size.new_empty(keep.shape)


@composite(
    "group(Tensor raw, Tensor size, Tensor keep, Tensor gone, Tensor into) -> (Tensor, Tensor, Tensor)", group_shapes
)
def group(raw: Tensor, size: Tensor, keep: Tensor, gone: Tensor, into: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The map, the pooling weights and the new sizes that a matching gives; constants for autograd.

    Args:
        raw: [B, N] pooling weights before normalisation (MCTF: informativeness times size), raised to the
            least positive number of their dtype.
        size: [B, N] token sizes.
        keep: int64 [B, M], the old position of each new token's carrier, as ``mctf::match`` returns it.
        gone: int64 [B, r], the old positions of the tokens that left.
        into: int64 [B, r], the new position each went into.

    Returns:
        index: int64 [B, N], the new position of every old token.
        weight: [B, N], ``raw`` normalised to sum to 1 in each group.
        size: [B, M], the sums of the sizes.
    """
    return aten.group(raw.detach(), size.detach(), keep, gone, into)


def pool_shapes(x: Tensor, weight: Tensor | None, keep: Tensor, gone: Tensor, into: Tensor, dim: int) -> Tensor:
    """An empty result of ``mctf::pool``: like ``x`` with M tokens at ``dim``."""
    return resized(x, dim, keep.shape[1])


@composite("pool(Tensor x, Tensor? weight, Tensor keep, Tensor gone, Tensor into, int dim) -> Tensor", pool_shapes)
def pool(x: Tensor, weight: Tensor | None, keep: Tensor, gone: Tensor, into: Tensor, dim: int) -> Tensor:
    """Combine the tokens of each group: the weighted sum, or the maximum where ``weight`` is None.

    Args:
        x: [B, ..., N, ...] with the tokens at ``dim`` (not 0), floating; differentiable.
        weight: [B, N] normalised pooling weights, from ``mctf::group``.
        keep: the matching, as for ``mctf::group``.
        gone: see there.
        into: see there.
        dim: the dimension of the tokens.

    Returns:
        [B, ..., M, ...] in the dtype of ``x``.

    Source: Lee et al., CVPR 2024, eq. 7.
    """
    return aten.pool(x, weight, keep, gone, into, dim)


def _keep_shapes(x: Tensor, keep: Tensor, dim: int) -> Tensor:
    return resized(x, dim, keep.shape[1])


@composite("keep(Tensor x, Tensor keep, int dim) -> Tensor", _keep_shapes)
def keep(x: Tensor, keep: Tensor, dim: int) -> Tensor:
    """The tokens that stay, as they are; the others are dropped.

    Args:
        x: [B, ..., N, ...] with the tokens at ``dim`` (not 0), of any dtype; differentiable.
        keep: int64 [B, M], the positions of those that stay.
        dim: the dimension of the tokens.

    Returns:
        [B, ..., M, ...].
    """
    return x.gather(dim, aten.along(keep, x, dim))


@composite("mlerp(Tensor x, Tensor weight, Tensor keep, Tensor gone, Tensor into) -> Tensor")
def mlerp(x: Tensor, weight: Tensor, keep: Tensor, gone: Tensor, into: Tensor) -> Tensor:
    """The factor that gives the mean of each group the largest norm of its members.

    Args:
        x: [B, N, C], floating; differentiable.
        weight: [B, N], the weights of the mean, before normalisation.
        keep: the matching, as for ``mctf::group``.
        gone: see there.
        into: see there.

    Returns:
        [B, M]: max_k |x_k| / |mean|; 1 where the mean is 0.

    Source: MLERP, Kim et al., WACV 2024 (arXiv 2312.01026), section 3.3.
    """
    return aten.mlerp(x, weight, keep, gone, into)
