"""Pass: re-emit the graph with the planned fusions, every value in the generation its tokens are in."""

from __future__ import annotations

import operator
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.traceback import set_current_meta

from mctf_compile.errors import Declined
from mctf_compile.kernels.library import working_dtype
from mctf_compile.methods import Evidence, Site
from mctf_compile.passes.axes import Dims, Place, Tokens, mentions, places
from mctf_compile.passes.fusion import Fusion, Stream, Value
from mctf_compile.passes.normalize import trace
from mctf_compile.passes.plan import Plan, PlannedBlock
from mctf_compile.passes.projections import Projection
from mctf_compile.passes.rules import Call, Rule, find_rule
from mctf_compile.passes.rules.attention import scale_of
from mctf_compile.passes.rules.base import wrap
from mctf_compile.passes.token_axes import Axes

Env = Mapping[fx.Node, Any]


@dataclass(frozen=True)
class Unmerge:
    """An operator before which the tokens were given back, and why."""

    node: fx.Node
    reason: str


@dataclass(frozen=True)
class Outcome:
    """A rewritten graph and what was learned on the way.

    ``wasted``: blocks whose fusion was undone before their MLP had run, with the reason; ``whole``:
    blocks that got the original tokens back although an earlier block had fused them.
    """

    graph: fx.GraphModule
    unmerges: list[Unmerge]
    wasted: dict[int, str]
    whole: frozenset[int]


def rewrite_graph(gm: fx.GraphModule, inputs: Sequence[Any], axes: Axes, plan: Plan) -> Outcome:
    """Fuse tokens at each planned block and make everything downstream size-weighted.

    Before::  x1 = add(x0, proj(sdpa(q, k, v)))
    After::   importance, weights, norm = mctf.importance(q, k, log_size, None, scale)
              keep, gone, into = mctf.match(x0, importance, size, r, ...)
              index, weight, size = mctf.group(importance * size, size, keep, gone, into)
              y0 = mctf.pool(x0, weight, keep, gone, into, 1)
              y1 = add(y0, proj(mctf.ahead(weights, norm, v(y0), index, weight, keep, gone, into, 0.0)))

    1. Each value keeps its generation: how many fusions its tokens have been through.
    2. Operands of different generations meet in the youngest; older ones are fused through the maps.
    3. An operator that mixes tokens runs its rule's size-weighted form.
    4. An operator without one, and every output, gets the original tokens back (``mctf.unmerge``).

    Source: Lee et al., CVPR 2024, section 3.
    """
    rewriter = Rewriter(gm, axes, plan)
    result = trace(rewriter.run, inputs)
    # What was computed of the old tokens alone and is read no more.
    result.graph.eliminate_dead_code()
    result.recompile()
    return Outcome(result, rewriter.unmerges, rewriter.wasted(), frozenset(rewriter.whole))


class Rewriter:
    """Runs a graph on traced tensors, fusing where the plan says."""

    def __init__(self, gm: fx.GraphModule, axes: Axes, plan: Plan) -> None:
        self.gm, self.axes, self.plan = gm, axes, plan
        self.order = {node: i for i, node in enumerate(gm.graph.nodes)}
        self.unmerges: list[Unmerge] = []
        self.whole: set[int] = set()
        self._reset()

    def _reset(self) -> None:
        self.streams: dict[Tokens, Stream] = {}
        self.env: dict[fx.Node, Any] = {}
        self._sources: dict[tuple[Stream, int], fx.Node] = {}
        self._fused: dict[fx.Node, Value] = {}
        self._raised: dict[tuple[fx.Node, int, int], Value] = {}
        self._projected: dict[tuple[fx.Node, int, int, int], Tensor] = {}
        self._importance: dict[fx.Node, Tensor] = {}
        self.unmerges.clear()
        self.whole.clear()
        self._at_node = {b.block.attention.node: b for b in self.plan.fusing}
        self._at_weights = {
            b.block.attention.weights: b for b in self.plan.fusing if b.block.attention.weights is not None
        }
        after = {Site.AFTER: "exit", Site.BETWEEN: "middle"}.get(self.plan.site)
        self._at_end = {getattr(b.block, after): b for b in self.plan.fusing} if after else {}

    def wasted(self) -> dict[int, str]:
        """The blocks in which tokens were given back between the fusion and the end of the MLP."""
        found = {}
        for planned in self.plan.fusing:
            block = planned.block
            first, last = self.order[block.attention.node], self.order[block.exit]
            for unmerge in self.unmerges:
                if first < self.order[unmerge.node] <= last:
                    found[planned.index] = f"the fused tokens would be given back within the block: {unmerge.reason}"
        return found

    def run(self, *inputs: Any) -> Any:
        """The rewritten program; call it under a tracer."""
        self._reset()
        feed = iter(inputs)
        for node in self.gm.graph.nodes:
            if node.op == "placeholder":
                self.env[node] = self._dense(node, next(feed))
            elif node.op == "output":
                return fx.node.map_arg(node.args[0], lambda n: self._output(n))
            else:
                with set_current_meta(node):
                    self.env[node] = self._emit(node)
        raise AssertionError("a graph without an output")

    def _output(self, node: fx.Node) -> Any:
        value = self.env[node]
        return self._lower(value).tensor if isinstance(value, Value) else value

    def _dense(self, node: fx.Node, result: Any) -> Any:
        if isinstance(result, Tensor):
            return Value(result, self.axes.of(node) if node in self.axes.dims else ())
        if isinstance(result, (tuple, list)):
            dims = self.axes.dims.get(node, [()] * len(result))
            return [Value(r, self.axes.table.canonical_dims(d)) if isinstance(r, Tensor) else r
                    for r, d in zip(result, dims)]
        return result

    def _emit(self, node: fx.Node) -> Any:
        if node in self._at_node:
            result = self._attend(node, self._at_node[node])
        else:
            result = self.evaluate(node, self.env)
        if node in self._at_weights:
            block = self._at_weights[node]
            self._importance[block.block.attention.node] = self._mean_received(result, block)
        if node in self._at_end:
            result = self._fuse(self._at_end[node], result, self._importance[self._at_end[node].block.attention.node])
        return result

    # Running operators.

    def evaluate(self, node: fx.Node, env: Env) -> Any:
        """Run one node on the values of ``env``, in the youngest generation among them."""
        if node.op == "get_attr":
            return self._dense(node, operator.attrgetter(node.target)(self.gm))
        if node in self.plan.projections:
            return self._project(node, self.plan.projections[node], env)
        if node.target is operator.getitem and isinstance(env.get(node.args[0]), list):
            return env[node.args[0]][node.args[1]]
        operands = [env[n] for n in node.all_input_nodes]
        fused = [v for v in _flat(operands) if v.generation]
        if not fused:
            return self._run_dense(node, env)
        try:
            if len({v.stream for v in fused}) > 1:
                raise Declined("two token axes that are fused apart meet")
            return self._run_fused(node, fused[0].stream, max(v.generation for v in fused), env)
        except Declined as declined:
            self.unmerges.append(Unmerge(node, str(declined)))
            return self._run_dense(node, env)

    def _run_dense(self, node: fx.Node, env: Env) -> Any:
        def dense(n: fx.Node) -> Any:
            value = env[n]
            if isinstance(value, list):
                return [self._lower(v).tensor if isinstance(v, Value) else v for v in value]
            return self._lower(value).tensor if isinstance(value, Value) else value

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), dense)
        return self._dense(node, node.target(*args, **kwargs))

    def _run_fused(self, node: fx.Node, stream: Stream, generation: int, env: Env) -> Any:
        rule = find_rule(node.target)
        if rule is None:
            raise Declined(f"{node.target} has no rule for fused tokens")
        call = FusedCall(self, rule, node, stream, generation, env)
        if not mentions(self.axes.mixed_by(node), stream.tokens):
            return call.emit()
        if rule.fused is None:
            raise Declined(f"{node.target} reads the original tokens")
        return rule.fused(call)

    def again(self, node: fx.Node, source: fx.Node, replacement: Value) -> Any:
        """The value of ``node`` had ``source`` been ``replacement``; only what lies between is run again."""
        between, stack = set(), [node]
        while stack:
            n = stack.pop()
            if n not in between and self.order[n] > self.order[source]:
                between.add(n)
                stack.extend(n.all_input_nodes)
        local = ChainMap({source: replacement}, self.env)
        for n in sorted(between, key=self.order.__getitem__):
            if any(i in local.maps[0] for i in n.all_input_nodes):
                local[n] = self.evaluate(n, local)
        return local[node]

    def _descends(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether ``node`` is computed from ``source``."""
        stack, seen = [node], set()
        while stack:
            n = stack.pop()
            if n is source:
                return n is not node
            if n not in seen and self.order[n] > self.order[source]:
                seen.add(n)
                stack.extend(n.all_input_nodes)
        return False

    # Moving values between generations.

    def lift(self, node: fx.Node, value: Value, stream: Stream, generation: int, like: Value) -> Value:
        """``value`` in ``generation``; unchanged where it has no token axis. ``like`` shows where images are."""
        if value.generation == generation or not mentions(value.dims, stream.tokens):
            return value
        key = (node, id(value.tensor), generation)
        if key not in self._raised:
            source = self._sources.get((stream, generation))
            if source is not None and value.generation == generation - 1 and self._descends(node, source):
                # What was derived from the tokens before they were fused is derived from the fused ones.
                value = self.again(node, source, self._fused[source])
                if value.generation == generation:
                    self._raised[key] = value
                    return value
            if stream.tokens.batch and not _has_batch(value.dims, stream.tokens):
                value = _with_images(value, stream, like)
            self._raised[key] = stream.raise_to(stream.intensive(value), generation)
        return self._raised[key]

    def _lower(self, value: Value, generation: int = 0) -> Value:
        if value.stream is None:
            return value
        return value.stream.lower_to(value.stream.intensive(value), generation)

    def _project(self, node: fx.Node, projection: Projection, env: Env) -> Value:
        """A part of a fused projection, computed alone; neighbouring parts of one input are computed together."""
        x = env[projection.linear.args[0]]
        parts = self._parts(projection, x)
        start, stop = parts
        key = (projection.linear, id(x.tensor), start, stop)
        if key not in self._projected:
            weight, bias = (self._arg(projection.linear, i, env) for i in (1, 2))
            bias = None if bias is None else bias[start:stop]
            self._projected[key] = torch.ops.aten.linear(x.tensor, weight[start:stop], bias)
        out = self._projected[key][..., projection.start - start : projection.stop - start]
        if projection.shape:
            out = out.unflatten(-1, projection.shape)
        return Value(out.permute(projection.order), self.axes.of(node), x.stream, x.generation)

    def _arg(self, linear: fx.Node, i: int, env: Env) -> Tensor | None:
        node = linear.args[i] if len(linear.args) > i else linear.kwargs.get(("input", "weight", "bias")[i])
        return None if node is None else env[node].tensor

    def _parts(self, projection: Projection, x: Value) -> tuple[int, int]:
        """The range of output features to compute at once: this part, and q or k beside it."""
        if x.generation != self.env[projection.linear.args[0]].generation:
            return projection.start, projection.stop
        wanted = {n for b in self.plan.fusing for n in (b.block.attention.query, b.block.attention.key)}
        beside = [
            p for n, p in self.plan.projections.items()
            if p.linear is projection.linear and self._feeds(n, wanted)
        ]
        if projection not in beside:
            return projection.start, projection.stop
        start, stop = min(p.start for p in beside), max(p.stop for p in beside)
        solid = sum(p.stop - p.start for p in beside) == stop - start
        return (start, stop) if solid else (projection.start, projection.stop)

    def _feeds(self, node: fx.Node, wanted: set[fx.Node]) -> bool:
        """Whether ``node`` is, or leads through pointwise steps to, one of ``wanted`` and not to a value."""
        seen, stack = set(), [node]
        while stack:
            n = stack.pop()
            if n in wanted:
                return True
            if n in seen or n in self._at_node or len(seen) > 64:
                continue
            seen.add(n)
            stack.extend(n.users)
        return False

    # Fusing.

    def _stream(self, block: PlannedBlock) -> Stream:
        """The stream of a block's tokens; a new one where they came back unfused since the last fusion."""
        tokens, value = block.block.tokens, self._entry(block)
        if value.stream is not None:
            return value.stream
        if tokens not in self.streams or self.streams[tokens].fusions:
            self.streams[tokens] = Stream(tokens)
        return self.streams[tokens]

    def _entry(self, block: PlannedBlock) -> Value:
        return self.env[block.block.entry]

    def _attend(self, node: fx.Node, block: PlannedBlock) -> Value:
        """A planned attention, with the fusion that belongs to it."""
        site, entry = block.block.attention, block.block.entry
        if site.weights is not None:
            return self._attend_spelled_out(node, block)
        call = FusedCall(self, find_rule(node.target), node, self._stream(block), self._entry(block).generation, self.env)
        q, k = (call.intensive(name).tensor for name in ("query", "key"))
        bias = None if call.args.get("attn_mask") is None else call.intensive("attn_mask").tensor
        (place,) = self.places(entry, call.stream)
        log_size = call.log_sizes(place)
        importance, weights, norm = torch.ops.mctf.importance(q, k, log_size, bias, scale_of(call.call))
        if self.plan.site is Site.AHEAD:
            x = self._fuse(block, self._entry(block), importance)
            v = self._young(self.again(site.value, entry, x), x)
            fusion = x.stream.fusion(x.generation, place.lead, place.tail)
            out = torch.ops.mctf.ahead(
                weights, norm, v.tensor, fusion.index, fusion.weight, fusion.keep, fusion.gone, fusion.into,
                call.args["dropout_p"],
            )
            return Value(out, self.axes.of(node), x.stream, x.generation)
        if self.plan.site is Site.BEFORE:
            return self.again(node, entry, self._fuse(block, self._entry(block), importance))
        self._importance[node] = importance
        v = call.intensive("value").tensor
        rows = torch.nn.functional.dropout(weights, call.args["dropout_p"]) @ v
        return call.result((rows * norm).to(v.dtype))

    def _attend_spelled_out(self, node: fx.Node, block: PlannedBlock) -> Value:
        site, entry = block.block.attention, block.block.entry
        if self.plan.site is Site.AHEAD:
            x = self._fuse(block, self._entry(block), self._importance[node])
            v = self._young(self.again(site.value, entry, x), x)
            if x.stream.fusions[-1].weight is None:
                return self._attend_by_maxima(node, block, v)
            repeated = x.stream.lower_to(v, x.generation - 1)
            out = self.evaluate(node, ChainMap({site.value: repeated}, self.env))
            return x.stream.raise_to(out, x.generation)
        if self.plan.site is Site.BEFORE:
            return self.again(node, entry, self._fuse(block, self._entry(block), self._importance[node]))
        return self.evaluate(node, self.env)

    def _attend_by_maxima(self, node: fx.Node, block: PlannedBlock, v: Value) -> Value:
        """The pooled map itself times the values: maxima over rows are no linear map."""
        site = block.block.attention
        factor = next(n for n in node.all_input_nodes if n is not site.value)
        weights = self.env[factor]
        if weights.mass is None:
            # Weights of the original tokens: their keys run along the last dimension.
            weights = replace(weights, mass=len(weights.dims) - 1)
        return self.evaluate(node, ChainMap({site.value: v, factor: v.stream.pooled_map(weights)}, self.env))

    def _young(self, value: Value, x: Value) -> Value:
        return x.stream.raise_to(value, x.generation)

    def _mean_received(self, weights: Value, block: PlannedBlock) -> Tensor:
        """[B, N] mean over heads and queries of attention weights, whatever their layout."""
        stream = self._stream(block)
        dim = wrap(block.block.attention.weights.args[1], len(weights.dims))
        place = next(p for p in stream.places(weights.dims) if p.dim == dim)
        tensor = weights.tensor.detach()
        return stream.canonical(Value(tensor.to(working_dtype(tensor.dtype)), weights.dims, stream,
                                      weights.generation), place).mean(-1)

    def _fuse(self, block: PlannedBlock, x: Value, importance: Tensor) -> Value:
        """Choose and pool the block's tokens: a new generation. Returns ``x`` in it."""
        stream = self._stream(block)
        (place,) = stream.places(x.dims)
        if stream.body(x.generation) + place.lead + place.tail != block.tokens_in:
            self.whole.add(block.index)
        x = Value(x.tensor, x.dims, stream, x.generation)
        tokens = stream.canonical(x, place)
        dtype = working_dtype(x.tensor.dtype)
        if x.generation:
            size = stream.fusion(x.generation, place.lead, place.tail).size
        else:
            size = torch.ones_like(importance, dtype=dtype)
        choice = self.plan.method.choose(
            Evidence(tokens, size, importance.to(dtype)), block.removed, block.lead, block.tail, self.plan.config
        )
        index, weight, size = torch.ops.mctf.group(choice.weight, size, choice.keep, choice.gone, choice.into)
        stream.fusions.append(
            Fusion(choice.keep, choice.gone, choice.into, index, None if choice.maximum else weight,
                   size, place.lead, place.tail)
        )
        fused = stream.raise_to(x, x.generation + 1)
        if self.plan.site in (Site.AHEAD, Site.BEFORE):
            self._sources[stream, fused.generation] = block.block.entry
            self._fused[block.block.entry] = fused
        return fused

    def places(self, node: fx.Node, stream: Stream) -> list[Place]:
        return stream.places(self.axes.of(node))


class FusedCall:
    """One node to be run on fused tokens, as a rule sees it."""

    def __init__(
        self, rewriter: Rewriter, rule: Rule, node: fx.Node, stream: Stream, generation: int, env: Env
    ) -> None:
        self.rewriter, self.rule, self.node = rewriter, rule, node
        self.stream, self.generation, self.env = stream, generation, env
        self.call: Call = rewriter.axes.call(node)
        self.args, self.target = self.call.args, node.target
        self.packet = node.target.overloadpacket

    @property
    def tokens(self) -> Tokens:
        return self.stream.tokens

    def _like(self) -> Value:
        """The fused operand of the highest rank: it shows where the images are."""
        values = [v for v in _flat(self.env[n] for n in self.node.all_input_nodes) if v.generation]
        return max(values, key=lambda v: len(v.dims)) if values else self.env[self.node.all_input_nodes[0]]

    def lifted(self, node: fx.Node) -> Value:
        return self.rewriter.lift(node, self.env[node], self.stream, self.generation, self._like())

    def value(self, name: str) -> Value:
        """A tensor argument in the generation of this call."""
        return self.lifted(self.args[name])

    def intensive(self, name: str) -> Value:
        """A tensor argument, attention weights turned into those of one copy of each token."""
        value = self.value(name)
        return self.stream.intensive(value) if value.generation else value

    def dims(self, name: str) -> Dims:
        return self.rewriter.axes.of(self.args[name])

    def wrapped(self, name: str) -> int:
        """A dimension argument as a non-negative number."""
        return wrap(self.args[name], len(self.call.dims_of(self.call.tensors()[0])))

    def places_of(self, node: fx.Node) -> list[Place]:
        return self.stream.places(self.rewriter.axes.of(node))

    def place(self, name: str, dim: int) -> Place:
        """The place of the token axis at one dimension of an argument."""
        found = [p for p in self.places_of(self.args[name]) if p.dim == dim]
        if not found:
            raise Declined("the token axis meets another axis")
        return found[0]

    def only_place(self, name: str) -> Place:
        found = self.places_of(self.args[name])
        if len(found) != 1:
            raise Declined("the token axis occurs twice in one operand")
        return found[0]

    def batch_dim(self, name: str) -> int | None:
        if not self.tokens.batch:
            return 0
        return self.stream.batch_dim(self.dims(name))

    def log_sizes(self, place: Place) -> Tensor | None:
        """[B, M] log sizes of the tokens at a place; None where all sizes are 1 or count for nothing."""
        if not self.generation or not self.rewriter.plan.config.proportional:
            return None
        return self.stream.log_size(self.generation, place.lead, place.tail)

    def log_sizes_like(self, name: str, place: Place) -> Tensor | None:
        log_size = self.log_sizes(place)
        return None if log_size is None else self.stream.spread(log_size, self.value(name), place)

    def sizes_of(self, node: fx.Node, place: Place) -> Tensor:
        """The sizes of the tokens at a place of an operand, as a factor for it."""
        size = self.stream.fusion(self.generation, place.lead, place.tail).size
        return self.stream.spread(size, self.lifted(node), place)

    def sizes_like(self, name: str, place: Place) -> Tensor:
        return self.sizes_of(self.args[name], place)

    def dense_count(self, name: str, dims: set[int]) -> Any:
        """The number of original positions in some dimensions of an argument."""
        dense, fused = self.args[name].meta["val"].shape, self.value(name).tensor.shape
        count: Any = 1
        for d in dims:
            count = count * (dense[d] if isinstance(dense[d], int) else fused[d])
        return count

    def expected_shape(self, dims: Dims, dense: Sequence[Any]) -> list[Any] | None:
        """The shape a result must have: as before, its token axes shrunk. None: no whole token axis."""
        found = places(dims, self.tokens)
        if found is None:
            return None
        shape = list(dense)
        removed = self.tokens.size - self.stream.body(self.generation)
        for p in found:
            whole = self.tokens.size + p.lead + p.tail
            size = shape[p.dim]
            shape[p.dim] = size // whole * (whole - removed)
        return shape

    def out_dims(self) -> list[Dims]:
        out = self.rewriter.axes.dims[self.node]
        table = self.rewriter.axes.table
        return [table.canonical_dims(d) for d in (out if isinstance(out, list) else [out])]

    def emit(self, intensive: bool = False, mass_lost: bool = False) -> Any:
        """Run the operator as it is, on lifted operands, with the sizes among its arguments shrunk."""
        all_dims = self.out_dims()
        vals = self.node.meta["val"]
        vals = vals if isinstance(vals, (tuple, list)) else [vals]
        shapes = [self.expected_shape(d, v.shape) for d, v in zip(all_dims, vals)]
        if any(shape is None for shape in shapes):
            raise Declined(f"the tokens are regrouped to {tuple(vals[0].shape)} (windows or a grid)")
        mass = self._mass(all_dims)

        def operand(n: fx.Node) -> Any:
            value = self.env[n]
            if isinstance(value, list):
                raise Declined(f"{self.node.target} takes a list of results")
            if not isinstance(value, Value):
                return value
            if any(self.args.get(name) is n for name in self.rule.ignores):
                return value.tensor
            self.places_of(n)
            lifted = self.lifted(n)
            return (lifted if mass is not None else self.stream.intensive(lifted)).tensor

        args, kwargs = fx.node.map_arg((self.node.args, self.node.kwargs), operand)
        if self.rule.resized is not None:
            result = self._resize(args, shapes[0], all_dims[0])
        else:
            result = self.target(*args, **kwargs)
        results = result if isinstance(result, (tuple, list)) else [result]
        for got, want in zip(results, shapes):
            self._check(got.shape, want)
        values = [self.result(r, mass, d) for r, d in zip(results, all_dims)]
        return values if isinstance(result, (tuple, list)) else values[0]

    def _mass(self, out: list[Dims]) -> int | None:
        """The dimension of attention weights in the result, where the operator leaves them what they are."""
        values = [v for v in (self.env[n] for n in self.node.all_input_nodes) if isinstance(v, Value)]
        held = [v for v in values if v.mass is not None]
        if len(held) != 1 or values[0] is not held[0] or len(out) != 1 or self.packet not in MASS_KEEPING:
            return None
        (value,) = held
        last = value.mass == len(value.dims) - 1 and out[0][-1:] == value.dims[-1:]
        if out[0] == value.dims:
            return value.mass
        return len(out[0]) - 1 if last else None

    def _resize(self, args: tuple, shape: list[Any], dims: Dims) -> Tensor:
        """Reshape or expand to ``shape``; sizes that hold no tokens stay as the program computes them."""
        x = args[0]
        if self.rule.resized == "size":
            given = args[1] if isinstance(args[1], (list, tuple)) else list(shape)
            touched = {p.dim for p in places(dims, self.tokens)}
            return torch.ops.aten.expand(x, [shape[d] if d in touched else s for d, s in enumerate(given)])
        unknown = [d for d, s in enumerate(shape) if not isinstance(s, int)]
        if len(unknown) > 1:
            given = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else None
            if given is None:
                raise Declined("a reshape with several symbolic sizes meets fused tokens")
            touched = {p.dim for p in places(dims, self.tokens)}
            shape = [s if isinstance(s, int) or d in touched else given[d] for d, s in enumerate(shape)]
            unknown = [d for d in unknown if d in touched or given[d] == -1]
            if len(unknown) > 1:
                raise Declined("a reshape with several symbolic sizes meets fused tokens")
        target = [-1 if d in unknown else s for d, s in enumerate(shape)]
        return torch.ops.aten.reshape(x, target)

    def _check(self, got: Sequence[Any], want: Sequence[Any]) -> None:
        agree = len(got) == len(want) and all(
            not (isinstance(g, int) and isinstance(w, int)) or g == w for g, w in zip(got, want)
        )
        if not agree:
            raise Declined(f"{self.node.target} gives {tuple(got)} on fused tokens where {tuple(want)} is due")

    def result(self, tensor: Tensor, mass: int | None = None, dims: Dims | None = None) -> Value:
        """A value of this call's generation, where its axes hold the tokens; else an ordinary one."""
        dims = self.out_dims()[0] if dims is None else dims
        if not mentions(dims, self.tokens):
            return Value(tensor, dims)
        stream = self.stream if self.generation else None
        return Value(tensor, dims, stream, self.generation, mass if self.generation else None)


aten = torch.ops.aten
# Operators that leave attention weights what they are, up to scaling or layout.
MASS_KEEPING: set[Callable] = {
    aten.dropout, aten.to, aten._to_copy, aten.type_as, aten.contiguous, aten.clone, aten.alias, aten.detach,
    aten.view, aten.reshape, aten._unsafe_view, aten.expand, aten.flatten, aten.unflatten, aten.unsqueeze,
}


def _flat(values: Any) -> list[Value]:
    flat: list[Value] = []
    for value in values:
        if isinstance(value, Value):
            flat.append(value)
        elif isinstance(value, list):
            flat.extend(v for v in value if isinstance(v, Value))
    return flat


def _has_batch(dims: Dims, tokens: Tokens) -> bool:
    width = len(tokens.batch)
    return any(dim[i : i + width] == tokens.batch for dim in dims for i in range(len(dim)))


def _with_images(value: Value, stream: Stream, like: Value) -> Value:
    """A value that is the same for all images, with a dimension for them where ``like`` has it."""
    batch = stream.batch_dim(like.dims)
    if batch is None:
        raise Declined("images share a dimension with other axes where a value without them meets the tokens")
    rank = len(like.dims)
    missing = rank - len(value.dims)
    dims = ((),) * missing + value.dims
    if missing < 0 or dims[batch]:
        raise Declined("a value without the batch axis meets fused tokens in another layout")
    tensor = value.tensor.reshape([1] * missing + list(value.tensor.shape))
    shape = [-1] * rank
    shape[batch] = like.tensor.shape[batch]
    dims = (*dims[:batch], stream.tokens.batch, *dims[batch + 1 :])
    return Value(tensor.expand(shape), dims, value.stream, value.generation, value.mass)
