"""Scaled dot-product attention over tokens that have sizes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from mctf_compile.errors import Declined
from mctf_compile.passes.axes import Dims, Place, Tokens, product
from mctf_compile.passes.rules.base import rule
from mctf_compile.passes.rules.call import Call, Flow, Fused, V


def scale_of(call: Call) -> float:
    """The factor on the logits: the argument, or D ** -0.5."""
    given = call.args.get("scale")
    scale: float = call.args["query"].meta["val"].shape[-1] ** -0.5 if given is None else given
    return scale


@dataclass(frozen=True)
class HeadLayout:
    """How the leading dimensions of q, k and v hold images and heads.

    ``apart``: images first, then any number of others; ``single``: images alone; ``joined``: images outside
    and ``heads`` inside one dimension.
    """

    kind: str
    heads: int = 1

    def split(self, x: Tensor) -> Tensor:
        """[..., N, D] -> [B, H, N, D]."""
        if self.kind == "single":
            return x.unsqueeze(1)
        if self.kind == "joined":
            apart: Tensor = x.unflatten(0, (-1, self.heads))
            return apart
        return x if x.dim() == 4 else x.flatten(1, -3)

    def join(self, x: Tensor, like: Tensor) -> Tensor:
        """[B, H, N, D] -> the leading dimensions of ``like``."""
        return x if like.dim() == 4 else x.reshape(*like.shape[:-2], *x.shape[-2:])


def head_layout(dims: Dims, tokens: Tokens) -> HeadLayout | None:
    """The layout of a query with these dims; None where images cannot be told from the rest."""
    lead, batch = dims[:-2], tokens.batch
    if lead and lead[0] == batch:
        return HeadLayout("apart" if len(lead) > 1 else "single")
    if len(lead) == 1 and lead[0][: len(batch)] == batch:
        heads = product(lead[0][len(batch) :])
        return HeadLayout("joined", heads) if isinstance(heads, int) else None
    return None


@dataclass(frozen=True)
class Operands:
    """Operands of attention as [B, H, N, D], an additive ``bias`` for its logits, and the layout they had.

    The bias has four dimensions too, of which some may be 1.
    """

    layout: HeadLayout
    query: Tensor
    key: Tensor
    value: Tensor | None
    bias: Tensor | None


def attention_operands(call: Fused[V], *names: str) -> Operands:
    """The operands named, in the generation of ``call``, with the bias."""
    if call.args.get("is_causal"):
        raise Declined("causal attention needs the order of the original tokens")
    if call.args.get("enable_gqa"):
        raise Declined("grouped-query attention is not fused")
    layout = head_layout(call.dims("query"), call.tokens)
    if layout is None or layout != head_layout(call.dims("key"), call.tokens):
        raise Declined("attention numbers its images otherwise than the residual stream does (windows or frames)")
    given = {name: call.intensive(name).tensor for name in names}
    bias = None
    if call.args.get("attn_mask") is not None:
        query = given["query"]
        bias = additive(call.intensive("attn_mask").tensor, query.dtype)
        if bias.dim() < query.dim():
            # It may be one for all images, all heads, or all queries; or one number.
            bias = bias.reshape(*[1] * (query.dim() - bias.dim()), *bias.shape)
        if query.dim() != 4:
            bias = layout.split(bias.expand(*query.shape[:-2], *bias.shape[-2:]))
    return Operands(
        layout,
        layout.split(given["query"]),
        layout.split(given["key"]),
        layout.split(given["value"]) if "value" in given else None,
        bias,
    )


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask (True: take part) as a bias of 0 and -inf; a bias as it is."""
    if mask.dtype is not torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, float("-inf"))


def sized_attention(call: Fused[V]) -> V:
    """Attention in which key j occurs s_j times: ``mctf.attention``."""
    given = attention_operands(call, "query", "key", "value")
    last = len(call.dims("key")) - 2
    log_size = None
    if any(last in (p.dim, *p.rest) for p in call.places_of(call.args["key"])):
        keys = call.place("key", last)
        if keys.before or keys.after:
            raise Declined("attention meets the token axis inside a product of axes")
        if call.to_itself(keys):
            if given.bias is not None or not call.places_of(call.args["query"]):
                raise Declined("tokens that count for themselves alone meet a bias, or queries of another kind")
            out = torch.ops.mctf.policy_attention(
                given.query, given.key, given.value, call.size(keys), scale_of(call.call)
            )
            return call.result(given.layout.join(out, call.value("query").tensor))
        log_size = call.log_sizes(keys)
    out = torch.ops.mctf.attention(
        given.query, given.key, given.value, log_size, given.bias, scale_of(call.call), call.args["dropout_p"]
    )
    return call.result(given.layout.join(out, call.value("query").tensor))


def sized_importance(
    call: Fused[V], query: Tensor, key: Tensor, keys: Place, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What each key receives of attention in which key j occurs s_j times, with its map."""
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.mctf.importance(
        query, key, call.log_sizes(keys), bias, scale_of(call.call)
    )
    return found


@rule(
    "scaled_dot_product_attention",
    reads="query key value attn_mask dropout_p is_causal scale enable_gqa",
    fused=sized_attention,
    broadcasts=True,
    called="attention within windows",
    layer=True,
    beside=True,
    received=sized_importance,
)
def attention(call: Call) -> Flow:
    q, k, v = (call.dims(name) for name in ("query", "key", "value"))
    align = call.table.align
    mixed = (k[-2], q[-1], *align(k[-2], v[-2]), *align(q[-1], k[-1]))
    mask = call.args.get("attn_mask")
    # From the right, as they broadcast; what is missing or 1 in one is that of another.
    leads = [dims[-3::-1] for dims in (q, k, v, *(() if mask is None else (call.dims_of(mask),)))]
    lead = tuple(next(filter(None, dims), ()) for dims in zip_longest(*leads, fillvalue=()))[::-1]
    for i, (a, b, c) in enumerate(zip_longest(*leads[:3], fillvalue=())):
        if i == 0 and call.args.get("enable_gqa") and not product(a) == product(b) == product(c):
            # Several heads of the queries share one of the keys.
            mixed += (a, b, c)
            continue
        mixed += align(a, b) + align(a, c) + align(b, c)
    if mask is not None:
        for a, b in zip(reversed((*q[:-1], k[-2])), reversed(call.dims_of(mask))):
            mixed += align(a, b)
    if call.args.get("is_causal"):
        mixed += (q[-2],)
    return Flow((*lead, q[-2], v[-1]), mixed)
