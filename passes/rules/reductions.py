"""Reductions over positions. Over fused tokens each position counts as often as its size says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mctf_compile.errors import Declined, PassError
from mctf_compile.passes.axes import Dims
from mctf_compile.passes.rules.base import Call, Flow, rule, wrap
from mctf_compile.passes.rules.pointwise import pointwise

if TYPE_CHECKING:
    from mctf_compile.passes.rewriting.fused_call import FusedCall
    from mctf_compile.passes.rewriting.stream import Value

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


@dataclass(frozen=True)
class Sized:
    """What is reduced over fused tokens: ``x``, its sizes as a factor, the dimensions that go, and their count.

    ``count`` is the number of original positions, which fusing does not change; where tokens were dropped,
    it is the sum of the sizes that are left, of each image.
    """

    x: Tensor
    size: Tensor
    dims: list[int]
    count: Any
    keep: bool

    @classmethod
    def of(cls, call: FusedCall, dims: set[int] | None = None) -> Sized:
        """The operand of a reduction over all of the one token axis, and maybe over other dimensions."""
        gone = reduced(call.call)[0] if dims is None else dims
        place = call.only_place(call.operand)
        if not gone.issuperset((place.dim, *place.rest)) or place.before or place.after:
            raise Declined("a reduction runs over a part of the token axis, or of a product with it")
        x = call.intensive(call.operand).tensor
        size, dims = call.sizes_like(call.operand, place), sorted(gone)
        count = call.dense_count(call.operand, gone)
        if not call.conserves:
            count = size.expand([n if d in gone else m for d, (n, m) in enumerate(zip(x.shape, size.shape))])
            count = count.sum(dims, keepdim=True).to(x.dtype)
        return cls(x, size, dims, count, call.args.get("keepdim", False))

    def without(self, x: Tensor) -> Tensor:
        """``x``, reduced with dimensions of 1 left, as the operator's arguments ask for it."""
        return x if self.keep else x.squeeze(self.dims)


def weighted_sum(call: FusedCall) -> Value:
    """Σ s x, and for a mean Σ s x / n (the number n of tokens does not change)."""
    given = Sized.of(call)
    total = (given.x * given.size.to(given.x.dtype)).sum(given.dims, True, dtype=call.args.get("dtype"))
    return call.result(given.without(total if call.packet is aten.sum else total / given.count))


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
    given = Sized.of(call)
    x = given.x
    if abs(order) != float("inf"):
        if order <= 0:
            raise Declined(f"a norm of order {order} over fused tokens")
        x = x * (given.size ** (1 / order)).to(x.dtype)
    return call.result(aten.linalg_vector_norm(x, order, given.dims, given.keep, dtype=call.args.get("dtype")))


@rule(aten.linalg_vector_norm, aten.norm, fused=weighted_norm)
def norm(call: Call) -> Flow:
    return flow(call)


def weighted_variance(call: FusedCall) -> Value:
    """Σ s (x - mean)² / (n - correction), and its root for a standard deviation."""
    given = Sized.of(call)
    x, size = given.x, given.size.to(given.x.dtype)
    mean = (x * size).sum(given.dims, keepdim=True) / given.count
    correction = call.args.get("correction", call.args.get("unbiased", True))
    # A default of None is Bessel's correction.
    correction = 1.0 if correction is None else float(correction)
    variance = ((x - mean) ** 2 * size).sum(given.dims, True) / (given.count - correction)
    variance = given.without(variance)
    return call.result(variance.sqrt() if call.packet is aten.std else variance)


@rule(aten.var, aten.std, fused=weighted_variance)
def variance(call: Call) -> Flow:
    return flow(call)


def weighted_logsumexp(call: FusedCall) -> Value:
    """log Σ s exp(x)."""
    given = Sized.of(call)
    return call.result((given.x + given.size.log().to(given.x.dtype)).logsumexp(given.dims, given.keep))


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
    if any(call.out_dims()[0][2:]):
        raise Declined("the grid of tokens is pooled to a smaller one")
    given = Sized.of(call, set(range(2, len(call.dims("self")))))
    weighted = given.x * given.size.to(given.x.dtype)
    return call.result(weighted.sum(given.dims, keepdim=True) / given.count)


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
    if call.stream.fusion(call.generation, place.lead, place.tail).whole_to_itself:
        raise PassError("attention that is spelled out cannot be trained with dropped tokens; use "
                        "scaled_dot_product_attention (in timm: timm.layers.set_fused_attn(True))")
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
