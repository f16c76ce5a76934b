"""Operators that work position by position: arithmetic, activations, casts, dropout."""

import torch

from mctf_compile.passes.axes import Dim
from mctf_compile.passes.rules.base import Call, Flow, rule

aten = torch.ops.aten


@rule(aten.add, aten.hardswish, aten.hardsigmoid, aten.hardtanh, aten.prelu, aten.masked_fill, aten.where)
def pointwise(call: Call) -> Flow:
    """Operands broadcast from the right; aligned dimensions are one axis."""
    rank = len(call.shape)
    out: list[Dim] = [()] * rank
    mixed: tuple[Dim, ...] = ()
    for node in call.tensors():
        for offset, dim in enumerate(reversed(call.dims_of(node)), 1):
            mixed += call.table.align(out[rank - offset], dim)
            out[rank - offset] = out[rank - offset] or dim
    return Flow(tuple(out), mixed)


@rule(
    aten.dropout, aten.feature_dropout, aten.contiguous, aten.clone, aten.alias, aten.detach, aten.to,
    aten._to_copy, aten.type_as, aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like, aten.rand_like,
    aten.randn_like, aten.bernoulli, aten.lift_fresh_copy, aten.resolve_conj, aten.alpha_dropout,
    ignores=("other",),
)
def same_layout(call: Call) -> Flow:
    """The result has the axes of the first tensor, and nothing else is read by position."""
    return Flow(call.dims_of(call.tensors()[0]))


@rule(aten.new_empty, aten.new_zeros, aten.new_ones, aten.new_full, ignores=("self",))
def new(call: Call) -> Flow:
    """A new tensor takes dtype and device from its operand and nothing else."""
    return Flow(call.table.fresh_dims(call.shape))
