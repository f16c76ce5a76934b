"""Pass: find the branches that leave a residual stream and are added to it again. Pure analysis."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import networkx as nx
import torch
from torch import fx

from mctf_compile.methods import Site
from mctf_compile.methods.base import ATTENTION, CROSS, MLP
from mctf_compile.narrowing import present
from mctf_compile.passes.analysis.blocks import is_own, sums
from mctf_compile.passes.analysis.dataflow import Dataflow
from mctf_compile.passes.analysis.readings import attends
from mctf_compile.passes.analysis.structure import Attention, Block
from mctf_compile.passes.analysis.token_axes import Axes
from mctf_compile.passes.analysis.towers import is_layer, leads_around_layers
from mctf_compile.passes.axes import Tokens, mentions
from mctf_compile.passes.pipeline import State, graph_pass
from mctf_compile.passes.rules import find_rule

aten = torch.ops.aten


@dataclass(frozen=True)
class Branch:
    """A way from a residual stream to an addition to it, as far as it can run on fewer tokens.

    ``kind``: self-attention, attention to what other tokens say (``cross``), or ``mlp``. ``nodes`` run on fused tokens.
    ``inputs`` are the values that are fused for them: the last ones before a layer, behind the norm. Whatever else
    reads a value of ``nodes`` gets the original tokens back, the residual addition first of all.
    """

    kind: str
    nodes: frozenset[fx.Node]
    inputs: frozenset[fx.Node]


@graph_pass("branches", requires=("blocks",), ensures=("branches",))
def run(state: State) -> None:
    blocks = present(state.blocks)
    wanted = state.config.method.fuses_at is Site.BRANCH
    graph = present(state.normal).graph
    state.branches = find_branches(graph, blocks, present(state.axes)) if wanted else [()] * len(blocks)


def find_branches(graph: fx.Graph, blocks: Sequence[Block], axes: Axes) -> list[tuple[Branch, ...]]:
    """By block the branches of its residual stream, from its attention on to the next block.

    1. A branch ends at an addition to the residual stream, or to something else that was computed from it beside the
       branch.
    2. What comes before the first layer (norms, modulation, layout) stays on the original tokens.
    3. So does what a branch begins with up to the last operator that mixes tokens before its attention, or whose
       result is read by others.
    """
    flow = Dataflow(graph)
    found: list[tuple[Branch, ...]] = []
    for block in blocks:
        if block.problem is not None or block.tokens is None:
            found.append(())
            continue
        finder = _Finder(flow, axes, blocks, block.tokens)
        middle = present(block.middle)
        later = {b.entry for b in blocks if b.entry is not None and (b.entry is middle or flow.leads(middle, b.entry))}
        following = min(later, key=flow.order.__getitem__, default=None)
        branches = [finder.of_attention(block), *finder.behind(block, following)]
        found.append(tuple(branch for branch in branches if branch is not None))
    return found


class _Finder:
    """Finds branches of one residual stream."""

    def __init__(self, flow: Dataflow, axes: Axes, blocks: Sequence[Block], tokens: Tokens) -> None:
        self.flow, self.axes, self.tokens = flow, axes, tokens
        self.own = [block.attention.node for block in blocks if is_own(block.attention, axes)]

    def of_attention(self, block: Block) -> Branch | None:
        """The branch of a block's attention."""
        attention, entry = block.attention, present(block.entry)

        def behind(node: fx.Node) -> bool:
            return node is attention.node or self.flow.leads(attention.node, node)

        for node, a, b in sums(self.flow.span(attention.node, block.middle), self.axes):
            for result, beside in ((a, b), (b, a)):
                around = beside is entry or self.flow.leads(entry, beside)
                if behind(result) and around and not behind(beside) and behind(node):
                    return self._branch(ATTENTION, entry, result, self._core(attention))
        return None

    def behind(self, block: Block, following: fx.Node | None) -> Iterator[Branch | None]:
        """The other branches between a block's attention and the residual stream that the next one reads."""
        stream, entry = present(block.middle), present(block.entry)
        like = self.axes.of(stream)
        for node, a, b in list(sums(self.flow.span(stream, following)[1:], self.axes)):
            if self.axes.of(node) != like:
                continue
            for beside, result in ((a, b), (b, a)):
                goes_on = beside is stream or (
                    self.flow.leads(stream, beside) and leads_around_layers(stream, beside, self.flow)
                )
                start = next((s for s in (beside, stream, entry) if self.flow.leads(s, result)), None)
                if goes_on and start is not None and not leads_around_layers(start, result, self.flow):
                    kind = self._kind(start, result)
                    yield None if kind is None else self._branch(kind, start, result, set())
                    stream = node
                    break

    def _core(self, attention: Attention) -> set[fx.Node]:
        """What an attention consists of, from its logits to its product with the values."""
        if attention.product is None:
            return {attention.node}
        return {attention.product, attention.node, *self.flow.between(attention.product, attention.node)}

    def _kind(self, start: fx.Node, result: fx.Node) -> str | None:
        """What a way from a residual stream back to it is; None for self-attention, which its own block answers for.

        In cross-attention there is a softmax over other tokens: a product takes what does not come from the branch.
        """
        ways = {*self.flow.between(start, result), result}
        if not ways.isdisjoint(self.own):
            return None
        if any(map(attends, ways)):
            return CROSS
        maps = [node for node in ways if _packet(node) is aten.softmax]
        products = [node for node in ways if (rule := find_rule(node.target)) is not None and rule.factors is not None]
        crosses = any(
            self.flow.leads(weights, node) and not ways.issuperset(node.all_input_nodes)
            for weights in maps
            for node in products
        )
        return CROSS if crosses else MLP

    def _branch(self, kind: str, stream: fx.Node, result: fx.Node, core: Collection[fx.Node]) -> Branch | None:
        """What of the way from ``stream`` to ``result`` runs on fused tokens; None where nothing does."""
        ways = [*self.flow.between(stream, result), result]
        inside, read = set(ways), {*ways, *result.users}
        ahead: set[fx.Node] = set()
        for node in ways:
            if is_layer(node) or not ahead.isdisjoint(node.all_input_nodes):
                ahead.add(node)
        graph = self.flow.graph.subgraph(inside)
        beyond = _closure(graph, core, nx.descendants) - set(core)
        dense = {n for n in ahead - beyond - set(core) if self._mixes(n) or self.flow.live & set(n.users) - read}
        dense = dense | _closure(graph, dense, nx.ancestors)
        late = {n for n in beyond if self._mixes(n)}
        late = late | _closure(graph, late, nx.descendants)
        for node in ways:
            # Of several results each is one value.
            if node.target is operator.getitem and node.args[0] in dense:
                dense.add(node)
        nodes = ahead - dense - late
        outside = (inside - nodes) | {stream}
        inputs = {n for node in nodes for n in node.all_input_nodes if n in outside and self._has_tokens(n)}
        fits = inputs and (not core or nodes & set(core) == set(core))
        return Branch(kind, frozenset(nodes), frozenset(inputs)) if fits else None

    def _mixes(self, node: fx.Node) -> bool:
        """Whether an operator lets tokens meet, or is not known."""
        if node.target is operator.getitem:
            return False
        return find_rule(node.target) is None or mentions(self.axes.mixed_by(node), self.tokens)

    def _has_tokens(self, node: fx.Node) -> bool:
        dims = self.axes.dims.get(node)
        return isinstance(dims, tuple) and mentions(self.axes.of(node), self.tokens)


def _packet(node: fx.Node) -> object:
    return getattr(node.target, "overloadpacket", None)


def _closure(
    graph: nx.DiGraph, nodes: Iterable[fx.Node], step: Callable[[nx.DiGraph, fx.Node], set[fx.Node]]
) -> set[fx.Node]:
    """All nodes that ``step`` reaches from some."""
    found: set[fx.Node] = set()
    for node in nodes:
        if node not in found:
            found |= step(graph, node)
    return found
