"""Scaled dot-product attention over tokens that have sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mctf_compile.errors import Declined
from mctf_compile.passes.rules.base import Call, Flow, rule

if TYPE_CHECKING:
    from mctf_compile.passes.fused_call import FusedCall
    from mctf_compile.passes.fusion import Value

aten = torch.ops.aten


def scale_of(call: Call) -> float:
    """The factor on the logits: the argument, or D ** -0.5."""
    given = call.args.get("scale")
    return call.args["query"].meta["val"].shape[-1] ** -0.5 if given is None else given


def sized_attention(call: FusedCall) -> Value:
    """Attention in which key j occurs s_j times: ``mctf.attention``."""
    q, k, v = (call.intensive(name).tensor for name in ("query", "key", "value"))
    if call.args.get("is_causal"):
        raise Declined("causal attention needs the order of the original tokens")
    if q.dim() != 4 or q.shape[1] != k.shape[1]:
        raise Declined("attention over fused tokens needs the layout [B, H, N, D]")
    bias = None
    if call.args.get("attn_mask") is not None:
        bias = call.intensive("attn_mask").tensor
        if not bias.dtype.is_floating_point:
            raise Declined("a boolean attention mask cannot be fused")
    keys = next((p for p in call.places_of(call.args["key"]) if p.dim == 2), None)
    log_size = None
    if keys is not None:
        if keys.before or keys.after or call.batch_dim("key") != 0:
            raise Declined("attention over fused tokens needs the layout [B, H, N, D]")
        log_size = call.log_sizes(keys)
    out = torch.ops.mctf.attention(q, k, v, log_size, bias, scale_of(call.call), call.args["dropout_p"])
    return call.result(out)


@rule(aten.scaled_dot_product_attention, fused=sized_attention)
def attention(call: Call) -> Flow:
    q, k, v = (call.dims(name) for name in ("query", "key", "value"))
    agree = call.table.unify(k[-2], v[-2]) & call.table.unify(q[-1], k[-1])
    if not call.args.get("enable_gqa"):
        for a, b, c in zip(q[:-2], k[:-2], v[:-2]):
            agree &= (not (a and b) or call.table.unify(a, b)) and (not (b and c) or call.table.unify(b, c))
    mixed = (k[-2], q[-1])
    mask = call.args.get("attn_mask")
    if mask is not None:
        logits = (*q[:-1], k[-2])
        for offset, dim in enumerate(reversed(call.dims_of(mask)), 1):
            agree &= not dim or call.table.unify(logits[-offset], dim)
    if call.args.get("is_causal"):
        mixed += (q[-2],)
    return Flow((*q[:-1], v[-1]), mixed if agree else (*q, *k, *v))
