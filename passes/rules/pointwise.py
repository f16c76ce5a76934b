"""Operators that work position by position: arithmetic, activations, casts, dropout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, TypeAlias

from mctf_compile.errors import Declined
from mctf_compile.narrowing import present
from mctf_compile.passes.axes import Dim, Dims
from mctf_compile.passes.rules.base import Elements, rule
from mctf_compile.passes.rules.call import Arguments, Call, Flow, Fused, V

Axes: TypeAlias = Callable[[Call], Flow]

# How a new tensor is made: none of it is read by position.
MAKING = "dtype layout device pin_memory memory_format non_blocking copy"


def broadcast(call: Call, rank: int) -> Flow:
    """The tensors of a call brought to ``rank`` dimensions from the right; dimensions that are aligned are one axis."""
    return aligned(call, [call.dims_of(node) for node in call.tensors()], rank)


def aligned(call: Call, operands: Sequence[Dims], rank: int) -> Flow:
    """The same of some dims."""
    out: list[Dim] = [()] * rank
    mixed: tuple[Dim, ...] = ()
    for dims in operands:
        for offset, dim in enumerate(reversed(dims), 1):
            mixed += call.table.align(out[rank - offset], dim)
            out[rank - offset] = out[rank - offset] or dim
    return Flow(tuple(out), mixed)


@rule(
    "add.Tensor",
    "add.Scalar",
    "sub.Tensor",
    "sub.Scalar",
    "subtract.Tensor",
    "subtract.Scalar",
    "rsub.Tensor",
    "rsub.Scalar",
    "masked_fill.Scalar",
    "masked_fill.Tensor",
    "where.self",
    "where.ScalarOther",
    "where.ScalarSelf",
    "where.Scalar",
    reads="self other alpha mask value condition",
    broadcasts=True,
    prevails=True,
)
@rule(
    "mul.Tensor",
    "hardswish",
    "hardsigmoid",
    "hardtanh",
    "max.other",
    "min.other",
    # PyTorch tags those above not, and none that goes by two names but by the first.
    "__and__.Tensor",
    "__and__.Scalar",
    "__or__.Tensor",
    "__or__.Scalar",
    "__xor__.Tensor",
    "__xor__.Scalar",
    "absolute",
    "arccos",
    "arccosh",
    "arcsin",
    "arcsinh",
    "arctan",
    "arctan2",
    "arctanh",
    "complex",
    "conj",
    "_conj",
    "divide.Scalar",
    "divide.Scalar_mode",
    "divide.Tensor",
    "divide.Tensor_mode",
    "fix",
    "floor_divide",
    "floor_divide.Scalar",
    "greater.Scalar",
    "greater.Tensor",
    "greater_equal.Scalar",
    "greater_equal.Tensor",
    "imag",
    "isclose",
    "isreal",
    "less.Scalar",
    "less.Tensor",
    "less_equal.Scalar",
    "less_equal.Tensor",
    "log_sigmoid",
    "multiply.Scalar",
    "multiply.Tensor",
    "negative",
    "not_equal.Scalar",
    "not_equal.Tensor",
    "polar",
    "real",
    "resolve_conj",
    "resolve_neg",
    "special_digamma",
    "special_erf",
    "special_erfc",
    "special_erfinv",
    "special_exp2",
    "special_expit",
    "special_expm1",
    "special_gammaln",
    "special_i0",
    "special_log1p",
    "special_logit",
    "special_ndtr",
    "special_psi",
    "special_round",
    "special_sinc",
    "special_xlogy",
    "special_xlogy.other_scalar",
    "special_xlogy.self_scalar",
    "true_divide.Scalar",
    reads="self other min_val max_val real imag abs angle rounding_mode rtol atol equal_nan eps decimals",
    broadcasts=True,
)
@rule("gelu", "relu", "silu", reads="self approximate", broadcasts=True, passing=True)
def pointwise(call: Call) -> Flow:
    """Each position of the result is made of the operands' at that position."""
    return broadcast(call, len(call.shape))


@rule("contiguous", "clone", "alias", "lift_fresh_copy", reads="self memory_format", elements=Elements.REGROUPED)
@rule(
    "detach",
    "to.device",
    "to.dtype",
    "to.other",
    "to.dtype_layout",
    "_to_copy",
    "type_as",
    reads=f"self other {MAKING}",
    ignores=("other",),
    elements=Elements.CONVERTED,
)
@rule("dropout", reads="input p train", elements=Elements.THINNED, passing=True)
@rule("zeros_like", reads=f"self {MAKING}", uniform=lambda arguments: 0)
@rule("ones_like", reads=f"self {MAKING}", uniform=lambda arguments: 1)
@rule("full_like", reads=f"self fill_value {MAKING}", uniform=itemgetter("fill_value"))
@rule("fill.Scalar", reads="self value", uniform=itemgetter("value"))
@rule("empty_like", reads=f"self {MAKING}", uniform=lambda arguments: None)
@rule(
    "feature_dropout",
    "alpha_dropout",
    "feature_alpha_dropout",
    "rrelu",
    reads="self input p train lower upper training generator",
)
def same_layout(call: Call) -> Flow:
    """The result has the axes of the first tensor, and nothing else is read by position."""
    return Flow(call.dims_of(call.tensors()[0]))


@rule("outer", "ger", reads="self vec2")
def outer(call: Call) -> Flow:
    """Every number of one times every number of the other."""
    return Flow(call.dims("self") + call.dims("vec2"))


@rule("one_hot", reads="self num_classes")
def one_hot(call: Call) -> Flow:
    return Flow((*call.dims("self"), call.table.fresh(call.shape[-1])))


@rule("frexp.Tensor", reads="self")
def two_parts(call: Call) -> Flow:
    dims = call.dims("self")
    return Flow([dims, dims])


def drawn_for_each(call: Fused[V]) -> V:
    """In training all tokens stay; copies that were fused would share one number."""
    if not call.relaxed:
        raise Declined(f"{present(call.packet).__name__} draws a number for each of the original tokens")
    value: V = call.emit()
    return value


@rule("rand_like", "randn_like", "bernoulli", "bernoulli.p", reads=f"self p generator {MAKING}", fused=drawn_for_each)
def drawn(call: Call) -> Flow:
    """Numbers that programs compare and sort: unlike those of dropout, not to be shared by copies."""
    dims = call.dims("self")
    return Flow(dims, dims)


def made_as(uniform: Callable[[Arguments], Any], *names: str) -> Callable[[Axes], Axes]:
    """``rule`` for new tensors that hold one number."""
    reads = f"self size s fill_value {MAKING}"
    return rule(*names, reads=reads, ignores=("self",), fused=lambda call: call.original(), uniform=uniform)


@made_as(lambda arguments: None, "new_empty")
@made_as(lambda arguments: 0, "new_zeros", "zeros")
@made_as(lambda arguments: 1, "new_ones", "ones")
@made_as(itemgetter("fill_value"), "new_full", "full")
@made_as(itemgetter("s"), "scalar_tensor")
def new(call: Call) -> Flow:
    """A new tensor takes dtype and device from an operand and nothing else; its sizes are those of the program."""
    return Flow(call.table.fresh_dims(call.shape), call.dims("self") if "self" in call.args else ())
