"""``mctf::routed_linear``: a linear layer that has two weights, of which each token is multiplied by one."""

from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from mctf_compile.kernels.library import autocast_dtype, composite, opaque


def _shapes(x: Tensor, second: Tensor, weight: Tensor, bias: Tensor | None, *others: Tensor | None) -> Tensor:
    torch._check(second.shape == x.shape[:-1], lambda: f"routes {second.shape} for tokens {x.shape}")
    recorded = any(t is not None and t.requires_grad for t in (x, weight, bias, *others))
    result = x.new_empty(*x.shape[:-1], weight.shape[0], dtype=autocast_dtype(x))
    return result.requires_grad_(recorded and torch.is_grad_enabled())


def _macs(x: Tensor, second: Tensor, weight: Tensor, *_: Tensor | None) -> int:
    """Those of the weight that a token takes; computing both and choosing takes twice as many."""
    return prod(x.shape[:-1]) * prod(weight.shape)


@composite(
    "routed_linear(Tensor input, Tensor second, Tensor weight, Tensor? bias, Tensor other, Tensor? other_bias) "
    "-> Tensor",
    _shapes,
    _macs,
)
def routed_linear(
    input: Tensor, second: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor, other_bias: Tensor | None
) -> Tensor:
    """X other^T + other_bias for the tokens of which ``second`` is true, X weight^T + bias for the others.

    Args:
        input: X [..., C], differentiable.
        second: boolean [...], which tokens take the second weight.
        weight: [O, C], differentiable.
        bias: [O], or None.
        other: [O, C], differentiable.
        other_bias: [O], or None.

    Returns:
        [..., O] in the dtype of ``input``, or in that of autocast.
    """
    return torch.where(second[..., None], F.linear(input, other, other_bias), F.linear(input, weight, bias))


@opaque(
    "dispatched_linear(Tensor input, Tensor second, Tensor weight, Tensor? bias, Tensor other, Tensor? other_bias) "
    "-> Tensor",
    lambda x, second, weight, *_: x.new_empty(*x.shape[:-1], weight.shape[0]),
    _macs,
)
def dispatched_linear(
    input: Tensor, second: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor, other_bias: Tensor | None
) -> Tensor:
    """``mctf::routed_linear`` by one product for the tokens of each weight; ``other`` may be codes of its weights.

    Those are int8, as ``torch.ops.mctf.powers`` takes them. All operands but these are of one dtype.
    """
    rows, chosen = input.reshape(-1, input.shape[-1]), second.reshape(-1)
    out = rows.new_empty(len(rows), weight.shape[0])
    for mine, product, operands in (
        (~chosen, F.linear, (weight, bias)),
        (chosen, _by_codes if other.dtype is torch.int8 else F.linear, (other, other_bias)),
    ):
        where = mine.nonzero()[:, 0]
        if len(where) == len(rows):
            out = product(rows, *operands)
        elif len(where):
            out.index_copy_(0, where, product(rows[where], *operands))
    return out.view(*input.shape[:-1], -1)


def _by_codes(rows: Tensor, codes: Tensor, bias: Tensor | None) -> Tensor:
    from mctf_compile.kernels.on_cpu import shift_supported

    if shift_supported(rows, codes, bias):
        product: Tensor = torch.ops.mctf.shift_linear_cpp(rows, codes, bias)
        return product
    return F.linear(rows, torch.ops.mctf.powers(codes, rows.dtype), bias)
