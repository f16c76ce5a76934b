"""Inserting the reduction at a planned block: what the method sees, what it chooses, and attention around it."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, fx

from mctf_compile.compat import WatchedShapeEnv
from mctf_compile.errors import Declined, PassError
from mctf_compile.kernels.library import working_dtype
from mctf_compile.kernels.ordering import descending
from mctf_compile.kernels.pooling.aten import index_of
from mctf_compile.methods import Choice, Combine, Evidence, Need, Site
from mctf_compile.methods.base import ATTENTION
from mctf_compile.narrowing import node_of, present
from mctf_compile.passes.analysis.packs import MASKED
from mctf_compile.passes.analysis.structure import Attention
from mctf_compile.passes.axes import Place, atoms, hint_of
from mctf_compile.passes.planning.plan import PlannedBlock
from mctf_compile.passes.rewriting import fused_call
from mctf_compile.passes.rewriting.embedding import made_of_kept, origins
from mctf_compile.passes.rewriting.following import Reduction
from mctf_compile.passes.rewriting.fused_call import FusedCall
from mctf_compile.passes.rewriting.stream import Fusion, Stream, Value
from mctf_compile.passes.rules import rule_of
from mctf_compile.passes.rules.attention import HeadLayout, additive, attention_operands
from mctf_compile.passes.rules.base import wrap


class Program(fused_call.Program, Protocol):
    """The rewritten program, as far as attention in it is planned.

    ``env``: the values of its nodes. ``remaining``: by block the number of tokens that it leaves, where that is an
    input.
    """

    env: dict[fx.Node, Any]
    remaining: dict[int, torch.SymInt]

    def evaluate(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
        """Run one node on the values of ``env``."""

    def on_original_tokens(self, node: fx.Node) -> Any:
        """Run one node on the original tokens."""

    def derived(self, nodes: Sequence[fx.Node], replacements: Mapping[fx.Node, Value]) -> Mapping[fx.Node, Any]:
        """The values had others been the ``replacements``, as far as ``nodes`` are computed from them."""

    def recomputed(self, node: fx.Node, replacements: Mapping[fx.Node, Value]) -> Any:
        """The value of ``node`` had others been the ``replacements``."""

    def recomputed_fused(self, node: fx.Node, replacements: Mapping[fx.Node, Value]) -> Value | None:
        """The same, as far as no tokens are given back on the way; else None."""

    def of_fused(self, node: fx.Node, stream: Stream, generation: int) -> Any:
        """The value of ``node`` had the tokens that a block fused to ``generation`` been so before."""

    def descends(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether ``node`` is computed from ``source``."""


@dataclass(frozen=True)
class Map:
    """The map of an attention, A = weights * norm, and the layout of its operands."""

    weights: Tensor
    norm: Tensor
    layout: HeadLayout


class Insertion:
    """Runs the planned attentions of a rewrite, and reduces their tokens.

    ``fused`` and ``sources`` keep, for each generation that a residual stream was fused into, that stream
    and its node: values derived from it before are derived again. ``reductions`` are those made so far, ``uncut``
    collects the blocks that turned out to get the original tokens, ``undone`` those that could not be fused, with the
    reason.
    """

    def __init__(self, program: Program) -> None:
        self.program, self.plan = program, program.plan
        self.streams: dict[fx.Node, Stream] = {}
        self.sources: dict[tuple[Stream, int], fx.Node] = {}
        self.fused: dict[fx.Node, Value] = {}
        self.reductions: list[Reduction] = []
        self.uncut: set[int] = set()
        self.undone: dict[int, str] = {}
        self._seen: dict[int, dict[str, Tensor]] = {}
        self._within = {n: (b, branch) for b in self.plan.fusing for branch in b.branches for n in branch.nodes}
        self._choices: dict[Stream, Choice] = {}
        self._entered: dict[tuple[Stream, fx.Node], Value] = {}
        self._at_entry = {b.block.entry: b for b in reversed(self.plan.fusing)}
        around = [] if self.plan.site is Site.BRANCH else self.plan.fusing
        self._at_node = {b.block.attention.node: b for b in around}
        self._at_weights = {b.block.attention.weights: b for b in around if b.block.attention.weights is not None}
        after = {Site.AFTER: "exit", Site.AROUND: "exit", Site.BETWEEN: "middle"}.get(self.plan.site)
        self._at_end = {getattr(b.block, after): b for b in self.plan.fusing} if after else {}

    def emit(self, node: fx.Node) -> object:
        """The value of ``node`` in the rewritten program, with whatever the plan has there."""
        if self.plan.site is Site.BRANCH:
            return self._emit_beside_stream(node)
        planned = self._at_node.get(node)
        if planned is None or planned.index in self.undone:
            result = self.program.evaluate(node, self.program.env)
        else:
            result = self._attend(node, planned)
        if node in self._at_weights:
            planned = self._at_weights[node]
            if result.generation == self._entry(planned).generation:
                try:
                    self._seen[planned.index] = self._look_at_map(result, planned)
                except Declined as declined:
                    self.undone[planned.index] = str(declined)
            else:
                self.undone[planned.index] = "attention gets the original tokens back before its softmax"
        if node in self._at_end and self._at_end[node].index not in self.undone:
            planned = self._at_end[node]
            if self.plan.site is Site.AROUND:
                return result.stream.put_back(result, self._entry(planned))
            if result.generation != self._entry(planned).generation:
                # What was seen of the fused tokens says nothing of the original ones.
                self.undone[planned.index] = "the original tokens are given back within the block"
                return result
            result = self._fuse(planned, result)
        return result

    def _emit_beside_stream(self, node: fx.Node) -> object:
        """The value of ``node`` where branches alone run on fused tokens: all else reads the original ones.

        Before::  x1 = add(x0, proj(attention(qkv(norm(x0)))))
        After::   y0 = mctf.pool(norm(x0), ...)
                  x1 = add(x0, mctf.unmerge(proj(attention(qkv(y0))), index))
        """
        if node not in self._within:
            return self.program.on_original_tokens(node)
        planned, branch = self._within[node]
        read = {n: self._enter(planned, n) for n in node.all_input_nodes if n in branch.inputs}
        return self.program.evaluate(node, ChainMap(read, self.program.env))

    def _enter(self, block: PlannedBlock, node: fx.Node) -> Value:
        """What a branch reads, fused as the block's tokens are."""
        stream = self._stream(block)
        if not stream.fusions:
            self._see_ahead(block)
            self._fuse(block, self._entry(block))
        if (stream, node) not in self._entered:
            value = replace(self.program.env[node], stream=stream)
            self._entered[stream, node] = self._with_gain(stream.raise_to(value, 1), value, self._choices[stream])
        return self._entered[stream, node]

    def _see_ahead(self, block: PlannedBlock) -> None:
        """Note what the method asks of an attention over all tokens, which is not there otherwise."""
        if not self.plan.method.needs and not block.padded:
            return
        attention, stream = block.block.attention, self._stream(block)
        inputs = {n: self.program.env[n] for b in block.branches if b.kind == ATTENTION for n in b.inputs}
        if attention.weights is not None:
            env = self.program.derived([attention.weights, attention.key], inputs)
            self._seen[block.index] = self._look_at_map(env[attention.weights], block, env)
            return
        env = self.program.derived([attention.query, attention.key], inputs)
        rule = present(rule_of(attention.node))
        self._look_at_operands(FusedCall(self.program, rule, attention.node, stream, 0, env), block)

    def begin(self, node: fx.Node) -> None:
        """Called with each value that was emitted: original tokens that a block will fuse get their sizes.

        The first block that fuses then does what later ones do, on sizes of 1, and is compiled with them.
        """
        planned = self._at_entry.get(node)
        if planned is None or self._entry(planned).generation:
            return
        stream, x = self._stream(planned), self._entry(planned)
        if stream.fusions:
            # One match serves several blocks.
            return
        (place,) = stream.places(x.dims)
        tokens = stream.canonical(replace(x, stream=stream), place)
        # Of the tokens these have their number alone: where nothing else needs all of them, they need not be made.
        dtype, device = working_dtype(x.tensor.dtype), tokens.device
        stream.begin(torch.ones(tokens.shape[:2], dtype=dtype, device=device), place.lead, place.tail)

    def _stream(self, block: PlannedBlock) -> Stream:
        """The stream of a block's tokens; one of its own where nothing has fused them yet, or all came back."""
        value = self._entry(block)
        if value.stream is not None:
            return value.stream
        matched = block if block.match is None else self.plan.blocks[block.match]
        entry = present(matched.block.entry)
        if entry not in self.streams:
            self.streams[entry] = Stream(present(block.block.tokens))
        return self.streams[entry]

    def _entry(self, block: PlannedBlock) -> Value:
        value: Value = self.program.env[present(block.block.entry)]
        return value

    # Attention, and the reduction that belongs to it.

    def _attend(self, node: fx.Node, block: PlannedBlock) -> Value:
        """The value of a planned attention."""
        attention, entry = block.block.attention, present(block.block.entry)
        call: FusedCall | None = None
        seen: Map | None = None
        value: Value
        if attention.weights is None:
            stream, generation = self._stream(block), self._entry(block).generation
            call = FusedCall(self.program, present(rule_of(node)), node, stream, generation, self.program.env)
            try:
                seen = self._look_at_operands(call, block)
            except Declined as declined:
                self.undone[block.index] = str(declined)
                value = self.program.evaluate(node, self.program.env)
                return value
        if self.plan.site is Site.BEFORE:
            value = self.program.recomputed(node, {entry: self._fuse(block, self._entry(block))})
            return value
        if self.plan.site is Site.AROUND:
            return self._attend_chosen(node, block)
        if self.plan.site is Site.AHEAD:
            return self._attend_ahead(node, block, call, seen)
        if seen is None or call is None:
            value = self.program.evaluate(node, self.program.env)
            return value
        # The map is there: its product with the values is all that is left of attention.
        v = call.intensive("value").tensor
        rows = torch.nn.functional.dropout(seen.weights, call.args["dropout_p"]) @ seen.layout.split(v)
        return call.result(seen.layout.join((rows * seen.norm).to(v.dtype), v))

    def _attend_ahead(self, node: fx.Node, block: PlannedBlock, call: FusedCall | None, seen: Map | None) -> Value:
        """A' V: the values of the fused tokens under the map of the unfused ones."""
        attention = block.block.attention
        x = self._fuse(block, self._entry(block))
        stream = present(x.stream)
        fusion = stream.fusions[-1]
        v = stream.raise_to(self.program.of_fused(attention.value, stream, x.generation), x.generation)
        if seen is not None and call is not None:
            keys = self._keys(call)
            fusion = stream.fusion(x.generation, keys.lead, keys.tail)
            out = torch.ops.mctf.ahead(
                seen.weights,
                seen.norm,
                seen.layout.split(v.tensor),
                fusion.index,
                fusion.weight,
                fusion.keep,
                fusion.gone,
                fusion.into,
                call.args["dropout_p"],
            )
            return Value(seen.layout.join(out, v.tensor), self.program.axes.of(node), x.stream, x.generation)
        if fusion.combine is Combine.MAX and attention.weights is not None:
            return self._attend_by_maxima(node, block, v)
        repeated = stream.lower_to(v, x.generation - 1)
        out = self.program.evaluate(node, ChainMap({attention.value: repeated}, self.program.env))
        return stream.raise_to(out, x.generation)

    def _attend_by_maxima(self, node: fx.Node, block: PlannedBlock, v: Value) -> Value:
        """The pooled map itself times the values: maxima over rows are no linear map."""
        attention = block.block.attention
        factor = next(n for n in node.all_input_nodes if n is not attention.value)
        weights, stream = self.program.env[factor], present(v.stream)
        if weights.weights_dim is None:
            # The keys of what multiplies the values run along its last dimension.
            weights = stream.extensive(weights, len(weights.dims) - 1)
        pooled = {attention.value: v, factor: stream.pooled_map(weights)}
        value: Value = self.program.evaluate(node, ChainMap(pooled, self.program.env))
        return value

    def _attend_chosen(self, node: fx.Node, block: PlannedBlock) -> Value:
        """Attention among the chosen tokens: their own query, key and value, which are computed already."""
        attention = block.block.attention
        x = self._fuse(block, self._entry(block))
        operands = {n: self.program.env[n] for n in (attention.query, attention.key, attention.value)}
        stream = present(x.stream)
        value: Value = self.program.recomputed(
            node, {n: stream.raise_to(replace(v, stream=stream), x.generation) for n, v in operands.items()}
        )
        return value

    # What the method asked to see.

    def _look_at_operands(self, call: FusedCall, block: PlannedBlock) -> Map | None:
        """Note what attention in one operator tells; returns its map where that was made."""
        needs, seen = set(self.plan.method.needs), self._seen.setdefault(block.index, {})
        received = present(present(rule_of(call.node)).received)
        given, keys = attention_operands(call, "query", "key"), self._keys(call)
        if block.padded:
            columns = max(call.places_of(call.args["attn_mask"]), key=lambda p: p.dim)
            seen["padding"] = self._masked(call.intensive("attn_mask"), columns, call.stream)
        if block.packed:
            seen["image"] = self._image(block)
        if Need.KEYS in needs:
            seen["keys"] = given.key.mean(1)
        if Need.CLASS_LOGITS in needs:
            query = given.query.narrow(2, block.first, 1)
            seen["class_logits"] = (query @ given.key.transpose(-2, -1)).mean((1, 2))
        if Need.CLASS_ATTENTION in needs:
            query = given.query.narrow(2, block.first, 1)
            # A bias for all queries alike has one row.
            bias = given.bias
            if bias is not None and bias.shape[2] != 1:
                bias = bias.narrow(2, block.first, 1)
            seen["class_attention"] = received(call, query, given.key, keys, bias)[0]
        if Need.IMPORTANCE not in needs:
            return None
        seen["importance"], weights, norm = received(call, given.query, given.key, keys, given.bias)
        return None if weights is None or norm is None else Map(weights, norm, given.layout)

    def _image(self, block: PlannedBlock) -> Tensor:
        """Int64 [B, N]: the run of original tokens that each token is of, within which alone it may be fused."""
        return self._stream(block).image(self._entry(block).generation, block.packed, block.block.padding)

    def _keys(self, call: FusedCall) -> Place:
        """Where the keys of attention in one operator have the token axis."""
        return next(p for p in call.places_of(call.args["key"]) if p.dim == len(call.dims("key")) - 2)

    def _look_at_map(
        self, weights: Value, block: PlannedBlock, env: Mapping[fx.Node, Any] | None = None
    ) -> dict[str, Tensor]:
        """What a softmax over tokens tells, spelled out in the graph; ``env``: where else than there values are."""
        env = self.program.env if env is None else env
        needs = set(self.plan.method.needs)
        seen: dict[str, Tensor] = {}
        stream, attention = self._stream(block), block.block.attention
        softmax = present(attention.weights)
        dim = wrap(cast(int, softmax.args[1]), len(weights.dims))
        keys = next(p for p in stream.places(weights.dims) if p.dim == dim)
        logits = env[node_of(softmax.args[0])]
        if block.padded:
            # As the logits would be were all products 0: a product may be as low as a mask.
            product = present(attention.product)
            known: Value = env[product]
            shape, dtype, device = known.tensor.shape, known.tensor.dtype, known.tensor.device
            nothing = replace(known, tensor=torch.zeros(shape, dtype=dtype, device=device))
            mask: Value = self.program.recomputed(node_of(softmax.args[0]), {product: nothing})
            seen["padding"] = self._masked(mask, keys, stream)
        if block.packed:
            seen["image"] = self._image(block)
        if Need.KEYS in needs:
            seen["keys"] = self._mean_key(env[attention.key], attention, stream)
        if Need.CLASS_LOGITS in needs:
            seen["class_logits"] = self._mean_row(logits, keys, stream, block.first)
        if block.padded:
            # Padding may see nothing: its weights are 0 / 0, and it attends to nothing.
            weights = replace(weights, tensor=weights.tensor.masked_fill(weights.tensor.isnan(), 0))
        if Need.CLASS_ATTENTION in needs:
            seen["class_attention"] = self._mean_row(weights, keys, stream, block.first)
        if Need.IMPORTANCE in needs:
            seen["importance"] = self._mean_row(weights, keys, stream)
        return seen

    def _mean_row(self, weights: Value, keys: Place, stream: Stream, query: int | None = None) -> Tensor:
        """[B, N] mean over heads and queries (or for one query alone) of a map in any layout."""
        tensor, dims = weights.tensor.detach(), weights.dims
        if query is not None:
            queries = next(p for p in stream.places(dims) if p.dim != keys.dim)
            tensor = tensor.narrow(queries.dim, query, 1)
            dims = tuple(() if d == queries.dim else dim for d, dim in enumerate(dims))
        wide = Value(tensor.to(working_dtype(tensor.dtype)), dims, stream, weights.generation, weights.weights_dim)
        return stream.canonical(wide, keys).mean(-1)

    def _mean_key(self, value: Value, attention: Attention, stream: Stream) -> Tensor:
        """[B, N, D] mean over heads of the keys, in any layout."""
        (place,) = stream.places(value.dims)
        shared = {atom for dim in self.program.axes.of(present(attention.product)) for atom in atoms(dim)}
        tokens = value.dims[place.dim][len(place.before) : len(value.dims[place.dim]) - len(place.after)]
        # An axis that was cut into single positions has no atoms.
        own = {*stream.tokens.batch, *atoms(stream.tokens.batch), *tokens, *atoms(tokens)}
        rest = [axis for dim in value.dims for axis in dim if not own & {axis, *atoms((axis,))}]
        x = stream.canonical(value, place).unflatten(2, [axis.size for axis in rest])
        heads = [i + 2 for i, axis in enumerate(rest) if shared & set(atoms((axis,)))]
        mean: Tensor = (x.mean(heads) if heads else x).flatten(2)
        return mean

    def _masked(self, logits: Value, keys: Place, stream: Stream) -> Tensor:
        """Bool [B, N]: the tokens that no query may see, from the logits or from what is added to them."""
        logits = replace(logits, tensor=additive(logits.tensor, torch.float32), stream=stream)
        return stream.canonical(logits, keys).amax(-1) <= MASKED

    # The reduction itself.

    def _evidence(self, block: PlannedBlock, tokens: Tensor, size: Tensor) -> Evidence:
        """What the method sees of the tokens [B, N, C] of a residual stream; of the keys, those that are among them."""
        seen = {name: block.own(t) for name, t in self._seen.get(block.index, {}).items()}
        if Need.LEARNED in self.plan.method.needs:
            stream, learned = self._stream(block), self.program.env[present(block.block.learned)]
            learned = stream.raise_to(learned, self._entry(block).generation)
            (place,) = stream.places(learned.dims)
            seen["learned"] = stream.canonical(learned, place)
        seen = {name: t.to(size.dtype) if t.is_floating_point() else t for name, t in seen.items()}
        if "padding" in seen:
            seen["padding"] = seen["padding"].expand_as(size)
        return Evidence(tokens, size, block.lead, block.tail, block.number, block.depth, tiles=block.tiles, **seen)

    def _choose(self, evidence: Evidence, r: int) -> Choice:
        """The method's choice.

        Where tokens are of several kinds, padding or of one image of a pack, they are first sorted by kind, padding
        last, so that each kind is spread over both sides of a bipartite matching and has partners of its own.
        """
        kind = evidence.kind
        if kind is None:
            return self.plan.method.choose(evidence, r)
        n, lead, tail = kind.shape[1], evidence.lead, evidence.tail
        body = descending(-kind[:, lead : n - tail].int()) + lead
        position = torch.arange(n, device=body.device).expand_as(kind)
        order = torch.cat([position[:, :lead], body, position[:, n - tail :]], 1)
        tensors = {f.name: t for f in fields(evidence) if isinstance(t := getattr(evidence, f.name), Tensor)}
        taken: dict[str, Any] = {n: _take(t, order) for n, t in tensors.items()}
        choice = self.plan.method.choose(replace(evidence, **taken), r)
        weight = choice.weight
        if weight is not None:
            weight = torch.zeros_like(weight).scatter(1, order, weight)
        return replace(choice, keep=order.gather(1, choice.keep), gone=order.gather(1, choice.gone), weight=weight)

    def _fuse(self, block: PlannedBlock, x: Value) -> Value:
        """Choose and combine the block's tokens: a new generation. Returns ``x`` in it."""
        stream = self._stream(block)
        (place,) = stream.places(x.dims)
        found = hint_of(stream.body(x.generation)) + place.lead + place.tail
        if not self.plan.relaxed and found != block.tokens_in:
            if x.generation == 0:
                self.uncut.add(block.index)
            elif not self.uncut and not self.undone:
                # Else it gets right numbers when the plan of the blocks before it is made again.
                self.undone[block.index] = "its tokens are fused by a block of another tower"
        x = Value(x.tensor, x.dims, stream, x.generation)
        tokens = stream.canonical(x, place)
        size = stream.size(x.generation, place.lead, place.tail)
        evidence = self._evidence(block, tokens, size)
        fused = self._relax(block, x, evidence, place) if self.plan.relaxed else self._reduce(block, x, evidence, place)
        self.reductions.append(Reduction(block, stream, fused.generation, place, evidence))
        if self.plan.site in (Site.AHEAD, Site.BEFORE):
            entry = present(block.block.entry)
            self.sources[stream, fused.generation] = entry
            self.fused[entry] = fused
        return fused

    def _reduce(self, block: PlannedBlock, x: Value, evidence: Evidence, place: Place) -> Value:
        """``x`` with fewer tokens."""
        remaining, stream = self.program.remaining.get(block.index), present(x.stream)
        # Where it is an input of the graph it is a SymInt, which methods take as they take an int.
        r = block.removed if remaining is None else cast(int, evidence.x.shape[1] - remaining)
        env = None if remaining is None else cast(WatchedShapeEnv, remaining.node.shape_env)
        with nullcontext() if env is None else env.watched():
            choice = self._choose(evidence, r)
        stream.fusions.append(replace(self._fusion(choice, evidence, place), padding=block.block.padding))
        self._choices[stream] = choice
        fused = self._made_of_kept(block, x, choice) or stream.raise_to(x, x.generation + 1)
        return self._with_gain(fused, x, choice)

    def _made_of_kept(self, block: PlannedBlock, x: Value, choice: Choice) -> Value | None:
        """The kept tokens, made alone: what is computed of each patch by itself begins with those that stay.

        Before::  x0 = add(embed(patches), positions); y0 = mctf.keep(x0, keep, 1)
        After::   y0 = add(embed(mctf.keep(patches, keep, 1)), mctf.keep(positions, keep, 1))

        None where tokens that leave are combined with others, where all are needed to choose among them, and where they
        are made of several parts that cannot be told apart by token.
        """
        entry, learned, stream = present(block.block.entry), block.block.learned, present(x.stream)
        if choice.combine is not Combine.DROP or not choice.zeroed or x.generation or self.plan.site is not Site.BEFORE:
            return None
        first = origins(entry, stream.tokens, self.program.axes)
        if learned is not None and any(node is learned or self.program.descends(learned, node) for node in first):
            return None
        try:
            made = {node: made_of_kept(node, stream, self.program.env) for node in first}
        except Declined:
            return None
        return self.program.recomputed_fused(entry, made)

    def _with_gain(self, fused: Value, x: Value, choice: Choice) -> Value:
        """What the tokens of ``x`` were fused to, times what the choice has beside the mean."""
        stream, gain = present(fused.stream), choice.gain
        if gain is None and choice.combine is not Combine.MLERP:
            return fused
        (place,) = stream.places(fused.dims)
        if choice.combine is Combine.MLERP:
            tokens, ends = stream.canonical(x, place), stream.fusion(fused.generation, place.lead, place.tail)
            factor = torch.ops.mctf.mlerp(tokens, present(ends.weight), ends.keep, ends.gone, ends.into)
            gain = factor if gain is None else gain * factor
        return replace(fused, tensor=fused.tensor * stream.factor(present(gain).to(fused.tensor.dtype), fused, place))

    def _relax(self, block: PlannedBlock, x: Value, evidence: Evidence, place: Place) -> Value:
        """``x`` with all tokens, which count as the method says."""
        relaxed = self.plan.method.relax(evidence, present(block.tokens_in), block.removed)
        stream = present(x.stream)
        if relaxed.x is not None and (stream.batch_dim(x.dims), place.dim, len(x.dims)) != (0, 1, 3):
            raise PassError(f"method {self.plan.method.name!r} trains on residual streams [B, N, C] alone")
        nobody = evidence.size[:, :0].long()
        position = torch.arange(evidence.size.shape[1], device=nobody.device).expand(evidence.size.shape)
        order = position if relaxed.order is None else relaxed.order
        # A token that counts for nothing has a logarithm still, and a gradient.
        size = relaxed.size if relaxed.whole_to_itself else relaxed.size + torch.finfo(torch.float32).tiny
        stream.fusions.append(
            Fusion(
                order,
                nobody,
                nobody,
                index_of(order, nobody, nobody),
                None,
                size,
                place.lead,
                place.tail,
                Combine.DROP,
                conserves=False,
                whole_to_itself=relaxed.whole_to_itself,
                back=relaxed.back,
            )
        )
        moved = x if relaxed.order is None else stream.raise_to(x, x.generation + 1)
        return Value(moved.tensor if relaxed.x is None else relaxed.x, x.dims, x.stream, x.generation + 1)

    def _fusion(self, choice: Choice, evidence: Evidence, place: Place) -> Fusion:
        method, size = self.plan.method, evidence.size
        if choice.combine is Combine.DROP:
            if self.plan.site is Site.AHEAD:
                raise PassError(f"method {method.name!r} drops tokens, which has no attention one step ahead")
            into = choice.into
            if choice.zeroed:
                into = torch.zeros_like(choice.gone)
            elif into is None:
                into = torch.ops.mctf.nearest(evidence.x, choice.keep, choice.gone, place.lead, place.tail)
            index, back = index_of(choice.keep, choice.gone, into), None
            if choice.zeroed:
                back = torch.zeros_like(size).scatter(1, choice.keep, 1.0)
            return Fusion(
                choice.keep,
                choice.gone,
                into,
                index,
                None,
                size.gather(1, choice.keep),
                place.lead,
                place.tail,
                choice.combine,
                conserves=False,
                back=back,
            )
        raw = torch.ones_like(size) if choice.weight is None else choice.weight
        index, weight, total = torch.ops.mctf.group(raw, size, choice.keep, choice.gone, choice.into)
        if not method.sized:
            total = torch.ones_like(total)
        weight = None if choice.combine is Combine.MAX else weight
        return Fusion(
            choice.keep,
            choice.gone,
            present(choice.into),
            index,
            weight,
            total,
            place.lead,
            place.tail,
            choice.combine,
            conserves=method.sized,
            mixed=choice.mixed,
        )


def _take(x: Tensor, order: Tensor) -> Tensor:
    """The tokens of [B, N] or [B, N, C] in another order."""
    return x.gather(1, order if x.dim() == 2 else order[:, :, None].expand_as(x))
