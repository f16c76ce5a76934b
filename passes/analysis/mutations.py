"""Part of normalize: no operator writes into a tensor that another one reads."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from mctf_compile.errors import UnsupportedGraph
from mctf_compile.kernels.library import without_autocast
from mctf_compile.narrowing import function_of, node_of, operator_of, present
from mctf_compile.passes.rules import Elements, find_rule, schema_arguments
from mctf_compile.passes.tracing import mode_of

aten = torch.ops.aten


def functionalize(gm: fx.GraphModule) -> None:
    """Replace in-place operators by those that return a new tensor.

    A rewrite runs some values again and gives others their tokens back in a copy; a write would then
    happen twice, or be lost.

    Before::  y = aten.add_.Tensor(x, z);  w = aten.mul.Tensor(x, 2)
    After::   y = aten.add.Tensor(x, z);   w = aten.mul.Tensor(y, 2)

    Before::  v = aten.slice.Tensor(x, 1, 0, 4);  aten.mul_.Tensor(v, 2);    w = aten.neg.default(x)
    After::   v = aten.mul.Tensor(aten.slice.Tensor(x, 1, 0, 4), 2)
              w = aten.neg.default(aten.slice_scatter.default(x, v, 1, 0, 4))

    1. Every later use of the tensor written to, under any name, reads the new one.
    2. Memory of the graph's own is made anew where a view of it is written to, and every other view of it again.
    3. A graph input that is written to, or a view of one, is written once, at the end.
    4. An operator without such a form (``bernoulli_``) stays, on a tensor of the graph's own; so do writes
       between values that no input but parameters leads to, which a rewrite leaves alone.

    Raises ``UnsupportedGraph`` for a write that somebody else may see in memory: where another view of an input is read
    after it, or the graph returns several views of what it has written to.
    """
    graph = gm.graph
    if not any(map(is_write, graph.nodes)):
        return
    order = {node: i for i, node in enumerate(graph.nodes)}
    names: dict[fx.Node, list[fx.Node]] = {}
    memory: dict[int, set[fx.Node]] = {}
    for node in graph.nodes:
        for storage in _storages(node):
            memory.setdefault(storage, set()).add(node)
    live = _live(graph)
    written: dict[fx.Node, fx.Node] = {}
    own: dict[int, _Own] = {}
    for node in [n for n in graph.nodes if is_write(n)]:
        family = set().union(*(memory[s] for n in (node, *node.all_input_nodes[:1]) for s in _storages(n)))
        if not family & live:
            continue
        target = node.args[0] if node.args else None
        if not isinstance(target, fx.Node) or not node.target._schema.name.endswith("_") or target.op == "get_attr":
            raise UnsupportedGraph(f"{node.target} writes into a tensor in a way that cannot be followed")
        owners = {n.op for s in _storages(target) for n in memory[s]}
        if "get_attr" in owners:
            raise UnsupportedGraph(f"{node.target} writes into a tensor that the graph holds")
        if owners == {"call_function"} and len(_storages(target)) == 1:
            (storage,) = _storages(target)
            own.setdefault(storage, _Own(graph, memory[storage])).write(node)
            continue
        held = names.pop(target, [target])
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


class _Own:
    """Memory that the graph itself has made, and its views.

    ``whole`` is the value that all of it has, as far as writes have been replaced. ``steps`` has for each name of a
    part what takes that from the whole, the outermost first, and None where that cannot be told.
    """

    def __init__(self, graph: fx.Graph, names: set[fx.Node]) -> None:
        self.graph = graph
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        single = sorted(n for n in names if isinstance(n.meta["val"], Tensor))
        self.whole = single[0]
        self.steps: dict[fx.Node, tuple[_Step, ...] | None] = {self.whole: ()}
        for name in single[1:]:
            self.steps[name] = self._steps_to(name)

    def _steps_to(self, name: fx.Node) -> tuple[_Step, ...] | None:
        step = _step(name)
        source = name.args[0] if step is None or name.target is not operator.getitem else node_of(name.args[0]).args[0]
        before = self.steps.get(source) if isinstance(source, fx.Node) else None
        if before is None or is_write(name):
            return before
        return None if step is None else (*before, step)

    def write(self, node: fx.Node) -> None:
        """Replace a write: the whole is made anew, and of it every view before the write that is read behind it."""
        target = node_of(node.args[0])
        steps = self.steps[target]
        before = [name for name in self.steps if not self._is_later(node, name)]
        following = [name for name in before if any(self._is_later(node, user) for user in name.users)]
        unknown = [name for name in following if self.steps[name] is None]
        if steps is None or unknown or any(step.undone is None for step in steps):
            raise UnsupportedGraph(f"{node.target} writes into a view that cannot be followed")
        result = _pure(self.graph, node)
        if result is node:
            # What is made of it behind the write, by another write say, reads what was written.
            if any(self.steps[name] or name not in (node, target) for name in following):
                raise UnsupportedGraph(f"{node.target} writes into a tensor of which a view is read afterwards")
            self._replace(target, node, node)
            return
        with self.graph.inserting_before(node):
            parts = [self.whole]
            for step in steps:
                parts.append(step.of(self.graph, parts[-1]))
            value = result
            for step, part in zip(reversed(steps), reversed(parts[:-1])):
                value = step.put(self.graph, part, value)
            self.whole = value
            made: dict[tuple[_Step, ...], fx.Node] = {(): value}
            for name in following:
                wanted = self.steps[name] or ()
                for i in range(1, len(wanted) + 1):
                    if wanted[:i] not in made:
                        made[wanted[:i]] = wanted[i - 1].of(self.graph, made[wanted[: i - 1]])
                self._replace(name, made[wanted], node)
        self.steps.pop(node, None)
        self.steps.update({view: wanted for wanted, view in made.items()})
        self.graph.erase_node(node)

    def _is_later(self, node: fx.Node, user: fx.Node) -> bool:
        return self.order.get(user, -1) > self.order[node]

    def _replace(self, name: fx.Node, new: fx.Node, write: fx.Node) -> None:
        """Let what stands behind a write read another value."""
        name.replace_all_uses_with(new, delete_user_cb=lambda user: self._is_later(write, user))


# From what a view is of and a value for the view, the operator that puts it there, and its operands.
Undoing: TypeAlias = Callable[[fx.Node, fx.Node], tuple[Any, tuple[Any, ...]]]


@dataclass(frozen=True, eq=False)
class _Step:
    """An operator that makes a view of its first operand, with the others, a node of its, and what undoes it."""

    like: fx.Node
    target: Callable[..., Any]
    rest: Sequence[Any]
    options: Mapping[str, Any]
    undone: Undoing | None

    def of(self, graph: fx.Graph, source: fx.Node) -> fx.Node:
        """The view of another operand."""
        made = graph.call_function(self.target, (source, *self.rest), dict(self.options))
        made.meta = dict(self.like.meta)
        return made

    def put(self, graph: fx.Graph, part: fx.Node, value: fx.Node) -> fx.Node:
        """The operand ``part`` with ``value`` in place of the view."""
        made = graph.call_function(*present(self.undone)(part, value))
        made.meta = dict(part.meta)
        return made


def _step(view: fx.Node) -> _Step | None:
    """What a node does to be a view of its first operand; None where that is no operator of one result."""
    if view.target is operator.getitem:
        return _of_several(view)
    if not isinstance(view.target, OpOverload):
        return None
    args, rule = schema_arguments(view), find_rule(view.target)
    # Another whole lies in memory in another order maybe.
    target: Any = aten.reshape.default if view.target is aten.view.default else view.target
    undone: Undoing | None = None
    if target is aten.slice.Tensor:
        undone = _scattered(aten.slice_scatter.default, *(args[n] for n in ("dim", "start", "end", "step")))
    elif target is aten.narrow.default and isinstance(args["start"], int) and args["start"] >= 0:
        undone = _scattered(aten.slice_scatter.default, args["dim"], args["start"], args["start"] + args["length"])
    elif target is aten.select.int:
        undone = _scattered(aten.select_scatter.default, args["dim"], args["index"])
    elif rule is not None and rule.elements is Elements.REORDERED:
        rank = view.meta["val"].dim()
        made = function_of(view)(torch.empty(tuple(range(2, rank + 2)), device="meta"), *view.args[1:], **view.kwargs)
        order = [made.shape.index(d + 2) for d in range(rank)]
        undone = partial(_put_in_order, order)
    elif rule is not None and (rule.elements is Elements.REGROUPED or view.target in _TO):
        undone = _put_in_shape
    return _Step(view, target, view.args[1:], view.kwargs, undone)


def _scattered(target: Any, *where: Any) -> Undoing:
    return lambda part, value: (target, (part, value, *where))


def _put_in_order(order: Sequence[int], part: fx.Node, value: fx.Node) -> tuple[Any, tuple[Any, ...]]:
    return aten.permute.default, (value, order)


def _put_in_shape(part: fx.Node, value: fx.Node) -> tuple[Any, tuple[Any, ...]]:
    return aten.reshape_as.default, (value, part)


def _of_several(view: fx.Node) -> _Step | None:
    """One of the parts that an operator makes of a tensor, as a slice of that."""
    source, index = view.args
    made_by = node_of(source)
    rule = find_rule(made_by.target)
    if rule is None or rule.elements is not Elements.TAKEN or not isinstance(index, int):
        return None
    values, d = made_by.meta["val"], schema_arguments(made_by)["dim"]
    if values[0].dim() < node_of(made_by.args[0]).meta["val"].dim():
        return _Step(view, aten.select.int, [d, index], {}, _scattered(aten.select_scatter.default, d, index))
    edges = [0, *accumulate(value.shape[d] for value in values)]
    if not all(isinstance(edge, int) for edge in edges):
        return None
    where = [d, edges[index], edges[index + 1]]
    return _Step(view, aten.slice.Tensor, where, {}, _scattered(aten.slice_scatter.default, *where))


# What gives its operand itself where there is nothing to convert.
_TO = (aten.to.dtype, aten.to.device, aten.to.other, aten.to.dtype_layout, aten.type_as.default)


def still_written(graph: fx.Graph) -> set[fx.Node]:
    """The values in memory that an operator of the graph writes to, so that none of them is what made it."""
    memory = set().union(*(_storages(n) for n in graph.nodes if is_write(n)))
    return {n for n in graph.nodes if _storages(n) & memory}


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


def is_write(node: fx.Node) -> bool:
    """Whether an operator writes into memory that it is given."""
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
        if written is aten.index_put_.default and _fills_by_mask(args):
            mask, number = args["indices"][0], args["values"]
            for _ in range(value.dim() - mask.meta["val"].dim()):
                mask = insert(aten.unsqueeze.default, mask, -1)
            return insert(aten.masked_fill.Tensor, node.args[0], mask, number)
        packet = getattr(getattr(torch.ops, written.namespace), name[:-1], None)
        pure = getattr(packet, written._overloadname, None)
        if pure is None:
            return node
        result = insert(pure, *node.args, **node.kwargs)
        given, options = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with without_autocast(), mode_of(tree_leaves((given, options))):
            own = pure(*given, **options)
        if own.dtype == value.dtype:
            return result
        # A write keeps the dtype of what it writes to.
        result.meta["val"] = own
        return insert(aten.to.dtype, result, value.dtype)


def _fills_by_mask(args: Mapping[str, Any]) -> bool:
    """Whether an ``index_put_`` puts one number wherever one boolean is true."""
    indices, values = args["indices"], args["values"].meta["val"]
    if len(indices) != 1 or args["accumulate"] or values.dim() or values.dtype != args["self"].meta["val"].dtype:
        return False
    return bool(indices[0].meta["val"].dtype is torch.bool)


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
