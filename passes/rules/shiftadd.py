"""The operators of ShiftAddViT: attention on binary queries and keys, and layers with two weights."""

from __future__ import annotations

import torch
from torch import Tensor

import mctf_compile.kernels  # noqa: F401  registers torch.ops.mctf
from mctf_compile.errors import Declined
from mctf_compile.passes.axes import FEATURES, Place
from mctf_compile.passes.rules.attention import attention_operands
from mctf_compile.passes.rules.base import rule
from mctf_compile.passes.rules.call import Call, Flow, Fused, V


def sized_binary_attention(call: Fused[V]) -> V:
    """Attention in which key j occurs s_j times: ``mctf.sized_binary_attention``."""
    given = attention_operands(call, "query", "key", "value")
    keys = call.place("key", len(call.dims("key")) - 2)
    if keys.before or keys.after:
        raise Declined("attention meets the token axis inside a product of axes")
    if call.to_itself(keys):
        raise Declined("linear attention has no weight that a token gives itself alone")
    operands = given.query, given.key, given.value
    if call.log_sizes(keys) is None:
        out = torch.ops.mctf.binary_attention(*operands)
    else:
        out = torch.ops.mctf.sized_binary_attention(*operands, call.size(keys))
    return call.result(given.layout.join(out, call.value("query").tensor))


def sized_binary_importance(
    call: Fused[V], query: Tensor, key: Tensor, keys: Place, bias: Tensor | None
) -> tuple[Tensor, None, None]:
    """What each key receives where key j occurs s_j times; the map is never made."""
    size = None if call.log_sizes(keys) is None else call.size(keys)
    received: Tensor = torch.ops.mctf.binary_importance(query, key, size)
    return received, None, None


@rule(
    "mctf::binary_attention",
    reads="query key value",
    fused=sized_binary_attention,
    called="binary attention",
    layer=True,
    received=sized_binary_importance,
)
def binary_attention(call: Call) -> Flow:
    q, k, v = (call.dims(name) for name in ("query", "key", "value"))
    align = call.table.align
    mixed = (k[-2], q[-1], *align(k[-2], v[-2]), *align(q[-2], k[-2]), *align(q[-1], k[-1]), v[-1])
    for a, b, c in zip(q[:-2], k[:-2], v[:-2]):
        mixed += align(a, b) + align(a, c)
    return Flow((*q[:-1], v[-1]), mixed)


def mean_of_neighbours(call: Fused[V]) -> V:
    """A fused token has the mean of what its members find around them."""
    names = ("lead", "rows", "columns")
    weight, places = call.value("weight").tensor, [call.args[name] for name in names]
    return call.by_place("x", lambda x: torch.ops.mctf.neighbours(x, weight, *places))


@rule(
    "mctf::neighbours",
    reads="x weight lead rows columns",
    fused=mean_of_neighbours,
    called="a convolution of the values",
    layer=True,
    by_place=True,
)
def neighbours(call: Call) -> Flow:
    dims = call.dims("x")
    return Flow(dims, (dims[2],))


@rule(
    "mctf::routed_linear",
    reads="input second weight bias other other_bias",
    called="a linear layer over the tokens",
    layer=True,
    channels=-1,
)
def routed_linear(call: Call) -> Flow:
    x, second = call.dims("input"), call.dims("second")
    mixed = tuple(dim for a, b in zip(x[:-1], second) for dim in call.table.align(a, b))
    for name in ("weight", "other"):
        call.table.unify(x[-1], call.dims(name)[-1])
    return Flow((*x[:-1], call.table.fresh(call.shape[-1], FEATURES)), (*mixed, x[-1]))
