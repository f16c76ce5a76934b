"""Pass: name every axis of every value. Pure analysis; the graph does not change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import fx

from mctf_compile.narrowing import present
from mctf_compile.passes.analysis.sizes import Sizes
from mctf_compile.passes.axes import AxisTable, Dims
from mctf_compile.passes.pipeline import State, graph_pass
from mctf_compile.passes.rules import Call, flow_of


@dataclass
class Axes:
    """The axes of a graph's values, in their finest form."""

    table: AxisTable
    dims: dict[fx.Node, Dims | list[Dims]]
    mixed: dict[fx.Node, Dims]
    clashing: dict[fx.Node, Dims]

    def of(self, node: fx.Node) -> Dims:
        """The dims of a node with one tensor."""
        return self.table.canonical_dims(cast(Dims, self.dims[node]))

    def mixed_by(self, node: fx.Node) -> Dims:
        """The dims whose positions meet in a node; for one without a rule, all of its operands'."""
        return self.table.canonical_dims(self.mixed[node])

    def clashes_of(self, node: fx.Node) -> Dims:
        """Those of them that meet one to one although one is numbered otherwise than the other."""
        return self.table.canonical_dims(self.clashing.get(node, ()))

    def call(self, node: fx.Node) -> Call:
        return Call(node, self.table, self.of)


@graph_pass("token_axes", requires=("normal", "observations"), ensures=("axes", "sizes"))
def run(state: State) -> None:
    state.sizes = Sizes.of(state.inputs)
    state.axes = axes = token_axes(present(state.normal).graph)
    for observation in present(state.observations):
        # What is said of tokens need not be computed of them.
        for read, learned in zip(axes.of(observation.read)[:2], axes.of(observation.learned)[:2]):
            axes.table.unify(read, learned)


def token_axes(graph: fx.Graph) -> Axes:
    """Propagate axes from the inputs to the outputs of a normalised graph.

    1. An input, a constant and the result of an operator without a rule has axes of its own.
    2. A rule moves, splits, joins and identifies axes.
    3. Identification works backwards too (a position embedding gets the tokens' axis), so dims are
       read through ``Axes.of``, in the form they have after the whole graph has been seen.
    """
    axes = Axes(AxisTable(), {}, {}, {})
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op in ("placeholder", "get_attr"):
            if isinstance(value, torch.Tensor):
                axes.dims[node] = axes.table.fresh_dims(value.shape, "p")
        elif node.op == "call_function":
            flow = flow_of(node, axes.table, axes.dims)
            if flow is not None:
                axes.dims[node] = flow.out
                axes.mixed[node] = flow.mixed
            axes.clashing[node] = tuple(axes.table.clashes)
            axes.table.clashes.clear()
    return axes
