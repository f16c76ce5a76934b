"""Pass: find the attention-MLP blocks of a graph from its structure alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import networkx as nx
import torch
from torch import fx

from mctf_compile.passes.axes import Cat, Dim, Dims, Tokens, atoms, mentions, places
from mctf_compile.passes.rules import schema_arguments
from mctf_compile.passes.rules.contractions import letters, operands
from mctf_compile.passes.token_axes import Axes

aten = torch.ops.aten
CONTRACTIONS = (aten.matmul, aten.bmm, aten.einsum, aten.baddbmm)
ADDS = (aten.add, aten.add_)


@dataclass(frozen=True)
class Attention:
    """A softmax over a token axis contracted with values over that axis.

    ``node`` contracts; ``weights`` is the softmax where it is a node of its own, with the dimension of
    its keys. ``query``, ``key``, ``value`` are the operands of the two products.
    """

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    weights: fx.Node | None
    key_axis: Dim
    query_axis: Dim


@dataclass(frozen=True)
class Block:
    """An attention, the residual stream around it, and the MLP that follows.

    ``entry``: the residual stream that attention reads; ``middle``: the residual add after attention;
    ``exit``: the residual stream after the MLP (``middle`` where no MLP follows). ``problem`` says why
    no token can be fused here, else None.
    """

    attention: Attention
    tokens: Tokens | None
    entry: fx.Node | None = None
    middle: fx.Node | None = None
    exit: fx.Node | None = None
    problem: str | None = None


def find_blocks(graph: fx.Graph, axes: Axes, protected: int | None = None) -> list[Block]:
    """Every self-attention over a token axis, in the order of execution, with its residual stream.

    1. Attention is scaled_dot_product_attention, or a softmax over an axis that a product then contracts.
    2. The residual stream is the operand of the first addition after attention from which query, key
       and value all descend.
    3. The MLP ends at the next addition of two descendants of that sum.
    4. The batch axes are those of the residual stream that are neither tokens nor channels.
    """
    flow = nx.DiGraph()
    for node in graph.nodes:
        flow.add_node(node)
        flow.add_edges_from((source, node) for source in node.all_input_nodes)
    order = {node: i for i, node in enumerate(graph.nodes)}
    sites = [site for node in graph.nodes if (site := _attention(node, axes)) is not None]
    blocks = []
    for i, site in enumerate(sites):
        following = order[sites[i + 1].node] if i + 1 < len(sites) else len(order)
        blocks.append(_block(site, following, flow, order, axes, protected))
    return blocks


def _attention(node: fx.Node, axes: Axes) -> Attention | None:
    packet = getattr(node.target, "overloadpacket", None)
    if node not in axes.dims:
        return None
    if packet is aten.scaled_dot_product_attention:
        args = schema_arguments(node)
        q, k, v = args["query"], args["key"], args["value"]
        site = Attention(node, q, k, v, None, axes.of(k)[-2], axes.of(q)[-2])
    elif packet is aten.softmax:
        site = _spelled_out(node, axes)
    else:
        return None
    if site is None or not site.key_axis:
        return None
    return site if set(atoms(site.key_axis)) & set(atoms(site.query_axis)) else None


def _spelled_out(softmax: fx.Node, axes: Axes) -> Attention | None:
    """softmax(q kᵀ …) v as nodes: the product before the softmax and the one after it."""
    dims = axes.of(softmax)
    dim = softmax.args[1] % len(dims)
    before = _walk(softmax.args[0], lambda n: [a for a in n.all_input_nodes if len(axes.dims.get(a, ())) > 1])
    after = _walk(softmax, lambda n: list(n.users), skip_first=True)
    if before is None or after is None or not dims[dim]:
        return None
    q, k = _factors(before)
    values = [n for n in _factors(after) if not _descends(n, softmax)]
    if len(values) != 1:
        return None
    keys = set(atoms(dims[dim]))
    query_axis = next((d for i, d in enumerate(dims) if i != dim and set(atoms(d)) & keys), ())
    return Attention(after, q, k, values[0], softmax, dims[dim], query_axis)


def _walk(start: fx.Node, step, skip_first: bool = False) -> fx.Node | None:
    """The nearest matrix product in one direction, through pointwise and layout operators."""
    seen, queue = set(), step(start) if skip_first else [start]
    for _ in range(64):
        if not queue:
            return None
        node = queue.pop(0)
        if node in seen or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        seen.add(node)
        packet = getattr(node.target, "overloadpacket", None)
        if packet in CONTRACTIONS:
            return node
        if packet in (aten.linear, aten.layer_norm, aten.scaled_dot_product_attention):
            continue
        queue.extend(step(node))
    return None


def _factors(product: fx.Node) -> list[fx.Node]:
    args = schema_arguments(product)
    if "tensors" in args:
        terms, _ = letters(args["equation"])
        return list(args["tensors"]) if len(terms) == 2 else []
    return [args[name] for name in operands(args)]


def _descends(node: fx.Node, ancestor: fx.Node) -> bool:
    """Whether ``node`` is ``ancestor`` or reaches it within a few single-operand steps."""
    for _ in range(8):
        if node is ancestor:
            return True
        if not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]
    return False


def _block(site, following, flow, order, axes, protected) -> Block:
    keys, queries = axes.table.canonical(site.key_axis), axes.table.canonical(site.query_axis)
    if keys != queries:
        return Block(site, None, problem="queries and keys run over different tokens")
    tokens = _tokens(keys, protected)
    if isinstance(tokens, str):
        return Block(site, None, problem=tokens)
    sources = set.intersection(*(nx.ancestors(flow, n) for n in (site.query, site.key, site.value)))
    found = _residual(site.node, sources, following, flow, order, axes)
    if found is None:
        return Block(site, None, problem="no residual connection leads around this attention")
    entry, middle = found
    tokens = _with_batch(tokens, axes.of(entry))
    if isinstance(tokens, str):
        return Block(site, None, entry, middle, problem=tokens)
    after = nx.descendants(flow, middle) | {middle}
    stop = _sum(middle, lambda a, b: a in after and b in after, following, flow, order, axes)
    return Block(site, tokens, entry, middle, stop or middle)


def _residual(site, sources, following, flow, order, axes) -> tuple[fx.Node, fx.Node] | None:
    """(residual stream, the addition that returns to it)."""
    reached = nx.descendants(flow, site)
    middle = _sum(site, lambda a, b: a in sources and b in reached, None, flow, order, axes)
    if middle is None:
        return None
    return next(n for n in middle.args[:2] if n in sources), middle


def _sum(start, accept, following, flow, order, axes) -> fx.Node | None:
    """The first addition after ``start`` of two values of equal axes that ``accept`` takes in some order."""
    for node in sorted(nx.descendants(flow, start), key=order.__getitem__):
        if following is not None and order[node] >= following:
            return None
        if getattr(node.target, "overloadpacket", None) not in ADDS:
            continue
        a, b = node.args[:2]
        if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)) or {a, b} - axes.dims.keys():
            continue
        if axes.of(a) == axes.of(b) == axes.of(node) and (accept(a, b) or accept(b, a)):
            return node
    return None


def _tokens(axis: Dim, protected: int | None) -> Tokens | str:
    """Prefix, body and suffix of a token axis, as far as the axis itself tells."""
    if not all(isinstance(a.size, int) for a in axis):
        return "the number of tokens is symbolic"
    parts = axis[0].parts if len(axis) == 1 and isinstance(axis[0], Cat) else None
    if parts is None:
        total = 1
        for a in axis:
            total *= a.size
        return Tokens(axis, total, 0, 0, ())
    sizes = [size for size, _ in parts]
    largest = sizes.index(max(sizes))
    lead, tail = sum(sizes[:largest]), sum(sizes[largest + 1 :])
    if protected is not None and protected < lead:
        return Tokens(axis, sum(sizes), 0, 0, (), lead)
    return Tokens(parts[largest][1], sizes[largest], lead, tail, ())


def _with_batch(tokens: Tokens, dims: Dims) -> Tokens | str:
    """Add the batch axes, read off the residual stream: all that is neither tokens nor channels."""
    found = places(dims, tokens)
    if found is None or not mentions(dims, tokens):
        return "the residual stream keeps its tokens in another layout than attention does (windows or a grid)"
    if len(found) != 1 or found[0].dim == len(dims) - 1:
        return "the residual stream has no token axis apart from its channels"
    (place,) = found
    if any(axis.size == 0 for dim in dims for axis in dim):
        return "the batch is empty"
    batch = [dim for d, dim in enumerate(dims[:-1]) if dim and d != place.dim]
    batch += [part for part in (place.before, place.after) if part]
    if len(batch) > 1:
        return "the residual stream has more than one axis beside tokens and channels (windows or frames)"
    return replace(tokens, batch=batch[0] if batch else ())
