"""ShiftAddViT: linear attention on binary queries and keys, and MLPs whose tokens take one of two experts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mctf_compile.errors import ConfigError
from mctf_compile.kernels.library import without_autocast
from mctf_compile.methods.base import MLP
from mctf_compile.narrowing import node_of, present
from mctf_compile.passes.analysis.blocks import find_blocks
from mctf_compile.passes.analysis.branches import find_branches
from mctf_compile.passes.analysis.dataflow import Dataflow
from mctf_compile.passes.analysis.masks import mask_operands
from mctf_compile.passes.analysis.normalize import constants, normalize
from mctf_compile.passes.analysis.observations import Observation, is_of, take_observations
from mctf_compile.passes.analysis.opening import Opener
from mctf_compile.passes.analysis.structure import Attention, Block
from mctf_compile.passes.analysis.token_axes import Axes, token_axes
from mctf_compile.passes.axes import Dim, Dims
from mctf_compile.passes.lowering.autocast import devices_of, keep_autocast_out
from mctf_compile.passes.rules import schema_arguments
from mctf_compile.passes.rules.attention import head_layout
from mctf_compile.passes.tracing import trace

aten = torch.ops.aten

# What attached modules say: the weight of the convolution of a block's values; the logits of the two experts of each
# token; and at each linear layer of an MLP, what the second expert computes there.
LOCAL, ROUTER, EXPERT = "shiftadd.local", "shiftadd.router", "shiftadd.expert"

UNTRAINED = "the modules of ShiftAddViT are untrained: train them, or load their weights (mctf_shiftadd)"
HINT = "mctf_compile.shiftadd.attach(model, images) adds what it learns, before the model is compiled"


@dataclass(frozen=True)
class Heads:
    """How the dimensions of an attention's operands become [..., N, D], and of its result [..., N, D] what they were.

    ``lead``, ``rows``, ``columns``: tokens before those of the grid, and the grid. ``channels``: H·D of the values.
    """

    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...]
    out: tuple[int, ...]
    lead: int
    rows: int
    columns: int
    channels: int


def reparameterize(gm: fx.GraphModule, inputs: Sequence[Any], examples: Sequence[Any]) -> fx.GraphModule:
    """A captured graph with ShiftAddViT's parts in the place of its own, where modules for them are attached.

    Before::  o = attention(q, k, v);  x1 = add(x0, proj(o));  x2 = add(x1, fc2(gelu(fc1(norm(x1)))))
    After::   o = add(mctf.binary_attention(q, k, v), mctf.neighbours(v, weight, ...))
              y = fc2'(gelu(fc1'(norm(x1)))) * gate;  x2 = add(x1, y)
    with ``fc'`` = mctf.routed_linear(x, second, fc.weight, fc.bias, expert.weight, expert.bias), and ``second`` and
    ``gate`` from the router's logits.

    Args:
        gm: the graph; it is not changed.
        inputs: fake tensors for its inputs.
        examples: its inputs as they were given.

    Returns:
        A graph of the same inputs and outputs; ``gm`` itself where it has no attention.

    Raises ``ConfigError`` where attention has no such modules, or they do not fit it.

    Source: You et al., ShiftAddViT, NeurIPS 2023 (arXiv 2306.06446), sections 4.1 and 4.2.
    """
    normal = normalize(gm, inputs)
    found = take_observations(normal, (LOCAL, ROUTER, EXPERT))
    axes = token_axes(normal.graph)
    blocks = find_blocks(normal.graph, axes, known=constants(gm, normal, examples))
    if not found:
        if not blocks:
            return gm
        raise ConfigError(f"reparameterize='shiftadd' finds none of its modules in this model; {HINT}.")
    if any(o.state == "untrained" for o in found):
        warnings.warn(f"mctf: {UNTRAINED}", stacklevel=2)
    flow, mlps = Dataflow(normal.graph), mlps_of(normal.graph, blocks, axes)
    experts = [[o for o in found if o.method == EXPERT and o.read in mlp] for of_block in mlps for mlp in of_block]
    for o in found:
        if o.method == LOCAL:
            _replace_attention(o, next((b for b in blocks if is_of(o, b, flow)), None), axes)
        elif o.method == ROUTER:
            _replace_mlp(o, next((e for e in experts if _leads_into(o, e)), []), flow)
    normal.graph.eliminate_dead_code()
    normal.recompile()
    with without_autocast():
        made = trace(Opener(normal).run, inputs)
    placeholders = (graph.find_nodes(op="placeholder") for graph in (gm.graph, made.graph))
    for old, new, given in zip(*placeholders, inputs):
        # Of what is traced nobody knows any more whether it has a gradient.
        new.meta = {**old.meta, "val": given}
        new.name = old.name
    keep_autocast_out(made, devices_of(made.graph.nodes))
    return made


def mlps_of(graph: fx.Graph, blocks: Sequence[Block], axes: Axes) -> list[list[frozenset[fx.Node]]]:
    """By block the nodes of each MLP that leads from its residual stream back to it."""
    return [[b.nodes for b in of_block if b.kind == MLP] for of_block in find_branches(graph, blocks, axes)]


def heads_of(block: Block, axes: Axes) -> Heads | str:
    """The layout of a block's attention, which binary attention can take the place of; else why it cannot."""
    if block.problem is not None:
        return block.problem
    attention, tokens = block.attention, present(block.tokens)
    if mask_operands(attention) or schema_arguments(attention.node).get("is_causal"):
        return "its logits meet something else before the softmax (a mask, a bias, other heads), and there will be none"
    if not _is_softmax_alone(attention):
        return "its attention weights meet something else before the values, and there will be none"
    grid = [axis.size for axis in axes.table.canonical(tokens.body)]
    if len(grid) != 2 or not all(isinstance(size, int) for size in grid):
        return "the model does not tell the grid of its tokens, whose neighbours a convolution is to add up"
    nodes = attention.query, attention.key, attention.value, attention.node
    dims, keys = [axes.of(node) for node in nodes], axes.table.canonical(attention.key_axis)
    # Images and heads, which the map has too where there is one.
    lead = dims[0][:-2] if attention.product is None else [d for d in axes.of(attention.product) if d != keys]
    layout = head_layout((*lead, keys, ()), tokens)
    orders = [_order(of, lead, keys) for of in dims]
    if layout is None or len(lead) > 2 or None in orders:
        return "its queries, keys and values are not laid out as images, heads, tokens and channels"
    query, key, value, out = map(present, orders)
    shape, rank = attention.value.meta["val"].shape, len(out)
    count = shape[value[1]] if len(lead) == 2 else layout.heads
    rows, columns = (int(size) for size in grid)
    back = tuple(map(out.index, range(rank)))
    return Heads(query, key, value, back, tokens.lead, rows, columns, count * shape[value[-1]])


def _is_softmax_alone(attention: Attention) -> bool:
    """Whether nothing but casts, layout and dropout is between the softmax and its product with the values."""
    stack = [] if attention.weights is None else [n for n in attention.node.all_input_nodes if n is not attention.value]
    while stack:
        node = stack.pop()
        if node is not attention.weights:
            if len(node.all_input_nodes) != 1:
                return False
            stack.extend(node.all_input_nodes)
    return True


def _order(dims: Dims, lead: Sequence[Dim], keys: Dim) -> tuple[int, ...] | None:
    """The dimensions of a value in the order [..., N, D]; None where it has other ones."""
    known = [*lead, keys]
    if len(dims) != len(known) + 1 or len(set(dims)) < len(dims) or not set(known) <= set(dims):
        return None
    (rest,) = (d for d, dim in enumerate(dims) if dim not in known)
    return (*map(dims.index, known), rest)


def _replace_attention(local: Observation, block: Block | None, axes: Axes) -> None:
    if block is None:
        raise ConfigError(
            f"reparameterize='shiftadd' has a module at {local.read.name!r} for attention, which this graph does not "
            "have there in a form that can be followed; the report says why (mctf_compile.explain without the option)."
        )
    heads = heads_of(block, axes)
    if isinstance(heads, str):
        raise ConfigError(f"reparameterize='shiftadd' does not fit {_named(block)}: {heads}.")
    attention, weight = block.attention, local.learned
    if weight.meta["val"].shape[0] != heads.channels:
        raise ConfigError(
            f"reparameterize='shiftadd' does not fit {_named(block)}: its convolution was made for "
            f"{weight.meta['val'].shape[0]} channels, and its values have {heads.channels}."
        )

    def attend(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
        q, k, v = q.permute(heads.query), k.permute(heads.key), v.permute(heads.value)
        out: Tensor = torch.ops.mctf.binary_attention(q, k, v)
        apart = v if v.dim() == 4 else v.unflatten(0, (-1, heads.channels // v.shape[-1]))
        near: Tensor = torch.ops.mctf.neighbours(apart, weight.to(v.dtype), heads.lead, heads.rows, heads.columns)
        return (out + near.reshape(out.shape)).permute(heads.out)

    _put(attention.node, attend, (attention.query, attention.key, attention.value, weight))


def _named(block: Block) -> str:
    return block.module or f"the attention {block.attention.node.name!r}"


def _leads_into(router: Observation, experts: Sequence[Observation]) -> bool:
    """Whether a router stands before one of the layers; autocast may have put a cast between."""
    read = {n for o in experts for n in (o.read, node_of(schema_arguments(o.read)["input"]))}
    return not read.isdisjoint(router.readers)


def _replace_mlp(router: Observation, experts: Sequence[Observation], flow: Dataflow) -> None:
    """The layers of an MLP by such as have two weights, and behind the last of them the gate."""
    if not experts:
        raise ConfigError(
            f"reparameterize='shiftadd' has a router at {router.read.name!r}, from which no MLP of linear layers leads "
            "back to the residual stream in this graph."
        )
    last = [o for o in experts if not any(flow.leads(o.read, other.read) for other in experts if other is not o)]
    for expert in experts:
        own, other = schema_arguments(expert.read), schema_arguments(expert.learned)
        operands = own["input"], router.learned, own["weight"], own["bias"], other["weight"], other["bias"]
        _put(expert.read, _gated if expert in last else _routed, operands)


def _routed(
    x: Tensor, logits: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor, other_bias: Tensor | None
) -> Tensor:
    found: Tensor = torch.ops.mctf.routed_linear(x, logits[..., 1] > logits[..., 0], weight, bias, other, other_bias)
    return found


def _gated(x: Tensor, logits: Tensor, *weights: Tensor | None) -> Tensor:
    found: Tensor = _routed(x, logits, *weights)  # type: ignore[arg-type]  # the four that a routed layer has
    gated: Tensor = found * logits.softmax(-1).amax(-1, keepdim=True).to(found.dtype)
    return gated


def _put(node: fx.Node, function: Callable[..., Tensor], operands: Sequence[Any]) -> None:
    """What ``function`` makes of ``operands`` in the place of a node."""
    after = max(n for n in (node, *operands) if isinstance(n, fx.Node))
    with node.graph.inserting_after(after):
        new = node.graph.call_function(function, tuple(operands))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
