"""Why tokens cannot stay fused, in the words of someone who wrote the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from mctf_compile.passes.rules import find_rule, schema_arguments
from mctf_compile.passes.subclasses import described, wrappers

aten = torch.ops.aten


def name_of(node: fx.Node) -> str:
    """An operator by the name that its users know: "a 3×3 convolution", "a linear layer", "cumsum"."""
    if wrappers(node):
        return described(node.target, wrappers(node))
    called = getattr(find_rule(node.target), "called", None)
    if callable(called):
        return str(called(schema_arguments(node)))
    return called or getattr(getattr(node.target, "overloadpacket", None), "__name__", None) or str(node.target)


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
            rule = find_rule(user.target)
            if user.op == "output":
                return "an output"
            if isinstance(user.target, OpOverload) and not (rule and (rule.passing or rule.elements)):
                return "windows" if user.target is aten.linear.default else name_of(user)
        front = following
    return "another layout"


def regrouped(node: fx.Node, shape: Iterable[Any]) -> str:
    """A reshape that takes the token axis apart, with the shape that it makes and what for."""
    return f"the tokens are reshaped to [{', '.join(map(str, shape))}] for {purpose(node)}"
