"""Reductions over positions. Over fused tokens each position counts as often as its size says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mctf_compile.errors import Declined
from mctf_compile.passes.axes import Dims, Place
from mctf_compile.passes.rules.base import Call, Flow, rule, wrap
from mctf_compile.passes.rules.pointwise import pointwise

if TYPE_CHECKING:
    from mctf_compile.passes.fused_call import FusedCall
    from mctf_compile.passes.fusion import Value

aten = torch.ops.aten


def reduced(call: Call) -> tuple[set[int], Dims]:
    """The dimensions that a reduction removes, and the dims of its operand."""
    dims = call.dims_of(call.tensors()[0])
    chosen = call.args.get("dim")
    if chosen is None or chosen == []:
        return set(range(len(dims))), dims
    chosen = [chosen] if isinstance(chosen, int) else chosen
    return {wrap(d, len(dims)) for d in chosen}, dims


def flow(call: Call) -> Flow:
    gone, dims = reduced(call)
    keep = call.args.get("keepdim", False)
    out = tuple(() if d in gone else dim for d, dim in enumerate(dims) if keep or d not in gone)
    return Flow(out, tuple(dims[d] for d in gone))


def whole_place(call: FusedCall) -> tuple[set[int], Place]:
    """The dimensions that go, and the one place of the token axis, which goes as a whole."""
    gone, _ = reduced(call.call)
    place = call.only_place(call.operand)
    if not gone.issuperset((place.dim, *place.rest)) or place.before or place.after:
        raise Declined("a reduction runs over a part of the token axis, or of a product with it")
    return gone, place


def weighted_sum(call: FusedCall) -> Value:
    """Σ s x, and for a mean Σ s x / n (the number n of tokens does not change)."""
    gone, place = whole_place(call)
    x = call.intensive(call.operand).tensor
    weighted = x * call.sizes_like(call.operand, place).to(x.dtype)
    keep = call.args.get("keepdim", False)
    total = weighted.sum(sorted(gone), keepdim=keep, dtype=call.args.get("dtype"))
    if call.packet is not aten.sum:
        total = total / call.dense_count(call.operand, gone)
    return call.result(total)


@rule(aten.mean, aten.sum, fused=weighted_sum)
def total(call: Call) -> Flow:
    return flow(call)


@rule(aten.amax, aten.amin, aten.any, aten.all, fused=lambda call: call.emit())
def extreme(call: Call) -> Flow:
    """A maximum over copies is the maximum over tokens."""
    return flow(call)


def weighted_norm(call: FusedCall) -> Value:
    """(Σ s |x|^p)^(1/p); the maximum for p = ∞."""
    order = call.args.get("ord", call.args.get("p"))
    order = 2.0 if order is None else float(order)
    gone, place = whole_place(call)
    x = call.intensive(call.operand).tensor
    if abs(order) != float("inf"):
        if order <= 0:
            raise Declined(f"a norm of order {order} over fused tokens")
        x = x * (call.sizes_like(call.operand, place) ** (1 / order)).to(x.dtype)
    keep, dtype = call.args.get("keepdim", False), call.args.get("dtype")
    return call.result(aten.linalg_vector_norm(x, order, sorted(gone), keep, dtype=dtype))


@rule(aten.linalg_vector_norm, aten.norm, fused=weighted_norm)
def norm(call: Call) -> Flow:
    return flow(call)


def weighted_variance(call: FusedCall) -> Value:
    """Σ s (x - mean)² / (n - correction), and its root for a standard deviation."""
    gone, place = whole_place(call)
    x = call.intensive(call.operand).tensor
    size, dims = call.sizes_like(call.operand, place).to(x.dtype), sorted(gone)
    count = call.dense_count(call.operand, gone)
    mean = (x * size).sum(dims, keepdim=True) / count
    correction = call.args.get("correction", call.args.get("unbiased", True))
    # A default of None is Bessel's correction.
    correction = 1 if correction is None else correction
    variance = ((x - mean) ** 2 * size).sum(dims, keepdim=call.args.get("keepdim", False)) / (count - correction)
    return call.result(variance.sqrt() if call.packet is aten.std else variance)


@rule(aten.var, aten.std, fused=weighted_variance)
def variance(call: Call) -> Flow:
    return flow(call)


def weighted_logsumexp(call: FusedCall) -> Value:
    """log Σ s exp(x)."""
    gone, place = whole_place(call)
    x = call.intensive(call.operand).tensor
    x = x + call.sizes_like(call.operand, place).log().to(x.dtype)
    return call.result(x.logsumexp(sorted(gone), keepdim=call.args.get("keepdim", False)))


@rule(aten.logsumexp, fused=weighted_logsumexp)
def logsumexp(call: Call) -> Flow:
    return flow(call)


@rule(aten.prod)
def product(call: Call) -> Flow:
    return flow(call)


@rule(aten.max, aten.min)
def extreme_with_index(call: Call) -> Flow:
    """Over a dimension: values and positions; positions have no form on fused tokens."""
    if "other" in call.args:
        return pointwise(call)
    if "dim" not in call.args:
        return flow(call)
    one = flow(call)
    return Flow([one.out, one.out], one.mixed)


def pooled_to_one(call: FusedCall) -> Value:
    """Adaptive average pooling to a single position: a mean over the grid."""
    x = call.intensive("self").tensor
    place = call.only_place("self")
    spatial = set(range(2, len(call.dims("self"))))
    if not spatial.issuperset((place.dim, *place.rest)) or any(call.dims_out(0)[2:]):
        raise Declined("the grid of tokens is pooled to a smaller one")
    weighted = x * call.sizes_like("self", place).to(x.dtype)
    return call.result(weighted.sum(sorted(spatial), keepdim=True) / call.dense_count("self", spatial))


@rule(aten.adaptive_avg_pool1d, aten.adaptive_avg_pool2d, aten.adaptive_avg_pool3d, fused=pooled_to_one)
def adaptive_pool(call: Call) -> Flow:
    dims = call.dims("self")
    rank = len(call.args["output_size"])
    return Flow((*dims[:-rank], *call.table.fresh_dims(call.shape[-rank:], "x")), dims[-rank:])


def weighted_softmax(call: FusedCall) -> Value:
    """softmax(l + log s): the weight of a token is that of all its copies together."""
    dim = call.wrapped("dim")
    logits = call.intensive("self")
    place = call.place("self", dim)
    if place.before or place.after:
        raise Declined("a softmax meets the token axis inside a product of axes")
    tensor = logits.tensor
    bias = call.log_sizes_like("self", place)
    if bias is not None:
        dtype = tensor.dtype
        tensor = (tensor.to(bias.dtype) + bias).to(dtype)
    return call.result(call.target(tensor, call.args["dim"], call.args.get("dtype")), mass=dim)


@rule(aten.softmax, fused=weighted_softmax)
def softmax(call: Call) -> Flow:
    dims = call.dims("self")
    return Flow(dims, (dims[wrap(call.args["dim"], len(dims))],))


def weighted_log_softmax(call: FusedCall) -> Value:
    """x - log Σ s exp(x): the logarithm of the weight of one copy."""
    dim = call.wrapped("dim")
    logits = call.intensive("self").tensor
    place = call.place("self", dim)
    if place.before or place.after:
        raise Declined("a softmax meets the token axis inside a product of axes")
    logits = logits.to(call.args.get("dtype") or logits.dtype)
    sized = logits + call.sizes_like("self", place).log().to(logits.dtype)
    return call.result(logits - sized.logsumexp(dim, keepdim=True))


@rule(aten.log_softmax, fused=weighted_log_softmax)
def log_softmax(call: Call) -> Flow:
    return softmax(call)


@rule(aten.cumsum, aten.sort, aten.argsort, aten.flip, aten.roll)
def along_one(call: Call) -> Flow:
    """The layout stays, positions along the dimension meet; over tokens: unmerged."""
    dims = call.dims("self")
    chosen = call.args.get("dim", call.args.get("dims"))
    chosen = [chosen] if isinstance(chosen, int) else chosen
    mixed = tuple(dims[wrap(d, len(dims))] for d in chosen) if chosen else dims
    return Flow([dims, dims] if call.node.target.overloadpacket is aten.sort else dims, mixed)
