"""Reductions over positions. Over fused tokens each position counts as often as its size says."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from mctf_compile.errors import Declined, PassError
from mctf_compile.narrowing import present
from mctf_compile.passes.axes import Dims
from mctf_compile.passes.rules.base import Elements, rule, wrap
from mctf_compile.passes.rules.call import Call, Flow, Fused, V

if TYPE_CHECKING:
    from mctf_compile.passes.axes import Place

aten = torch.ops.aten


def reduced(call: Call) -> tuple[set[int], Dims]:
    """The dimensions that a reduction removes, and the dims of its operand."""
    dims = call.dims_of(call.tensors()[0])
    chosen = call.args.get("dim")
    # An empty list means every dimension, and to these two none.
    if chosen is None or (chosen == [] and call.node.target not in (aten.all.dims, aten.any.dims)):
        return set(range(len(dims))), dims
    chosen = [chosen] if isinstance(chosen, int) else chosen
    return {wrap(d, len(dims)) for d in chosen}, dims


def flow(call: Call) -> Flow:
    """The dims of each result of a reduction: all alike."""
    gone, dims = reduced(call)
    keep = call.args.get("keepdim", False)
    out = tuple(() if d in gone else dim for d, dim in enumerate(dims) if keep or d not in gone)
    return Flow(out if call.results == 1 else [out] * call.results, tuple(dims[d] for d in gone))


@dataclass(frozen=True)
class Sized:
    """What is reduced over fused tokens: ``x``, its sizes as a factor, the dimensions that go, and their count.

    Numbers with a fraction are in the dtype of the sizes or a wider one, and so rounded to a narrow dtype once; all
    others are int64, and so are their sizes. ``count`` is the number of original positions, which fusing does not
    change; where tokens were dropped, it is the sum of the sizes that are left, of each image.
    """

    x: Tensor
    size: Tensor
    dims: list[int]
    count: Any
    keep: bool

    @classmethod
    def of(cls, call: Fused[V], over: set[int] | None = None) -> Sized:
        """The operand of a reduction over all of the one token axis, and maybe over other dimensions."""
        gone = reduced(call.call)[0] if over is None else over
        value = call.intensive(call.operand)
        place = call.only_place(value)
        if not gone.issuperset((place.dim, *place.rest)) or place.before or place.after:
            raise Declined("a reduction runs over a part of the token axis, or of a product with it")
        x, size, dims = value.tensor, call.sizes(value, place), sorted(gone)
        x = x.to(call.args.get("dtype") or x.dtype)
        count = call.dense_count(call.operand, gone)
        if not call.conserves:
            count = size.expand([n if d in gone else m for d, (n, m) in enumerate(zip(x.shape, size.shape))])
            count = count.sum(dims, keepdim=True)
        if has_fraction(x):
            wide = torch.promote_types(x.dtype, size.dtype)
            x, size = x.to(wide), size.to(wide.to_real())
        else:
            x, size = x.to(torch.int64), call.as_integers(size)
        return cls(x, size, dims, count, call.args.get("keepdim", False))

    def total(self, x: Tensor) -> Tensor:
        """Σ s x, with dimensions of 1 left."""
        return (x * self.size).sum(self.dims, True)

    def without(self, x: Tensor) -> Tensor:
        """``x``, reduced with dimensions of 1 left, as the operator's arguments ask for it."""
        return x if self.keep else x.squeeze(self.dims)


def has_fraction(x: Tensor) -> bool:
    """Whether a tensor's dtype holds more than whole numbers: floating or complex."""
    return x.is_floating_point() or x.is_complex()


def real(given: Sized) -> Sized:
    """``given`` where it holds real numbers with a fraction."""
    if not given.x.is_floating_point():
        raise Declined(f"values of dtype {given.x.dtype} are reduced over fused tokens as real numbers")
    return given


def weighted_sum(call: Fused[V]) -> V:
    """Σ s x; for a mean Σ s x / n (the number n of tokens does not change), for a count x is 1 or 0."""
    given = Sized.of(call)
    total = given.total(given.x)
    if call.packet is aten.mean:
        total = total / given.count
    return call.result(given.without(total).to(call.dtype))


@rule("mean", "mean.dim", "sum", "sum.dim_IntList", reads="self dim keepdim dtype", fused=weighted_sum)
def total(call: Call) -> Flow:
    return flow(call)


def weighted_count(call: Fused[V]) -> V:
    """Σ s over the positions that are not 0."""
    given = Sized.of(call)
    return call.result(given.without(((given.x != 0) * call.as_integers(given.size)).sum(given.dims, True)))


@rule("count_nonzero", "count_nonzero.dim_IntList", reads="self dim", fused=weighted_count)
def count(call: Call) -> Flow:
    return flow(call)


def weighted_sum_of_numbers(call: Fused[V]) -> V:
    """Σ s x over what is a number, and for a mean divided by Σ s over the same."""
    given = Sized.of(call)
    number = ~given.x.isnan()
    total = given.total(torch.where(number, given.x, 0))
    if call.packet is aten.nanmean:
        total = total / given.total(number.to(given.size.dtype))
    return call.result(given.without(total).to(call.dtype))


@rule("nansum", "nanmean", reads="self dim keepdim dtype", fused=weighted_sum_of_numbers)
def total_of_numbers(call: Call) -> Flow:
    return flow(call)


@rule(
    "amax",
    "amin",
    "any",
    "any.dim",
    "any.dims",
    "all",
    "all.dim",
    "all.dims",
    "max",
    "min",
    "aminmax",
    reads="self dim keepdim",
    fused=lambda call: call.emit(),
)
def extreme(call: Call) -> Flow:
    """A maximum over copies is the maximum over tokens."""
    return flow(call)


def weighted_norm(call: Fused[V]) -> V:
    """(Σ s |x|^p)^(1/p); the maximum for p = ∞, the number of those that are not 0 for p = 0."""
    order = call.args.get("ord", call.args.get("p"))
    order = 2.0 if order is None else float(order)
    given = Sized.of(call)
    if not has_fraction(given.x):
        raise Declined(f"a norm of values of dtype {given.x.dtype} over fused tokens")
    x = given.x.abs()
    if order == 0:
        result = given.without(given.total((x != 0).to(given.size.dtype)))
    else:
        x = x if abs(order) == inf else x * given.size ** (1 / order)
        result = aten.linalg_vector_norm(x, order, given.dims, given.keep)
    return call.result(result.to(call.dtype))


@rule(
    "linalg_vector_norm",
    "norm.Scalar",
    "norm.ScalarOpt_dim",
    "norm.ScalarOpt_dim_dtype",
    "norm.ScalarOpt_dtype",
    reads="self ord p dim keepdim dtype",
    fused=weighted_norm,
)
def norm(call: Call) -> Flow:
    return flow(call)


def weighted_norm_of_vectors(call: Fused[V]) -> V:
    """Of a matrix there are norms that are none of its entries alone."""
    gone, dims = reduced(call.call)
    if call.args["ord"] is not None and (len(gone) > 1 or (len(dims) > 1 and call.args["dim"] is None)):
        raise Declined("a norm of matrices over the tokens")
    return weighted_norm(call)


@rule("linalg_norm", reads="self ord dim keepdim dtype", fused=weighted_norm_of_vectors)
def norm_of_vectors_or_matrices(call: Call) -> Flow:
    return flow(call)


def variance_and_mean(call: Fused[V]) -> tuple[Tensor, Tensor]:
    """Σ s (x - mean)² / (n - correction), and the mean; for a standard deviation its root."""
    given = real(Sized.of(call))
    mean = given.total(given.x) / given.count
    correction = call.args.get("correction", call.args.get("unbiased", True))
    # A default of None is Bessel's correction.
    freedom = given.count - (1.0 if correction is None else float(correction))
    if isinstance(freedom, Tensor):
        freedom = freedom.clamp(min=0)
    elif isinstance(freedom, float):
        freedom = max(freedom, 0.0)
    variance = given.total((given.x - mean) ** 2) / freedom
    if call.packet in (aten.std, aten.std_mean):
        variance = variance.sqrt()
    return given.without(variance).to(call.dtype), given.without(mean).to(call.dtype)


DEVIATION = "self dim unbiased correction keepdim"


@rule(
    "var",
    "var.dim",
    "var.correction",
    "std",
    "std.dim",
    "std.correction",
    reads=DEVIATION,
    fused=lambda call: call.result(variance_and_mean(call)[0]),
)
def variance(call: Call) -> Flow:
    return flow(call)


@rule(
    "var_mean",
    "var_mean.dim",
    "var_mean.correction",
    "std_mean",
    "std_mean.dim",
    "std_mean.correction",
    reads=DEVIATION,
    fused=lambda call: [call.result(x, index=i) for i, x in enumerate(variance_and_mean(call))],
)
def variance_beside_mean(call: Call) -> Flow:
    return flow(call)


def weighted_logsumexp(call: Fused[V]) -> V:
    """Log Σ s exp(x)."""
    given = Sized.of(call)
    if given.x.is_complex():
        raise Declined("a logarithm of a sum of complex exponentials over fused tokens")
    logits = given.x + given.size.log()
    return call.result(logits.logsumexp(given.dims, given.keep).to(call.dtype))


@rule("logsumexp", "special_logsumexp", reads="self dim keepdim", fused=weighted_logsumexp)
def logsumexp(call: Call) -> Flow:
    return flow(call)


def extreme_alone(call: Fused[V]) -> list[V | None]:
    """The values, where nothing reads their positions: those have no form on fused tokens."""
    if not reads_values_alone(call):
        raise Declined(f"the position of the {present(call.packet).__name__} among the original tokens is read")
    extreme = aten.amax if call.packet is aten.max else aten.amin
    values = extreme(call.intensive("self").tensor, [call.args["dim"]], call.args["keepdim"])
    return [call.result(values), None]


def reads_values_alone(call: Fused[V]) -> bool:
    """Whether of a call's results the first alone is read."""
    return all(user.target is operator.getitem and user.args[1] == 0 for user in call.node.users)


@rule("max.dim", "min.dim", reads="self dim keepdim", fused=extreme_alone)
def extreme_with_index(call: Call) -> Flow:
    return flow(call)


@rule(
    "prod",
    "prod.dim_int",
    "argmax",
    "argmin",
    "median",
    "median.dim",
    "nanmedian",
    "nanmedian.dim",
    "mode",
    "kthvalue",
    "quantile.scalar",
    "nanquantile.scalar",
    reads="self dim keepdim dtype k q interpolation",
)
def by_order(call: Call) -> Flow:
    """What has no form that sizes weight: over tokens they are unmerged."""
    return flow(call)


@rule("topk", reads="self k dim largest sorted")
def topk(call: Call) -> Flow:
    dims = call.dims("self")
    d = wrap(call.args["dim"], len(dims)) if dims else 0
    out = (*dims[:d], call.table.fresh(call.shape[d]), *dims[d + 1 :]) if dims else ()
    return Flow([out, out], dims[d : d + 1])


@rule("roll", reads="self shifts dims", elements=Elements.SHIFTED)
@rule(
    "cumsum",
    "cumprod",
    "cummax",
    "cummin",
    "logcumsumexp",
    "sort",
    "sort.stable",
    "argsort",
    "argsort.stable",
    "flip",
    reads="self dim dims dtype stable descending",
)
def along_one(call: Call) -> Flow:
    """The layout stays, positions along the dimension meet; over tokens: unmerged."""
    dims = call.dims("self")
    chosen = call.args.get("dim", call.args.get("dims"))
    chosen = [chosen] if isinstance(chosen, int) else chosen
    mixed = tuple(dims[wrap(d, len(dims))] for d in chosen) if chosen and dims else dims
    return Flow(dims if call.results == 1 else [dims] * call.results, mixed)


def pooled_to_one(call: Fused[V]) -> V:
    """Adaptive average pooling to a single position: a mean over the grid."""
    dims = call.dims("self")
    pooled = set(range(len(dims) - len(call.args["output_size"]), len(dims)))
    if any(call.out_dims()[0][d] for d in pooled):
        raise Declined("the grid of tokens is pooled to a smaller one")
    given = Sized.of(call, pooled)
    return call.result((given.total(given.x) / given.count).to(call.dtype))


@rule(
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    reads="self output_size",
    fused=pooled_to_one,
)
def adaptive_pool(call: Call) -> Flow:
    dims = call.dims("self")
    rank = len(call.args["output_size"])
    return Flow((*dims[:-rank], *call.table.fresh_dims(call.shape[-rank:], "x")), dims[-rank:])


def largest_of_grid(call: Fused[V]) -> list[V | None]:
    """Adaptive maximum pooling to a single position, where nothing reads which that was."""
    dims = call.dims("self")
    pooled = list(range(len(dims) - len(call.args["output_size"]), len(dims)))
    if any(call.out_dims()[0][d] for d in pooled):
        raise Declined("the grid of tokens is pooled to a smaller one")
    if not reads_values_alone(call):
        raise Declined("the position of the maximum among the original tokens is read")
    return [call.result(call.intensive("self").tensor.amax(pooled, keepdim=True)), None]


@rule(
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    reads="self output_size",
    fused=largest_of_grid,
)
def adaptive_max_pool(call: Call) -> Flow:
    pooled = adaptive_pool(call)
    return Flow([cast(Dims, pooled.out)] * 2, pooled.mixed)


def logits_of(call: Fused[V]) -> tuple[Tensor, int, Place]:
    """The operand of a softmax in the dtype that is asked for, its dimension, and the place of the tokens there."""
    logits, dim = call.intensive("self"), call.wrapped("dim")
    place = call.place_in(logits, dim)
    if place.before or place.after:
        raise Declined("a softmax meets the token axis inside a product of axes")
    return logits.tensor.to(call.args["dtype"] or logits.tensor.dtype), dim, place


def weighted_softmax(call: Fused[V]) -> V:
    """softmax(l + log s): the weight of a token is that of all its copies together.

    The sum is not rounded to a narrow dtype of the logits before it is exponentiated.
    """
    logits, dim, place = logits_of(call)
    if call.to_itself(place):
        raise PassError(
            "attention that is spelled out cannot be trained with dropped tokens; use "
            "scaled_dot_product_attention (in timm: timm.layers.set_fused_attn(True))"
        )
    log_size = call.log_sizes(place, logits.dtype)
    if log_size is not None:
        logits = logits + call.factor(log_size, call.value("self"), place)
    return call.result(aten.softmax(logits, dim).to(call.dtype), weights_dim=dim)


@rule("softmax.int", reads="self dim dtype", fused=weighted_softmax, called="attention within windows")
@rule("special_softmax", reads="self dim dtype", fused=weighted_softmax)
def softmax(call: Call) -> Flow:
    dims = call.dims("self")
    return Flow(dims, (dims[wrap(call.args["dim"], len(dims))],) if dims else ())


def weighted_log_softmax(call: Fused[V]) -> V:
    """X - log Σ s exp(x): the logarithm of the weight of one copy."""
    logits, dim, place = logits_of(call)
    size = call.sizes(call.value("self"), place)
    logits = logits.to(torch.promote_types(logits.dtype, size.dtype))
    return call.result((logits - (logits + size.to(logits.dtype).log()).logsumexp(dim, keepdim=True)).to(call.dtype))


@rule("log_softmax.int", "special_log_softmax", reads="self dim dtype", fused=weighted_log_softmax)
def log_softmax(call: Call) -> Flow:
    return softmax(call)
