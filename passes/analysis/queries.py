"""Pass: which blocks work on queries that read another sequence, and not on its own tokens. Pure analysis."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from torch import fx

from mctf_compile.narrowing import present
from mctf_compile.passes.analysis.normalize import constants
from mctf_compile.passes.analysis.readings import from_inputs, reading_at, values_read
from mctf_compile.passes.analysis.sizes import Sizes
from mctf_compile.passes.analysis.structure import Attention, Block
from mctf_compile.passes.analysis.token_axes import Axes
from mctf_compile.passes.axes import Size, Tokens, mentions, places, product, size_at
from mctf_compile.passes.pipeline import State, graph_pass


@graph_pass("queries", requires=("blocks", "sizes"), ensures=("blocks",))
def run(state: State) -> None:
    normal = present(state.normal)
    known = constants(state.gm, normal, state.examples)
    state.blocks = mark_queries(present(state.blocks), normal.graph, present(state.axes), known, present(state.sizes))


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
    given = from_inputs(graph, known)
    found = [reading for node in graph.nodes if (reading := reading_at(node, axes)) is not None]
    readings = [reading for reading in found if reading.value in given]
    return [replace(b, queries=_are_queries(b, readings, axes, given, sizes)) for b in blocks]


def _are_queries(
    block: Block,
    readings: Sequence[Attention],
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
        before = [n for n in values_read(node) if has_tokens(n)]
        if not before:
            found.append(node)
        stack.extend(n for n in before if n not in seen)
        seen.update(before)
    return found


def _is_sequence(node: fx.Node, tokens: Tokens, axes: Axes) -> bool:
    """Whether a value is a sequence of tokens that the graph is given: they stand in one dimension of it."""
    found = places(axes.of(node), tokens) if node.op == "placeholder" else None
    return found is not None and not any(place.rest for place in found)
