"""Calls of operators, made up from their schemas: every argument is drawn from what its type and its name allow.

    import random
    from mctf_compile.testing.operators import draw_call, ruled_operators

    x = torch.randn(2, 6, 4)
    call = draw_call(torch.ops.aten.sum.dim_IntList, [x], random.Random(0).choice)
    call.program(["x"])     # 'torch.ops.aten.sum.dim_IntList(x, [1], True)', or with other arguments
    call.run([x])

With ``lambda options: draw(st.sampled_from(options))`` for the choice it is Hypothesis that draws, and shrinks: the
first of all options is the plainest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from math import inf
from string import ascii_lowercase
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode

from mctf_compile.passes.rules import find_rule

Choose = Callable[[Sequence[Any]], Any]
aten = torch.ops.aten

DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.complex64,
)


@cache
def ruled_operators() -> tuple[OpOverload, ...]:
    """Every overload of ATen with a rule that takes tensors, in the order of their names."""
    names = (
        name.removeprefix("aten::").partition(".")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("aten::")
    )
    overloads = (getattr(getattr(aten, name), kind or "default") for name, _, kind in names)
    return tuple(sorted((o for o in overloads if find_rule(o) is not None and _takes_tensors(o)), key=str))


def _takes_tensors(target: OpOverload) -> bool:
    return any("Tensor" in str(argument.type) for argument in target._schema.arguments)


@dataclass(frozen=True)
class Given:
    """In the arguments of a call: the tensor of that number among those that it is made on."""

    index: int


@dataclass(frozen=True)
class Made:
    """In the arguments of a call: a tensor of the call's own, as a weight is."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    seed: int = 0

    def tensor(self) -> Tensor:
        return made(self.shape, self.dtype, self.seed)

    def __str__(self) -> str:
        return f"made({self.shape}, {self.dtype}, {self.seed})"


def made(shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Small numbers, the same for the same seed: whole and not negative for integers, both signs else."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.rand(tuple(shape), generator=generator) > 0.5
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.randint(0, 4, tuple(shape), generator=generator).to(dtype)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.complex64 if dtype.is_complex else None).to(dtype)


@dataclass(frozen=True)
class OperatorCall:
    """An operator with its arguments, in which ``Given`` and ``Made`` stand for tensors."""

    target: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def given(self) -> list[int]:
        """The numbers of the tensors that it is made on, as often as it reads each."""
        return [leaf.index for leaf in _leaves((self.args, self.kwargs)) if isinstance(leaf, Given)]

    def filled(
        self, given: Sequence[Any], own: Callable[[Made], Any] = Made.tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, with tensors (or whatever ``given`` and ``own`` say) in their places."""

        def fill(value: Any) -> Any:
            if isinstance(value, Given):
                return given[value.index]
            if isinstance(value, list):
                return [fill(v) for v in value]
            return own(value) if isinstance(value, Made) else value

        return tuple(map(fill, self.args)), {name: fill(value) for name, value in self.kwargs.items()}

    def run(self, given: Sequence[Tensor]) -> Any:
        args, kwargs = self.filled(given)
        return self.target(*args, **kwargs)

    def program(self, names: Sequence[str]) -> str:
        """The call as an expression, on tensors with these names; it may call ``made`` of this module."""

        def show(value: Any) -> str:
            if isinstance(value, Given):
                return names[value.index]
            if isinstance(value, list):
                return f"[{', '.join(map(show, value))}]"
            if isinstance(value, float) and value in (inf, -inf):
                return f'float("{value}")'
            if isinstance(value, torch.device):
                return f'torch.device("{value}")'
            return str(value) if isinstance(value, (Made, torch.dtype)) else repr(value)

        shown = [*map(show, self.args), *(f"{name}={show(value)}" for name, value in self.kwargs.items())]
        return f"torch.ops.{self.target!s}({', '.join(shown)})"


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for entry in value:
            yield from _leaves(entry)
    else:
        yield value


def draw_call(target: OpOverload, given: Sequence[Tensor], choose: Choose) -> OperatorCall | None:
    """A call of ``target`` on some of ``given``, or None where what was drawn does not fit together.

    Args:
        target: any overload that returns tensors.
        given: real tensors; one at least is an operand. The call is tried on them, and on fake ones, as it is captured:
            PyTorch runs some that it cannot capture (``norm`` of truth values).
        choose: takes one of a sequence of options, the plainest first.
    """
    call = _Drawing(target, given, choose).call()
    if call is None or not call.given:
        return None
    try:
        results = _list(call.run(given))
        mode = FakeTensorMode()
        fakes = [mode.from_tensor(x.detach()) if i in call.given else x for i, x in enumerate(given)]
        args, kwargs = call.filled(fakes, lambda made: mode.from_tensor(made.tensor()))
        with mode:
            captured = _list(call.target(*args, **kwargs))
    except REFUSALS:
        return None
    if not results or not all(isinstance(r, Tensor) for r in results):
        return None
    alike = [(r.shape, r.dtype) for r in results] == [(r.shape, r.dtype) for r in captured]
    return call if alike else None


def _list(results: Any) -> list[Any]:
    return list(results) if isinstance(results, (tuple, list)) else [results]


# What operators raise for arguments that they do not take, and fake tensors for numbers that they do not have.
REFUSALS = (RuntimeError, IndexError, ValueError, TypeError, ArithmeticError, AssertionError)


class _Unfit(Exception):
    """There is no such argument for these tensors."""


class _Drawing:
    """The arguments of one call, drawn in the order of the schema, each knowing those before it."""

    def __init__(self, target: OpOverload, given: Sequence[Tensor], choose: Choose) -> None:
        self.target, self.given, self.choose = target, given, choose
        self.name = target._schema.name.removeprefix("aten::")
        self.drawn: dict[str, Any] = {}

    def call(self) -> OperatorCall | None:
        """The call as a tracer writes it: by position, defaults left out at the end, by name what the schema asks."""
        arguments = self.target._schema.arguments
        # What is multiplied comes before what it is added to, and tensors before the letters of their dimensions; a
        # dimension comes before the sizes that it is split into.
        last = {
            "addmm": ("self",),
            "baddbmm": ("self",),
            "einsum": ("equation",),
            "take_along_dim": ("indices",),
        }
        later = last.get(self.name, ("split_size", "split_sizes"))
        try:
            for argument in sorted(arguments, key=lambda a: a.name in later):
                self.drawn[argument.name] = self._argument(argument)
            if self.name == "scaled_dot_product_attention":
                self._check_attention()
        except _Unfit:
            return None
        plain = {a.name for a in arguments if a.has_default_value() and _same(self.drawn[a.name], a.default_value)}
        by_position = [a.name for a in arguments if not a.kwarg_only]
        while by_position and by_position[-1] in plain:
            by_position.pop()
        by_name = [a.name for a in arguments if a.kwarg_only and a.name not in plain]
        return OperatorCall(self.target, tuple(self.drawn[n] for n in by_position), {n: self.drawn[n] for n in by_name})

    def _check_attention(self) -> None:
        """There are as many values as keys, which PyTorch does not look at: it reads what lies behind them."""
        key, value = (self._tensor(self.drawn[name]) for name in ("key", "value"))
        if key.dim() > 1 and value.dim() > 1 and key.shape[-2] != value.shape[-2]:
            raise _Unfit

    @property
    def x(self) -> Tensor:
        """The first tensor that was drawn: dimensions and sizes are about it."""
        first = next((leaf for leaf in _leaves(self.drawn) if isinstance(leaf, (Given, Made))), None)
        if first is None:
            raise _Unfit
        return self._tensor(first)

    def _tensor(self, leaf: Given | Made) -> Tensor:
        return self.given[leaf.index] if isinstance(leaf, Given) else leaf.tensor()

    @property
    def dim(self) -> int:
        """The dimension that was drawn, non-negative."""
        d = self.drawn.get("dim")
        if not isinstance(d, int) or not self.x.dim():
            raise _Unfit
        return d % self.x.dim()

    def _argument(self, argument: Any) -> Any:
        """A value for an argument, of its type; the default is the first option."""
        kind = str(argument.real_type)
        optional = kind.startswith("Optional[")
        kind = kind[len("Optional[") : -1] if optional else kind
        if kind == "Tensor":
            return self._operand(argument.name, optional)
        if kind == "List[Tensor]":
            return self._operands()
        if kind == "List[Optional[Tensor]]":
            return self._indices()
        own = [argument.default_value] if argument.has_default_value() else []
        options = own + [v for v in self._options(kind, argument.name) if not any(_same(v, o) for o in own)]
        if not options:
            raise _Unfit
        return self.choose(options)

    def _options(self, kind: str, name: str) -> Sequence[Any]:
        if kind == "bool":
            return (False, True) if name not in ("pin_memory", "sparse", "implicit") else ()
        if kind == "ScalarType" or name == "dtype":
            return DTYPES
        if kind in ("int", "SymInt"):
            return self._numbers(name)
        if kind in ("List[int]", "List[SymInt]"):
            return self._lists_of_numbers(name)
        if kind in ("float", "number"):
            return NUMBERS.get(name, (1.0, 0.5, 2, -1.5, 0) if kind == "number" else (1.0, 0.5, 2.0))
        if kind == "List[float]":
            return (None,)
        if kind == "str":
            return self._texts(name)
        if kind == "Device":
            return (torch.device("cpu"),)
        return ()

    # Tensors.

    def _operand(self, name: str, optional: bool) -> Given | Made | None:
        """A tensor of those given, or one that the operator brings along."""
        shapes = self._own_shapes(name)
        if shapes is not None:
            dtype = torch.float32 if self.name == "embedding" else self.x.dtype
            dtype = torch.int64 if self.name in INDEXING else dtype
            found: list[Any] = [Made(tuple(shape), dtype, seed) for seed, shape in enumerate(shapes, 1)]
        else:
            found = [Given(i) for i in range(len(self.given))]
            if any(isinstance(leaf, (Given, Made)) for leaf in _leaves(self.drawn)):
                sides = self._sides(name)
                found += [Made(shape, dtype, 1) for shape in sides for dtype in self._beside(name)]
        if not found and not optional:
            raise _Unfit
        chosen: Given | Made | None = self.choose(([None] if optional else []) + found)
        return chosen

    def _operands(self) -> list[Given | Made]:
        """Tensors for a list: at least one of those given."""
        operands: list[Given | Made] = []
        for _ in range(self.choose((2, 1, 3))):
            operand = self._operand("tensors", False)
            assert operand is not None
            operands.append(operand)
        return operands

    def _indices(self) -> list[Made | None]:
        """Positions along one dimension, or two."""
        rank = self.x.dim()
        if not rank:
            raise _Unfit
        at = self.choose([(d,) for d in range(rank)] + [(d, e) for d in range(rank) for e in range(d)])
        shape = self.choose(((2,), (2, 3)))
        return [Made(shape, torch.int64, d) if d in at else None for d in range(max(at) + 1)]

    def _beside(self, name: str) -> tuple[torch.dtype, ...]:
        """Dtypes of an operand that the operator brings along."""
        if name in ("mask", "condition", "attn_mask"):
            return (torch.bool,)
        if self.name in PRODUCTS or self.x.dtype is torch.int64:
            return (self.x.dtype,)
        return (self.x.dtype, torch.int64)

    def _sides(self, name: str) -> list[tuple[int, ...]]:
        """The shapes of an operand beside the first: what multiplies it from the right, or broadcasts against it."""
        if name in ("key", "value"):
            return [tuple(self.x.shape)]
        if name == "attn_mask" and self.x.dim() > 1:
            n = self.x.shape[-2]
            return [(n, n), (1, n)]
        if name == "self" and self.name in ("addmm", "baddbmm"):
            _, right = (leaf for leaf in _leaves(self.drawn) if isinstance(leaf, (Given, Made)))
            return _broadcast((*self.x.shape[:-1], *self._tensor(right).shape[-1:]))
        if name not in FACTORS or self.name not in PRODUCTS:
            return _broadcast(self.x.shape)
        *lead, inner = self.x.shape or (1,)
        one = [(inner,), (inner, 3)] if self.name in ("matmul", "mv", "mm", "addmm") else []
        return one + ([(*lead[:-1], inner, 3)] if len(lead) > 1 else [])

    def _own_shapes(self, name: str) -> list[tuple[int, ...]] | None:
        """The shapes of a parameter; None where the argument is no parameter."""
        if self.name == "embedding":
            return [(8, 5)] if name == "weight" else None
        if self.name in INDEXING and name.startswith("ind"):
            picked = [(*self.x.shape[: self.dim], n, *self.x.shape[self.dim + 1 :]) for n in (2, 3)]
            return [(2,), (3,)] if self.name == "index_select" else [*picked, tuple(self.x.shape)]
        if self.name == "bilinear" and name == "weight":
            one, other = (self._tensor(self.drawn[name]) for name in ("input1", "input2"))
            return [(5, one.shape[-1], other.shape[-1])] if one.dim() and other.dim() else []
        if self.name == "masked_fill" and name == "value":
            return [()]
        if name not in ("weight", "bias", "running_mean", "running_var") or self.name == "lerp":
            return None
        shape = self.x.shape
        if not shape:
            return []
        if "normalized_shape" in self.drawn:
            return [tuple(self.drawn["normalized_shape"])]
        if name == "bias" and self.name.startswith(("linear", "conv", "bilinear")):
            return [self.drawn["weight"].shape[:1]]
        if self.name == "linear":
            return [(5, shape[-1]), (shape[-1], shape[-1])]
        channels = shape[1] if len(shape) > 1 else 1
        if self.name.startswith("conv"):
            pairs = ((5, channels), (channels, 1))
            sides = len(shape) - 2 if self.name == "convolution" else int(self.name[4])
            return [(*pair, *[size] * sides) for pair in pairs for size in (1, 3)]
        return [(channels,), (1,)] if self.name == "prelu" else [(channels,)]

    # Numbers.

    def _numbers(self, name: str) -> Sequence[int | None]:
        if name in ORDERS:
            return ORDERS[name]
        shape = self.x.shape
        rank = len(shape)
        if name in DIMENSIONS:
            more = 1 if self.name in ("unsqueeze", "stack") else 0
            return [d for i in range(rank + more) for d in (i, i - rank - more)]
        if name in ("index", "start", "end", "length", "step"):
            size = shape[self.dim]
            return {
                "index": (0, 1, -1, size - 1),
                "start": (None, 0, 1, 2, -2),
                "end": (None, size, 2, -1),
                "length": (1, 2, size - 1, size),
                "step": (1, 2),
            }[name]
        if name == "split_size":
            return (1, 2, shape[self.dim])
        if name == "groups":
            return (1, shape[1] if rank > 1 else 1)
        return (1, 2, 3, 0)

    def _lists_of_numbers(self, name: str) -> Sequence[list[int] | None]:
        shape = list(self.x.shape)
        rank = len(shape)
        if name in ("size", "shape", "sizes"):
            return self._sizes(shape)
        if name == "dims" and self.name == "permute":
            return [list(order) for order in permutations(range(rank))]
        if name in ("repeats", "dims") and self.name in ("repeat", "tile"):
            return [[1] * i + [times] + [1] * (rank - 1 - i) for i in range(rank) for times in (2, 1)]
        if name == "dims_other":
            met, other = [shape[d] for d in self.drawn["dims_self"]], self._tensor(self.drawn["other"]).shape
            chosen = permutations(range(len(other)), len(met))
            return [list(dims) for dims in chosen if [other[d] for d in dims] == met]
        if name in ("dim", "dims", "dims_self", "source", "destination"):
            pairs = [[a, b] for a in range(rank) for b in range(rank) if a != b]
            return [[], *([d] for d in range(-rank, rank)), *pairs, list(range(rank))]
        if name in ("split_size", "split_sizes"):
            if not shape:
                raise _Unfit
            size = shape[self.dim if "dim" in self.drawn else 0]
            return [[size], [1, size - 1], [size - 1, 1], [1] * size]
        return {
            "normalized_shape": [shape[i:] for i in range(rank - 1, -1, -1)],
            "output_size": [[1] * n for n in (1, 2, 3)] + [[2] * n for n in (1, 2, 3)],
            "pad": [[0, 1], [1, 0], [0, 0, 1, 1], [0, 0], [0, 0, 0, 0, 0, 1]],
            "indices": [[1], [1, 2], [2]],
            "padding": [[0], [1]],
            "kernel_size": [[1], [2], [3]],
            "stride": [[1], [2]],
            "dilation": [[1], [2]],
            "shifts": [[1], [-1], [1, 1]],
        }.get(name, [[1], [0], [1, 1]])

    def _sizes(self, shape: list[int]) -> list[list[int]]:
        """Shapes that a tensor can be brought to: neighbours joined, one split, dimensions repeated."""
        if self.name.startswith("new"):
            return [shape, [1], [2, 3]]
        if self.name in ("expand", "broadcast_to"):
            return [shape, [-1] * len(shape), [3, *shape], [n if n > 1 else 3 for n in shape]]
        if self.name == "unflatten":
            size = shape[self.dim]
            return [[n, size // n] for n in range(1, size + 1) if size % n == 0] + [[-1, 2], [1, -1]]
        joined = [[*shape[:i], shape[i] * shape[i + 1], *shape[i + 2 :]] for i in range(len(shape) - 1)]
        parted = [
            [*shape[:i], n, shape[i] // n, *shape[i + 1 :]]
            for i in range(len(shape))
            for n in (1, 2, 3)
            if shape[i] % n == 0
        ]
        return [shape, *joined, *parted, [-1], [shape[0], -1] if shape else [1]]

    def _texts(self, name: str) -> Sequence[str | None]:
        return [self._equation()] if name == "equation" else TEXTS.get(name, ())

    def _equation(self) -> str:
        """Letters for the dimensions of the tensors: equal sizes may share one, and some are summed away."""
        sizes: dict[str, int] = {}
        terms = []
        for leaf in self.drawn["tensors"]:
            term = ""
            for size in self._tensor(leaf).shape:
                fresh = ascii_lowercase[len(sizes)]
                term += self.choose([c for c in sizes if sizes[c] == size and c not in term] + [fresh])
                sizes.setdefault(term[-1], size)
            terms.append(term)
        gone = self.choose(["", *sizes])
        return f"{','.join(terms)}->{''.join(c for c in sizes if c != gone)}"


def _broadcast(shape: Sequence[int]) -> list[tuple[int, ...]]:
    """Shapes that broadcast against ``shape``."""
    shape = tuple(shape)
    last = [shape[i:] for i in range(len(shape) + 1)]
    first = [(1,) * i + shape[i:] for i in range(1, len(shape))] + [shape[:i] + (1,) * (len(shape) - i) for i in (1, 2)]
    return list(dict.fromkeys(last + [side for side in first if len(side) == len(shape)]))


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and a == b


# Matrix products, and their arguments that multiply from the right.
PRODUCTS = ("matmul", "mm", "bmm", "mv", "addmm", "baddbmm")
FACTORS = ("other", "mat2", "vec", "batch2")

# Arguments that name one dimension.
DIMENSIONS = ("dim", "dim0", "dim1", "axis0", "axis1", "source", "destination", "start_dim", "end_dim")

# Operators that take positions.
INDEXING = ("index_select", "gather", "take_along_dim")

ORDERS = {
    "num_classes": (4, 6),
    "n": (0, 1, 2),
    "p": (1, 2),
    "num_groups": (1, 2),
    "padding_idx": (-1, 0),
    "output_size": (None,),
}

NUMBERS: dict[str, tuple[Any, ...]] = {
    "p": (2, 1, 3, 0.5, 0, -1, inf, -inf),
    "ord": (2, 1, 3, 0.5, 0, -1, inf, -inf),
    "correction": (None, 1, 0, 2),
    "min": (None, -0.5, 0),
    "max": (None, 0.5, 2),
    "momentum": (0.1,),
    "eps": (1e-5, 1e-3),
    "dropout_p": (0.0,),
    "scale": (None, 0.5),
    "lower": (0.125,),
    "upper": (0.25,),
}

TEXTS: dict[str, tuple[str | None, ...]] = {
    "approximate": ("none", "tanh"),
    "rounding_mode": (None, "floor", "trunc"),
    "padding": ("valid", "same"),
    "mode": ("constant", "reflect", "replicate", "circular"),
}
