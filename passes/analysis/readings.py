"""Every attention of a graph, whatever its queries and keys are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from torch import fx

from mctf_compile.passes.analysis.structure import Attention
from mctf_compile.passes.analysis.token_axes import Axes
from mctf_compile.passes.analysis.towers import is_layer
from mctf_compile.passes.axes import FEATURES, Dim, atoms
from mctf_compile.passes.rules import find_rule, rule_of, schema_arguments, sources
from mctf_compile.passes.rules.base import wrap

aten = torch.ops.aten


def reading_at(node: fx.Node, axes: Axes) -> Attention | None:
    """The attention at a node: an operator that is one, or a softmax between two products."""
    if node not in axes.dims:
        return None
    if attends(node):
        return in_one_operator(node, axes)
    return _spelled_out(node, axes) if getattr(node.target, "overloadpacket", None) is aten.softmax else None


def attends(node: fx.Node) -> bool:
    """Whether a node is attention in one operator, as ``scaled_dot_product_attention`` is."""
    rule = find_rule(node.target)
    return rule is not None and rule.received is not None


def in_one_operator(node: fx.Node, axes: Axes) -> Attention:
    """The attention that a call of ``scaled_dot_product_attention``, or of another operator like it, is."""
    args = schema_arguments(node)
    q, k, v = args["query"], args["key"], args["value"]
    return Attention(node, q, k, v, None, None, axes.of(k)[-2], axes.of(q)[-2])


def _spelled_out(softmax: fx.Node, axes: Axes) -> Attention | None:
    dims = axes.of(softmax)
    at = wrap(schema_arguments(softmax)["dim"], len(dims))
    inside = {atom for atom in atoms(dims[at]) if atom.name != FEATURES}

    def over_keys(node: fx.Node) -> bool:
        held = axes.dims.get(node)
        return isinstance(held, tuple) and any(atom in inside for dim in axes.of(node) for atom in atoms(dim))

    logits = _nearest(softmax, lambda n: n.all_input_nodes, over_keys)
    after = _nearest(softmax, lambda n: list(n.users), lambda n: True)
    if logits is None or after is None or over_keys(after[1]):
        return None
    factors, weighed = factors_of(logits[1]), [n for n in factors_of(after[1]) if n is not after[0]]
    keys = [n for n in factors if over_keys(n)]
    queries = [n for n in factors if n not in keys]
    if len(keys) != 1 or len(queries) != 1 or len(weighed) != 1 or not over_keys(weighed[0]):
        return None
    shared = {atom for dim in axes.of(keys[0]) for atom in atoms(dim)}
    own: Dim = next((d for d in reversed(dims) if d and not shared & set(atoms(d))), ())
    return Attention(after[1], queries[0], keys[0], weighed[0], logits[1], softmax, dims[at], own)


def factors_of(node: fx.Node) -> Sequence[fx.Node]:
    """The two operands of a product; none of another node."""
    rule = rule_of(node) if node.op == "call_function" else None
    return () if rule is None or rule.factors is None else rule.factors(schema_arguments(node))


def _nearest(
    start: fx.Node, step: Callable[[fx.Node], Iterable[fx.Node]], passes: Callable[[fx.Node], bool]
) -> tuple[fx.Node, fx.Node] | None:
    """The nearest product in one direction, through nodes that ``passes`` takes, and the node before it on the way."""
    queue, seen = [start], {start}
    while queue:
        node = queue.pop(0)
        for n in step(node):
            if n in seen or not passes(n):
                continue
            if factors_of(n):
                return node, n
            seen.add(n)
            queue.append(n)
    return None


def is_of_inputs(attention: Attention, given: Collection[fx.Node]) -> bool:
    """Whether another graph has made the queries and keys: no layer makes them of the inputs ``given``."""
    return all(_is_input(node, given) for node in (attention.query, attention.key))


def _is_input(node: fx.Node, given: Collection[fx.Node]) -> bool:
    stack, seen, found = [node], {node}, False
    while stack:
        n = stack.pop()
        if n.op == "call_function" and is_layer(n):
            return False
        found |= n in given and n.op == "placeholder"
        before = [s for s in values_read(n) if s not in seen]
        stack.extend(before)
        seen.update(before)
    return found


def values_read(node: fx.Node) -> list[fx.Node]:
    """The inputs of a node whose values tell its own; what holds one number everywhere reads at most that number."""
    rule = find_rule(node.target)
    if rule is None or rule.uniform is None:
        return sources(node)
    number = rule.uniform(schema_arguments(node))
    return [number] if isinstance(number, fx.Node) else []


def from_inputs(graph: fx.Graph, known: Collection[fx.Node]) -> set[fx.Node]:
    """The tensors whose values depend on what the model is given, and not on its parameters and on shapes alone.

    ``known``: the parameters and buffers of the graph.
    """
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            own = node not in known and isinstance(node.meta.get("val"), torch.Tensor)
        else:
            own = node.op == "call_function" and not found.isdisjoint(values_read(node))
        if own:
            found.add(node)
    return found
