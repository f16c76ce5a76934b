"""One operator on fused tokens and on all their copies, run eagerly, with axes, sizes and maps of a real rewrite."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from mctf_compile.kernels.pooling.aten import group
from mctf_compile.methods import get_method
from mctf_compile.passes.analysis.token_axes import token_axes
from mctf_compile.passes.axes import Tokens, mentions, places
from mctf_compile.passes.planning.plan import Plan
from mctf_compile.passes.rewriting.rewriter import Rewriter
from mctf_compile.passes.rewriting.stream import Fusion, Stream, Value
from mctf_compile.testing.operators import Made, OperatorCall, draw_call, made

aten = torch.ops.aten

# No two are equal, so that no axis is taken for another by a drawn argument; N is ROWS times COLUMNS.
B, N, C = 3, 10, 28
ROWS, COLUMNS, HEADS = 2, 5, 4
# Which tokens are copies of one another: the same ones in every image, or others in each.
ALIKE = [[0, 1, 0, 2, 0, 1, 3, 3, 0, 2]] * B
APART = [[0, 1, 0, 2, 0, 1, 3, 3, 0, 2], [0, 0, 0, 1, 1, 2, 2, 2, 3, 3], [3, 2, 1, 0, 0, 0, 0, 1, 2, 3]]


@cache
def fusion(alike: bool, dtype: torch.dtype) -> Fusion:
    """The fusion of all copies of a kind into the first of them."""
    kinds = ALIKE if alike else APART
    first = [sorted({kind: row.index(kind) for kind in row}.values()) for row in kinds]
    others = [[i for i in range(N) if i not in kept] for kept in first]
    into = [[kept.index(row.index(row[i])) for i in gone] for row, kept, gone in zip(kinds, first, others, strict=True)]
    keep, gone, into = map(torch.tensor, (first, others, into))
    ones = torch.ones(B, N, dtype=dtype if dtype is torch.float64 else torch.float32)
    index, weight, size = group(ones, ones, keep, gone, into)
    return Fusion(keep, gone, into, index, weight, size, 0, 0)


class Program:
    """A graph on tokens [B, N, C] of which some are copies of others, with the values of its nodes.

    ``given`` are the tokens in a layout, the same with their channels in the other order, which of them are positive,
    and the second with its last two dimensions exchanged, as products want it. Of a layout of one image, B is 1.
    """

    def __init__(self, dtype: torch.dtype, alike: bool, layout: str) -> None:
        self.dtype, self.alike, self.layout = dtype, alike, layout
        self.graph, self.values = fx.Graph(), {}
        images = slice(1 if layout in POSITIONS["one image"] else B)
        whole = fusion(alike, dtype)
        parts = {name: getattr(whole, name)[images] for name in ("keep", "gone", "into", "index", "weight", "size")}
        self.fusion = replace(whole, **parts)
        kinds = torch.tensor(ALIKE if alike else APART)[images]
        own = made((len(kinds), int(kinds.max()) + 1, C), dtype, 11)
        self.tokens = self.place(own.gather(1, kinds[:, :, None].expand(-1, -1, C)))
        x = LAYOUTS[layout](self, self.tokens)
        y = LAYOUTS[layout](self, self.call(aten.flip.default, self.tokens, [2]))
        length = self.call(aten.abs.default, x) if dtype.is_complex else x
        # Rows and columns of a grid have an order.
        turns = self.values[y].dim() > 1 and layout not in POSITIONS["grid"]
        turned = [self.call(aten.transpose.int, y, -1, -2)] if turns else []
        self.given = (x, y, self.call(aten.gt.Scalar, length, 0), *turned)
        self.fused = self._fused()

    def place(self, value: Tensor) -> fx.Node:
        """An input of the graph."""
        return self._add(self.graph.placeholder(f"p{len(self.values)}"), value)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        of = fx.node.map_arg((args, kwargs), self.values.__getitem__)
        return self._add(self.graph.call_function(target, args, kwargs), target(*of[0], **of[1]))

    def _add(self, node: fx.Node, value: Any) -> fx.Node:
        node.meta["val"] = self.values[node] = value
        return node

    def make(self, side: Made) -> fx.Node:
        """A tensor beside the tokens; where it has their axis, copies have equal entries."""
        value = side.tensor()
        for dim, size in enumerate(value.shape):
            if size == N and self.alike:
                value = value.index_select(dim, torch.tensor([ALIKE[0].index(kind) for kind in ALIKE[0]]))
            elif size % N == 0 or size in (ROWS, COLUMNS, N + 1, N + 2):
                value = value.narrow(dim, 0, 1).expand(value.shape)
        return self.place(value.contiguous())

    def _rewriter(self) -> tuple[Rewriter, Stream]:
        axes = token_axes(self.graph)
        batch, body, _ = axes.of(self.tokens)
        # A module would be made of the graph by writing and compiling its code.
        rewriter = Rewriter(SimpleNamespace(graph=self.graph), axes, Plan(get_method("mctf")(), []))
        return rewriter, Stream(Tokens(body, N, 0, 0, batch), [self.fusion])

    def _fused(self) -> dict[fx.Node, Value]:
        """The values of ``given`` on fused tokens, by the rules of the operators that lay them out."""
        output = self.graph.output(self.given)
        rewriter, stream = self._rewriter()
        self.graph.erase_node(output)
        kept = self.fusion.keep[:, :, None].expand(-1, -1, C)
        env: dict[fx.Node, Any] = {}
        for node in self.graph.nodes:
            if node is self.tokens:
                tensor = self.values[node].gather(1, kept)
                env[node] = Value(tensor, rewriter.axes.of(node), stream, 1)
            elif node.op == "placeholder":
                env[node] = Value(self.values[node], rewriter.axes.of(node))
            else:
                env[node] = rewriter.evaluate(node, env)
        assert not rewriter.unmerges, rewriter.unmerges
        return {node: env[node] for node in self.given}

    def run(self, call: OperatorCall) -> list[Outcome]:
        """Compare a call on fused tokens with the same on all of their copies; nothing where those do not take it.

        Of several results all are read, and then the first alone.
        """
        before = list(self.graph.nodes)
        outcomes = []
        try:
            args, kwargs = call.filled(self.given, self.make)
            try:
                node = self.call(call.target, *args, **kwargs)
                # Some kernels take truth values in some strides alone, and tokens that came back have others.
                if self.dtype is torch.bool:
                    packed = fx.node.map_arg((args, kwargs), lambda n: self.values[n].clone().contiguous())
                    call.target(*packed[0], **packed[1])
            except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError):
                return []
            # PyTorch neither gathers nor compares complex numbers of 16 bits on a CPU.
            if getattr(self.values[node], "dtype", None) is torch.complex32:
                return []
            several = len(call.target._schema.returns) > 1
            results = (
                [self.call(operator.getitem, node, i) for i in range(len(self.values[node]))] if several else [node]
            )
            for read in (results, results[:1]) if several else (results,):
                output = self.graph.output(read)
                for unread in results[len(read) :]:
                    self.graph.erase_node(unread)
                outcomes.append(self._compared(call, node, len(read)))
                self.graph.erase_node(output)
        finally:
            for node in reversed(list(self.graph.nodes)):
                if node in before:
                    break
                self.values.pop(node, None)
                self.graph.erase_node(node)
        return outcomes

    def _compared(self, call: OperatorCall, node: fx.Node, read: int) -> Outcome:
        rewriter, stream = self._rewriter()
        mixes = mentions(rewriter.axes.mixed_by(node), stream.tokens)
        read_first = self.values[self.given[call.given[0]]].dtype
        outcome = Outcome(f"{self.dtype} {self.layout}: {call.program('xyzw')}", read_first, self.layout, mixes)
        if not all(places(rewriter.axes.of(n), stream.tokens) for n in self.given):
            return replace(outcome, reason="tokens whose axis is cut into single positions are fused in no such layout")
        env = {n: self._present(n, rewriter, stream) for n in node.all_input_nodes}
        try:
            result = rewriter.evaluate(node, env)
            plain = [rewriter._plain(r) for r in (result if isinstance(result, list) else [result])]
        except Exception as error:  # Whatever it is, the user would see it.
            return replace(outcome, problem=f"{type(error).__name__}: {error}")
        expected = self.values[node]
        expected = list(expected) if isinstance(expected, (tuple, list)) else [expected]
        problem = f"{len(plain)} results instead of {len(expected)}" if len(plain) != len(expected) else None
        read = read if len(call.target._schema.returns) > 1 else len(expected)
        for got, want in list(zip(plain, expected, strict=False))[:read]:
            problem = problem or difference(got, want, self._reads(call), is_settled(call))
        reason = rewriter.unmerges[0].reason if rewriter.unmerges else None
        return replace(outcome, reason=reason, problem=problem)

    def _reads(self, call: OperatorCall) -> torch.dtype:
        """The dtype that a call computes in: another one where it names that, and tokens are as exact in it."""
        named = [v for v in (*call.args, *call.kwargs.values()) if isinstance(v, torch.dtype) and v.is_floating_point]
        return named[0] if named and self.layout != "attention" else self.dtype

    def _present(self, node: fx.Node, rewriter: Rewriter, stream: Stream) -> Value:
        """A value of an operand, its dims in the axes of the whole graph."""
        if node not in self.fused:
            return Value(self.values[node], rewriter.axes.of(node))
        fused = self.fused[node]
        return replace(fused, dims=rewriter.axes.of(node), stream=stream if fused.generation else None)


@dataclass(frozen=True)
class Outcome:
    """What became of one call: ``reason`` for which its tokens were given back, ``problem`` if the result is wrong.

    ``mixes``: tokens meet in it.
    """

    shown: str
    dtype: torch.dtype
    layout: str
    mixes: bool
    reason: str | None = None
    problem: str | None = None

    @property
    def weighted(self) -> bool:
        """Whether tokens meet in it, and it ran on fused ones."""
        return self.mixes and self.reason is None and self.problem is None


def _pairs(p: Program, x: fx.Node) -> fx.Node:
    one, other = (p.call(aten.select.int, x, 2, i) for i in (0, 1))
    return p.call(aten.mul.Tensor, p.call(aten.unsqueeze.default, one, 2), p.call(aten.unsqueeze.default, other, 1))


def _prefix(p: Program, x: fx.Node) -> fx.Node:
    return p.call(aten.cat.default, [p.place(made((B, 1, C), p.dtype, 5)), x], 1)


def _heads(p: Program, x: fx.Node) -> fx.Node:
    return p.call(aten.reshape.default, x, [B, N, HEADS, -1])


def _channels(p: Program, x: fx.Node) -> fx.Node:
    return p.call(aten.transpose.int, x, 1, 2)


LAYOUTS: dict[str, Callable[[Program, fx.Node], fx.Node]] = {
    "nbc": lambda p, x: p.call(aten.permute.default, x, [1, 0, 2]),
    "nb": lambda p, x: p.call(aten.permute.default, p.call(aten.select.int, x, 2, 0), [1, 0]),
    "(bn)c": lambda p, x: p.call(aten.reshape.default, x, [B * N, C]),
    "bnc": lambda p, x: x,
    "bn": lambda p, x: p.call(aten.select.int, x, 2, 0),
    "bnhd": _heads,
    "bnc2": lambda p, x: p.call(aten.reshape.default, x, [B, N, C // 2, 2]),
    "bcn": _channels,
    "bhnd": lambda p, x: p.call(aten.transpose.int, _heads(p, x), 1, 2),
    "bcn11": lambda p, x: p.call(aten.reshape.default, _channels(p, x), [B, C, N, 1, 1]),
    "bhdn": lambda p, x: p.call(aten.permute.default, _heads(p, x), [0, 2, 3, 1]),
    "bc1n": lambda p, x: p.call(aten.unsqueeze.default, _channels(p, x), 2),
    "bhwc": lambda p, x: p.call(aten.reshape.default, x, [B, ROWS, COLUMNS, C]),
    "bchw": lambda p, x: p.call(aten.reshape.default, _channels(p, x), [B, C, ROWS, COLUMNS]),
    "b(nc)": lambda p, x: p.call(aten.reshape.default, x, [B, N * C]),
    "prefix": _prefix,
    "ends": lambda p, x: p.call(aten.cat.default, [_prefix(p, x), p.place(made((B, 1, C), p.dtype, 6))], 1),
    "pairs": _pairs,
    "attention": lambda p, x: p.call(aten.softmax.int, _pairs(p, x), 2),
    "nc": lambda p, x: p.call(aten.select.int, x, 0, 0),
    "cn": lambda p, x: p.call(aten.permute.default, p.call(aten.select.int, x, 0, 0), [1, 0]),
    "n": lambda p, x: p.call(aten.select.int, p.call(aten.select.int, x, 0, 0), 1, 0),
}

# By the position of the token axis, layouts of several ranks; then those where it is not alone or not once there.
POSITIONS: dict[int | str, tuple[str, ...]] = {
    0: ("nbc", "(bn)c", "nb"),
    1: ("bnc", "bn", "bnhd", "bnc2"),
    2: ("bcn", "bhnd", "bcn11"),
    3: ("bhdn", "bc1n"),
    "grid": ("bhwc", "bchw"),
    "joined": ("b(nc)", "prefix", "ends"),
    "twice": ("pairs", "attention"),
    "one image": ("nc", "cn", "n"),
}


@cache
def program(dtype: torch.dtype, alike: bool, layout: str) -> Program:
    return Program(dtype, alike, layout)


# Dtypes in which calls are drawn: what takes none of them takes no tensor of ours.
DRAWN_IN = (torch.float64, torch.int64, torch.bool, torch.float32, torch.complex64)


def draw_forms(
    target: OpOverload, positions: Sequence[int | str], tries: int, dtypes: Sequence[torch.dtype] = DRAWN_IN
) -> Iterator[tuple[str, Form]]:
    """Different calls of an operator, each with the layout of its tokens; the same ones every time."""
    source = random.Random(f"{target} {positions} {dtypes}")
    layouts = [layout for position in positions for layout in POSITIONS[position]]
    seen: set[str] = set()
    for attempt in range(tries):
        layout, dtype = layouts[attempt % len(layouts)], dtypes[attempt // len(layouts) % len(dtypes)]
        if not exists(layout, dtype):
            continue
        base = program(dtype, True, layout)
        call = draw_call(target, [base.values[node] for node in base.given], source.choice)
        if call is not None and f"{layout} {call}" not in seen:
            seen.add(f"{layout} {call}")
            yield layout, Form(call, dtype)


def exists(layout: str, dtype: torch.dtype) -> bool:
    """Whether there are tokens of a dtype in a layout: weights of attention have a fraction."""
    return layout != "attention" or dtype.is_floating_point


@dataclass(frozen=True)
class Form:
    """A call that was drawn for tokens of one dtype."""

    call: OperatorCall
    dtype: torch.dtype

    def of(self, dtype: torch.dtype) -> OperatorCall:
        """The same for tokens of another: what the operator brings along in their dtype is in that one."""

        def change(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)(map(change, value))
            return replace(value, dtype=dtype) if isinstance(value, Made) and value.dtype is self.dtype else value

        return replace(
            self.call, args=change(self.call.args), kwargs={name: change(v) for name, v in self.call.kwargs.items()}
        )


def is_settled(call: OperatorCall) -> bool:
    """Whether the numbers of a call's result are the same every time."""
    return torch.Tag.nondeterministic_seeded not in call.target.tags and "empty" not in str(call.target)


# Relative to the largest entry, for one operator of a few hundred operands.
ROUNDING = {
    torch.float64: 1e-12,
    torch.complex128: 1e-12,
    torch.float32: 1e-5,
    torch.complex64: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}


def difference(got: Tensor, want: Tensor, dtype: torch.dtype, compare: bool = True) -> str | None:
    """What sets two results apart beyond rounding, of them or of their operands of ``dtype``."""
    if (got.shape, got.dtype) != (want.shape, want.dtype):
        return f"{got.dtype} {tuple(got.shape)} instead of {want.dtype} {tuple(want.shape)}"
    if not compare or torch.equal(got, want):
        return None
    tolerance = scale = 0.0
    if want.is_floating_point() or want.is_complex():
        tolerance = max(ROUNDING[want.dtype], ROUNDING.get(dtype, 0.0))
        finite = want[want.isfinite()].abs()
        scale = finite.amax().item() if finite.numel() else 0.0
    if torch.allclose(got, want, rtol=tolerance, atol=tolerance * scale, equal_nan=True):
        return None
    apart = ~torch.isclose(got, want, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
    few = got[apart][:3].tolist(), want[apart][:3].tolist()
    return f"{int(apart.sum())} of {apart.numel()} entries differ: {few[0]}, not {few[1]}"
