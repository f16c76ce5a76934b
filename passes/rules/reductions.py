"""Reductions over positions. Over fused tokens each position counts as often as its size says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mctf_compile.errors import Declined
from mctf_compile.passes.axes import Dims
from mctf_compile.passes.rules.base import Call, Flow, rule, wrap

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


def weighted_sum(call: FusedCall) -> Value:
    """Σ s x, and for a mean Σ s x / Σ s (the number of tokens does not change)."""
    x = call.intensive("self")
    gone, _ = reduced(call.call)
    place = call.only_place("self")
    if place.dim not in gone or place.before or place.after:
        raise Declined("a reduction meets the token axis inside a product of axes")
    weighted = x.tensor * call.sizes_like("self", place).to(x.tensor.dtype)
    keep = call.args.get("keepdim", False)
    total = weighted.sum(sorted(gone), keepdim=keep, dtype=call.args.get("dtype"))
    if call.packet is aten.mean:
        total = total / call.dense_count("self", gone)
    return call.result(total)


@rule(aten.mean, aten.sum, fused=weighted_sum)
def total(call: Call) -> Flow:
    return flow(call)


@rule(aten.amax, aten.amin, fused=lambda call: call.emit())
def extreme(call: Call) -> Flow:
    """A maximum over copies is the maximum over tokens."""
    return flow(call)


@rule(aten.var, aten.std, aten.linalg_vector_norm, aten.logsumexp, aten.prod, aten.any, aten.all)
def other(call: Call) -> Flow:
    return flow(call)


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


@rule(aten.log_softmax, aten.cumsum, aten.sort, aten.argsort, aten.flip, aten.roll)
def along_one(call: Call) -> Flow:
    """The layout stays, positions along the dimension meet; over tokens: unmerged."""
    dims = call.dims("self")
    chosen = call.args.get("dim", call.args.get("dims"))
    chosen = [chosen] if isinstance(chosen, int) else chosen
    mixed = tuple(dims[wrap(d, len(dims))] for d in chosen) if chosen else dims
    return Flow([dims, dims] if call.node.target.overloadpacket is aten.sort else dims, mixed)
