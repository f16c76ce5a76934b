"""Pass: find which output features of a fused projection each of q, k and v reads. Pure analysis.

One-step-ahead attention computes q and k of the old tokens and v of the fused ones, so a fused
``qkv`` projection must be computed in parts. It is a linear, or several that are added, as with LoRA.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from mctf_compile.methods import Site
from mctf_compile.narrowing import function_of, node_of, present
from mctf_compile.passes.analysis.token_axes import Axes
from mctf_compile.passes.axes import Axis, Dims, atoms
from mctf_compile.passes.pipeline import State, graph_pass
from mctf_compile.passes.rules import RULES, Elements, rule_of, schema_arguments, sources
from mctf_compile.passes.rules.base import wrap

aten = torch.ops.aten
_BY_POSITION = RULES[aten.mul.Tensor].axes


@graph_pass("projections", requires=("plan",))
def run(state: State) -> None:
    plan = present(state.plan)
    if plan.site is not Site.AHEAD:
        return
    found: dict[fx.Node, Projection] = {}
    for planned in plan.fusing:
        attention, entry = planned.block.attention, present(planned.block.entry)
        found |= find_projections([attention.query, attention.key, attention.value], entry, present(state.axes))
    state.plan = replace(plan, projections=found)


@dataclass(frozen=True)
class Projection:
    """A value that is a rearranged range of the features of ``source``: a linear, or what has parts as linears have.

    The value is ``source[..., start:stop]`` with its last dimension split to ``shape``, then permuted by ``order``.
    """

    source: fx.Node
    start: int
    stop: int
    shape: tuple[int, ...]
    order: tuple[int, ...]


def find_projection(node: fx.Node, axes: Axes) -> Projection | None:
    """The part of a linear that ``node`` is, where nothing but layout lies between and it is a true part."""
    chain = _layout_chain(node, axes)
    if chain is None:
        return None
    linear = chain[0]
    features = axes.of(linear)[-1]
    inside = {*features, *atoms(features)}
    index = _feature_indices(chain, axes, inside)
    if index is None:
        return None
    flat = index.flatten()
    width = linear.meta["val"].shape[-1]
    start, stop = int(flat.min()), int(flat.max()) + 1
    if flat.numel() != stop - start or stop - start == width:
        return None
    return _arrange(linear, node, index, start, stop, axes, inside)


def is_linear(node: fx.Node) -> bool:
    """Whether a node is a linear layer whose weights are no tensor subclass."""
    return node.target is aten.linear.default


def with_parts(node: fx.Node, axes: Axes) -> list[fx.Node]:
    """The operands of a node of which a range of features is all that the same range of its own is made of.

    Where linears are added (LoRA), scaled or cast, they are; anything else there is one number for each feature.
    """
    rule = rule_of(node) if node.op == "call_function" else None
    value = node.meta.get("val")
    if rule is None or not isinstance(value, Tensor) or not isinstance(axes.dims.get(node), tuple):
        return []
    if rule.elements is not Elements.CONVERTED and rule.axes is not _BY_POSITION:
        return []
    tensors = [n for n in sources(node) if isinstance(n.meta.get("val"), Tensor)]
    whole = [n for n in tensors if axes.of(n) == axes.of(node) and (is_linear(n) or with_parts(n, axes))]
    rest = [n for n in tensors if n not in whole]
    return whole if not any(dim for n in rest for dim in axes.of(n)[:-1]) else []


def linears_of(source: fx.Node, axes: Axes) -> list[fx.Node]:
    """The linears that a source of projections is made of."""
    return [source] if is_linear(source) else [n for part in with_parts(source, axes) for n in linears_of(part, axes)]


def read_by(source: fx.Node, axes: Axes) -> list[fx.Node]:
    """The values that computing a range of a source reads."""
    if is_linear(source):
        return source.all_input_nodes
    parts = with_parts(source, axes)
    return [
        n for operand in source.all_input_nodes for n in (read_by(operand, axes) if operand in parts else [operand])
    ]


def _layout_chain(node: fx.Node, axes: Axes) -> list[fx.Node] | None:
    """The nodes from a source of projections to ``node``, that first, where all others only move positions."""
    chain = [node]
    for _ in range(24):
        if chain[0].target is not operator.getitem and not _moves(chain[0]):
            source = is_linear(chain[0]) or with_parts(chain[0], axes)
            return chain if source and len(chain) > 1 else None
        chain.insert(0, node_of(chain[0].args[0]))
    return None


def _feature_indices(chain: list[fx.Node], axes: Axes, inside: set[Axis]) -> Tensor | None:
    """Replay the chain on the numbers of the features, every other dimension shrunk to 1."""
    # A tensor, or several where an operator has made parts.
    value: Any = torch.arange(_int(chain[0].meta["val"].shape[-1]))
    for node in chain:
        if node is chain[0]:
            value = value.expand(*[1] * (len(axes.of(node)) - 1), -1)
        elif node.target is operator.getitem:
            value = value[node.args[1]]
        else:
            value = _moved(value, node, axes, inside)
        # Features that were cut to pieces have names of their own, and are followed no further.
        if value is None or (isinstance(value, Tensor) and list(value.shape) != _shrunk(axes.of(node), inside)):
            return None
    index: Tensor = value
    return index


def _int(size: int | torch.SymInt) -> int:
    return size if isinstance(size, int) else 0


def _shrunk(dims: Dims, inside: set[Axis]) -> list[int]:
    """The shape that has only the feature axes."""
    return [math.prod(axis.size for axis in dim if _is_inside(axis, inside)) for dim in dims]


def _is_inside(axis: Axis, inside: set[Axis]) -> bool:
    return axis in inside or any(atom in inside for atom in atoms((axis,)))


def _moves(node: fx.Node) -> bool:
    """Whether an operator only moves positions, or takes some of them."""
    rule = rule_of(node) if node.op == "call_function" else None
    return rule is not None and rule.elements is not None and rule.elements.moved


def _moved(value: Tensor, node: fx.Node, axes: Axes, inside: set[Axis]) -> Any:
    """What an operator makes of the numbers of the features, one tensor or several; None where that cannot be told."""
    elements, args = present(rule_of(node)).elements, schema_arguments(node)
    if elements is Elements.REGROUPED:
        shape = _shrunk(axes.of(node), inside)
        return value.reshape(shape) if math.prod(shape) == value.numel() else None
    if elements is Elements.TAKEN:
        source = node_of(node.args[0]).meta["val"].shape
        d = wrap(args["dim"], len(source))
        if value.shape[d] != source[d] or source[d] == 1:
            # Positions of another axis are taken: all of them, or the result is none of the linear's.
            made = node.meta["val"]
            return value if isinstance(made, Tensor) and list(made.shape) == list(source) else None
    if len(node.all_input_nodes) > 1:
        return None
    return function_of(node)(value, *node.args[1:], **node.kwargs)


def _arrange(
    linear: fx.Node, node: fx.Node, index: Tensor, start: int, stop: int, axes: Axes, inside: set[Axis]
) -> Projection | None:
    """How ``linear(...)[..., start:stop]`` becomes ``node``: split the last dimension, then permute."""
    source, target = axes.of(linear)[:-1], axes.of(node)
    strides = {d: int(index.select(d, 1).flatten()[0]) - start for d in range(index.dim()) if index.shape[d] > 1}
    feature_dims = sorted(strides, key=strides.__getitem__, reverse=True)
    shape = tuple(index.shape[d] for d in feature_dims)
    expected = torch.arange(start, stop).reshape(shape or (1,))
    compact = index.permute(*feature_dims, *[d for d in range(index.dim()) if d not in feature_dims])
    if not torch.equal(compact.flatten(), expected.flatten()):
        return None
    order = []
    for d, dim in enumerate(target):
        if d in feature_dims:
            if not all(_is_inside(axis, inside) for axis in dim):
                return None
            order.append(len(source) + feature_dims.index(d))
        else:
            matches = [s for s, other in enumerate(source) if other == dim and s not in order]
            if not matches:
                return None
            order.append(matches[0])
    if sorted(order) != list(range(len(source) + len(shape))):
        return None
    return Projection(linear, start, stop, shape, tuple(order))


def find_projections(operands: list[fx.Node], entry: fx.Node, axes: Axes) -> dict[fx.Node, Projection]:
    """All the parts of the fused projections of ``entry`` that ``operands`` are computed from.

    1. Back from the operands, through norms and rotations, to the linears behind them.
    2. Forward from each, through layout operators, to the last values that are parts of it: q, k and v,
       and the MLP's share where one linear serves both.
    """
    linears, seen, queue = [], set(), list(operands)
    while queue:
        node = queue.pop()
        if node in seen or node <= entry or not isinstance(node.meta.get("val"), (Tensor, tuple, list)):
            continue
        seen.add(node)
        if is_linear(node):
            linears.append(node)
        else:
            queue.extend(sources(node))
    found: dict[fx.Node, Projection] = {}
    queue, seen = [user for linear in linears for user in linear.users], set()
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        if with_parts(node, axes):
            queue.extend(node.users)
        if _layout_chain(node, axes) is None:
            continue
        queue.extend(node.users)
        projection = find_projection(node, axes) if isinstance(node.meta.get("val"), Tensor) else None
        if projection is not None:
            found[node] = projection
    # The last one of each chain, where all that is made of another is one too.
    return {n: p for n, p in found.items() if not n.users or any(user not in found for user in n.users)}
