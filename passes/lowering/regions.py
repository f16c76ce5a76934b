"""Pass: cut a rewritten graph at its blocks, so that blocks which do the same are compiled once."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload

from mctf_compile.kernels.device import device_of
from mctf_compile.narrowing import function_of, present
from mctf_compile.passes.axes import Size, hint_of, size_of
from mctf_compile.passes.lowering.autocast import devices_of, keep_autocast_out
from mctf_compile.passes.pipeline import State, graph_pass
from mctf_compile.passes.planning.segments import SEGMENT
from mctf_compile.passes.subclasses import make_up

aten = torch.ops.aten


@graph_pass("regions", requires=("lowered",))
def run(state: State) -> None:
    cut = None if stays_in_one_piece(state) else split(state.frozen or present(state.lowered))
    # Something speaks for it where blocks are alike, or numbers of tokens may change.
    if cut is not None and any(region.instances > 1 or region.adjustable for region in cut.regions):
        state.cut = cut


def stays_in_one_piece(state: State) -> bool:
    """Whether the inner compiler is to see the graph in one piece.

    CUDA graphs record one set of addresses; with an interpreter there is nothing to share.
    """
    lowering = state.config.lowering
    if state.one_piece or lowering.inner == "eager":
        return True
    recorders = {device_of(x.device).recorder for x in state.inputs if isinstance(x, Tensor)}
    return state.counts is None and any(lowering.inductor_has(name) for name in recorders if name is not None)


@dataclass(frozen=True)
class Symbol:
    """The ``index``-th of the numbers that differ between the instances of a region."""

    index: int


@dataclass(frozen=True)
class Region:
    """A part of a graph that runs at one or more instances, on other operands each time.

    ``body`` takes first the numbers that differ between its instances (token counts), then tensors;
    ``example_numbers`` are those numbers as they were traced. ``shapes`` has the dimensions of each tensor operand,
    ``results`` the places among its nodes of what is read after it at one instance or another; ``instances`` is how
    many there are. ``adjustable``: whether an instance's numbers may change between calls.
    """

    body: fx.GraphModule
    example_numbers: list[int]
    shapes: list[list[int | Symbol]]
    results: list[int]
    instances: int
    adjustable: bool


@dataclass(frozen=True)
class Cut:
    """A graph in regions.

    ``outer`` calls the submodule ``region_<i>`` with the number of the instance and its operands, and takes a tuple of
    results; each call carries ``SEGMENT``. It reads the attributes of ``root``.
    """

    root: fx.GraphModule
    outer: fx.Graph
    regions: list[Region]


def split(gm: fx.GraphModule, joined: bool = True) -> Cut | None:
    """Cut a graph whose nodes carry ``SEGMENT`` into regions; None where it cannot be cut.

    ``joined``: neighbours of which none is like another become one region.

    Before::  block 1, block 2, block 3, ... each with its own number of tokens
    After::   region_1(0, *sizes, *operands), region_1(1, *sizes, *operands), ...

    Two segments are instances of one region where their nodes are the same, up to the sizes of activations and the
    numbers that operators take for sizes. What differs among the instances is a symbol; numbers that are equal to each
    other at every instance are one symbol. Each instance runs what its own segment says, so nothing rests on a guess at
    how sizes are related.
    """
    if any(isinstance(n.target, HigherOrderOperator) or n.op in ("call_module", "call_method") for n in gm.graph.nodes):
        return None
    for node in gm.graph.nodes:
        _take_apart(node)
    for node in gm.graph.find_nodes(op="get_attr"):
        node.meta.setdefault("val", operator.attrgetter(node.target)(gm))
    segments = [_Segment(nodes) for nodes in _segments(gm.graph)]
    if any(_is_number(n) and not _is_size(n) for s in segments for n in s.read):
        return None
    if joined:
        segments = _joined(segments)
    groups: dict[tuple[Any, ...], list[_Segment]] = {}
    for segment in segments:
        groups.setdefault(segment.key, []).append(segment)
    regions, operands = zip(*(_region(gm, group) for group in groups.values()))
    return Cut(gm, _outer(gm.graph, segments, list(groups), regions, operands), list(regions))


def _take_apart(node: fx.Node) -> None:
    """Name all results of an operator that has several: some may be read at one instance of a region alone."""
    values = node.meta.get("val")
    if node.op != "call_function" or not isinstance(values, (tuple, list)):
        return
    present = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    last = node
    for i, value in enumerate(values):
        if i not in present:
            with node.graph.inserting_after(last):
                present[i] = node.graph.call_function(operator.getitem, (node, i))
            present[i].meta = {**node.meta, "val": value}
        else:
            last.append(present[i])
        last = present[i]


def _segments(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    outside = {n for n in graph.nodes if n.op in ("placeholder", "get_attr")}
    parts: dict[int, list[fx.Node]] = {}
    number = 0
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if _is_size(node) and all(n in outside for n in node.all_input_nodes):
            outside.add(node)
            continue
        number = max(number, node.meta.get(SEGMENT, 0))
        # The results of one operator are taken apart where it runs.
        of_many = node.all_input_nodes and isinstance(node.all_input_nodes[0].meta.get("val"), (tuple, list))
        node.meta[SEGMENT] = node.all_input_nodes[0].meta[SEGMENT] if of_many else number
        parts.setdefault(node.meta[SEGMENT], []).append(node)
    return (nodes for _, nodes in sorted(parts.items()))


def _joined(segments: list[_Segment]) -> list[_Segment]:
    """The segments, with neighbours that are like no other made one."""
    times = Counter(s.key for s in segments)
    joined: list[_Segment] = []
    for alone, run in groupby(segments, lambda s: times[s.key] == 1):
        several = list(run)
        joined.extend([_Segment([n for s in several for n in s.nodes])] if alone else several)
    return joined


def _is_size(node: fx.Node) -> bool:
    """Whether a node is a number that regions take: a whole one."""
    return isinstance(node.meta.get("val"), torch.SymInt)


def _is_number(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymBool, torch.SymFloat))


# A number at an instance: itself, the node that computes it, or a tensor and its dimension.
Number = int | fx.Node | tuple[fx.Node, int]


def _known(number: Number) -> int | torch.SymInt:
    """A number as it was traced."""
    if isinstance(number, tuple):
        node, d = number
        size: int | torch.SymInt = node.meta["val"].shape[d]
        return size
    return number.meta["val"] if isinstance(number, fx.Node) else number


class _Segment:
    """Consecutive nodes, what they ``read`` from outside, and what is read of them later.

    ``numbers`` are those that may differ between instances of one region, in the order in which they are met;
    ``key`` is all the rest.
    """

    def __init__(self, nodes: list[fx.Node]) -> None:
        self.nodes, self.own = nodes, set(nodes)
        self.read = dict.fromkeys(i for n in nodes for i in n.all_input_nodes if i not in self.own)
        self.inputs = [n for n in self.read if not _is_number(n)]
        self.results = {i for i, n in enumerate(nodes) if any(user not in self.own for user in n.users)}
        self.numbers: list[Number] = []
        names = {n: f"%{i}" for i, n in enumerate((*self.inputs, *nodes))}
        key: list[Any] = []
        for node in self.inputs:
            value = node.meta["val"]
            shape = [self._note((node, d)) if _varies(node, s) else s for d, s in enumerate(value.shape)]
            key.append((value.dtype, value.device, tuple(shape), make_up(value)))
        checkpoints: dict[int | None, int] = {}
        for node in nodes:
            checkpoint = checkpoints.setdefault(node.meta.get("ac_graph_id"), len(checkpoints))
            arguments = fx.node.map_arg(self.arguments(node, self._note), names.__getitem__)
            key.append((str(node.target), repr(arguments), str(node.meta.get("recompute")), checkpoint))
        self.key = tuple(key)

    def _note(self, number: Number) -> str:
        self.numbers.append(number)
        return "size"

    @property
    def expressions(self) -> list[Size]:
        return [size_of(_known(n)) for n in self.numbers]

    def arguments(self, node: fx.Node, number: Callable[[Any], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a node, with ``number`` of each that may differ in its place."""

        def walk(value: Any, size: bool) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)(walk(v, size) for v in value)
            outer = isinstance(value, fx.Node) and value not in self.own and _is_number(value)
            given = size and isinstance(value, int) and not isinstance(value, bool) and value > 1
            return number(value) if outer or given else value

        args = tuple(walk(v, _takes_size(node.target, i)) for i, v in enumerate(node.args))
        return args, {k: walk(v, _takes_size(node.target, k)) for k, v in node.kwargs.items()}


def _varies(node: fx.Node, size: int | torch.SymInt) -> bool:
    """Whether a size of an operand may differ between instances; that of a weight may not."""
    return isinstance(size, torch.SymInt) or (size > 1 and node.op == "call_function")


def _takes_size(target: Any, place: int | str) -> bool:
    """Whether an operator takes a number there that may be symbolic."""
    if not isinstance(target, OpOverload):
        return False
    arguments = target._schema.arguments
    found = arguments[place] if isinstance(place, int) else next((a for a in arguments if a.name == place), None)
    kind = None if found is None else found.real_type
    while isinstance(kind, (torch.ListType, torch.OptionalType)):
        kind = kind.getElementType()
    return isinstance(kind, torch.SymIntType)


def _region(gm: fx.GraphModule, segments: list[_Segment]) -> tuple[Region, list[list[Number]]]:
    """The region of some segments that are alike, and the operands of each."""
    index: dict[tuple[Any, ...], Symbol] = {}
    first_at: list[int] = []
    known: list[int | Symbol] = []
    for i, vector in enumerate(zip(*(s.expressions for s in segments), strict=True)):
        if isinstance(vector[0], int) and len(set(vector)) == 1:
            known.append(vector[0])
            continue
        if vector not in index:
            index[vector] = Symbol(len(index))
            first_at.append(i)
        known.append(index[vector])
    first, unread = segments[0], iter(known)
    shapes = [[next(unread) if _varies(n, s) else s for s in n.meta["val"].shape] for n in first.inputs]
    operands = [[*(s.numbers[i] for i in first_at), *s.inputs] for s in segments]
    results = sorted(set().union(*(s.results for s in segments)))
    body = fx.GraphModule(gm, _body(first, results, len(index), unread))
    keep_autocast_out(body, devices_of((*first.inputs, *first.nodes)))
    adjustable = any(not isinstance(e, int) for vector in index for e in vector)
    example_numbers = [hint_of(_known(first.numbers[i])) for i in first_at]
    return Region(body, example_numbers, shapes, results, len(segments), adjustable), operands


def _body(segment: _Segment, results: list[int], symbols: int, known: Iterator[int | Symbol]) -> fx.Graph:
    graph = fx.Graph()
    numbers = [graph.placeholder(f"s{i}") for i in range(symbols)]
    env = {n: graph.placeholder(f"x{i}") for i, n in enumerate(segment.inputs)}

    def number(_: Any) -> Any:
        value = next(known)
        return numbers[value.index] if isinstance(value, Symbol) else value

    for node in segment.nodes:
        arguments = segment.arguments(node, number)
        args, kwargs = fx.node.map_arg(arguments, lambda n: env.get(n, n))
        env[node] = graph.call_function(function_of(node), args, kwargs)
        # A number that is read from a tensor has another symbol where the region is traced anew.
        env[node].meta = {
            k: v for k, v in node.meta.items() if k not in ("val", "tensor_meta", "unbacked_bindings", SEGMENT)
        }
    graph.output(tuple(env[segment.nodes[i]] for i in results))
    return graph


def _outer(
    graph: fx.Graph,
    segments: list[_Segment],
    keys: list[tuple[Any, ...]],
    regions: Sequence[Region],
    operands: Sequence[list[list[Number]]],
) -> fx.Graph:
    outer = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    inside = set().union(*(s.own for s in segments))

    def number(value: Number) -> Any:
        if isinstance(value, tuple):
            size = _known(value)
            return size if isinstance(size, int) else outer.call_function(aten.sym_size.int, (env[value[0]], value[1]))
        return env[value] if isinstance(value, fx.Node) else value

    for node in graph.nodes:
        if node not in inside and node.op != "output":
            env[node] = outer.node_copy(node, env.__getitem__)
    met = dict.fromkeys(keys, 0)
    for segment in segments:
        which, instance = keys.index(segment.key), met[segment.key]
        met[segment.key] += 1
        results = outer.call_module(f"region_{which}", (instance, *map(number, operands[which][instance])))
        results.meta[SEGMENT] = segment.nodes[0].meta[SEGMENT]
        for i, position in enumerate(regions[which].results):
            if position in segment.results:
                env[segment.nodes[position]] = outer.call_function(operator.getitem, (results, i))
    (output,) = graph.find_nodes(op="output")
    outer.output(fx.node.map_arg(output.args[0], env.__getitem__))
    return outer
