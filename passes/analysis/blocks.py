"""Pass: find the attention-MLP blocks of a graph from its structure alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import cast

import networkx as nx
import torch
from torch import fx

from mctf_compile.narrowing import function_of, node_of, present
from mctf_compile.passes.analysis.dataflow import Dataflow
from mctf_compile.passes.analysis.masks import mask_operands
from mctf_compile.passes.analysis.mutations import updates_statistics
from mctf_compile.passes.analysis.normalize import constants
from mctf_compile.passes.analysis.observations import assign
from mctf_compile.passes.analysis.packs import MASKED, Packs
from mctf_compile.passes.analysis.readings import attends, from_inputs, in_one_operator, is_of_inputs, reading_at
from mctf_compile.passes.analysis.reasons import name_of, padded, windows
from mctf_compile.passes.analysis.structure import Attention, Block
from mctf_compile.passes.analysis.token_axes import Axes
from mctf_compile.passes.axes import FEATURES, Cat, Dim, Dims, Size, Tokens, atoms, mentions, places, product
from mctf_compile.passes.pipeline import State, graph_pass
from mctf_compile.passes.rules import Elements, rule_of, schema_arguments
from mctf_compile.passes.rules.contractions import letters

aten = torch.ops.aten


@graph_pass("blocks", requires=("axes", "observations"), ensures=("blocks",))
def run(state: State) -> None:
    method = state.config.method
    protected = None if isinstance(method.protected, str) else method.protected
    graph = present(state.normal).graph
    known = constants(state.gm, present(state.normal), state.examples)
    found = find_blocks(graph, present(state.axes), protected, known)
    state.blocks = assign(present(state.observations), found, graph)


def find_blocks(
    graph: fx.Graph, axes: Axes, protected: int | None = None, known: Mapping[fx.Node, torch.Tensor] | None = None
) -> list[Block]:
    """Every self-attention over a token axis, in the order of execution, with its residual stream.

    1. Attention is one operator (scaled_dot_product_attention), or a softmax over an axis that a product contracts.
    2. The residual stream is the operand of the first addition after attention from which query, key
       and value all descend.
    3. The MLP ends at the next addition of two descendants of that sum.
    4. The batch axes are those of the residual stream that are neither tokens nor channels.

    Attention of queries and keys that the graph is given is none that could be followed; it has an entry all the same.
    ``known`` holds the tensors of the graph's constants (parameters and buffers), as far as they are known.
    """
    flow, packs = Dataflow(graph), Packs(graph, known or {})
    own = {node: found for node in graph.nodes if (found := _attention(node, axes)) is not None}
    attentions = list(own.values())
    blocks = _of_inputs(graph, axes, from_inputs(graph, known or {}), own)
    for i, attention in enumerate(attentions):
        following = attentions[i + 1].node if i + 1 < len(attentions) else None
        pack, images = _images(attention, packs, axes)
        block = _block(attention, following, flow, axes, protected, images)
        blocks.append(replace(block, pack=pack, module=_module(attention.node)))
    return sorted(blocks, key=lambda block: block.attention.weights or block.attention.node)


def _of_inputs(graph: fx.Graph, axes: Axes, given: Collection[fx.Node], beside: Collection[fx.Node]) -> list[Block]:
    """Attention whose queries and keys another graph has made, without that at the nodes ``beside``."""
    found = (reading_at(node, axes) for node in graph.nodes if node not in beside)
    return [
        Block(attention, None, problem=GIVEN, module=_module(attention.node))
        for attention in found
        if attention is not None and is_of_inputs(attention, given)
    ]


def _images(attention: Attention, packs: Packs, axes: Axes) -> tuple[fx.Node | None, tuple[int, ...]]:
    """The mask of an attention that keeps images in one sequence apart, and their numbers of tokens."""
    for mask, reader in mask_operands(attention).items():
        hides = reader.target is aten.masked_fill.Scalar and schema_arguments(reader)["value"] <= MASKED
        if attention.weights is None or hides or reader.target is aten.add.Tensor:
            images = packs.of(mask, reader, hides)
            # Else what is known of the mask's positions is nothing of the tokens'.
            if images and axes.of(mask)[-2:] == (attention.query_axis, attention.key_axis):
                return mask, images
    return None, ()


def _module(node: fx.Node) -> str | None:
    """The path of the module that a node runs in, as ``blocks.3.attn``."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    path, _ = list(stack.values())[-1]
    # Dynamo writes a path as Python: L['self']._modules['blocks'][3].attn.
    path = re.sub(r"^L\['\w+'\]\.?|_modules(?=\[)", "", path)
    return re.sub(r"\['?(\w+)'?\]", r".\1", path).strip(".").replace("..", ".") or None


# Why nothing can be fused where another graph has made queries and keys, as one before a graph break does.
GIVEN = "its queries and keys are inputs of the graph: what makes them of the tokens is in another"


def _attention(node: fx.Node, axes: Axes) -> Attention | None:
    """The self-attention over tokens at a node, if it is one.

    Attention over channels (cross-covariance) softmaxes an axis of features. Queries that are protected
    tokens alone (class attention) read the tokens, and there is nothing behind them to fuse.
    """
    if node not in axes.dims:
        return None
    if attends(node):
        attention: Attention | None = in_one_operator(node, axes)
    elif getattr(node.target, "overloadpacket", None) is aten.softmax:
        attention = _spelled_out(node, axes)
    else:
        return None
    if attention is None or not attention.key_axis:
        return None
    keys, queries = set(atoms(attention.key_axis)), set(atoms(attention.query_axis))
    tokens = _tokens(attention.key_axis, None)
    over_tokens = isinstance(tokens, str) or bool(queries & set(atoms(tokens.body)))
    features = all(atom.name == FEATURES for atom in keys)
    return attention if keys & queries and over_tokens and not features else None


def _spelled_out(softmax: fx.Node, axes: Axes) -> Attention | None:
    """softmax(q kᵀ …) v as nodes: the product before the softmax and the one after it."""
    dims = axes.of(softmax)
    dim = cast(int, softmax.args[1]) % len(dims)
    keys = set(atoms(dims[dim]))
    query_axis = next((d for i, d in enumerate(dims) if i != dim and set(atoms(d)) & keys), ())
    if not keys or not query_axis:
        return None

    def is_map(node: fx.Node) -> bool:
        """Whether a value has an entry for every pair of query and key."""
        held = axes.dims.get(node)
        return isinstance(held, tuple) and sum(bool(set(atoms(d)) & keys) for d in axes.of(node)) > 1

    def is_product(node: fx.Node) -> bool:
        rule = rule_of(node) if node.op == "call_function" else None
        return rule is not None and rule.factors is not None

    def makes_map(node: fx.Node) -> bool:
        return is_product(node) and not any(map(is_map, _factors(node)))

    before = _walk([node_of(softmax.args[0])], is_map, makes_map, lambda n: n.all_input_nodes)
    after = _walk(
        list(softmax.users),
        lambda n: any(map(is_map, n.all_input_nodes)),
        lambda n: is_product(n) and not is_map(n),
        lambda n: list(n.users),
    )
    if before is None or after is None or len(_factors(before)) != 2:
        return None
    factors = _factors(before) if _keys_come_last(softmax, before, dim, is_map, axes) else _factors(before)[::-1]
    q, k = factors
    values = [n for n in _factors(after) if not is_map(n)]
    return Attention(after, q, k, values[0], before, softmax, dims[dim], query_axis) if len(values) == 1 else None


def _keys_come_last(
    softmax: fx.Node, product: fx.Node, dim: int, is_map: Callable[[fx.Node], bool], axes: Axes
) -> bool:
    """Whether the second factor of a product holds the keys: the dimension of its map that the softmax runs over."""
    keys = set(atoms(axes.of(softmax)[dim]))

    def over_tokens(node: fx.Node) -> list[int]:
        return [d for d, of in enumerate(axes.of(node)) if set(atoms(of)) & keys]

    def way(node: fx.Node) -> list[fx.Node] | None:
        """The maps from ``node`` back to the product, without that."""
        if node is product:
            return []
        found = (way(n) for n in node.all_input_nodes if is_map(n))
        back = next((nodes for nodes in found if nodes is not None), None)
        return None if back is None else [node, *back]

    last = over_tokens(softmax).index(dim) > 0
    for node in way(node_of(softmax.args[0])) or ():
        rule = rule_of(node)
        if rule is not None and rule.elements is Elements.REORDERED:
            # What the operator makes of dimensions that are told apart by their sizes.
            given = node.all_input_nodes[0].meta["val"].dim()
            x = torch.empty(tuple(range(2, given + 2)), device="meta")
            made = function_of(node)(x, *node.args[1:], **node.kwargs)
            first, second = (made.shape[d] for d in over_tokens(node)[:2])
            last ^= first > second
    if product.target is aten.einsum.default:
        args = schema_arguments(product)
        terms, out = letters(args["equation"], [n.meta["val"].dim() for n in args["tensors"]])
        return out[over_tokens(product)[last]] in terms[1]
    return last


def _walk(
    queue: list[fx.Node],
    passes: Callable[[fx.Node], bool],
    found: Callable[[fx.Node], bool],
    step: Callable[[fx.Node], Iterable[fx.Node]],
) -> fx.Node | None:
    """The nearest node that ``found`` takes in one direction, through nodes that ``passes`` takes."""
    seen: set[fx.Node] = set()
    while queue:
        node = queue.pop(0)
        if node in seen or not passes(node):
            continue
        seen.add(node)
        if found(node):
            return node
        queue = [*queue, *step(node)]
    return None


def _factors(product: fx.Node) -> Sequence[fx.Node]:
    return present(present(rule_of(product)).factors)(schema_arguments(product))


def _block(
    attention: Attention,
    following: fx.Node | None,
    flow: Dataflow,
    axes: Axes,
    protected: int | None,
    images: tuple[int, ...],
) -> Block:
    if not is_own(attention, axes):
        return Block(attention, None, problem="queries and keys run over different tokens")
    keys = axes.table.canonical(attention.key_axis)
    tokens = Tokens(keys, product(keys), 0, 0, ()) if len(images) > 1 else _tokens(keys, protected)
    if isinstance(tokens, str):
        return Block(attention, None, problem=tokens)
    found = _residual(attention, tokens, following, flow, axes)
    if found is None:
        problem = "no residual connection leads around this attention with the tokens in its order"
        return Block(attention, None, problem=problem)
    entry, middle = found
    if not mentions(axes.of(entry), tokens):
        problem = _padding(attention, entry, flow, axes) or _remade(attention, entry, flow, axes)
        return Block(attention, None, entry, middle, problem=problem)
    tokens = _with_batch(tokens, axes.of(entry), axes.of(attention.query))
    if isinstance(tokens, str):
        problem = _padding(attention, entry, flow, axes) or tokens
        return Block(attention, None, entry, middle, problem=problem)
    if not _ends_are_keys(axes.of(entry), keys, tokens):
        problem = "the residual stream holds protected tokens beside its others that attention does not read as keys"
        return Block(attention, None, entry, middle, problem=problem)
    end = _mlp_end(middle, following, flow, axes) or middle
    if any(map(updates_statistics, flow.between(entry, end))):
        return Block(attention, None, entry, middle, problem="batch norm in training takes statistics over the tokens")
    return Block(attention, tokens, entry, middle, end, packed=_packed(keys, images))


def _packed(keys: Dim, images: Sequence[int]) -> tuple[int, ...]:
    """The runs of positions within which tokens may be fused, of several images packed into one sequence.

    Of an image that is joined of parts, the largest is what may be fused; each position of the others is a run of one.
    """
    parts = keys[0].parts if len(keys) == 1 and isinstance(keys[0], Cat) else ()
    edges = [*accumulate(cast(list[int], [size for size, _ in parts]))]
    found: list[int] = []
    start = 0
    if len(images) < 2:
        return ()
    for size in images:
        cuts = [start, *(edge for edge in edges if start < edge < start + size), start + size]
        pieces = [b - a for a, b in pairwise(cuts)]
        largest = pieces.index(max(pieces))
        for i, piece in enumerate(pieces):
            found += [piece] if i == largest else [1] * piece
        start += size
    return tuple(found)


def _residual(
    attention: Attention, tokens: Tokens, following: fx.Node | None, flow: Dataflow, axes: Axes
) -> tuple[fx.Node, fx.Node] | None:
    """(residual stream, the addition that returns to it).

    Of several streams that meet in one attention it is that of the tokens; the others are returned to before the
    next attention, ``following``.
    """
    other = None
    for node, a, b in sums(flow.span(attention.node, None), axes):
        if other is not None and following is not None and flow.order[node] > flow.order[following]:
            break
        # Attention may read what the sum has a copy of.
        for stream, branch in ((a, b), (b, a), (_copied(a, axes), b), (_copied(b, axes), a)):
            around = all(flow.leads(stream, n) for n in (attention.query, attention.key, attention.value))
            if around and (branch is attention.node or flow.leads(attention.node, branch)):
                if mentions(axes.of(stream), tokens):
                    return stream, node
                other = other or (stream, node)
    return other


def _copied(node: fx.Node, axes: Axes) -> fx.Node:
    """What a value is a copy of, as it is before something is added in place."""
    rule = rule_of(node)
    while rule is not None and rule.elements in (Elements.REGROUPED, Elements.REPEATED):
        of = node_of(node.args[0])
        if of not in axes.dims or axes.of(of) != axes.of(node):
            break
        node, rule = of, rule_of(of)
    return node


def _ends_are_keys(stream: Dims, keys: Dim, tokens: Tokens) -> bool:
    """Whether the protected tokens of a residual stream are the keys next to the others."""
    own, all_keys = (_ends_of(dims, tokens) for dims in (stream, (keys,)))
    return all(mine == theirs[: len(mine)] for mine, theirs in zip(own, all_keys))


def _ends_of(dims: Dims, tokens: Tokens) -> tuple[list[tuple[Size, Dim]], list[tuple[Size, Dim]]]:
    """The parts before and after the tokens in the dimension that holds them, the nearest first."""
    body = set(atoms(tokens.body))
    axis = next((axis for dim in dims for axis in dim if isinstance(axis, Cat) and body & set(atoms((axis,)))), None)
    if axis is None or tokens.body == (axis,):
        return [], []
    inside = [bool(body & set(atoms(part))) for _, part in axis.parts]
    first, last = inside.index(True), len(inside) - inside[::-1].index(True)
    return list(axis.parts[:first][::-1]), list(axis.parts[last:])


def _mlp_end(middle: fx.Node, following: fx.Node | None, flow: Dataflow, axes: Axes) -> fx.Node | None:
    """The addition of two descendants of ``middle``, in its layout, before the next attention."""
    span = flow.span(middle, following)
    if not span:
        # The next attention reads the same tokens as this one, before the sum.
        return None
    after = nx.descendants(flow.graph.subgraph(span), middle) | {middle}
    added = sums(span[1:] if following is None else span[1:-1], axes)
    return next((n for n, a, b in added if {a, b} <= after and axes.of(a) == axes.of(middle)), None)


def is_own(attention: Attention, axes: Axes) -> bool:
    """Whether the queries of an attention run over the tokens of its keys."""
    return axes.table.canonical(attention.query_axis) == axes.table.canonical(attention.key_axis)


def sums(nodes: Iterable[fx.Node], axes: Axes) -> Iterator[tuple[fx.Node, fx.Node, fx.Node]]:
    """The additions of two values of equal axes, with those."""
    for node in nodes:
        if getattr(node.target, "overloadpacket", None) is not aten.add:
            continue
        a, b = node.args[:2]
        if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)) or {a, b} - axes.dims.keys():
            continue
        if axes.of(a) == axes.of(b) == axes.of(node):
            yield node, a, b


def _padding(attention: Attention, entry: fx.Node, flow: Dataflow, axes: Axes) -> str | None:
    """What padding makes of the tokens between the residual stream and attention, if anything does."""
    keys = axes.table.canonical(attention.key_axis)
    return next(filter(None, (padded(node, axes, keys) for node in flow.between(entry, attention.key))), None)


def _remade(attention: Attention, entry: fx.Node, flow: Dataflow, axes: Axes) -> str:
    """What makes new tokens of those in the residual stream before attention sees them."""
    stream = {atom for dim in axes.of(entry) for atom in atoms(dim)}
    for node in flow.between(entry, attention.key):
        dims = axes.dims.get(node)
        if isinstance(dims, tuple) and len(dims) > 2:
            held = [{atom for atom in atoms(dim)} & stream for dim in axes.of(node)]
            if sum(map(bool, held)) < 2:
                return f"{name_of(node)} makes other tokens of those in the residual stream before attention"
    return "attention runs over other tokens than those in the residual stream"


def _tokens(axis: Dim, protected: int | None) -> Tokens | str:
    """Prefix, body and suffix of a token axis, as far as the axis itself tells."""
    parts = axis[0].parts if len(axis) == 1 and isinstance(axis[0], Cat) else None
    if parts is None:
        return Tokens(axis, product(axis), 0, 0, ())
    sizes = [size for size, _ in parts]
    varying = [i for i, size in enumerate(sizes) if not isinstance(size, int)]
    if len(varying) > 1:
        return "the sequence of tokens has several parts whose numbers vary, any of which may be the largest"
    largest = varying[0] if varying else sizes.index(max(cast(list[int], sizes)))
    body = set(atoms(parts[largest][1]))
    if any(body & set(atoms(part)) for i, (_, part) in enumerate(parts) if i != largest):
        return "several images are packed into one sequence of tokens"
    lead, tail = sum(cast(list[int], sizes[:largest])), sum(cast(list[int], sizes[largest + 1 :]))
    if protected is not None and protected < lead:
        return Tokens(axis, sum(sizes), 0, 0, (), lead)
    return Tokens(parts[largest][1], sizes[largest], lead, tail, ())


def _with_batch(tokens: Tokens, stream: Dims, query: Dims) -> Tokens | str:
    """Add the batch axes: those that the residual stream has beside its tokens and shares with the queries.

    What it does not share are its channels; where all are shared (q is the stream itself) the last are.
    """
    found = places(stream, tokens)
    if found is None:
        many = f"{tokens.total} tokens" if isinstance(tokens.total, int) else "tokens"
        cut = windows(stream, tokens.body)
        if cut is not None and "×" in cut[0] and cut[0] != cut[1]:
            return f"attention runs within windows of {cut[1]} tokens of a grid of {cut[0]}"
        return f"attention runs within windows or groups of {many} of a larger grid"
    if len(found) != 1:
        return "the residual stream has the token axis twice"
    (place,) = found
    if any(axis.size == 0 for dim in stream for axis in dim):
        return "the batch is empty"
    shared = set(atoms(tuple(axis for dim in query for axis in dim)))
    others = [dim for d, dim in enumerate(stream) if dim and d not in (place.dim, *place.rest)]
    batch = [dim for dim in others if set(atoms(dim)) <= shared]
    if others and len(batch) == len(others):
        batch = batch[:-1]
    batch += [part for part in (place.before, place.after) if part]
    if len(batch) > 1:
        return "the residual stream has more than one axis beside tokens and channels (windows or frames)"
    return replace(tokens, batch=batch[0] if batch else ())
