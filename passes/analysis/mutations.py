"""Part of normalize: no operator writes into a tensor that another one reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from mctf_compile.errors import UnsupportedGraph
from mctf_compile.kernels.library import without_autocast
from mctf_compile.narrowing import node_of, operator_of
from mctf_compile.passes.rules import schema_arguments

aten = torch.ops.aten


def functionalize(gm: fx.GraphModule) -> None:
    """Replace in-place operators by those that return a new tensor.

    A rewrite runs some values again and gives others their tokens back in a copy; a write would then
    happen twice, or be lost.

    Before::  y = aten.add_.Tensor(x, z);  w = aten.mul.Tensor(x, 2)
    After::   y = aten.add.Tensor(x, z);   w = aten.mul.Tensor(y, 2)

    1. Every later use of the tensor written to, under any name, reads the new one.
    2. A graph input that is written to, or a view of one, is written once, at the end.
    3. An operator without such a form (``bernoulli_``) stays, on a tensor of the graph's own; so do writes
       between values that no input but parameters leads to, which a rewrite leaves alone.

    Raises ``UnsupportedGraph`` where a view of the tensor is read after the write: only the memory itself would
    carry the change there.
    """
    graph = gm.graph
    if not any(map(_is_write, graph.nodes)):
        return
    order = {node: i for i, node in enumerate(graph.nodes)}
    names: dict[fx.Node, list[fx.Node]] = {}
    memory: dict[int, set[fx.Node]] = {}
    for node in graph.nodes:
        for storage in _storages(node):
            memory.setdefault(storage, set()).add(node)
    live = _live(graph)
    written: dict[fx.Node, fx.Node] = {}
    for node in [n for n in graph.nodes if _is_write(n)]:
        family = set().union(*(memory[s] for n in (node, *node.all_input_nodes[:1]) for s in _storages(n)))
        if not family & live:
            continue
        target = node.args[0] if node.args else None
        if not isinstance(target, fx.Node) or not node.target._schema.name.endswith("_") or target.op == "get_attr":
            raise UnsupportedGraph(f"{node.target} writes into a tensor in a way that cannot be followed")
        held = names.pop(target, [target])
        owners = {n.op for s in _storages(target) for n in memory[s]}
        if "get_attr" in owners:
            raise UnsupportedGraph(f"{node.target} writes into a tensor that the graph holds")
        sharing = set().union(*(memory[s] for s in _storages(target))) - set(held) - {node}
        if any(order[user] > order[node] for other in sharing if order[other] < order[node] for user in other.users):
            raise UnsupportedGraph(f"{node.target} writes into a tensor of which a view is read afterwards")
        result = _pure(graph, node)
        if result is node and "placeholder" in owners:
            raise UnsupportedGraph(f"{node.target} writes into an input of the graph")
        order[result] = order[node]
        later = {user for name in (*held, node) for user in name.users if order.get(user, -1) > order[node]}
        for name in (*held, node):
            name.replace_all_uses_with(result, delete_user_cb=(later - {result}).__contains__)
        for storage in _storages(target):
            memory[storage].add(result)
        names[result] = [*held, result]
        if "placeholder" in owners:
            # The last write is the last at the end as well.
            written.pop(held[0], None)
            written[held[0]] = result
        if result is not node:
            for sharers in memory.values():
                sharers.discard(node)
            graph.erase_node(node)
    _write_back(graph, written)
    graph.lint()
    gm.recompile()


def _live(graph: fx.Graph) -> set[fx.Node]:
    """The values that depend on an input of the graph other than parameters."""
    live: set[fx.Node] = set()
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder":
            if not isinstance(value, torch.nn.Parameter):
                live.add(node)
        elif any(n in live for n in node.all_input_nodes):
            live.add(node)
    return live


def _is_write(node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _storages(node: fx.Node) -> set[int]:
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    return {v.untyped_storage()._cdata for v in values if isinstance(v, Tensor)}


def _pure(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The operator that computes what ``node`` writes, inserted before it; ``node`` itself where there is none."""
    args = schema_arguments(node)
    value = node.meta["val"]

    def insert(target: Any, *arguments: Any, **options: Any) -> fx.Node:
        new = graph.call_function(target, arguments, options)
        new.meta = dict(node.meta)
        return new

    with graph.inserting_before(node):
        if node.target is aten.copy_.default:
            source = args["src"]
            if source.meta["val"].dtype != value.dtype:
                source = insert(aten.to.dtype, source, value.dtype)
            shape = list(node_of(node.args[0]).meta["val"].shape)
            return insert(aten.clone.default, insert(aten.expand.default, source, shape))
        written = operator_of(node)
        name = written._schema.name.partition("::")[2]
        packet = getattr(getattr(torch.ops, written.namespace), name[:-1], None)
        pure = getattr(packet, written._overloadname, None)
        if pure is None:
            return node
        result = insert(pure, *node.args, **node.kwargs)
        given, options = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with without_autocast():
            own = pure(*given, **options)
        if own.dtype == value.dtype:
            return result
        # A write keeps the dtype of what it writes to.
        result.meta["val"] = own
        return insert(aten.to.dtype, result, value.dtype)


def _write_back(graph: fx.Graph, written: dict[fx.Node, fx.Node]) -> None:
    """Write the last value of each input, or view of one, into it before the graph returns."""
    output = next(n for n in graph.nodes if n.op == "output")
    with graph.inserting_before(output):
        for target, value in written.items():
            copy = graph.call_function(aten.copy_.default, (target, value))
            copy.meta = {**value.meta, "val": target.meta["val"]}


def updates_statistics(node: fx.Node) -> bool:
    """Whether an operator changes a state that its schema does not name: batch norm in training."""
    target = getattr(node.target, "overloadpacket", None)
    return target is aten.batch_norm and bool(schema_arguments(node)["training"])
