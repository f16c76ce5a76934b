"""Why tokens cannot stay fused, in the words of someone who wrote the model."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from mctf_compile.passes.analysis.readings import factors_of, from_inputs
from mctf_compile.passes.analysis.token_axes import Axes
from mctf_compile.passes.axes import FEATURES, Atom, Dim, Dims, atoms, product
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


def why_no_attention(graph: fx.Graph, axes: Axes, known: Collection[fx.Node]) -> str:
    """Why a graph without blocks has none. ``known``: its parameters and buffers."""
    for node in graph.nodes:
        if getattr(node.target, "__name__", None) in ATTENTION and wrappers(node):
            kind = type(wrappers(node)[0]).__name__
            return f"attention is a call of {name_of(node)}, and what that does is the {kind}'s own"
    return _without_map(graph, axes, from_inputs(graph, known)) or "the graph has no self-attention over tokens"


LINEAR = (
    "attention without a softmax between queries and keys: queries meet the product of keys and values "
    "(linear attention), so that there is no map over the tokens"
)
UNNORMED = "attention without a softmax: its map over the tokens meets the values as it is"
CHANNELS = "attention over channels (cross-covariance): its map has no tokens"


def _without_map(graph: fx.Graph, axes: Axes, given: Collection[fx.Node]) -> str | None:
    """What takes the place of attention over tokens, if anything does: two products of what the model is given.

    1. The first sums over tokens that the result of the second has: keys and values, or queries and keys by channels.
    2. The first has the tokens twice, and the second sums over them: a map without a softmax.
    """
    for node in graph.nodes:
        if node.op != "call_function" or len([n for n in factors_of(node) if n in given]) != 2:
            continue
        summed = {atom for dim in axes.mixed_by(node) for atom in atoms(dim) if atom.name != FEATURES}
        meets = _next_product(node, axes, given)
        if meets is None:
            continue
        second, softmax = meets
        if summed & _atoms(second, axes):
            return CHANNELS if softmax else LINEAR
        again = {atom for dim in axes.mixed_by(second) for atom in atoms(dim) if atom.name != FEATURES}
        if not softmax and sum(bool(set(atoms(dim)) & again) for dim in axes.of(node)) > 1:
            return UNNORMED
    return None


def _next_product(node: fx.Node, axes: Axes, given: Collection[fx.Node]) -> tuple[fx.Node, bool] | None:
    """The nearest product behind another, of which both factors are ``given``, and whether a softmax is between."""
    queue, seen = [(node, False)], {node}
    while queue:
        at, softmax = queue.pop(0)
        for user in at.users:
            if user in seen or user.op != "call_function":
                continue
            seen.add(user)
            factors = factors_of(user)
            if factors and all(n in given for n in factors) and isinstance(axes.dims.get(user), tuple):
                return user, softmax
            if not factors and isinstance(axes.dims.get(user), tuple):
                queue.append((user, softmax or getattr(user.target, "overloadpacket", None) is aten.softmax))
    return None


def _atoms(node: fx.Node, axes: Axes) -> set[Atom]:
    return {atom for dim in axes.of(node) for atom in atoms(dim)}


def windows(dims: Dims, tokens: Dim) -> tuple[str, str] | None:
    """A grid with the axes of ``dims``, and the part of it that ``tokens`` are, as "70×70" and "14×14".

    None unless the tokens are a part of every dimension that holds any of them, in sizes that are numbers.
    """
    inside = set(tokens)
    held = [dim for dim in dims if inside & set(dim)]
    parts = [tuple(axis for axis in dim if axis in inside) for dim in held]
    sizes = [(product(dim), product(part)) for dim, part in zip(held, parts)]
    if {axis for part in parts for axis in part} != inside or not all(isinstance(n, int) for s in sizes for n in s):
        return None
    grid, window = ("×".join(str(size[i]) for size in sizes) for i in (0, 1))
    return grid, window


def padded(node: fx.Node, axes: Axes, tokens: Dim) -> str | None:
    """What padding makes of a residual stream before attention over ``tokens``; None of another operator."""
    found = windows(axes.of(node), tokens) if node.target in PADDING else None
    if found is None or node.meta["val"].shape == node.all_input_nodes[0].meta["val"].shape:
        return None
    grid, window = found
    cut = "" if grid == window else f" and cut in windows of {window}"
    return f"the tokens are padded to {grid}{cut} before attention, which mixes padding with them"


PADDING = (aten.pad.default, aten.constant_pad_nd.default)


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
