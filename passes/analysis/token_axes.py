"""Pass: name every axis of every value. Pure analysis; the graph does not change."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from mctf_compile.narrowing import node_of, present
from mctf_compile.passes.axes import AxisTable, Dims
from mctf_compile.passes.pipeline import State, graph_pass
from mctf_compile.passes.rules import Call, Flow, Rule, find_rule


@dataclass
class Axes:
    """The axes of a graph's values, in their finest form."""

    table: AxisTable
    dims: dict[fx.Node, Dims | list[Dims]]
    mixed: dict[fx.Node, Dims]

    def of(self, node: fx.Node) -> Dims:
        """The dims of a node with one tensor."""
        return self.table.canonical_dims(cast(Dims, self.dims[node]))

    def mixed_by(self, node: fx.Node) -> Dims:
        """The dims whose positions meet in a node; for one without a rule, all of its operands'."""
        return self.table.canonical_dims(self.mixed[node])

    def call(self, node: fx.Node) -> Call:
        return Call(node, self.table, self.of)


@graph_pass("token_axes", requires=("normal",), ensures=("axes",))
def run(state: State) -> None:
    state.axes = token_axes(present(state.normal).graph)


def token_axes(graph: fx.Graph) -> Axes:
    """Propagate axes from the inputs to the outputs of a normalised graph.

    1. An input, a constant and the result of an operator without a rule has axes of its own.
    2. A rule moves, splits, joins and identifies axes.
    3. Identification works backwards too (a position embedding gets the tokens' axis), so dims are
       read through ``Axes.of``, in the form they have after the whole graph has been seen.
    """
    axes = Axes(AxisTable(), {}, {})
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op in ("placeholder", "get_attr"):
            if isinstance(value, torch.Tensor):
                axes.dims[node] = axes.table.fresh_dims(value.shape, "p")
        elif node.op == "call_function":
            flow = _flow(node, value, axes)
            if flow is not None:
                axes.dims[node] = flow.out
                axes.mixed[node] = flow.mixed
    return axes


def _flow(node: fx.Node, value: Any, axes: Axes) -> Flow | None:
    if node.target is operator.getitem and node.args[0] in axes.dims:
        several = cast(list[Dims], axes.dims[node_of(node.args[0])])
        return Flow(several[cast(int, node.args[1])])
    if not _tensors(value):
        return None
    operands = [n for n in node.all_input_nodes if n in axes.dims and isinstance(axes.dims[n], tuple)]
    rule: Rule | None = find_rule(node.target)
    # Of values without dimensions, whose first and last may be named all the same, there is nothing to say.
    if rule is not None and any(axes.dims[n] for n in operands):
        return rule.axes(axes.call(node))
    mixed = tuple(dim for n in operands for dim in cast(Dims, axes.dims[n]))
    if isinstance(value, torch.Tensor):
        return Flow(axes.table.fresh_dims(value.shape), mixed)
    return Flow([axes.table.fresh_dims(v.shape) if isinstance(v, torch.Tensor) else () for v in value], mixed)


def _tensors(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return any(isinstance(v, torch.Tensor) for v in value)
    return isinstance(value, torch.Tensor)
