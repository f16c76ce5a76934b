"""Why tokens cannot stay fused, in the words of someone who wrote the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from mctf_compile.passes.rules import schema_arguments
from mctf_compile.passes.subclasses import described, wrappers

aten = torch.ops.aten
CONVOLUTIONS = (aten.conv1d, aten.conv2d, aten.conv3d)
LAYOUT = (
    aten.reshape,
    aten.view,
    aten._unsafe_view,
    aten.flatten,
    aten.unflatten,
    aten.permute,
    aten.transpose,
    aten.contiguous,
    aten.clone,
    aten.unsqueeze,
    aten.squeeze,
    aten.roll,
    aten.pad,
    aten.constant_pad_nd,
)
ALIKE = (aten.batch_norm, aten.layer_norm, aten.group_norm, aten.gelu, aten.relu, aten.silu, aten.dropout, aten.to)


def name_of(node: fx.Node) -> str:
    """An operator by the name that its users know: "a 3×3 convolution", "a linear layer", "cumsum"."""
    if wrappers(node):
        return described(node.target, wrappers(node))
    packet = getattr(node.target, "overloadpacket", None)
    if packet in CONVOLUTIONS:
        kernel = schema_arguments(node)["weight"].meta["val"].shape[2:]
        return f"a {'×'.join(str(k) for k in kernel)} convolution"
    if packet is aten.linear:
        return "a linear layer over the tokens"
    if packet in (aten.scaled_dot_product_attention, aten.softmax):
        return "attention within windows"
    return getattr(packet, "__name__", None) or str(node.target)


ATTENTION = ("scaled_dot_product_attention", "multi_head_attention_forward", "softmax", "_softmax")


def why_no_attention(graph: fx.Graph) -> str:
    """Why a graph without blocks has none."""
    for node in graph.nodes:
        if getattr(node.target, "__name__", None) in ATTENTION and wrappers(node):
            kind = type(wrappers(node)[0]).__name__
            return f"attention is a call of {name_of(node)}, and what that does is the {kind}'s own"
    return "the graph has no self-attention over tokens"


def purpose(node: fx.Node) -> str:
    """What a change of layout is made for: the first operator behind it that is more than layout."""
    front, seen = [node], {node}
    while front:
        following = [user for n in front for user in n.users if user not in seen]
        seen.update(following)
        for user in following:
            packet = getattr(user.target, "overloadpacket", None)
            if user.op == "output":
                return "an output"
            if packet not in LAYOUT + ALIKE and packet is not None:
                return "windows" if packet is aten.linear else name_of(user)
        front = following
    return "another layout"


def regrouped(node: fx.Node, shape: Iterable[Any]) -> str:
    """A reshape that takes the token axis apart, with the shape that it makes and what for."""
    return f"the tokens are reshaped to [{', '.join(map(str, shape))}] for {purpose(node)}"
