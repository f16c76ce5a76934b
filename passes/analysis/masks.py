"""What the masks and biases of an attention allow: which tokens may be fused with which. Pure analysis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx

from mctf_compile.narrowing import present
from mctf_compile.passes.analysis.normalize import constants
from mctf_compile.passes.analysis.structure import Attention, Block, Mask
from mctf_compile.passes.analysis.token_axes import Axes
from mctf_compile.passes.axes import Atom, atoms
from mctf_compile.passes.pipeline import State, graph_pass
from mctf_compile.passes.rules import RULES, rule_of, schema_arguments

aten = torch.ops.aten

# A logit below this is no attention at all; masks are written with -inf, finfo.min or -1e9.
MASKED = -1e4

# Products of two conditions on single tokens; any other meeting of two token axes compares tokens.
SEPARABLE = {aten.bitwise_and, aten.logical_and, aten.mul, aten.bitwise_or, aten.logical_or, aten.add}


@graph_pass("masks", requires=("blocks",), ensures=("blocks",))
def run(state: State) -> None:
    values = constants(state.gm, present(state.normal), state.examples)
    state.blocks = find_masks(present(state.blocks), present(state.axes), values)


def find_masks(blocks: Iterable[Block], axes: Axes, values: Mapping[fx.Node, Tensor]) -> list[Block]:
    """The blocks with the most restricting mask on the logits of each that could fuse.

    ``values`` holds the tensors of the graph's constants (parameters and buffers), as far as they are known.
    """
    return [b if b.tokens is None else replace(b, mask=_mask_of(b.attention, axes, values)) for b in blocks]


def _mask_of(site: Attention, axes: Axes, values: Mapping[fx.Node, Tensor]) -> Mask:
    finder = _Finder(set(atoms(axes.table.canonical(site.key_axis))), axes, values)
    return max((finder.kind(node) for node in _operands(site)), default=Mask.NONE)


def _operands(site: Attention) -> list[fx.Node]:
    """What is combined with q kᵀ before the softmax."""
    if site.weights is None:
        mask = schema_arguments(site.node).get("attn_mask")
        return [] if mask is None else [mask]
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

    found: list[fx.Node] = []
    stack, seen = [site.weights], set()
    while stack:
        node = stack.pop()
        if node is product or node in seen:
            continue
        seen.add(node)
        for source in node.all_input_nodes:
            (stack if descends(source) else found).append(source)
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
        if count == 0:
            return Mask.NONE
        if count == 1:
            return Mask.BIAS if self._learned(node) else Mask.TOKENS
        if node in self.values:
            return Mask.BIAS if self._soft(self.values[node]) else Mask.PAIRS
        packet = getattr(node.target, "overloadpacket", None)
        rule = rule_of(node) if node.op == "call_function" else None
        sources = [n for n in node.all_input_nodes if self._count(n)]
        if rule is None or (packet not in _SPREADING and rule is not RULES[aten.add.Tensor]) or not sources:
            return Mask.BIAS if self._learned(node) else Mask.PAIRS
        kinds = [self.kind(n) for n in sources]
        singles = [n for n in sources if self._count(n) == 1]
        if len(singles) > 1 and packet not in SEPARABLE and Mask.TOKENS in kinds:
            return Mask.PAIRS
        return max(kinds)

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
