"""What the masks and biases of an attention allow: which tokens may be fused with which. Pure analysis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from mctf_compile.narrowing import node_of, present
from mctf_compile.passes.analysis.normalize import constants
from mctf_compile.passes.analysis.structure import Attention, Block, Mask
from mctf_compile.passes.analysis.token_axes import Axes
from mctf_compile.passes.axes import Atom, Dim, atoms
from mctf_compile.passes.pipeline import State, graph_pass
from mctf_compile.passes.rules import RULES, find_rule, is_random, rule_of, schema_arguments, sources

aten = torch.ops.aten

# A logit below this is no attention at all, whatever a soft bias adds to a mask. Masks are written with -inf,
# finfo.min, -1e9 or -1e4.
MASKED = -5e3

# Products of two conditions on single tokens; any other meeting of two token axes compares tokens.
_AND = {aten.bitwise_and, aten.logical_and, aten.__and__}
_OR = {aten.bitwise_or, aten.logical_or, aten.__or__}
SEPARABLE = {aten.mul, aten.add} | _AND | _OR

# Of a mask: the values each of which alone tells which tokens it masks out, itself among them.
Telling = frozenset[fx.Node]


@graph_pass("masks", requires=("blocks",), ensures=("blocks", "masks"))
def run(state: State) -> None:
    normal = present(state.normal)
    values = constants(state.gm, normal, state.examples)
    state.blocks, state.masks = find_masks(normal.graph, present(state.blocks), present(state.axes), values)


def find_masks(
    graph: fx.Graph, blocks: Iterable[Block], axes: Axes, values: Mapping[fx.Node, Tensor]
) -> tuple[list[Block], dict[fx.Node, Telling]]:
    """The blocks with the most restricting mask on the logits of each, and every mask over single tokens.

    ``values`` holds the tensors of the graph's constants (parameters and buffers), as far as they are known.
    """
    masks: dict[fx.Node, Telling] = {}
    equal = _equal(graph)

    def look(readers: Mapping[fx.Node, fx.Node], key_axis: Dim) -> tuple[list[Mask], list[Telling]]:
        finder = _Finder(set(atoms(axes.table.canonical(key_axis))), axes, values)
        kinds = {node: finder.kind(node) for node in readers}
        told = {n: finder.told_by(n, _masks_where(readers[n])) for n, kind in kinds.items() if kind is Mask.TOKENS}
        own = {n: frozenset().union(*map(equal.__getitem__, nodes)) for n, nodes in told.items()}
        masks.update((n, masks.get(n, told) & told) for n, told in own.items())
        return list(kinds.values()), list(own.values())

    found = []
    for block in blocks:
        kinds, told = look(_operands(block.attention), block.attention.key_axis)
        padding = frozenset.intersection(*told) if told else frozenset()
        found.append(replace(block, mask=max(kinds, default=Mask.NONE), padding=padding))
    # Attention of other queries than the tokens has its masks too.
    for node in graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        mask, keys = schema_arguments(node)["attn_mask"], axes.of(node_of(schema_arguments(node)["key"]))[-2]
        if mask is not None and mask not in masks and keys:
            look({mask: node}, keys)
    return found, masks


def _equal(graph: fx.Graph) -> dict[fx.Node, Telling]:
    """By node, those that compute the same, itself among them: a mask may be made anew in every block."""
    first: dict[Any, fx.Node] = {}
    same: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        key: Any = node
        if find_rule(node.target) is not None and not is_random(node.target):
            key = (node.target, str(fx.node.map_arg((node.args, node.kwargs), lambda n: same.get(n, n))))
        same[node] = first.setdefault(key, node)
    groups: dict[fx.Node, set[fx.Node]] = {}
    for node, representative in same.items():
        groups.setdefault(representative, set()).add(node)
    return {node: frozenset(groups[representative]) for node, representative in same.items()}


def _operands(site: Attention) -> dict[fx.Node, fx.Node]:
    """What is combined with q kᵀ before the softmax, each with the operator that does it."""
    if site.weights is None:
        mask = schema_arguments(site.node).get("attn_mask")
        return {} if mask is None else {mask: site.node}
    product = present(site.product)
    inside: dict[fx.Node, bool] = {product: True}

    def descends(node: fx.Node) -> bool:
        """Whether a node is computed from the product; asked from the softmax backwards only."""
        stack = [node]
        while stack:
            n = stack[-1]
            if n in inside:
                stack.pop()
                continue
            unknown = [i for i in n.all_input_nodes if i not in inside]
            if unknown and n > product:
                stack.extend(unknown)
                continue
            inside[n] = any(inside.get(i, False) for i in n.all_input_nodes)
            stack.pop()
        return inside[node]

    found: dict[fx.Node, fx.Node] = {}
    stack, seen = [site.weights], set()
    while stack:
        node = stack.pop()
        if node is product or node in seen:
            continue
        seen.add(node)
        for source in node.all_input_nodes:
            if descends(source):
                stack.append(source)
            else:
                found[source] = node
    return found


class _Finder:
    def __init__(self, inside: set[Atom], axes: Axes, values: Mapping[fx.Node, Tensor]) -> None:
        self.inside, self.axes, self.values = inside, axes, values
        self.known: dict[fx.Node, Mask] = {}

    def kind(self, node: fx.Node) -> Mask:
        if node not in self.known:
            self.known[node] = Mask.NONE
            self.known[node] = self._kind(node)
        return self.known[node]

    def _count(self, node: fx.Node) -> int:
        dims = self.axes.dims.get(node)
        if not isinstance(dims, tuple):
            return 0
        return sum(any(axis in self.inside for axis in atoms(dim)) for dim in self.axes.of(node))

    def _kind(self, node: fx.Node) -> Mask:
        count = self._count(node)
        packet = getattr(node.target, "overloadpacket", None)
        rule = rule_of(node) if node.op == "call_function" else None
        # A new tensor, the same everywhere, tells no tokens apart.
        if count == 0 or (rule is not None and not sources(node)):
            return Mask.NONE
        if count == 1:
            return Mask.BIAS if self._learned(node) else Mask.TOKENS
        if node in self.values:
            return Mask.BIAS if self._soft(self.values[node]) else Mask.PAIRS
        inside = [n for n in node.all_input_nodes if self._count(n)]
        if (
            rule is None
            or (not _repeats(node) and packet not in _FILLING and rule.axes is not RULES[aten.add.Tensor].axes)
            or not inside
        ):
            return Mask.BIAS if self._learned(node) else Mask.PAIRS
        kinds = [self.kind(n) for n in inside]
        singles = [n for n in inside if self._count(n) == 1]
        if len(singles) > 1 and packet not in SEPARABLE and Mask.TOKENS in kinds:
            return Mask.PAIRS
        return max(kinds)

    def told_by(self, mask: fx.Node, where: bool | None) -> Telling:
        """The values each of which alone tells which tokens ``mask`` masks out.

        They are those that it repeats, rearranges or negates, that it adds a soft bias to, or that say where it is
        filled with a number that masks. ``where``: whether a boolean masks where it is true or where it is false.
        """
        return frozenset() if where is None else frozenset(node for node, _ in self._told_by(mask, where))

    def _told_by(self, mask: fx.Node, where: bool) -> frozenset[tuple[fx.Node, bool]]:
        packet = getattr(mask.target, "overloadpacket", None)
        before = [n for n in mask.all_input_nodes if self.kind(n) is Mask.TOKENS]
        filled, boolean = _masks_where(mask), _is_bool(mask)
        if packet in _FILLING:
            same = filled is not None and len(before) == 1 and _is_bool(before[0])
            where = filled is True
        elif boolean and packet in _NEGATING:
            same, where = all(map(_is_bool, before)), not where
        elif boolean and packet in _MEETING:
            same = all(map(_is_bool, before)) and where is _MEETING[packet]
        else:
            same = _repeats(mask) or packet is aten.cat or (packet is aten.add and not boolean)
            same = same and all(_is_bool(n) == boolean for n in before)
        told = [self._told_by(n, where) for n in before] if same else []
        return frozenset([(mask, where)]).union(frozenset.intersection(*told) if told else ())

    def _soft(self, value: Tensor) -> bool:
        """Whether a constant bias masks nothing."""
        return value.is_floating_point() and bool((value > MASKED).all())

    def _learned(self, node: fx.Node) -> bool:
        """Whether a value is computed from parameters, and nothing boolean takes part."""
        stack, seen, learned = [node], set(), False
        while stack:
            n = stack.pop()
            value = n.meta.get("val")
            if n in seen or not isinstance(value, Tensor):
                continue
            seen.add(n)
            if value.dtype is torch.bool:
                return False
            learned |= isinstance(self.values.get(n, value), torch.nn.Parameter)
            stack.extend(n.all_input_nodes)
        return learned


def _repeats(node: fx.Node) -> bool:
    """Whether an operator repeats or rearranges a mask without comparing tokens."""
    rule = rule_of(node)
    return rule is not None and rule.elements is not None and rule.elements.kept


def _is_bool(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype is torch.bool


def _masks_where(node: fx.Node) -> bool | None:
    """Whether an operator masks where its boolean operand is true, or where it is false; None where it does neither.

    An operand of another dtype masks where it is low.
    """
    packet = getattr(node.target, "overloadpacket", None)
    if packet in (aten.scaled_dot_product_attention, aten.add):
        return False
    if packet not in _FILLING:
        return None
    args = schema_arguments(node)
    true, false = ("value", "self") if packet is aten.masked_fill else ("self", "other")
    low = [not isinstance(args[name], fx.Node) and args[name] <= MASKED for name in (true, false)]
    return low[0] if sum(low) == 1 else None


_FILLING = {aten.masked_fill, aten.where}
_NEGATING = {aten.bitwise_not, aten.logical_not}
# Of two booleans one alone masks: where it is false, or where it is true.
_MEETING = dict.fromkeys(_AND, False) | dict.fromkeys(_OR, True)
