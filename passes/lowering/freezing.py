"""Pass: weights that nothing will change, as the operators of a graph read them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from mctf_compile.kernels.library import without_autocast
from mctf_compile.kernels.linear.op import frozen_linear_supported
from mctf_compile.narrowing import node_of, present
from mctf_compile.passes.lowering.regions import stays_in_one_piece
from mctf_compile.passes.pipeline import State, graph_pass

aten = torch.ops.aten


@graph_pass("freezing", requires=("lowered",))
def run(state: State) -> None:
    """Weights are operands to a region; of a graph that stays whole Inductor freezes them itself."""
    if state.config.lowering.inductor_has("freezing") and not torch.is_grad_enabled() and not stays_in_one_piece(state):
        state.frozen = freeze(present(state.lowered))


def freeze(gm: fx.GraphModule) -> fx.GraphModule:
    """What is computed of the graph's own tensors alone, computed once; ``gm`` is not changed.

    Before::  gelu(add(linear(x, slice(weight, 0, 0, O)), bias))
    After::   mctf.frozen_linear(x, frozen_0, frozen_1, "none")

    Linear layers, where oneDNN has them, read weights that are packed once, and take the bias and the GELU that
    follow: what Inductor does of a graph that it compiles whole.
    """
    with without_autocast():
        frozen = _folded(gm)
    for node in frozen.graph.find_nodes(op="call_function", target=aten.linear.default):
        if node.args[1].op == "get_attr" and node.args[0].meta["val"].dim() > 1:
            _pack(frozen, node)
    frozen.graph.eliminate_dead_code()
    # What was cast is not kept as it was.
    return fx.GraphModule(frozen, frozen.graph)


def _folded(gm: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    root: dict[str, Any] = {}
    env: dict[fx.Node, fx.Node] = {}
    known: dict[fx.Node, Tensor] = {}
    held: dict[fx.Node | str, fx.Node] = {}

    def hold(node: fx.Node) -> fx.Node:
        """A known tensor as an attribute of the new graph."""
        key = str(node.target) if node.op == "get_attr" else node
        if key not in held:
            name = f"frozen_{len(held)}"
            root[name] = known[node]
            held[key] = graph.get_attr(name)
            held[key].meta["val"] = root[name]
        return held[key]

    for node in gm.graph.nodes:
        if node.op == "get_attr":
            value = operator.attrgetter(node.target)(gm)
            if isinstance(value, Tensor):
                known[node] = value.detach()
                continue
            root[node.target] = value
        elif _is_pure(node) and node.all_input_nodes and all(n in known for n in node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **kwargs)
            continue
        for n in node.all_input_nodes:
            if n in known:
                env[n] = hold(n)
        env[node] = graph.node_copy(node, env.__getitem__)
    return fx.GraphModule(root, graph)


def _is_pure(node: fx.Node) -> bool:
    """Whether an operator gives the same single tensor every time."""
    target = node.target
    return (
        isinstance(target, OpOverload)
        and isinstance(node.meta.get("val"), Tensor)
        and not target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in target.tags
    )


def _pack(gm: fx.GraphModule, linear: fx.Node) -> None:
    """Put a packed product in the place of a linear layer and of what it can do besides."""
    x, weight, bias = (*linear.args, None)[:3]
    dtype = linear.meta["val"].dtype
    if not frozen_linear_supported(node_of(weight).meta["val"], dtype):
        return
    last, gelu = linear, None
    added = _only_user(last, aten.add.Tensor)
    if bias is None and added is not None and _adds_bias(added, last, dtype):
        last, bias = added, added.args[1]
    activated = _only_user(last, aten.gelu.default)
    if activated is not None:
        last, gelu = activated, activated.kwargs.get("approximate", "none")
    with gm.graph.inserting_before(last):
        packed = gm.graph.call_function(torch.ops.mctf.frozen_linear.default, (x, weight, bias, gelu))
    packed.meta = dict(last.meta)
    last.replace_all_uses_with(packed)


def _only_user(node: fx.Node, target: OpOverload) -> fx.Node | None:
    """The one reader of a node, if it is a call of ``target``."""
    user = next(iter(node.users), None)
    return user if user is not None and len(node.users) == 1 and user.target is target else None


def _adds_bias(added: fx.Node, product: fx.Node, dtype: torch.dtype) -> bool:
    """Whether an addition is of a vector that the graph holds, as it is, to a product."""
    value = added.args[1]
    held = value.meta["val"] if isinstance(value, fx.Node) and value.op == "get_attr" else None
    vector = isinstance(held, Tensor) and held.dim() == 1 and held.dtype is dtype
    return vector and added.args[0] is product and not added.kwargs
