"""Pass: weights that nothing will change, as the operators of a graph read them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

aten = torch.ops.aten


def freeze(gm: fx.GraphModule) -> fx.GraphModule:
    """What is computed of the graph's own tensors alone, computed once; ``gm`` is not changed.

    Before::  linear(x, slice(qkv_weight, 0, 0, 2 * C))
    After::   linear(x, frozen_0)

    On a CPU the weight [O, I] of a linear layer also gets the memory of an [I, O]: a matrix product in single or double
    precision then reads both of its operands along their rows.
    """
    graph = fx.Graph()
    root: dict[str, Any] = {}
    env: dict[fx.Node, fx.Node] = {}
    known: dict[fx.Node, Tensor] = {}
    held: dict[tuple[fx.Node | str, bool], fx.Node] = {}

    def hold(node: fx.Node, by_rows: bool) -> fx.Node:
        """A known tensor as an attribute of the new graph."""
        key = (str(node.target) if node.op == "get_attr" else node, by_rows)
        if key not in held:
            name = f"frozen_{len(held)}"
            root[name] = known[node].t().contiguous().t() if by_rows else known[node]
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
        weight = node.args[1] if node.target is aten.linear.default else None
        for n in node.all_input_nodes:
            if n in known:
                env[n] = hold(n, n is weight and _read_by_rows(known[n]))
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


def _read_by_rows(weight: Tensor) -> bool:
    """Whether its matrix product is one of BLAS, which autocast does not send elsewhere."""
    exact = weight.dtype in (torch.float32, torch.float64)
    return exact and weight.device.type == "cpu" and weight.dim() == 2 and not torch.is_autocast_enabled("cpu")
