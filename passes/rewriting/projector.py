"""Computing a part of a fused projection by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from mctf_compile.errors import Declined
from mctf_compile.narrowing import function_of, node_of, present
from mctf_compile.passes.analysis.projections import Projection, is_linear, linears_of, read_by, with_parts
from mctf_compile.passes.analysis.structure import Block
from mctf_compile.passes.analysis.token_axes import Axes
from mctf_compile.passes.planning.plan import Plan
from mctf_compile.passes.rewriting.stream import Value
from mctf_compile.passes.rules import sources


class Projector:
    """Evaluates the values that the plan lists as parts of a linear, each with its own rows of the weight."""

    def __init__(self, axes: Axes, plan: Plan) -> None:
        self.axes, self.plan = axes, plan
        self._projected: dict[tuple[fx.Node, int, int, tuple[Any, ...]], Tensor] = {}
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

    def evaluate(self, node: fx.Node, env: Mapping[fx.Node, Any], before: Mapping[fx.Node, Any]) -> Value:
        """A part of a fused projection, computed alone; q and k of one input are computed together.

        ``before``: the values of the program; where ``env`` has others of the fused tokens, v alone is wanted.
        """
        projection = self.plan.projections[node]
        inputs = [node_of(linear.args[0]) for linear in linears_of(projection.source, self.axes)]
        values = [env[n] for n in inputs]
        x: Value = values[0]
        if len({(v.stream, v.generation) for v in values}) > 1:
            raise Declined("the layers that a projection is made of read tokens that were fused apart")
        old = all(before[n] is v for n, v in zip(inputs, values))
        start, stop = self._range(projection) if old else (projection.start, projection.stop)
        out = self._features(projection.source, start, stop, env)
        if (start, stop) != (projection.start, projection.stop):
            out = out[..., projection.start - start : projection.stop - start]
        if projection.shape:
            out = out.unflatten(-1, projection.shape)
        out = out.permute(projection.order)
        return Value(out, self.axes.of(node), x.stream, x.generation, returned=x.returned)

    def _features(self, source: fx.Node, start: int, stop: int, env: Mapping[fx.Node, Any]) -> Tensor:
        """``source[..., start:stop]``, of which no more than that is computed."""
        read = tuple(value.tensor if isinstance(value := env[n], Value) else value for n in read_by(source, self.axes))
        key = (source, start, stop, read)
        if key not in self._projected:
            self._projected[key] = self._compute(source, start, stop, env)
        return self._projected[key]

    def _compute(self, source: fx.Node, start: int, stop: int, env: Mapping[fx.Node, Any]) -> Tensor:
        if is_linear(source):
            x, weight, bias = (self._arg(source, i, env) for i in range(3))
            bias = None if bias is None else bias[start:stop]
            computed: Tensor = torch.ops.aten.linear(present(x), present(weight)[start:stop], bias)
            return computed
        parts, width = with_parts(source, self.axes), source.meta["val"].shape[-1]

        def operand(n: fx.Node) -> Any:
            if n in parts:
                return self._features(n, start, stop, env)
            if not isinstance(env[n], Value):
                return env[n]
            x = env[n].tensor
            return x[..., start:stop] if x.dim() and x.shape[-1] == width else x

        args, kwargs = fx.node.map_arg((source.args, source.kwargs), operand)
        computed = function_of(source)(*args, **kwargs)
        return computed

    def _arg(self, linear: fx.Node, i: int, env: Mapping[fx.Node, Any]) -> Tensor | None:
        node = linear.args[i] if len(linear.args) > i else linear.kwargs.get(("input", "weight", "bias")[i])
        tensor: Tensor | None = None if node is None else env[node_of(node)].tensor
        return tensor

    def _range(self, projection: Projection) -> tuple[int, int]:
        """The output features to compute at once: this part, and q or k beside it."""
        beside = [p for n, p in self.plan.projections.items() if p.source is projection.source and n in self._asked]
        if projection not in beside:
            return projection.start, projection.stop
        start, stop = min(p.start for p in beside), max(p.stop for p in beside)
        solid = sum(p.stop - p.start for p in beside) == stop - start
        return (start, stop) if solid else (projection.start, projection.stop)
