"""Computing a part of a fused projection by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from mctf_compile.narrowing import node_of, present
from mctf_compile.passes.analysis.projections import Projection
from mctf_compile.passes.analysis.structure import Block
from mctf_compile.passes.analysis.token_axes import Axes
from mctf_compile.passes.planning.plan import Plan
from mctf_compile.passes.rewriting.stream import Value
from mctf_compile.passes.rules import sources


class Projector:
    """Evaluates the values that the plan lists as parts of a linear, each with its own rows of the weight."""

    def __init__(self, axes: Axes, plan: Plan) -> None:
        self.axes, self.plan = axes, plan
        self._projected: dict[tuple[fx.Node, Tensor, int, int], Tensor] = {}
        self._asked = set().union(*(self._behind(b.block) for b in plan.fusing))

    def _behind(self, block: Block) -> set[fx.Node]:
        """The parts that a block's query and key are computed from."""
        found: set[fx.Node] = set()
        seen: set[fx.Node] = set()
        stack = [block.attention.query, block.attention.key]
        while stack:
            node = stack.pop()
            if node in self.plan.projections:
                found.add(node)
            elif node not in seen and node > present(block.entry):
                seen.add(node)
                stack.extend(sources(node))
        return found

    def evaluate(self, node: fx.Node, env: Mapping[fx.Node, Any], first: Value) -> Value:
        """A part of a fused projection, computed alone; q and k of one input are computed together.

        ``first`` is the linear's operand before this block fused; of the fused tokens, v alone is wanted.
        """
        projection = self.plan.projections[node]
        x = env[node_of(projection.linear.args[0])]
        start, stop = self._range(projection) if x is first else (projection.start, projection.stop)
        key = (projection.linear, x.tensor, start, stop)
        if key not in self._projected:
            weight, bias = (self._arg(projection.linear, i, env) for i in (1, 2))
            bias = None if bias is None else bias[start:stop]
            self._projected[key] = torch.ops.aten.linear(x.tensor, present(weight)[start:stop], bias)
        out = self._projected[key]
        if (start, stop) != (projection.start, projection.stop):
            out = out[..., projection.start - start : projection.stop - start]
        if projection.shape:
            out = out.unflatten(-1, projection.shape)
        return Value(out.permute(projection.order), self.axes.of(node), x.stream, x.generation)

    def _arg(self, linear: fx.Node, i: int, env: Mapping[fx.Node, Any]) -> Tensor | None:
        node = linear.args[i] if len(linear.args) > i else linear.kwargs.get(("input", "weight", "bias")[i])
        tensor: Tensor | None = None if node is None else env[node_of(node)].tensor
        return tensor

    def _range(self, projection: Projection) -> tuple[int, int]:
        """The output features to compute at once: this part, and q or k beside it."""
        beside = [p for n, p in self.plan.projections.items() if p.linear is projection.linear and n in self._asked]
        if projection not in beside:
            return projection.start, projection.stop
        start, stop = min(p.start for p in beside), max(p.stop for p in beside)
        solid = sum(p.stop - p.start for p in beside) == stop - start
        return (start, stop) if solid else (projection.start, projection.stop)
