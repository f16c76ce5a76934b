"""One operator on fused tokens and on all their copies, run eagerly, with the axes, sizes and maps of a real rewrite."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx

from mctf_compile.kernels.pooling.aten import group
from mctf_compile.methods import get_method
from mctf_compile.passes.analysis.token_axes import token_axes
from mctf_compile.passes.axes import Tokens
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
    into = [[kept.index(row.index(row[i])) for i in gone] for row, kept, gone in zip(kinds, first, others)]
    keep, gone, into = map(torch.tensor, (first, others, into))
    ones = torch.ones(B, N, dtype=dtype if dtype is torch.float64 else torch.float32)
    index, weight, size = group(ones, ones, keep, gone, into)
    return Fusion(keep, gone, into, index, weight, size, 0, 0)


class Program:
    """A graph that grows from tokens [B, N, C] of which some are copies of others, with the values of its nodes."""

    def __init__(self, dtype: torch.dtype, kinds: list[list[int]]) -> None:
        self.dtype, self.kinds = dtype, kinds
        self.graph, self.values = fx.Graph(), {}
        self.fusion = fusion(kinds is ALIKE, dtype)
        own = made((B, len(set(kinds[0])), C), dtype, 11)
        self.tokens = self.place(own.gather(1, torch.tensor(kinds)[:, :, None].expand(-1, -1, C)))

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
            if size == N and self.kinds is ALIKE:
                value = value.index_select(dim, torch.tensor([ALIKE[0].index(kind) for kind in ALIKE[0]]))
            elif size % N == 0 or size in (ROWS, COLUMNS, N + 1, N + 2):
                value = value.narrow(dim, 0, 1).expand(value.shape)
        return self.place(value.contiguous())


LAYOUTS: dict[str, Callable[[Program], fx.Node]] = {
    "bnc": lambda p: p.tokens,
    "nbc": lambda p: p.call(aten.permute.default, p.tokens, [1, 0, 2]),
    "bcn": lambda p: p.call(aten.transpose.int, p.tokens, 1, 2),
    "bn": lambda p: p.call(aten.select.int, p.tokens, 2, 0),
    "bn1c": lambda p: p.call(aten.unsqueeze.default, p.tokens, 2),
    "bhnd": lambda p: p.call(aten.transpose.int, p.call(aten.reshape.default, p.tokens, [B, N, HEADS, -1]), 1, 2),
    "(bn)c": lambda p: p.call(aten.reshape.default, p.tokens, [B * N, C]),
    "b(nc)": lambda p: p.call(aten.reshape.default, p.tokens, [B, N * C]),
    "bhwc": lambda p: p.call(aten.reshape.default, p.tokens, [B, ROWS, COLUMNS, C]),
    "bchw": lambda p: p.call(aten.reshape.default, LAYOUTS["bcn"](p), [B, C, ROWS, COLUMNS]),
    "prefix": lambda p: p.call(aten.cat.default, [p.place(made((B, 1, C), p.dtype, 5)), p.tokens], 1),
    "ends": lambda p: p.call(aten.cat.default, [LAYOUTS["prefix"](p), p.place(made((B, 1, C), p.dtype, 6))], 1),
    "pairs": lambda p: p.call(
        aten.mul.Tensor,
        p.call(aten.select.int, LAYOUTS["bn1c"](p), 3, 0),
        p.call(aten.unsqueeze.default, p.call(aten.select.int, p.tokens, 2, 1), 1),
    ),
    "attention": lambda p: p.call(aten.softmax.int, LAYOUTS["pairs"](p), 2),
}


@dataclass
class Outcome:
    """What became of one operator: ``reason`` for which its tokens were given back, ``problem`` if it is wrong."""

    shown: str
    reason: str | None = None
    problem: str | None = None


@dataclass
class Outcomes:
    """Those of several calls of one operator."""

    found: list[Outcome] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        return [f"{o.shown}: {o.problem}" for o in self.found if o.problem]

    @property
    def fused(self) -> list[Outcome]:
        return [o for o in self.found if o.reason is None]


def try_call(target: Any, dtype: torch.dtype, source: random.Random, compare: bool = True) -> Outcome | None:
    """A call of an operator that is made up, in layouts that are; None where what was drawn does not fit together."""
    kinds = source.choice((ALIKE, APART))
    program = Program(dtype, kinds)
    layouts = [source.choice(list(LAYOUTS)) for _ in range(2)]
    if not (dtype.is_floating_point and target is not aten.embedding.default):
        layouts = [name if name != "attention" else "pairs" for name in layouts]
    given = [LAYOUTS[name](program) for name in layouts]
    given.append(program.call(aten.ne.Scalar, program.call(aten.to.dtype, given[0], torch.int64), 0))
    call = draw_call(target, [program.values[node] for node in given], source.choice)
    return None if call is None else run_call(program, call, given, f"{dtype} {' '.join(layouts)}", compare)


def run_call(program: Program, call: OperatorCall, given: list[fx.Node], where: str, compare: bool = True) -> Outcome:
    """Compare a call on fused tokens with the same on all of their copies."""
    outcome = Outcome(f"{where}: {call.program('xyz')}")
    args, kwargs = call.filled(given, program.make)
    node = program.call(call.target, *args, **kwargs)
    try:
        outcome.reason, results = evaluate(program, node)
    except Exception as error:
        outcome.problem = f"{type(error).__name__}: {error}"
        return outcome
    expected = program.values[node]
    expected = expected if isinstance(expected, (tuple, list)) else [expected]
    if len(results)!=len(expected): outcome.problem=f"LEN {len(results)} {len(expected)} {outcome.reason}"; return outcome
    for got, want in zip(results, expected, strict=True):
        outcome.problem = outcome.problem or difference(got, want, program.dtype, compare)
    return outcome


def evaluate(program: Program, node: fx.Node) -> tuple[str | None, list[Tensor]]:
    """The tensors of a node over the original tokens, from fused ones; why they were given back before it, if so."""
    program.graph.output(node)
    axes = token_axes(program.graph)
    batch, body, _ = axes.of(program.tokens)
    stream = Stream(Tokens(body, N, 0, 0, batch), [program.fusion])
    # A module would be made of the graph by writing and compiling its code.
    rewriter = Rewriter(SimpleNamespace(graph=program.graph), axes, Plan(get_method("mctf")(), []))
    kept = program.fusion.keep[:, :, None].expand(-1, -1, C)
    env: dict[fx.Node, Any] = {}
    for n in program.graph.nodes:
        if n is program.tokens:
            env[n] = Value(program.values[n].gather(1, kept), axes.of(n), stream, 1)
        elif n.op == "placeholder":
            env[n] = Value(program.values[n], axes.of(n))
        elif n.op == "call_function":
            env[n] = rewriter.evaluate(n, env)
    reason = next((u.reason for u in rewriter.unmerges if u.node is node), None)
    results = env[node] if isinstance(env[node], list) else [env[node]]
    return reason, [rewriter._plain(value) for value in results]


# Relative to the largest entry, for one operator of a few hundred operands.
ROUNDING = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.complex64: 1e-5,
    torch.complex128: 1e-12,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}


def difference(got: Tensor, want: Tensor, dtype: torch.dtype, compare: bool) -> str | None:
    """What sets two results apart beyond rounding, of them or of their operands of ``dtype``."""
    if (got.shape, got.dtype) != (want.shape, want.dtype):
        return f"{got.dtype} {tuple(got.shape)} instead of {want.dtype} {tuple(want.shape)}"
    if not compare:
        return None
    tolerance = scale = 0.0
    if want.is_floating_point() or want.is_complex():
        tolerance = max(ROUNDING[want.dtype], ROUNDING.get(dtype, 0.0))
        scale = want[want.isfinite()].abs().amax().item() if want.isfinite().any() else 0.0
    try:
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
    except AssertionError as error:
        return str(error).replace("\n", " ")
    return None
