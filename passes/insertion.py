"""Inserting the fusion at a planned block: attention, matching, pooling."""

from __future__ import annotations

from collections import ChainMap
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from mctf_compile.kernels.library import working_dtype
from mctf_compile.methods import Choice, Evidence, Site
from mctf_compile.passes.axes import Tokens
from mctf_compile.passes.fused_call import FusedCall
from mctf_compile.passes.fusion import Fusion, Stream, Value
from mctf_compile.passes.masks import MASKED
from mctf_compile.passes.plan import PlannedBlock
from mctf_compile.passes.rules import find_rule
from mctf_compile.passes.rules.attention import additive, operands, scale_of
from mctf_compile.passes.rules.base import wrap

if TYPE_CHECKING:
    from mctf_compile.passes.rewrite import Rewriter


class Insertion:
    """Runs the planned attentions of a rewrite, and fuses.

    ``fused`` and ``sources`` keep, for each generation that a residual stream was fused into, that stream
    and its node: values derived from it before are derived again. ``whole`` collects the blocks that
    turned out to get the original tokens, ``undone`` those that could not be fused, with the reason.
    """

    def __init__(self, rewriter: Rewriter) -> None:
        self.rewriter, self.plan = rewriter, rewriter.plan
        self.streams: dict[Tokens, Stream] = {}
        self.sources: dict[tuple[Stream, int], fx.Node] = {}
        self.fused: dict[fx.Node, Value] = {}
        self.whole: set[int] = set()
        self.undone: dict[int, str] = {}
        self._importance: dict[fx.Node, Tensor] = {}
        self._padding: dict[fx.Node, Tensor] = {}
        self._at_node = {b.block.attention.node: b for b in self.plan.fusing}
        self._at_weights = {
            b.block.attention.weights: b for b in self.plan.fusing if b.block.attention.weights is not None
        }
        after = {Site.AFTER: "exit", Site.BETWEEN: "middle"}.get(self.plan.site)
        self._at_end = {getattr(b.block, after): b for b in self.plan.fusing} if after else {}

    def emit(self, node: fx.Node) -> object:
        """The value of ``node`` in the rewritten program, with whatever fusion the plan has there."""
        rewriter = self.rewriter
        planned = self._at_node.get(node)
        if planned is None or planned.index in self.undone:
            result = rewriter.evaluate(node, rewriter.env)
        else:
            result = self._attend(node, planned)
        if node in self._at_weights and result.generation != self._entry(self._at_weights[node]).generation:
            self.undone[self._at_weights[node].index] = "attention gets the original tokens back before its softmax"
        elif node in self._at_weights:
            planned = self._at_weights[node]
            self._importance[planned.block.attention.node] = self._mean_received(result, planned)
            if planned.padded:
                logits = rewriter.env[node.args[0]]
                self._padding[planned.block.attention.node] = self._masked(logits, planned)
        if node in self._at_end and self._at_end[node].index not in self.undone:
            planned = self._at_end[node]
            result = self._fuse(planned, result, self._importance[planned.block.attention.node])
        return result

    def _stream(self, block: PlannedBlock) -> Stream:
        """The stream of a block's tokens; a new one where they came back unfused since the last fusion."""
        tokens, value = block.block.tokens, self._entry(block)
        if value.stream is not None:
            return value.stream
        if tokens not in self.streams or self.streams[tokens].fusions:
            self.streams[tokens] = Stream(tokens)
        return self.streams[tokens]

    def _entry(self, block: PlannedBlock) -> Value:
        return self.rewriter.env[block.block.entry]

    def _attend(self, node: fx.Node, block: PlannedBlock) -> Value:
        """A planned attention, with the fusion that belongs to it."""
        site, entry = block.block.attention, block.block.entry
        if site.weights is not None:
            return self._attend_spelled_out(node, block)
        stream, generation = self._stream(block), self._entry(block).generation
        call = FusedCall(self.rewriter, find_rule(node.target), node, stream, generation, self.rewriter.env)
        given = operands(call, "query", "key")
        (place,) = call.places_of(entry)
        if block.padded:
            self._padding[node] = self._masked(call.intensive("attn_mask"), block)
        importance, weights, norm = torch.ops.mctf.importance(
            given.query, given.key, call.log_sizes(place), given.bias, scale_of(call.call)
        )
        if self.plan.site is Site.AHEAD:
            x = self._fuse(block, self._entry(block), importance)
            v = x.stream.raise_to(self.rewriter.again(site.value, entry, x), x.generation)
            fusion = x.stream.fusion(x.generation, place.lead, place.tail)
            out = torch.ops.mctf.ahead(
                weights, norm, given.layout.split(v.tensor), fusion.index, fusion.weight, fusion.keep, fusion.gone,
                fusion.into, call.args["dropout_p"],
            )
            return Value(given.layout.join(out, v.tensor), self.rewriter.axes.of(node), x.stream, x.generation)
        if self.plan.site is Site.BEFORE:
            return self.rewriter.again(node, entry, self._fuse(block, self._entry(block), importance))
        self._importance[node] = importance
        v = call.intensive("value").tensor
        rows = torch.nn.functional.dropout(weights, call.args["dropout_p"]) @ given.layout.split(v)
        return call.result(given.layout.join((rows * norm).to(v.dtype), v))

    def _attend_spelled_out(self, node: fx.Node, block: PlannedBlock) -> Value:
        site, entry = block.block.attention, block.block.entry
        if self.plan.site is Site.AHEAD:
            x = self._fuse(block, self._entry(block), self._importance[node])
            v = x.stream.raise_to(self.rewriter.again(site.value, entry, x), x.generation)
            if x.stream.fusions[-1].weight is None:
                return self._attend_by_maxima(node, block, v)
            repeated = x.stream.lower_to(v, x.generation - 1)
            out = self.rewriter.evaluate(node, ChainMap({site.value: repeated}, self.rewriter.env))
            return x.stream.raise_to(out, x.generation)
        if self.plan.site is Site.BEFORE:
            return self.rewriter.again(node, entry, self._fuse(block, self._entry(block), self._importance[node]))
        return self.rewriter.evaluate(node, self.rewriter.env)

    def _attend_by_maxima(self, node: fx.Node, block: PlannedBlock, v: Value) -> Value:
        """The pooled map itself times the values: maxima over rows are no linear map."""
        site = block.block.attention
        factor = next(n for n in node.all_input_nodes if n is not site.value)
        weights = self.rewriter.env[factor]
        if weights.mass is None:
            # Weights of the original tokens: their keys run along the last dimension.
            weights = replace(weights, mass=len(weights.dims) - 1)
        pooled = {site.value: v, factor: v.stream.pooled_map(weights)}
        return self.rewriter.evaluate(node, ChainMap(pooled, self.rewriter.env))

    def _mean_received(self, weights: Value, block: PlannedBlock) -> Tensor:
        """[B, N] mean over heads and queries of attention weights, whatever their layout."""
        stream = self._stream(block)
        dim = wrap(block.block.attention.weights.args[1], len(weights.dims))
        place = next(p for p in stream.places(weights.dims) if p.dim == dim)
        tensor = weights.tensor.detach()
        wide = replace(weights, tensor=tensor.to(working_dtype(tensor.dtype)), stream=stream)
        return stream.canonical(wide, place).mean(-1)

    def _masked(self, logits: Value, block: PlannedBlock) -> Tensor:
        """bool [B, N]: the tokens that no query may see, from the logits or from what is added to them."""
        stream = self._stream(block)
        keys = max(stream.places(logits.dims), key=lambda p: p.dim)
        if block.block.attention.weights is not None:
            dim = wrap(block.block.attention.weights.args[1], len(logits.dims))
            keys = next(p for p in stream.places(logits.dims) if p.dim == dim)
        logits = replace(logits, tensor=additive(logits.tensor, torch.float32), stream=stream)
        return stream.canonical(logits, keys).amax(-1) <= MASKED

    def _choose(self, block: PlannedBlock, evidence: Evidence) -> Choice:
        """The method's choice. With padding the tokens are first sorted by kind, so that each kind is
        spread over both sides of a bipartite matching and has partners of its own.
        """
        ask = lambda e: self.plan.method.choose(e, block.removed, block.lead, block.tail, self.plan.config)  # noqa: E731
        if not block.padded:
            return ask(evidence)
        padding = self._padding[block.block.attention.node].expand_as(evidence.size)
        n = padding.shape[1]
        body = padding[:, block.lead : n - block.tail].int().argsort(stable=True, dim=1) + block.lead
        position = torch.arange(n, device=body.device).expand_as(padding)
        order = torch.cat([position[:, : block.lead], body, position[:, n - block.tail :]], 1)
        x = evidence.x.gather(1, order[:, :, None].expand_as(evidence.x))
        size, importance, padding = (t.gather(1, order) for t in (evidence.size, evidence.importance, padding))
        choice = ask(Evidence(x, size, importance, padding))
        weight = torch.zeros_like(choice.weight).scatter(1, order, choice.weight)
        return replace(choice, keep=order.gather(1, choice.keep), gone=order.gather(1, choice.gone), weight=weight)

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
        choice = self._choose(block, Evidence(tokens, size, importance.to(dtype)))
        index, weight, size = torch.ops.mctf.group(choice.weight, size, choice.keep, choice.gone, choice.into)
        stream.fusions.append(
            Fusion(choice.keep, choice.gone, choice.into, index, None if choice.maximum else weight,
                   size, place.lead, place.tail)
        )
        fused = stream.raise_to(x, x.generation + 1)
        if self.plan.site in (Site.AHEAD, Site.BEFORE):
            self.sources[stream, fused.generation] = block.block.entry
            self.fused[block.block.entry] = fused
        return fused
