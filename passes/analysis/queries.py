"""Pass: which blocks work on queries that read another sequence, and not on its own tokens. Pure analysis."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from mctf_compile.narrowing import present
from mctf_compile.passes.analysis.normalize import constants
from mctf_compile.passes.analysis.sizes import Sizes
from mctf_compile.passes.analysis.structure import Block
from mctf_compile.passes.analysis.token_axes import Axes
from mctf_compile.passes.axes import FEATURES, Dim, Size, Tokens, atoms, mentions, places, product, size_at
from mctf_compile.passes.pipeline import State, graph_pass
from mctf_compile.passes.rules import rule_of, schema_arguments, sources
from mctf_compile.passes.rules.base import wrap

aten = torch.ops.aten


@graph_pass("queries", requires=("blocks", "sizes"), ensures=("blocks",))
def run(state: State) -> None:
    normal = present(state.normal)
    known = constants(state.gm, normal, state.examples)
    state.blocks = mark_queries(present(state.blocks), normal.graph, present(state.axes), known, present(state.sizes))


@dataclass(frozen=True)
class _Reading:
    """Attention of tokens at ``query_axis`` to others at ``key_axis``, whose values are ``value``."""

    query_axis: Dim
    key_axis: Dim
    value: fx.Node


def mark_queries(
    blocks: Sequence[Block],
    graph: fx.Graph,
    axes: Axes,
    known: Collection[fx.Node],
    sizes: Sizes,
) -> list[Block]:
    """The blocks, with ``queries`` set of those whose tokens are queries of a decoder.

    Such tokens read another sequence by cross-attention. So do those of an image that a text conditions; what tells
    them apart is what the tokens are made of beside what they read:

    1. Of parameters alone, as the objects of DETR and the queries of a Q-Former: queries.
    2. Of a sequence that the graph is given, as by a decoder that is compiled alone: queries, where it is shorter than
       the sequence that they read.
    3. Of anything else, as an image's patches: none.

    ``known``: the parameters and buffers of the graph. A symbolic number of tokens counts as what it is for the inputs
    that the graph was captured with.
    """
    given = _from_inputs(graph, known)
    readings = [reading for reading in _readings(graph, axes) if reading.value in given]
    return [replace(b, queries=_are_queries(b, readings, axes, given, sizes)) for b in blocks]


def _are_queries(
    block: Block,
    readings: Sequence[_Reading],
    axes: Axes,
    given: Collection[fx.Node],
    sizes: Sizes,
) -> bool:
    if block.tokens is None:
        return False
    tokens = block.tokens
    read = [
        axes.table.canonical(r.key_axis)
        for r in readings
        if mentions((axes.table.canonical(r.query_axis),), tokens)
        and not mentions((axes.table.canonical(r.key_axis),), tokens)
    ]
    if not read:
        return False
    made_of = [origin for origin in _origins(present(block.entry), tokens, axes) if origin in given]
    if not all(_is_sequence(origin, tokens, axes) for origin in made_of):
        return False
    return not made_of or any(_longer(product(keys), tokens.size, sizes) for keys in read)


def _longer(other: Size, own: Size, sizes: Sizes) -> bool:
    """Whether a sequence is known to be longer than another."""
    known = sizes.known(other) and sizes.known(own)
    return known and size_at(other, sizes.hints) > size_at(own, sizes.hints)


def _from_inputs(graph: fx.Graph, known: Collection[fx.Node]) -> set[fx.Node]:
    """The tensors whose values depend on what the model is given, and not on its parameters and on shapes alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            own = node not in known and isinstance(node.meta.get("val"), Tensor)
        else:
            own = node.op == "call_function" and not found.isdisjoint(sources(node))
        if own:
            found.add(node)
    return found


def _readings(graph: fx.Graph, axes: Axes) -> Iterator[_Reading]:
    """Every attention of a graph, whatever its queries and keys are."""
    for node in graph.nodes:
        packet = getattr(node.target, "overloadpacket", None)
        if node not in axes.dims:
            continue
        if packet is aten.scaled_dot_product_attention:
            args = schema_arguments(node)
            yield _Reading(axes.of(args["query"])[-2], axes.of(args["key"])[-2], args["value"])
        elif packet is aten.softmax:
            dims = axes.of(node)
            at = wrap(schema_arguments(node)["dim"], len(dims))
            value = _value(node, dims[at], axes)
            if value is not None:
                yield _Reading(tuple(axis for d, dim in enumerate(dims) if d != at for axis in dim), dims[at], value)


def _value(weights: fx.Node, keys: Dim, axes: Axes) -> fx.Node | None:
    """What a softmax over ``keys`` weighs: the other operand of the next product, which sums over them."""
    inside = {atom for atom in atoms(keys) if atom.name != FEATURES}

    def over_keys(node: fx.Node) -> bool:
        dims = axes.dims.get(node)
        return isinstance(dims, tuple) and any(atom in inside for dim in axes.of(node) for atom in atoms(dim))

    queue, seen = [weights], {weights}
    while queue:
        node = queue.pop(0)
        for user in node.users:
            rule = rule_of(user) if user.op == "call_function" else None
            if rule is not None and rule.factors is not None:
                others = [n for n in rule.factors(schema_arguments(user)) if n is not node]
                if len(others) == 1 and over_keys(others[0]) and not over_keys(user):
                    return others[0]
            elif user not in seen and over_keys(user):
                seen.add(user)
                queue.append(user)
    return None


def _origins(stream: fx.Node, tokens: Tokens, axes: Axes) -> list[fx.Node]:
    """The values that a residual stream's tokens come from: those that have them, made of none that has.

    What tokens read of others is none of them: neither keys nor values have the readers' axis.
    """

    def has_tokens(node: fx.Node) -> bool:
        dims = axes.dims.get(node, ())
        several = dims if isinstance(dims, list) else [dims]
        return any(mentions(axes.table.canonical_dims(of_one), tokens) for of_one in several)

    found: list[fx.Node] = []
    stack, seen = [stream], {stream}
    while stack:
        node = stack.pop()
        before = [n for n in sources(node) if has_tokens(n)]
        if not before:
            found.append(node)
        stack.extend(n for n in before if n not in seen)
        seen.update(before)
    return found


def _is_sequence(node: fx.Node, tokens: Tokens, axes: Axes) -> bool:
    """Whether a value is a sequence of tokens that the graph is given: they stand in one dimension of it."""
    found = places(axes.of(node), tokens) if node.op == "placeholder" else None
    return found is not None and not any(place.rest for place in found)
