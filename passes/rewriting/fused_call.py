"""One operator on fused tokens, as its rule sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Protocol, cast

import torch
from torch import Tensor, fx

from mctf_compile.errors import Declined
from mctf_compile.narrowing import function_of, present
from mctf_compile.passes.analysis.reasons import name_of, regrouped
from mctf_compile.passes.analysis.token_axes import Axes
from mctf_compile.passes.axes import Dims, Place, Tokens, has_batch, hint_of, mentions, places, product
from mctf_compile.passes.planning.plan import Plan
from mctf_compile.passes.rewriting.stream import Stream, Value
from mctf_compile.passes.rules import Call, Elements, Rule, sources
from mctf_compile.passes.rules.base import wrap
from mctf_compile.passes.subclasses import call

# What attention weights stay under, up to scaling or layout.
WEIGHTS_KEEPING = (Elements.REGROUPED, Elements.CONVERTED, Elements.THINNED, Elements.REPEATED)


class Program(Protocol):
    """The rewritten program that a call is a part of."""

    axes: Axes
    plan: Plan

    def in_generation(
        self,
        node: fx.Node,
        value: Value,
        stream: Stream,
        generation: int,
        like: Callable[[], Value],
        summed: int | None = None,
    ) -> Value: ...


class FusedCall:
    """One node to be run on fused tokens, as a rule sees it."""

    def __init__(
        self,
        program: Program,
        rule: Rule,
        node: fx.Node,
        stream: Stream,
        generation: int,
        env: Mapping[fx.Node, Any],
        others: Mapping[Stream, int] = MappingProxyType({}),
    ) -> None:
        self.program, self.rule, self.node = program, rule, node
        self.stream, self.generation, self.env = stream, generation, env
        # The generations of other streams, whose tokens the operator does not mix.
        self.others = others
        self.call: Call = program.axes.call(node)
        self.args, self.target = self.call.args, function_of(node)
        self.packet = getattr(node.target, "overloadpacket", None)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the (first) result."""
        value = self.node.meta["val"]
        dtype: torch.dtype = (value[0] if isinstance(value, (tuple, list)) else value).dtype
        return dtype

    @property
    def tokens(self) -> Tokens:
        return self.stream.tokens

    @property
    def relaxed(self) -> bool:
        """Whether all tokens stay, and count by fractions, as in training."""
        return self.program.plan.relaxed

    def _like(self) -> Value:
        """The fused operand of the highest rank: it shows where the images are."""
        values = [v for v in flat_values(self.env[n] for n in self.node.all_input_nodes) if v.generation]
        return max(values, key=lambda v: len(v.dims)) if values else self.env[self.node.all_input_nodes[0]]

    @property
    def operand(self) -> str:
        """The name of the first tensor argument."""
        first = self.call.tensors()[0]
        return next(name for name, value in self.args.items() if value is first)

    def operand_value(self, node: fx.Node, summed: int | None = None) -> Value:
        """The value of a node in the generation of this call.

        Along ``summed``, over which it is contracted, tokens that were fused since it was made have their sum.
        """
        value = self._with_others(node, self.env[node])
        value = self.program.in_generation(node, value, self.stream, self.generation, self._like, summed)
        if self.others and not self._fits(value):
            raise Declined("two token axes that are fused apart meet")
        if len(value.dims) != len(self.env[node].dims) and not self.rule.broadcasts:
            raise Declined("a value without the batch axis meets fused tokens in another layout")
        return value

    def _with_others(self, node: fx.Node, value: Value) -> Value:
        """A value with the tokens of other streams, where it has those, in their generations."""
        for other, generation in self.others.items():
            if not mentions(value.dims, other.tokens):
                continue
            if mentions(value.dims, self.tokens):
                if value.generation:
                    raise Declined("two token axes that are fused apart meet")
                # What is left of it are the tokens of this stream, all of them.
                fused = self.program.in_generation(node, value, other, generation, self._like)
                value = Value(fused.tensor, fused.dims, returned=value.returned)
            else:
                value = self.program.in_generation(node, value, other, generation, self._like)
        return value

    def _fits(self, value: Value) -> bool:
        """Whether a value has as many tokens of each stream as this call's generations of them have."""
        return all(
            (size := _extent(stream, place, generation)) is None
            or hint_of(value.tensor.shape[place.dim]) == hint_of(size)
            for stream, generation in ((self.stream, self.generation), *self.others.items())
            for place in stream.places(value.dims)
        )

    def value(self, name: str) -> Value:
        """A tensor argument in the generation of this call."""
        return self.operand_value(self.args[name])

    def intensive(self, name: str) -> Value:
        """A tensor argument, attention weights turned into those of one copy of each token."""
        value = self.value(name)
        return present(value.stream).intensive(value) if value.generation else value

    def dims(self, name: str) -> Dims:
        return self.program.axes.of(self.args[name])

    def wrapped(self, name: str) -> int:
        """A dimension argument as a non-negative number."""
        return wrap(self.args[name], len(self.call.dims_of(self.call.tensors()[0])))

    def places_of(self, node: fx.Node) -> list[Place]:
        return self.stream.places(self.program.axes.of(node))

    def place(self, name: str, dim: int) -> Place:
        """The place of the token axis at one dimension of an argument, where it is whole."""
        return self.place_in(self.value(name), dim)

    def place_in(self, value: Value, dim: int) -> Place:
        """The place of the token axis at one dimension of a value, where it is whole."""
        found = [p for p in self.stream.places(value.dims) if dim in (p.dim, *p.rest)]
        if not found:
            raise Declined("the token axis meets another axis")
        if found[0].rest:
            raise Declined("rows and columns of the token grid are told apart")
        return found[0]

    def places_in(self, value: Value) -> list[Place]:
        return self.stream.places(value.dims)

    def image_dims(self, value: Value) -> list[int]:
        """The dimensions of a value that hold the images, alone or with other axes."""
        return self.stream.batch_dims(value.dims)

    def only_place(self, value: Value) -> Place:
        found = self.stream.places(value.dims)
        if len(found) != 1:
            raise Declined("the token axis occurs twice in one operand")
        return found[0]

    def log_sizes(self, place: Place, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """[B, M] log sizes of the tokens at a place, in ``dtype`` or wider; None where sizes count for nothing."""
        if not self.program.plan.method.counts_sizes:
            return None
        log_size = self.stream.log_size(self.generation, place.lead, place.tail)
        wide = torch.promote_types(dtype, log_size.dtype)
        if wide == log_size.dtype:
            return log_size
        return self.size(place).to(wide).log()

    def size(self, place: Place) -> Tensor:
        """[B, M] sizes of the tokens at a place."""
        return self.stream.size(self.generation, place.lead, place.tail)

    def to_itself(self, place: Place) -> bool:
        """Whether a token at a place counts for itself alone."""
        return self.stream.fusion(self.generation, place.lead, place.tail).whole_to_itself

    def factor(self, per_token: Tensor, value: Value, place: Place) -> Tensor:
        """[B, M] numbers of the tokens at a place of a value, as a factor for it."""
        return self.stream.factor(per_token, value, place)

    def sizes(self, value: Value, place: Place) -> Tensor:
        """The sizes of the tokens at a place of a value, as a factor for it."""
        return self.factor(self.size(place), value, place)

    def weighted(self, value: Value, place: Place) -> Value:
        """A value times the sizes of its tokens, rounded once, and exact for whole numbers.

        It is in its own dtype but for float16, which has no room for the sizes: that becomes float32.
        """
        x, size = value.tensor, self.sizes(value, place)
        size = size if x.is_floating_point() or x.is_complex() else self.as_integers(size)
        return replace(value, tensor=(x * size).to(torch.float32 if x.dtype is torch.float16 else x.dtype))

    def as_integers(self, size: Tensor) -> Tensor:
        """Sizes as whole numbers."""
        if self.relaxed:
            raise Declined("in training tokens count by fractions, and whole numbers have none")
        return size.to(torch.int64)

    @property
    def conserves(self) -> bool:
        """Whether the sizes of this call's tokens add up to the number of original ones."""
        return self.stream.conserves(self.generation)

    def dense_count(self, name: str, dims: set[int]) -> Any:
        """The number of original positions in some dimensions of an argument."""
        dense, fused = self.args[name].meta["val"].shape, self.value(name).tensor.shape
        count: Any = 1
        rest = set(dims)
        for p in self.stream.places(self.dims(name)):
            held = {p.dim, *p.rest}
            if not all(isinstance(dense[d], int) for d in held):
                extent = _extent(self.stream, p, 0)
                if extent is None:
                    raise Declined("two symbolic sizes share a dimension with the token axis")
                count = count * extent
                rest -= held
        for d in rest:
            count = count * (dense[d] if isinstance(dense[d], int) else fused[d])
        return count

    def expected_shape(self, dims: Dims, dense: Sequence[Any]) -> list[int | torch.SymInt | None] | None:
        """The shape a result must have: as before, its token axes shrunk. None: no whole token axis.

        A size is None where others than tokens make it symbolic in the original program.
        """
        found = places(dims, self.tokens)
        if found is None:
            return None
        shape: list[int | torch.SymInt | None] = [size if isinstance(size, int) else None for size in dense]
        for stream, generation in ((self.stream, self.generation), *self.others.items()):
            for p in places(dims, stream.tokens) or ():
                shape = [1 if d in p.rest else size for d, size in enumerate(shape)]
                shape[p.dim] = _extent(stream, p, generation)
        return shape

    def out_dims(self) -> list[Dims]:
        out = self.program.axes.dims[self.node]
        table = self.program.axes.table
        return [table.canonical_dims(d) for d in (out if isinstance(out, list) else [out])]

    def emit(self) -> Any:
        """Run the operator as it is, on operands of its generation, with the sizes among its arguments shrunk."""
        all_dims = self.out_dims()
        vals = self.node.meta["val"]
        vals = vals if isinstance(vals, (tuple, list)) else [vals]
        shapes = [self.expected_shape(d, v.shape) for d, v in zip(all_dims, vals)]
        if any(shape is None for shape in shapes):
            raise Declined(regrouped(self.node, vals[0].shape))
        weights_dim = self._weights_dim(all_dims)
        read = set(sources(self.node))

        def operand(n: fx.Node) -> Any:
            value = self.env[n]
            if isinstance(value, list):
                raise Declined(f"{name_of(self.node)} takes a list of results")
            if not isinstance(value, Value):
                return value
            if n not in read:
                return value.tensor
            self.places_of(n)
            operand = self.operand_value(n)
            return (operand if weights_dim is not None else self.stream.intensive(operand)).tensor

        args, kwargs = fx.node.map_arg((self.node.args, self.node.kwargs), operand)
        if self.rule.resized is not None:
            result = self._resize(args, present(shapes[0]), all_dims[0])
        else:
            result = call(self.target, args, kwargs)
        results = result if isinstance(result, (tuple, list)) else [result]
        values = [self.result(r, weights_dim, index=i) for i, r in enumerate(results)]
        return values if isinstance(result, (tuple, list)) else values[0]

    def _weights_dim(self, out: list[Dims]) -> int | None:
        """The dimension of attention weights in the result, where the operator leaves them what they are."""
        values = [v for v in (self.env[n] for n in self.node.all_input_nodes) if isinstance(v, Value)]
        held = [v for v in values if v.weights_dim is not None]
        if len(held) != 1 or values[0] is not held[0] or len(out) != 1 or self.rule.elements not in WEIGHTS_KEEPING:
            return None
        if not self.node.meta["val"].is_floating_point():
            return None
        (value,) = held
        last = value.weights_dim == len(value.dims) - 1 and out[0][-1:] == value.dims[-1:]
        if out[0] == value.dims:
            return value.weights_dim
        return len(out[0]) - 1 if last else None

    def _resize(self, args: tuple[Any, ...], shape: list[Any], dims: Dims) -> Tensor:
        """Reshape or expand to ``shape``; sizes that hold no tokens stay as the program computes them."""
        x: Tensor = args[0]
        given = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else []
        if self.rule.resized == "size":
            touched = {d for p in present(places(dims, self.tokens)) for d in (p.dim, *p.rest)}
            # Of the shape of another tensor, or one that is listed.
            given = given or [self._lent(d, dims, args[1], size) for d, size in enumerate(shape)]
            x = torch.ops.aten.expand(x, [shape[d] if d in touched else s for d, s in enumerate(given)])
            return x
        if sum(not isinstance(size, int) for size in shape) == 1:
            shape = [size if isinstance(size, int) else -1 for size in shape]
        else:
            shape = [self._as_given(d, dims, x, given) if size is None else size for d, size in enumerate(shape)]
        if shape.count(-1) > 1:
            raise Declined("a reshape with several symbolic sizes meets fused tokens")
        x = torch.ops.aten.reshape(x, shape)
        return x

    def _lent(self, d: int, dims: Dims, other: Tensor, size: Any) -> Any:
        """The size that a dimension gets from another tensor, which may have fewer tokens than it had; -1: its own."""
        own = self.value(self.operand).dims
        before = d + len(own) - len(dims)
        if dims[d] and before >= 0 and dims[d] == own[before]:
            return -1
        if size is not None:
            return size
        lender = self.env[cast(fx.Node, self.node.args[1])]
        if lender.stream is not None and mentions((lender.dims[d],), lender.stream.tokens):
            raise Declined(f"{name_of(self.node)} repeats something along the tokens without reading them")
        return other.shape[d]

    def _as_given(self, d: int, dims: Dims, x: Tensor, given: Sequence[Any]) -> Any:
        """The size of a dimension of a reshape where it holds no tokens; -1 where that is not known."""
        source = self.value(self.operand).dims
        kept = [i for i, dim in enumerate(source) if dim and dim == dims[d]]
        if kept:
            return x.shape[kept[0]]
        return given[d] if len(given) == len(dims) and not mentions((dims[d],), self.tokens) else -1

    def _check(self, got: Tensor, dims: Dims, index: int) -> None:
        """Raise ``Declined`` where a result is not what the original program makes, its token axes shrunk."""
        dense = self.node.meta["val"]
        dense = dense[index] if isinstance(dense, (tuple, list)) else dense
        want = self.expected_shape(dims, dense.shape)
        if want is None:
            raise Declined(regrouped(self.node, dense.shape))
        agree = (
            got.dtype == dense.dtype
            and len(got.shape) == len(want)
            and all(w is None or hint_of(g) == hint_of(w) for g, w in zip(got.shape, want))
        )
        if not agree:
            raise Declined(
                f"{name_of(self.node)} gives {got.dtype} {tuple(got.shape)} on fused tokens "
                f"where {dense.dtype} {tuple(want)} is due"
            )

    def original(self) -> Value:
        """What the original program computes where no value of its operands is read."""

        def held(node: fx.Node) -> Any:
            value = self.env[node]
            return value.tensor if isinstance(value, Value) else value

        args, kwargs = fx.node.map_arg((self.node.args, self.node.kwargs), held)
        return Value(self.target(*args, **kwargs), self.out_dims()[0])

    def by_place(self, name: str, function: Callable[[Tensor], Tensor]) -> Value:
        """What ``function`` makes of the original tokens of an argument, fused as those are."""
        original = self.stream.lower_to(self.value(name), 0)
        made = replace(original, tensor=function(original.tensor), stream=self.stream)
        return self.result(self.stream.raise_to(made, self.generation).tensor)

    def result(self, tensor: Tensor, weights_dim: int | None = None, index: int = 0) -> Value:
        """A value of this call's generation, where its axes hold the tokens; else an ordinary one.

        ``index``: which of several results it is.
        """
        dims = self.out_dims()[index]
        if len(self.stream.batch_dims(dims)) > 1:
            raise Declined(f"{name_of(self.node)} lets the images of a batch meet one another")
        self._check(tensor, dims, index)
        if not mentions(dims, self.tokens):
            held = [(s, g) for s, g in self.others.items() if mentions(dims, s.tokens)]
            return Value(tensor, dims, *held[0]) if held else Value(tensor, dims)
        if any(mentions(dims, other.tokens) for other in self.others):
            raise Declined("two token axes that are fused apart meet")
        if not has_batch(dims, self.tokens):
            raise Declined("the images are regrouped")
        stream = self.stream if self.generation else None
        return Value(tensor, dims, stream, self.generation, weights_dim if self.generation else None)


def _extent(stream: Stream, place: Place, generation: int) -> int | torch.SymInt | None:
    """The size of a dimension that has the tokens of a generation at a place; None beside symbolic axes."""
    beside = product(place.before + place.after)
    if not isinstance(beside, int):
        return None
    return beside * (place.lead + stream.body(generation) + place.tail)


def generations(fused: Iterable[Value]) -> dict[Stream, int]:
    """The youngest generation of each stream whose fused tokens some values have."""
    found: dict[Stream, int] = {}
    for value in fused:
        stream = present(value.stream)
        found[stream] = max(found.get(stream, 0), value.generation)
    return found


def flat_values(values: Any) -> list[Value]:
    """The values among some, and those of the lists among them; other things are left out."""
    flat: list[Value] = []
    for value in values:
        if isinstance(value, Value):
            flat.append(value)
        elif isinstance(value, list):
            flat.extend(v for v in value if isinstance(v, Value))
    return flat
