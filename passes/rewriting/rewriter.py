"""Pass: re-emit the graph with the planned fusions, every value in the generation its tokens are in."""

from __future__ import annotations

import operator
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import takewhile
from typing import Any, cast

import torch
from torch import SymInt, Tensor, fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.fx.traceback import set_current_meta

from mctf_compile.errors import Declined
from mctf_compile.kernels.library import without_autocast
from mctf_compile.methods import Combine, Site
from mctf_compile.narrowing import function_of, node_of, operator_of, present
from mctf_compile.passes.analysis.mutations import still_written
from mctf_compile.passes.analysis.projections import read_by
from mctf_compile.passes.analysis.reasons import name_of
from mctf_compile.passes.analysis.token_axes import Axes
from mctf_compile.passes.axes import Dims, Place, atoms, has_batch, mentions, places
from mctf_compile.passes.pipeline import State, graph_pass
from mctf_compile.passes.planning.counts import Counts
from mctf_compile.passes.planning.macs import macs_by, shown
from mctf_compile.passes.planning.plan import Plan, stretches, tokens_remaining
from mctf_compile.passes.planning.segments import BRANCH, SEGMENT, ends, segments
from mctf_compile.passes.rewriting.fused_call import FusedCall, flat_values, generations
from mctf_compile.passes.rewriting.insertion import Insertion
from mctf_compile.passes.rewriting.projector import Projector
from mctf_compile.passes.rewriting.stream import Fusion, Stream, Value
from mctf_compile.passes.rules import find_rule, is_random, rule_of, sources
from mctf_compile.passes.subclasses import call
from mctf_compile.passes.tracing import trace

aten = torch.ops.aten
Env = Mapping[fx.Node, Any]


# Why a block that could fuse stays dense.
LOSES = "giving the original tokens back for later operators costs more than the fusion saves"
UNPAID = "with all that fusing takes, it would cost more on fused tokens"


@graph_pass("rewrite", requires=("plan",), ensures=("result",))
def run(state: State) -> str | None:
    state.counts = None
    plan, normal = present(state.plan), present(state.normal)
    if state.counted and not plan.relaxed:
        state.counts = Counts(state.inputs, [present(b.tokens_out) for b in plan.fusing])
    asked = state.adjustable or state.config.undecided
    keeping = state.config.lowering.outputs == "fused"
    outcome = rewrite_graph(normal, state.inputs, present(state.axes), plan, state.counts, asked=asked, keeping=keeping)
    state.result, state.unmerges, state.kept_fused = outcome.graph, outcome.unmerges, outcome.kept_fused
    known = state.findings
    declined = known.declined | outcome.wasted
    if plan.site is Site.BRANCH:
        declined = declined | _unpaid(state)
    elif outcome.unmerges and not outcome.wasted and not plan.relaxed:
        declined = declined | _losing(normal, plan, outcome)
    state.findings = replace(known, declined=declined, uncut=known.uncut | outcome.uncut)
    return None if state.findings == known else "plan"


def _losing(normal: fx.GraphModule, plan: Plan, outcome: Outcome) -> dict[int, str]:
    """The blocks of the stretches, from one place where all tokens are there to the next, that do not pay.

    What a stretch saves is its own affair: thin blocks that do not pay keep no wide ones behind them from fusing.
    """
    stretch = stretches(normal.graph, plan.blocks, outcome.streams)
    numbers = segments(normal.graph, [b.block for b in plan.blocks])
    before, after = (
        macs_by(normal, lambda n: stretch[numbers[n]]),
        macs_by(outcome.graph, lambda n: stretch[n.meta[SEGMENT]]),
    )
    losing = {stream for stream in outcome.given_back if after[stream] >= before[stream]}
    return {block: LOSES for block, stream in outcome.streams.items() if stream in losing}


def _unpaid(state: State) -> dict[int, str]:
    """The blocks whose branches take no less on fused tokens, with all that fusing them takes.

    Where other numbers of tokens may be asked for, nobody knows yet.
    """
    plan, normal = present(state.plan), present(state.normal)
    if state.adjustable or state.undecided:
        return {}
    part = plan.branch_of
    remaining = tokens_remaining(state) if state.counts is not None else ()
    before = macs_by(normal, part.get)
    after = macs_by(present(state.result), lambda n: n.meta.get(BRANCH), state.counts, remaining)
    state.branch_macs = {of: (before[of], after[of]) for of in dict.fromkeys(part.values())}
    unpaid = {}
    for block in plan.fusing:
        # Blocks that share a match share what it takes.
        together = {b.index for b in plan.fusing if b.match == block.match}
        own = [macs for (index, _), macs in state.branch_macs.items() if index in together]
        dense, fused = map(sum, zip(*own))
        if fused >= dense:
            unpaid[block.index] = f"{UNPAID}: {shown(fused)} instead of {shown(dense)}"
    return unpaid


@dataclass(frozen=True)
class Unmerge:
    """An operator before which the tokens were given back, and why."""

    node: fx.Node
    reason: str


@dataclass(frozen=True)
class FusedOutput:
    """An output that keeps its fused tokens.

    Its number among the outputs, the dimensions that hold its images (None where there is one image) and its tokens,
    and the numbers of the further outputs that say what the tokens are: their sizes [B, M], and the place of every
    original token among them [B, N].
    """

    output: int
    batch: int | None
    dim: int
    size: int
    source: int


@dataclass(frozen=True)
class Outcome:
    """A rewritten graph and what was learned on the way.

    ``wasted``: blocks whose fusion was undone before their MLP had run, with the reason; ``uncut``:
    blocks that got the original tokens back although an earlier block had fused them; ``streams``: by block, the number
    of the stream whose tokens it fused; ``given_back``: those of which all tokens were given back to an operator;
    ``kept_fused``: outputs that were not given them back.
    """

    graph: fx.GraphModule
    unmerges: list[Unmerge]
    wasted: dict[int, str]
    uncut: frozenset[int]
    streams: dict[int, int]
    given_back: set[int]
    kept_fused: tuple[FusedOutput, ...]


def rewrite_graph(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    axes: Axes,
    plan: Plan,
    counts: Counts | None = None,
    followed: bool = False,
    asked: bool = True,
    keeping: bool = False,
) -> Outcome:
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

    With ``counts`` the graph has one more input for each fusing block: the tokens that it leaves. ``followed``: beside
    its outputs it returns what became of the tokens, by block (see ``following``). ``keeping``: outputs keep their
    fused tokens where they have the token axis, and behind them the graph returns what those are (``FusedOutput``).

    Raises ``ConfigError`` for a method that, with ``counts``, chooses by the numbers of tokens themselves;
    ``UnsupportedGraph`` unless a graph that serves others was ``asked`` for.

    Source: Lee et al., CVPR 2024, section 3.
    """
    rewriter = Rewriter(gm, axes, plan, keeping)
    with without_autocast():
        if followed:
            result = trace(rewriter.run_followed, inputs)
        elif counts is None:
            result = trace(rewriter.run, inputs)
        else:
            result = trace(partial(rewriter.run_counted, len(inputs)), [*counts.inputs, *counts.remaining])
            counts.refuse_decisions(plan.method.name, asked)
    rewriter.close(result.graph)
    # What was computed of the old tokens alone and is read no more.
    result.graph.eliminate_dead_code()
    result.recompile()
    numbers: dict[Stream, int] = {}
    streams = {r.block.index: numbers.setdefault(r.stream, len(numbers)) for r in rewriter.insertion.reductions}
    given_back = {numbers[stream] for stream in rewriter.given_back}
    uncut = frozenset(rewriter.insertion.uncut)
    kept = tuple(rewriter.kept_fused)
    return Outcome(result, rewriter.unmerges, rewriter.wasted(), uncut, streams, given_back, kept)


class Rewriter:
    """Runs a graph on traced tensors, fusing where the plan says."""

    def __init__(self, gm: fx.GraphModule, axes: Axes, plan: Plan, keeping: bool = False) -> None:
        self.gm, self.axes, self.plan, self.keeping = gm, axes, plan, keeping
        self.order = {node: i for i, node in enumerate(gm.graph.nodes)}
        self.unmerges: list[Unmerge] = []
        self.given_back: set[Stream] = set()
        self.kept_fused: list[FusedOutput] = []
        self.env: dict[fx.Node, Any] = _Values(self._emit)
        self._segment = 0
        self._branch_of = plan.branch_of
        # By block, the number of tokens that it leaves, where that is an input of the graph.
        self.remaining: dict[int, SymInt] = {}
        self.insertion = Insertion(self)
        self._projector = Projector(axes, plan)
        self._read = self._nodes_read()
        self._raised: dict[tuple[Stream, int, fx.Node, Tensor, Dims, int | None], Value] = {}
        # By stream and generation: what is computed of the tokens that a block fused, and was before.
        self._of_fused: dict[tuple[Stream, int], dict[fx.Node, Any]] = {}

    @cached_property
    def _written(self) -> set[fx.Node]:
        """The values in memory that an operator writes to."""
        return still_written(self.gm.graph)

    def wasted(self) -> dict[int, str]:
        """The blocks in which tokens were given back between the fusion and the end of the MLP."""
        found = dict(self.insertion.undone)
        for planned in self.plan.fusing:
            block = planned.block
            first, last = self.order[block.attention.node], self.order[block.exit]
            if self.plan.site is Site.BRANCH:
                first, last = self.order[block.entry], first
            for unmerge in self.unmerges:
                if first < self.order[unmerge.node] <= last:
                    found[planned.index] = f"the fused tokens would be given back within the block: {unmerge.reason}"
        return found

    def run_counted(self, given: int, *inputs: Any) -> Any:
        """``run`` on the first ``given`` inputs; the others are the tokens that the fusing blocks leave."""
        self.remaining = {block.index: count for block, count in zip(self.plan.fusing, inputs[given:], strict=True)}
        return self.run(*inputs[:given])

    def run_followed(self, *inputs: Any) -> tuple[Any, dict[int, dict[str, Tensor]]]:
        """The results of ``run``, and by block what its reduction did to the original tokens."""
        return self.run(*inputs), {r.block.index: r.followed() for r in self.insertion.reductions}

    def run(self, *inputs: Any) -> Any:
        """The rewritten program; call it once, under a tracer."""
        feed = iter(inputs)
        cuts = ends([planned.block for planned in self.plan.blocks])
        for node in self.gm.graph.nodes:
            if node.op == "output":
                return self._returned(node.args[0])
            if node.op == "placeholder":
                self.env[node] = self._dense(node, next(feed))
            elif node in self._read:
                self.env[node] = self._emit(node)
            with set_current_meta(node):
                self.insertion.begin(node)
            if node in cuts:
                self.close(self._graph)
        raise AssertionError("a graph without an output")

    def _returned(self, outputs: Any) -> Any:
        if not self.keeping:
            return fx.node.map_arg(outputs, lambda n: self._plain(self.env[n]))
        listed = outputs if isinstance(outputs, (list, tuple)) else [outputs]
        results: list[Any] = []
        behind: dict[tuple[Stream, int, int, int], int] = {}
        for i, output in enumerate(listed):
            value = self.env[output] if isinstance(output, fx.Node) else None
            place = _token_dimensions(value) if isinstance(value, Value) else None
            if place is None:
                results.append(fx.node.map_arg(output, lambda n: self._plain(self.env[n])))
                continue
            value, (batch, tokens) = cast(Value, value), place
            key = present(value.stream), value.generation, tokens.lead, tokens.tail
            at = len(listed) + 2 * behind.setdefault(key, len(behind))
            self.kept_fused.append(FusedOutput(i, batch, tokens.dim, at, at + 1))
            results.append(value.tensor)
        for stream, generation, lead, tail in behind:
            results += stream.size(generation, lead, tail), stream.map(generation, 0, lead, tail)
        return results

    def _emit(self, node: fx.Node) -> Any:
        branch = self._branch_of.get(node)
        last = None if branch is None else next(reversed(self._graph.nodes))
        with set_current_meta(node):
            value = self.insertion.emit(node)
        if last is not None:
            for made in takewhile(lambda n: n is not last, reversed(self._graph.nodes)):
                made.meta.setdefault(BRANCH, branch)
        return value

    @property
    def _graph(self) -> fx.Graph:
        """The graph that is being traced."""
        return present(get_proxy_mode()).tracer.graph

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        """The nodes whose values ``evaluate`` reads: for a part of a projection, the operands of the whole."""
        projection = self.plan.projections.get(node)
        return node.all_input_nodes if projection is None else read_by(projection.source, self.axes)

    def _nodes_read(self) -> set[fx.Node]:
        """The nodes whose values are read, as far as that is known before.

        A projection that is computed in parts is not, nor what takes it apart, nor values that attention one step
        ahead derives from the fused tokens.
        """
        read = {b.block.learned for b in self.plan.fusing if b.block.learned is not None}
        attentions = (b.block.attention for b in self.plan.fusing) if self.plan.site is Site.AHEAD else ()
        anew = {attention.node: attention.value for attention in attentions}
        for node in reversed(self.gm.graph.nodes):
            if node in read or node.is_impure():
                read.update((node, *(n for n in self._sources(node) if n is not anew.get(node))))
        return read

    def close(self, graph: fx.Graph) -> None:
        """Give the nodes since the last call their place in the order of blocks."""
        for made in reversed(graph.nodes):
            if SEGMENT in made.meta:
                break
            made.meta[SEGMENT] = self._segment
        self._segment += 1

    def _plain(self, value: Any) -> Any:
        """What the original program would hold: tensors over the original tokens."""
        if isinstance(value, list):
            return [self._plain(v) for v in value]
        return self._lower(value).tensor if isinstance(value, Value) else value

    def _dense(self, node: fx.Node, result: Any, returned: frozenset[Stream] = frozenset()) -> Any:
        if isinstance(result, Tensor):
            return Value(result, self.axes.of(node) if node in self.axes.dims else (), returned=returned)
        if isinstance(result, (tuple, list)):
            dims = cast(list[Dims], self.axes.dims.get(node, [()] * len(result)))
            return [
                Value(r, self.axes.table.canonical_dims(d), returned=returned) if isinstance(r, Tensor) else r
                for r, d in zip(result, dims)
            ]
        return result

    # Running operators.

    def evaluate(self, node: fx.Node, env: Env) -> Any:
        """Run one node on the values of ``env``, in the youngest generation among them."""
        if node.op == "get_attr":
            return self._dense(node, operator.attrgetter(cast(str, node.target))(self.gm))
        if node in self.plan.projections:
            try:
                return self._projector.evaluate(node, env, self.env)
            except Declined as declined:
                self.unmerges.append(Unmerge(node, str(declined)))
                return self._run_dense(node, env)
        if node.target is operator.getitem and isinstance(env.get(cast(fx.Node, node.args[0])), list):
            return env[node_of(node.args[0])][node.args[1]]
        operands = [env[n] for n in node.all_input_nodes]
        fused = [v for v in flat_values(operands) if v.generation]
        if not fused:
            return self._run_dense(node, env)
        try:
            return self._run_fused(node, generations(fused), env)
        except Declined as declined:
            self.unmerges.append(Unmerge(node, str(declined)))
            return self._run_dense(node, env)

    def _run_dense(self, node: fx.Node, env: Env) -> Any:
        operands = flat_values([env[n] for n in node.all_input_nodes])
        fused = frozenset(present(v.stream) for v in operands if v.generation)
        self.given_back |= fused
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self._plain(env[n]))
        # Tokens that were given back lie elsewhere in memory than a view was made for.
        target = aten.reshape.default if node.target is aten.view.default else function_of(node)
        return self._dense(node, call(target, args, kwargs), fused.union(*(v.returned for v in operands)))

    def _run_fused(self, node: fx.Node, at: Mapping[Stream, int], env: Env) -> Any:
        """Run one node on fused tokens: those of one stream, or beside them those of others that it does not mix."""
        rule = rule_of(node)
        if rule is None:
            raise Declined(f"{name_of(node)} has no rule for fused tokens")
        mixed = self.axes.mixed_by(node)
        stream = next((s for s in at if mentions(mixed, s.tokens)), next(iter(at)))
        others = {other: generation for other, generation in at.items() if other is not stream}
        if others and (not rule.beside or any(mentions(mixed, other.tokens) for other in others)):
            raise Declined("two token axes that are fused apart meet")
        fused = FusedCall(self, rule, node, stream, at[stream], env, others)
        if not mentions(mixed, stream.tokens):
            if set(atoms(stream.tokens.batch)) & {axis for dim in mixed for axis in atoms(dim)}:
                raise Declined(f"{name_of(node)} mixes the images of a batch")
            return fused.emit()
        if rule.fused is None:
            raise Declined(f"{name_of(node)} mixes the original tokens")
        if mentions(self.axes.clashes_of(node), stream.tokens):
            raise Declined(f"{name_of(node)} takes the tokens together with positions that are numbered otherwise")
        return rule.fused(fused)

    def on_original_tokens(self, node: fx.Node) -> Any:
        """Run one node on the original tokens."""
        values = (self.env[n] for n in node.all_input_nodes)
        fused = any(value.generation for value in flat_values(values)) and node.target is not operator.getitem
        return self._run_dense(node, self.env) if fused else self.evaluate(node, self.env)

    def recomputed(self, node: fx.Node, replacements: Mapping[fx.Node, Value]) -> Any:
        """The value of ``node`` had others been the ``replacements``; only what lies between is run again."""
        return self.derived([node], replacements)[node]

    def recomputed_fused(self, node: fx.Node, replacements: Mapping[fx.Node, Value]) -> Value | None:
        """The same, as far as no tokens are given back on the way; else None."""
        unmerges, given_back = len(self.unmerges), set(self.given_back)
        value: Value = self.recomputed(node, replacements)
        if len(self.unmerges) == unmerges and self.given_back == given_back and value.generation:
            return value
        del self.unmerges[unmerges:]
        self.given_back = given_back
        return None

    def derived(self, nodes: Sequence[fx.Node], replacements: Mapping[fx.Node, Any]) -> ChainMap[fx.Node, Any]:
        """The values had others been the ``replacements``, as far as ``nodes`` are computed from them."""
        between, stack = set(), [*nodes]
        first = min((self.order[n] for n in replacements), default=len(self.order))
        while stack:
            n = stack.pop()
            if n not in between and n not in replacements and self.order[n] > first:
                between.add(n)
                stack.extend(self._sources(n))
        local = ChainMap(dict(replacements), self.env)
        for n in sorted(between, key=self.order.__getitem__):
            if any(i in local.maps[0] for i in self._sources(n)):
                local[n] = self.evaluate(n, local)
        return local

    def of_fused(self, node: fx.Node, stream: Stream, generation: int) -> Any:
        """The value of ``node`` had the tokens that a block fused been so before; what lies between is run once."""
        source = self.insertion.sources[stream, generation]
        known = self._of_fused.setdefault((stream, generation), {source: self.insertion.fused[source]})
        known.update(self.derived([node], known).maps[0])
        return known[node] if node in known else self.env[node]

    def descends(self, node: fx.Node, source: fx.Node) -> bool:
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

    def in_generation(
        self,
        node: fx.Node,
        value: Value,
        stream: Stream,
        generation: int,
        like: Callable[[], Value],
        summed: int | None = None,
    ) -> Value:
        """``value`` in ``generation``; unchanged where it has no token axis. ``like()`` shows where images are.

        ``summed``: a dimension along which the numbers of tokens that become one are summed, as weights are, where it
        is an older one of real numbers and none of them was dropped.
        """
        if value.generation == generation or not mentions(value.dims, stream.tokens):
            return value
        # A value that is the same for all images is laid out as what it meets.
        shared = not has_batch(value.dims, stream.tokens)
        averages = (value.tensor.is_floating_point() or value.tensor.is_complex()) and node not in self.plan.masks
        if summed is not None:
            dropped = any(f.combine is Combine.DROP for f in stream.fusions[value.generation : generation])
            over_tokens = any(place.dim == summed for place in stream.places(value.dims))
            summed = summed if averages and over_tokens and not (shared or dropped) else None
        # Tensors hash by identity; the key keeps its own alive, so that no other takes its place.
        key = (stream, generation, node, value.tensor, like().dims if shared else value.dims, summed)
        if key not in self._raised:
            source = self.insertion.sources.get((stream, generation))
            if source is not None and value.generation == generation - 1 and stream not in value.returned:
                fused = self.insertion.fused[source]
                if node is source:
                    value = fused
                elif self.descends(node, source):
                    # What was derived from the tokens before they were fused is derived from the fused ones.
                    value = self.of_fused(node, stream, generation)
                if value.generation == generation:
                    self._raised[key] = value
                    return value
            if shared:
                value = _with_images(value, stream, like())
            agrees = None if averages else partial(self._agrees, node, stream)
            value = stream.intensive(value)
            value = value if summed is None else stream.extensive(value, summed)
            self._raised[key] = stream.raise_to(value, generation, agrees)
        return self._raised[key]

    def _agrees(self, node: fx.Node, stream: Stream, fusion: Fusion) -> bool:
        """Whether the members of each token that a fusion made have equal values in ``node``, or are all masked by it.

        They are where the fusion kept apart what it masks. They have where what tells a mask has other tokens, as that
        over keys when queries are fused; and where it is computed, position by position, from nothing else that tells
        tokens apart than a boolean which the fusion kept apart.
        """
        if self.plan.masks.get(node, frozenset()) & fusion.padding:
            return True
        marks = self.plan.marks.get(node)
        if marks is not None and not any(mentions(self.axes.of(mark), stream.tokens) for mark in marks):
            return True
        stack, seen = [node], {n for n in fusion.padding if n.meta["val"].dtype is torch.bool}
        while stack:
            n = stack.pop()
            dims = self.axes.dims.get(n)
            if n in seen or dims is None or (isinstance(dims, tuple) and not mentions(self.axes.of(n), stream.tokens)):
                continue
            seen.add(n)
            read = sources(n)
            if find_rule(n.target) is None or is_random(operator_of(n)) or n in self._written:
                return False
            if read and mentions(self.axes.mixed_by(n), stream.tokens):
                return False
            stack.extend(read)
        return True

    def _lower(self, value: Value) -> Value:
        if value.stream is None:
            return value
        return value.stream.lower_to(value.stream.intensive(value), 0)


class _Values(dict[fx.Node, Any]):
    """Values by node. One that is not there yet is computed when it is read."""

    def __init__(self, compute: Callable[[fx.Node], Any]) -> None:
        super().__init__()
        self._compute = compute

    def __missing__(self, node: fx.Node) -> Any:
        self[node] = value = self._compute(node)
        return value


def _token_dimensions(value: Value) -> tuple[int | None, Place] | None:
    """Where a value of fused tokens holds its images, if there are several, and its tokens; each by themselves."""
    if not value.generation or value.weights_dim is not None:
        return None
    stream = present(value.stream)
    found, batch = places(value.dims, stream.tokens), stream.batch_dim(value.dims)
    if (batch is None) != (not stream.tokens.batch) or found is None or len(found) != 1:
        return None
    if found[0].before or found[0].after or found[0].rest:
        return None
    return batch, found[0]


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
    return Value(tensor.expand(shape), dims, value.stream, value.generation, value.weights_dim)
