"""What the masks and biases of an attention allow: which tokens may be fused with which. Pure analysis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx

from mctf_compile.passes.analysis.normalize import constants
from mctf_compile.passes.analysis.structure import Attention, Block, Mask
from mctf_compile.passes.analysis.token_axes import Axes
from mctf_compile.passes.axes import atoms
from mctf_compile.passes.pipeline import State, graph_pass
from mctf_compile.passes.rules import RULES, find_rule, schema_arguments

aten = torch.ops.aten

# A logit below this is no attention at all; masks are written with -inf, finfo.min or -1e9.
MASKED = -1e4

# Products of two conditions on single tokens; any other meeting of two token axes compares tokens.
SEPARABLE = {aten.bitwise_and, aten.logical_and, aten.mul, aten.bitwise_or, aten.logical_or, aten.add}


@graph_pass("masks", requires=("blocks",), ensures=("blocks",))
def run(state: State) -> None:
    values = constants(state.gm, state.normal, state.examples)
    state.blocks = find_masks(state.blocks, state.axes, values)


def find_masks(blocks: Iterable[Block], axes: Axes, values: Mapping[fx.Node, Tensor]) -> list[Block]:
    """The blocks with the most restricting mask on the logits of each that could fuse.

    ``values`` holds the tensors of the graph's constants (parameters and buffers), as far as they are known.
    """
    return [b if b.tokens is None else _with_mask(b, axes, values) for b in blocks]


def _with_mask(block: Block, axes: Axes, values: Mapping[fx.Node, Tensor]) -> Block:
    finder = _Finder(set(atoms(axes.table.canonical(block.attention.key_axis))), axes, values)
    kinds = {node: finder.kind(node) for node in _operands(block.attention)}
    masks = [node for node, kind in kinds.items() if kind is not Mask.NONE]
    told = finder.told_by(masks[0], block) if len(masks) == 1 else None
    return replace(block, mask=max(kinds.values(), default=Mask.NONE), padding=told)


def _operands(site: Attention) -> list[fx.Node]:
    """What is combined with q kᵀ before the softmax."""
    if site.weights is None:
        mask = schema_arguments(site.node).get("attn_mask")
        return [] if mask is None else [mask]
    inside: dict[fx.Node, bool] = {site.product: True}

    def descends(node: fx.Node) -> bool:
        """Whether a node is computed from the product; asked from the softmax backwards only."""
        stack = [node]
        while stack:
            n = stack[-1]
            if n in inside:
                stack.pop()
                continue
            unknown = [i for i in n.all_input_nodes if i not in inside]
            if unknown and n > site.product:
                stack.extend(unknown)
                continue
            inside[n] = any(inside.get(i, False) for i in n.all_input_nodes)
            stack.pop()
        return inside[node]

    found, stack, seen = [], [site.weights], set()
    while stack:
        node = stack.pop()
        if node is site.product or node in seen:
            continue
        seen.add(node)
        for source in node.all_input_nodes:
            (stack if descends(source) else found).append(source)
    return found


class _Finder:
    def __init__(self, inside: set, axes: Axes, values: Mapping[fx.Node, Tensor]) -> None:
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
        if count == 0:
            return Mask.NONE
        if count == 1:
            return Mask.BIAS if self._learned(node) else Mask.TOKENS
        if node in self.values:
            return Mask.BIAS if self._soft(self.values[node]) else Mask.PAIRS
        packet = getattr(node.target, "overloadpacket", None)
        rule = find_rule(node.target) if node.op == "call_function" else None
        sources = [n for n in node.all_input_nodes if self._count(n)]
        if rule is None or (packet not in _SPREADING and rule is not RULES[aten.add.Tensor]) or not sources:
            return Mask.BIAS if self._learned(node) else Mask.PAIRS
        kinds = [self.kind(n) for n in sources]
        singles = [n for n in sources if self._count(n) == 1]
        if len(singles) > 1 and packet not in SEPARABLE and Mask.TOKENS in kinds:
            return Mask.PAIRS
        return max(kinds)

    def told_by(self, mask: fx.Node, block: Block) -> fx.Node | None:
        """The boolean value, one for each token, that is false (or true) for just those that ``mask`` masks out."""
        if not _is_bool(mask) or block.attention.weights is not None and not all(map(_masks_out, mask.users)):
            return None
        node = self._origin(mask)
        dims = [] if node is None else [dim for dim in self.axes.of(node) if dim]
        others = [dim for dim in dims if not any(axis in self.inside for axis in atoms(dim))]
        return node if len(dims) - len(others) == 1 and others in ([], [block.tokens.batch]) else None

    def _origin(self, node: fx.Node) -> fx.Node | None:
        """The boolean value that ``node`` repeats, rearranges or negates; the same for both sides of an "and"."""
        sources = [n for n in node.all_input_nodes if self._count(n)]
        packet = getattr(node.target, "overloadpacket", None)
        if not all(map(_is_bool, sources)):
            return node
        if len(sources) == 1 and packet in _SPREADING | _NEGATING:
            return self._origin(sources[0])
        if packet in _CONJOINING:
            origins = {self._origin(source) for source in sources}
            return origins.pop() if len(origins) == 1 else None
        return node

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


def _is_bool(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype is torch.bool


def _masks_out(node: fx.Node) -> bool:
    """Whether an operator fills the logits with a number that masks, where a boolean operand says so."""
    filled = {aten.masked_fill.Scalar: "value", aten.where.ScalarOther: "other", aten.where.ScalarSelf: "self"}
    return node.target in filled and schema_arguments(node)[filled[node.target]] <= MASKED


_NEGATING = {aten.bitwise_not, aten.logical_not}
_CONJOINING = {aten.bitwise_and, aten.logical_and}

# Operators that repeat or rearrange a mask without comparing tokens.
_SPREADING = {
    aten.expand,
    aten.expand_as,
    aten.repeat,
    aten.reshape,
    aten.view,
    aten._unsafe_view,
    aten.permute,
    aten.transpose,
    aten.unsqueeze,
    aten.squeeze,
    aten.to,
    aten._to_copy,
    aten.type_as,
    aten.contiguous,
    aten.clone,
    aten.alias,
    aten.detach,
    aten.slice,
    aten.flatten,
    aten.unflatten,
    aten.masked_fill,
    aten.where,
}
