"""Programs that grow from the rule table: every operator is among them, and they are what they seem."""

import random
from collections import Counter

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from mctf_compile import backend
from mctf_compile.errors import PassError
from mctf_compile.inner import lowering
from mctf_compile.passes.analysis import normalize
from mctf_compile.testing.graphs import GraphCase
from mctf_compile.testing.growing import Grower, Rejected
from mctf_compile.testing.moves import NOT_CAPTURED, Builder, copies_apart, drawn_operators
from mctf_compile.testing.operators import made
from mctf_compile.testing.programs import Held, Kinds, Ref
from mctf_compile.testing.soundness import distance
from mctf_compile.testing.spellings import (
    BROADCASTING,
    PACKS,
    PADDINGS,
    PAIRS,
    SPELLINGS,
    SYMMETRIC,
    grouped,
    sdpa,
)

aten = torch.ops.aten


def builders(seeds, *features):
    for seed in seeds:
        builder = Builder(random.Random(seed).choice, *features)
        builder.grow()
        yield builder


def values(builder):
    """Tensors of several ranks and dtypes to draw operators on."""
    g, n = builder.g, builder.g.kinds.total
    x = g.given("x", (2, n, 8), torch.float32)
    image = g(aten.reshape.default, g(aten.transpose.int, x, 1, 2), [2, 8, 6, 3])
    mask = g(aten.gt.Scalar, x, 0)
    whole = g(aten.to.dtype, mask, torch.int64)
    matrix, vector = g(aten.select.int, x, 0, 0), g(aten.select.int, g(aten.select.int, x, 0, 0), 1, 0)
    heads = g(aten.reshape.default, x, [2, n, 4, 2])
    pairs = g(aten.view_as_complex.default, heads)
    square = g(aten.bmm.default, x, g(aten.transpose.int, x, 1, 2))
    frames, chances = g(aten.reshape.default, x, [2, 8, 3, 3, 2]), g(aten.sigmoid.default, x)
    return [x, image, mask, whole, matrix, vector, heads, pairs, square, frames, chances, g(aten.sum.default, x)]


@pytest.fixture(scope="module")
def drawn():
    """How often each operator was drawn, in programs that try them one by one."""
    builder = Builder(random.Random(0).choice, ("operators", "integers"))
    builder.g = Grower(random.Random(0).choice, Kinds((0, 1, 2) * 6), False)
    start = values(builder)
    count = Counter()
    for target in drawn_operators():
        for _ in range(2000):
            lines = len(builder.g.lines)
            builder.pool = list(start)
            with builder._attempt():
                builder._apply(target, start)
            count[target] += any(line.target is target for line in builder.g.lines[lines:])
            if count[target]:
                break
    return count


def test_every_operator_with_a_rule_is_drawn(drawn):
    assert len(drawn) > 300
    # It takes int8 alone, which no value here is.
    assert {str(target) for target, times in drawn.items() if not times} == {"aten._int_mm.default"}


def test_what_is_left_out_cannot_be_part_of_a_graph():
    x, number = torch.ones(4), torch.tensor(1)
    calls = {
        aten.where.default: (x,),
        aten.equal.default: (x, x),
        aten.repeat_interleave.Tensor: (number[None],),
        aten.repeat_interleave.self_Tensor: (x, number[None]),
        aten.narrow.Tensor: (x, 0, number, 1),
        aten.tensor_split.tensor_indices_or_sections: (x, number),
    }
    assert set(calls) == NOT_CAPTURED
    with FakeTensorMode() as mode:
        for target, args in calls.items():
            fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
            with pytest.raises((DataDependentOutputException, DynamicOutputShapeException, RuntimeError)):
                target(*fakes)


def test_a_program_is_the_same_as_source_and_as_a_graph():
    for builder in builders(range(8)):
        program = builder.program()
        with torch.set_grad_enabled(program.gradients):
            module, inputs = program.make()
            expected = module(*[x.clone() for x in inputs])
            got = fx.Interpreter(program.graph(module)).run(*[x.clone() for x in inputs])
            graph, held = program.graph(module, as_inputs=True), program.held_by(module)
            lifted = fx.Interpreter(graph).run(*[x.clone() for x in inputs], *held)
        assert len(expected) == len(program.outputs) == len(got) == len(lifted)
        assert all(node.op != "get_attr" for node in graph.graph.nodes)
        for name, a, b, c in zip(program.outputs, expected, got, lifted):
            assert distance(a, b) == 0.0 == distance(a, c) and a.dtype == b.dtype == c.dtype, name
            assert distance(builder.g.value(name), a) <= program.tolerance, name


def test_copies_stay_copies_in_every_stream():
    for builder in builders(range(8, 16)):
        for stream in builder.streams:
            builder._check_tokens(stream.ref)


def test_copies_that_are_told_apart_are_rejected():
    kinds = (0, 1, 0, 1)
    x = torch.randn(2, 2, 5)[:, list(kinds)]
    copies_apart(x, kinds)
    with pytest.raises(Rejected, match="told apart"):
        copies_apart(x + torch.arange(4)[:, None], kinds)
    with pytest.raises(Rejected, match="nearly copies"):
        copies_apart(torch.ones(2, 4, 5), kinds)


def test_a_value_that_rounding_decides_over_is_rejected():
    g = Grower(random.Random(0).choice, Kinds((0, 1, 2)), False)
    x = g.given("x", (2, 3, 4), torch.float32)
    residue = g(aten.sub.Tensor, g(aten.mul.Scalar, x, 3.0), g(aten.mul.Scalar, x, 3.0))
    with g.attempt():
        g(aten.layer_norm.default, residue, [4], None, None, 0.0)
    with g.attempt():
        g(aten.sign.default, residue)
    assert [str(step.target) for step in g.program().steps] == ["aten.mul.Scalar"] * 2 + ["aten.sub.Tensor"]


def printed(grower, way):
    """Runs what a case prints, as a program."""
    source = GraphCase(grower.program(), {"method": "tome", "r": 2, "min_tokens": 1}, way).program()
    exec(compile(source, "<printed>", "exec"), {"__name__": "__main__"})


@pytest.fixture
def block():
    """A program of one block, whose residual stream it returns."""
    g = Grower(random.Random(0).choice, Kinds((0, 1) * 6), False)
    x = g.given("x", (2, 12, 8), torch.float32)
    heads = g(aten.transpose.int, g(aten.view.default, x, [2, 12, 2, 4]), 1, 2)
    attended = g(aten.transpose.int, g(sdpa, heads, heads, heads), 1, 2)
    x = g(aten.add.Tensor, x, g(aten.reshape.default, attended, [2, 12, 8]))
    g(aten.add.Tensor, x, g(aten.gelu.default, g(aten.linear.default, x, g.hold((8, 8), torch.float32))))
    return g


@pytest.mark.parametrize("way", ["graph", "compiled", "rounding", "spelling", "tables"])
def test_what_a_case_prints_checks_what_the_case_does(way, block):
    printed(block, way)


@pytest.mark.parametrize("r", [0, 2])
def test_a_printed_program_fails_where_the_backend_returns_something_else(r, block, monkeypatch):
    def wrong(gm, inputs):
        return lambda *args: [2 * x for x in gm(*args)]

    def inner(config):
        return wrong if config.method.r == r else lambda gm, inputs: gm.forward

    monkeypatch.setattr(lowering, "inner_compiler", inner)
    monkeypatch.setattr(backend, "inner_compiler", inner)
    with pytest.raises(AssertionError, match=f"compiled with r={r}, the output is another"):
        printed(block, "compiled")


def test_tokens_of_one_kind_are_held_alike():
    g = Grower(random.Random(0).choice, Kinds((5, 0, 1, 0, 6), 1, 1), False)
    table, body = g.value(g.hold((5, 5), torch.float32)), g.value(g.hold((2, 3), torch.float32))
    assert torch.equal(table[1], table[3]) and torch.equal(table[:, 1], table[:, 3])
    assert torch.equal(body[:, 0], body[:, 2]) and not torch.equal(body[:, 0], body[:, 1])


def test_what_pytorch_does_not_trace_is_no_fault_of_a_pass(monkeypatch):
    """``channel_shuffle`` has other strides on tensors without data."""
    g = Grower(random.Random(0).choice, Kinds((0, 1) * 8), False)
    x = g.given("x", (2, 16, 8), torch.float32)
    maps = g(aten.reshape.default, g(aten.transpose.int, x, 1, 2), [2, 8, 4, 4])
    tokens = g(aten.transpose.int, g(aten.flatten.using_ints, g(aten.channel_shuffle.default, maps, 2), 2), 1, 2)
    g(aten.view.default, g(aten.permute.default, tokens, [2, 0, 1]), [8, 32])
    report = GraphCase(g.program(), {"r": 2}).check().report
    assert not report.fused
    assert (report.reason or "").startswith("PyTorch does not trace the program: pass normalize failed")

    def failing(*args):
        raise ValueError("out of order")

    monkeypatch.setattr(normalize, "canonicalize", failing)
    g = Grower(random.Random(0).choice, Kinds((0, 1) * 8), False)
    g(aten.relu.default, g.given("x", (2, 16, 8), torch.float32))
    with pytest.raises(PassError, match="out of order"):
        GraphCase(g.program(), {"r": 2}).check()


def test_a_tensor_apart_is_another_for_each_token():
    kinds, held = Kinds((0, 1, 0, 1)), Held(Ref("valid"), (2, 4), torch.float32, 7, apart=True)
    x = held.tensor(kinds)
    assert len(x.unique()) == 8
    assert torch.equal(eval(held.code(kinds), {"made": made, "torch": torch, "KINDS": torch.tensor(kinds.of)}), x)


def qkv(heads=2):
    return [torch.randn(2, h, 6, 4, generator=torch.Generator().manual_seed(h)) for h in (2, heads, heads)]


LENGTHS = [2, 3, 1]
KEYS = torch.tensor([[1, 1, 0, 1, 1, 0], [1, 0, 1, 1, 1, 1]]).bool()[:, None, None]


@pytest.mark.parametrize("mask", [*PADDINGS, *SYMMETRIC, *PACKS, *PAIRS], ids=lambda f: f.__name__)
def test_every_spelling_means_the_same(mask):
    """To queries that take part; what others see is up to the operator."""
    q, k, v = qkv()
    image = torch.tensor([0, 0, 1, 1, 1, 2])
    given, seen = KEYS, KEYS
    if mask in PACKS:
        given, seen = LENGTHS, image[:, None] == image
    elif mask in PAIRS:
        given, seen = 6, ~torch.eye(6).bool()
    bias = mask(given, torch.float32)
    rows = KEYS[:, 0, 0] if mask in SYMMETRIC else torch.ones(2, 6).bool()
    expected = (q @ k.mT / 2).masked_fill(~seen, -float("inf")).softmax(-1) @ v
    for attend in SPELLINGS:
        got = attend(q, k, v, bias)
        torch.testing.assert_close(got.transpose(1, 2)[rows], expected.transpose(1, 2)[rows])


@pytest.mark.parametrize("attend", [*BROADCASTING, grouped], ids=lambda f: f.__name__)
def test_one_head_of_keys_serves_all_queries(attend):
    q, k, v = qkv(1)
    torch.testing.assert_close(attend(q, k, v), sdpa(q, k.expand_as(q), v.expand_as(q)))


class Eager(Builder):
    """A builder of programs that have all of their features, however rare these are."""

    def __init__(self, seed, features):
        chance = random.Random(seed).choice
        super().__init__(lambda options: (len(options) > 2 and options[-1] is True) or chance(options), features)
        self.grow()

    def has(self, feature, percent):
        return feature in self.features


@pytest.mark.parametrize(
    "feature, drawn",
    [
        ("padding", {*PADDINGS[1:], *SYMMETRIC, *SPELLINGS}),
        ("packed", {*PACKS}),
        ("pairs", {*PAIRS}),
        ("grouped", {grouped}),
    ],
    ids=["padding", "packed", "pairs", "grouped"],
)
def test_every_spelling_is_drawn(feature, drawn):
    seen = set()
    for seed in range(100):
        seen |= {line.target for line in Eager(seed, (feature,)).program().steps}
        if drawn <= seen:
            break
    assert drawn <= seen


def test_joint_attention_changes_text_and_image():
    builder = next(b for b in map(lambda seed: Eager(seed, ("joint",)), range(9)) if b.text != Ref("text"))
    module, (x, text) = builder.program().make()
    (image, words), (other, _) = module(x, text)[:2], module(x, text.roll(1, 0))[:2]
    assert image.shape == x.shape and words.shape == text.shape
    assert distance(image, other) > 1e-3
