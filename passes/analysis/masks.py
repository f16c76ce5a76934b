"""What the masks and biases of an attention allow: which tokens may be fused with which. Pure analysis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from mctf_compile.narrowing import function_of, present
from mctf_compile.passes.analysis.mutations import still_written
from mctf_compile.passes.analysis.normalize import constants
from mctf_compile.passes.analysis.packs import MASKED, computed, number
from mctf_compile.passes.analysis.readings import reading_at
from mctf_compile.passes.analysis.structure import Attention, Block, Mask, Masks
from mctf_compile.passes.analysis.token_axes import Axes
from mctf_compile.passes.axes import Atom, Dim, atoms
from mctf_compile.passes.pipeline import State, graph_pass
from mctf_compile.passes.rules import RULES, Elements, find_rule, is_random, rule_of, schema_arguments

aten = torch.ops.aten

# As many marks are followed through one value: a table of them has 2 ** MARKS entries.
MARKS = 4

# A constant with more numbers is not looked at: it is no list of positions.
LARGEST = 1 << 16

# Of a mask: the values each of which alone tells which tokens it masks out.
Telling = frozenset[fx.Node]


@graph_pass("masks", requires=("blocks",), ensures=("blocks", "masks"))
def run(state: State) -> None:
    normal = present(state.normal)
    values = constants(state.gm, normal, state.examples)
    assumed = state.config.lowering.padding == "assume"
    blocks, masks = find_masks(normal.graph, present(state.blocks), present(state.axes), values, assumed=assumed)
    state.blocks, state.masks, state.marks = blocks, masks.padding, masks.marks
    inputs = normal.graph.find_nodes(op="placeholder")
    state.assumed = tuple(i for i, node in enumerate(inputs) if node in masks.assumed)


def find_masks(
    graph: fx.Graph,
    blocks: Iterable[Block],
    axes: Axes,
    values: Mapping[fx.Node, Tensor],
    *,
    assumed: bool = False,
) -> tuple[list[Block], Masks]:
    """The blocks with the most restricting mask on the logits of each, and every mask over single tokens.

    ``values`` holds the tensors of the graph's constants (parameters and buffers), as far as they are known.
    ``assumed``: whether masks over pairs that are inputs of the graph are taken for padding.
    """
    masks: dict[fx.Node, Telling] = {}
    marks: dict[fx.Node, Telling] = {}
    taken: set[fx.Node] = set()
    written = still_written(graph)
    equal = _equal(graph, written)

    def look(readers: Mapping[fx.Node, fx.Node], keys: Dim, batch: Dim | None) -> tuple[list[Mask], list[Telling]]:
        finder = _Finder(axes, keys, batch, values, written, assumed)
        found = {node: finder.look(node, reader) for node, reader in readers.items()}
        told = {n: told for n, (kind, told) in found.items() if kind is Mask.TOKENS}
        own = {n: frozenset().union(*map(equal.__getitem__, nodes)) for n, nodes in told.items()}
        masks.update((n, masks.get(n, told) & told) for n, told in own.items())
        # Of what masks pairs no token alone tells: it has no mean.
        masks.update((n, frozenset()) for n, (kind, _) in found.items() if kind > Mask.TOKENS)
        taken.update(finder.taken)
        marks.update((node, known) for node in readers if (known := finder.marks(node)) is not None)
        return [kind for kind, _ in found.values()], list(own.values())

    found, blocks = [], list(blocks)
    # Masks that keep the same images apart tell the same of tokens, however each is made.
    packs: dict[tuple[int, ...], Telling] = {}
    for block in blocks:
        if block.pack is not None and block.packed:
            packs[block.packed] = packs.get(block.packed, frozenset()) | equal[block.pack]
    for block in blocks:
        batch = None if block.tokens is None else block.tokens.batch
        operands = mask_operands(block.attention)
        pack = block.pack if block.pack in operands else None
        if pack is not None:
            del operands[pack]
        kinds, told = look(operands, block.attention.key_axis, batch)
        padding = frozenset.intersection(*told) if told else frozenset()
        if pack is not None:
            # Padding in a pack is told by neither alone.
            kinds.append(Mask.PAIRS if Mask.TOKENS in kinds else Mask.PACKED if block.packed else Mask.BIAS)
            if block.packed:
                padding = masks[pack] = packs[block.packed]
        found.append(replace(block, mask=max(kinds, default=Mask.NONE), padding=padding))
    # Attention of other queries than the tokens has its masks too.
    for reading in (reading_at(node, axes) for node in graph.nodes):
        if reading is not None and reading.key_axis:
            look({m: n for m, n in mask_operands(reading).items() if m not in masks}, reading.key_axis, None)
    return found, Masks(masks, marks, frozenset(taken))


def _equal(graph: fx.Graph, written: set[fx.Node]) -> dict[fx.Node, Telling]:
    """By node, those that compute the same, itself among them: a mask may be made anew in every block."""
    first: dict[Any, fx.Node] = {}
    same: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        key: Any = node
        if _is_as_it_was(node) and node not in written:
            same[node] = same[node.all_input_nodes[0]]
            continue
        if find_rule(node.target) is not None and not is_random(node.target) and node not in written:
            key = (node.target, str(fx.node.map_arg((node.args, node.kwargs), lambda n: same.get(n, n))))
        same[node] = first.setdefault(key, node)
    groups: dict[fx.Node, set[fx.Node]] = {}
    for node, representative in same.items():
        groups.setdefault(representative, set()).add(node)
    return {node: frozenset(groups[representative]) for node, representative in same.items()}


def _is_as_it_was(node: fx.Node) -> bool:
    """Whether a cast casts nothing: its operand has the dtype already, and is where it is."""
    rule = find_rule(node.target)
    if rule is None or rule.elements is not Elements.CONVERTED:
        return False
    before, after = node.all_input_nodes[0].meta["val"], node.meta["val"]
    return bool(before.dtype == after.dtype and before.device == after.device)


def mask_operands(attention: Attention) -> dict[fx.Node, fx.Node]:
    """What is combined with q kᵀ before the softmax, each with the operator that does it."""
    if attention.weights is None:
        mask = schema_arguments(attention.node).get("attn_mask")
        return {} if mask is None else {mask: attention.node}
    product = present(attention.product)
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
    stack, seen = [attention.weights], set()
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


@dataclass(frozen=True)
class Mark:
    """What tells single tokens apart: a boolean, or whether a number is low enough to mask.

    ``dim``: the dimension, counted from the right, at which the tokens of it stand in a value.
    """

    node: fx.Node
    dim: int


@dataclass(frozen=True)
class Told:
    """A value as far as marks of single tokens tell it: the same wherever those are the same.

    ``table``: its number for every combination of the ``marks``, with a dimension of two entries for each: that where
    the mark is false and that where it is true. ``soft``: where the number is not known, and masks nothing.
    """

    marks: tuple[Mark, ...]
    table: Tensor
    soft: Tensor

    @classmethod
    def number(cls, value: Any, dtype: torch.dtype) -> Told:
        """One number everywhere."""
        table = torch.as_tensor(value).to("cpu", dtype).reshape(())
        return cls((), table, torch.zeros((), dtype=torch.bool))

    @classmethod
    def bias(cls, dtype: torch.dtype) -> Told:
        """Numbers that mask nothing."""
        return cls((), torch.zeros((), dtype=dtype), torch.ones((), dtype=torch.bool))

    @classmethod
    def single(cls, node: fx.Node, dim: int) -> Told:
        """What nothing is known of but its tokens: its own mark."""
        if node.meta["val"].dtype is torch.bool:
            table, soft = torch.tensor([False, True]), torch.tensor([False, False])
        else:
            table, soft = torch.tensor([0.0, float("-inf")]), torch.tensor([True, False])
        return cls((Mark(node, dim),), table, soft)

    def over(self, marks: tuple[Mark, ...]) -> tuple[Tensor, Tensor]:
        """The table, and what is soft in it, over more marks."""
        order = sorted(range(len(self.marks)), key=lambda i: marks.index(self.marks[i]))
        shape = [2 if mark in self.marks else 1 for mark in marks]
        return self.table.permute(order).reshape(shape), self.soft.permute(order).reshape(shape)

    def masks(self) -> Tensor:
        """Where it masks, as what is added to logits, or, a boolean, lets them through."""
        low: Tensor = ~self.table if self.table.dtype is torch.bool else self.table <= MASKED
        return low & ~self.soft


class _Finder:
    def __init__(
        self,
        axes: Axes,
        keys: Dim,
        batch: Dim | None,
        values: Mapping[fx.Node, Tensor],
        written: set[fx.Node],
        assumed: bool,
    ) -> None:
        self.inside: set[Atom] = set(atoms(axes.table.canonical(keys)))
        self.batch = None if batch is None else set(atoms(axes.table.canonical(batch)))
        self.axes, self.values, self.assumed, self.written = axes, values, assumed, written
        # The inputs that were taken for padding.
        self.taken: set[fx.Node] = set()
        self.known: dict[fx.Node, Told | None] = {}
        self.constants: dict[fx.Node, Tensor | None] = {}

    def look(self, mask: fx.Node, reader: fx.Node) -> tuple[Mask, Telling]:
        """What an operand of the logits allows, and the values each of which alone tells it."""
        told = self.read(mask, reader)
        if not self.at(mask) or (told is not None and not told.marks):
            return (Mask.BIAS if self.at(mask) and told is not None and told.soft.any() else Mask.NONE), frozenset()
        if told is None:
            return (self._unread(mask) if len(self.at(mask)) > 1 else Mask.TOKENS), frozenset()
        return self._allowed(told, mask)

    def marks(self, mask: fx.Node) -> Telling | None:
        """The values that alone tell a mask: it is the same wherever those are. None where others may."""
        told = self.told(mask)
        return None if told is None or told.soft.any() else frozenset(mark.node for mark in told.marks)

    def read(self, mask: fx.Node, reader: fx.Node) -> Told | None:
        """What the logits are, told by the marks, after an operator has combined them with ``mask``."""
        told = self.told(mask)
        if reader.target is aten.scaled_dot_product_attention.default or told is None:
            return told
        others = {n: Told.bias(n.meta["val"].dtype) for n in reader.all_input_nodes if n is not mask}
        return self._by_position(reader, {mask: told, **others})

    def _allowed(self, told: Told, mask: fx.Node) -> tuple[Mask, Telling]:
        """What a mask allows of which all is known: padding, where one mark of a token masks its whole column."""
        masked = told.masks()
        telling = [i for i in range(masked.dim()) if not masked.select(i, 0).equal(masked.select(i, 1))]
        marks = [told.marks[i] for i in telling]
        for i in reversed(range(masked.dim())):
            if i not in telling:
                masked = masked.select(i, 0)
        if not marks:
            return Mask.BIAS, frozenset()
        nodes = {mark.node for mark in marks}
        if not all(map(self._of_tokens_alone, nodes)):
            return Mask.PAIRS, frozenset()
        if len({mark.dim for mark in marks}) == 1:
            return Mask.TOKENS, frozenset(nodes if len(nodes) == 1 else [mask])
        # Queries and keys are told apart by one mark, and each that has it is masked, whatever the other has.
        symmetric = len(nodes) == 1 and any(
            masked[at, :].all() and masked[:, at].all() and not masked[1 - at, 1 - at] for at in (0, 1)
        )
        return (Mask.TOKENS, frozenset(nodes)) if symmetric else (Mask.PAIRS, frozenset())

    def _of_tokens_alone(self, node: fx.Node) -> bool:
        """Whether a mark is one of each token of each image, and not of each head as well."""
        dims = self.axes.of(node)
        if node in self.taken and len(dims) == 4:
            # That heads are alike is looked at when the mask is there.
            dims = dims[:1] + dims[2:]
        others = {atom for dim in dims for atom in atoms(dim)} - self.inside
        # Heads that are read one by one have no axis left.
        unnamed = any(not any(atoms((axis,))) for dim in dims for axis in dim)
        return self.batch is None or (others <= self.batch and not unnamed)

    def _is_given(self, node: fx.Node) -> bool:
        """Whether a value comes from outside the graph."""
        return node.op == "placeholder" and node not in self.values

    def _unread(self, mask: fx.Node) -> Mask:
        """Why nothing is known of a mask over pairs: something outside the graph has made it, or what it is."""
        stack, seen = [mask], set()
        while stack:
            node = stack.pop()
            if node in seen or not self.at(node) or self.told(node) is not None:
                continue
            seen.add(node)
            if self._is_given(node):
                return Mask.GIVEN
            if self._is_followed(node):
                stack.extend(node.all_input_nodes)
        return Mask.PAIRS

    def at(self, node: fx.Node) -> list[int]:
        """The dimensions, counted from the right, in which a value has tokens."""
        if not isinstance(self.axes.dims.get(node), tuple):
            return []
        dims = self.axes.of(node)
        return [d - len(dims) for d, dim in enumerate(dims) if any(axis in self.inside for axis in atoms(dim))]

    def told(self, node: fx.Node) -> Told | None:
        """A value by the marks of single tokens; None where it compares tokens, or nothing is known."""
        stack, asked = [node], set()
        while stack:
            n = stack.pop()
            if n not in asked and n not in self.known:
                asked.add(n)
                stack.extend(n.all_input_nodes if self._is_followed(n) else ())
        for n in sorted(asked):
            self.known[n] = self._told(n)
        return self.known[node]

    def _is_followed(self, node: fx.Node) -> bool:
        rule = rule_of(node) if node.op == "call_function" and node not in self.written else None
        if rule is None or not isinstance(node.meta.get("val"), Tensor):
            return False
        kept = rule.elements is not None and rule.elements.kept
        return kept or rule.uniform is not None or rule.axes in (_BY_POSITION, _JOINED)

    def _told(self, node: fx.Node) -> Told | None:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.is_complex():
            return None
        at = self.at(node)
        found = self._followed(node) if self._is_followed(node) else None
        if found is not None and (len(at) != 1 or len({mark.node for mark in found.marks}) < 2):
            return found
        if self.assumed and self._is_given(node) and at == [-2, -1]:
            self.taken.add(node)
            return Told.single(node, -1)
        constant = self._constant(node)
        if constant is not None and constant.numel() and bool((constant == constant.flatten()[0]).all()):
            return Told.number(constant.flatten()[0], value.dtype)
        if value.is_floating_point() and (not at or self._learned(node) or self._soft(self.values.get(node))):
            return Told.bias(value.dtype)
        return Told.single(node, at[0]) if len(at) == 1 else None

    def _followed(self, node: fx.Node) -> Told | None:
        """What an operator makes of operands, where those are told by marks and it by them."""
        rule, value, args = present(rule_of(node)), node.meta["val"], schema_arguments(node)
        if rule.uniform is not None:
            number = rule.uniform(args)
            if isinstance(number, fx.Node):
                given = self.known.get(number)
                number = given.table if given is not None and not given.marks and not given.soft else None
            return None if number is None else Told.number(number, value.dtype)
        if rule.axes is _JOINED:
            return self._joined(node)
        if rule.axes is _BY_POSITION:
            told = {n: self.known.get(n) for n in node.all_input_nodes}
            return self._by_position(node, {n: t for n, t in told.items() if t is not None})
        source = node.all_input_nodes[0]
        given = self.known.get(source)
        return None if given is None else self._kept(node, source, given, present(rule.elements))

    def _kept(self, node: fx.Node, source: fx.Node, told: Told, elements: Elements) -> Told | None:
        """The same numbers in another layout, or another dtype."""
        before, after = self.at(source), self.at(node)
        where: dict[int, int] | None = None
        if elements in (Elements.CONVERTED, Elements.REPEATED):
            mixed = {axis for dim in self.axes.mixed_by(node) for axis in atoms(dim)}
            where = None if mixed & self.inside else {d: d for d in before}
        elif elements is Elements.REORDERED:
            rank = source.meta["val"].dim()
            sizes = torch.empty(tuple(range(2, rank + 2)), device="meta")
            made = function_of(node)(sizes, *node.args[1:], **node.kwargs).shape
            where = {d: made.index(sizes.shape[d]) - rank for d in before}
        elif len(before) == len(after):
            where = dict(zip(before, after))
        if where is None or not {mark.dim for mark in told.marks} <= where.keys():
            return None
        if told.soft.any() and not node.meta["val"].is_floating_point():
            return None
        marks = tuple(Mark(mark.node, where[mark.dim]) for mark in told.marks)
        return Told(marks, told.table.to(node.meta["val"].dtype), told.soft)

    def _joined(self, node: fx.Node) -> Told | None:
        """A concatenation of numbers for protected tokens and of one value that has the others."""
        holding = [n for n in node.all_input_nodes if (told := self.known.get(n)) is None or told.marks or told.soft]
        if len(holding) != 1 or len(self.at(node)) != 1 or self.at(holding[0]) != self.at(node):
            return None
        return self.known[holding[0]]

    def _by_position(self, node: fx.Node, told: Mapping[fx.Node, Told]) -> Told | None:
        """What an operator makes of the numbers of its operands, for each combination of their marks."""
        rule = rule_of(node)
        if rule is None or rule.axes is not _BY_POSITION or set(node.all_input_nodes) - told.keys():
            return None
        soft = any(bool(t.soft.any()) for t in told.values())
        if soft and not rule.prevails:
            return None
        marks = tuple(dict.fromkeys(mark for t in told.values() for mark in t.marks))
        if len(marks) > MARKS:
            return None
        over = {n: t.over(marks) for n, t in told.items()}
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: over[n][0])
        shape = [2] * len(marks)
        table: Tensor = function_of(node)(*args, **kwargs).to(node.meta["val"].dtype).expand(shape)
        unknown = torch.zeros((), dtype=torch.bool)
        for _, part in over.values():
            unknown = unknown | part
        return Told(marks, table, unknown.expand(shape) & ~(table <= MASKED))

    def _constant(self, node: fx.Node) -> Tensor | None:
        """What a value always is, where it is computed from constants, and of as few numbers as positions have."""
        if node not in self.constants:
            self.constants[node] = self._evaluated(node)
        return self.constants[node]

    def _evaluated(self, node: fx.Node) -> Tensor | None:
        if node.op in ("placeholder", "get_attr"):
            return number(node, self.values)
        value, target = node.meta.get("val"), node.target
        if not isinstance(target, OpOverload) or is_random(target) or node in self.written:
            return None
        if not isinstance(value, Tensor) or not all(isinstance(n, int) for n in value.shape) or value.numel() > LARGEST:
            return None
        if any(self._constant(n) is None for n in node.all_input_nodes):
            return None
        result: Tensor = computed(node, self.constants)
        return result

    def _soft(self, value: Tensor | None) -> bool:
        """Whether a constant bias masks nothing."""
        return value is not None and value.is_floating_point() and bool((value > MASKED).all())

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


_BY_POSITION = RULES[aten.mul.Tensor].axes
_JOINED = RULES[aten.cat.default].axes
