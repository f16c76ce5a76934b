"""Every operator against its plain reference in float64, and against what it promises."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mctf_compile  # noqa: F401  registers torch.ops.mctf
from mctf_compile.kernels.ahead import reference as ahead_reference
from mctf_compile.kernels.attention import reference as attention_reference
from mctf_compile.kernels.library import ShapesAlone
from mctf_compile.kernels.matching import reference as matching_reference
from mctf_compile.kernels.pooling import reference as pooling_reference
from mctf_compile.kernels.selection import reference as selection_reference
from mctf_compile.kernels.unmerge import reference as unmerge_reference

ops = torch.ops.mctf
Matching = tuple[Tensor, Tensor, Tensor]

DTYPES = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in (torch.float64, torch.float32, torch.bfloat16)]
# One bfloat16 rounding is 2**-9 of a value; products and logits go through several.
CLOSE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 3e-2, "atol": 2e-2},
}
# (tokens, lead, tail): odd and even, one and two tokens, a ViT's 197, every kind of protection.
LAYOUTS = [(2, 0, 0), (2, 1, 0), (5, 5, 0), (9, 5, 2), (16, 2, 0), (17, 1, 0), (17, 0, 2), (197, 1, 0)]
layouts = pytest.mark.parametrize(
    ("n", "lead", "tail"), [pytest.param(*c, id=f"N{c[0]}-lead{c[1]}-tail{c[2]}") for c in LAYOUTS]
)
directions = pytest.mark.parametrize("bidirectional", [True, False], ids=["two-way", "one-way"])
dtypes = pytest.mark.parametrize("dtype", DTYPES)
pooled = pytest.mark.parametrize("maximum", [False, True], ids=["weighted", "maximum"])
examples = settings(max_examples=80, deadline=None, derandomize=True)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def positive(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Values from 0.1 to 1.1."""
    return 0.1 + torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype = torch.float64) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), **CLOSE[dtype])


def strided(x: Tensor) -> Tensor:
    """Equal to ``x``, with every stride doubled and the dimensions laid out backwards."""
    reverse = list(range(x.dim()))[::-1]
    out = x.new_full([2 * s for s in x.shape[::-1]], float("nan"))[(slice(None, None, 2),) * x.dim()]
    return out.copy_(x.permute(reverse)).permute(reverse)


def most(n: int, lead: int, tail: int) -> int:
    """The largest r."""
    return (n - lead - tail) // 2


def some_matching(n: int, lead: int = 0, tail: int = 0, r: int | None = None, bidirectional: bool = True) -> Matching:
    """A matching of two images of random tokens, by the reference; ``r`` is maximal unless given."""
    r = most(n, lead, tail) if r is None else r
    return matching_reference.match(
        randn(2, n, 6, seed=n + r), None, torch.ones(2, n), r, lead, tail, 1.0, 0.0, 0.0, bidirectional
    )


def identity(n: int) -> tuple[Tensor, Matching]:
    """The map and the matching that fuse nothing."""
    keep = torch.arange(n).expand(2, -1)
    return keep, (keep, keep[:, :0], keep[:, :0])


def attention_map(*inputs: Any) -> Tensor:
    """A [B, H, N, N], read off ``importance`` and ``ahead`` with values and a map that are the identity."""
    _, *state = ops.importance(*inputs)
    heads, n, dtype = *inputs[0].shape[1:3], inputs[0].dtype
    index, matching = identity(n)
    eye = torch.eye(n, dtype=dtype).expand(2, heads, -1, -1)
    return ops.ahead(*state, eye, index, torch.ones(2, n, dtype=dtype), *matching, 0.0)


@dataclass(frozen=True)
class Problem:
    """The arguments of ``match`` apart from the tokens."""

    n: int
    r: int
    lead: int
    tail: int
    taus: tuple[float, float, float]
    bidirectional: bool

    def solve(self, x: Tensor, importance: Tensor | None, size: Tensor) -> Matching:
        return ops.match(x, importance, size, self.r, self.lead, self.tail, *self.taus, self.bidirectional)

    def expected(self, x: Tensor, importance: Tensor | None, size: Tensor) -> Matching:
        wide = None if importance is None else importance.double()
        return matching_reference.match(
            x.double(), wide, size.double(), self.r, self.lead, self.tail, *self.taus, self.bidirectional
        )


TAUS = ((0.0, 0.5, 1.0, 2.0), (0.0, 1.0, 20.0), (0.0, 1.0, 40.0))


@st.composite
def problems(draw: st.DrawFn, taus: tuple[tuple[float, ...], ...] = TAUS) -> Problem:
    n = draw(st.integers(2, 19))
    lead = draw(st.sampled_from([lead for lead in (0, 1, 2, 5) if lead <= n]))
    tail = draw(st.sampled_from([tail for tail in (0, 2) if lead + tail <= n]))
    r = draw(st.integers(0, most(n, lead, tail)))
    return Problem(n, r, lead, tail, tuple(draw(st.sampled_from(t)) for t in taus), draw(st.booleans()))


def same(actual: Matching, expected: Matching) -> None:
    for name, a, e in zip(("keep", "gone", "into"), actual, expected):
        assert a.dtype == torch.long
        assert a.tolist() == e.tolist(), name


@examples
@given(problem=problems(), informed=st.booleans(), seed=st.integers(0, 2**20))
def test_match_is_the_reference(problem: Problem, informed: bool, seed: int) -> None:
    x = randn(2, problem.n, 5, seed=seed)
    importance = positive(2, problem.n, seed=seed + 1) if informed else None
    size = 1 + 3 * positive(2, problem.n, seed=seed + 2)
    same(problem.solve(x, importance, size), problem.expected(x, importance, size))


@directions
@layouts
@dtypes
def test_match_is_the_reference_with_most_removed(
    dtype: torch.dtype, n: int, lead: int, tail: int, bidirectional: bool
) -> None:
    problem = Problem(n, most(n, lead, tail), lead, tail, (1.0, 20.0, 40.0), bidirectional)
    wide = torch.promote_types(dtype, torch.float32)
    inputs = randn(2, n, 24, dtype=dtype), positive(2, n, seed=1, dtype=wide), 1 + positive(2, n, seed=2, dtype=wide)
    same(problem.solve(*inputs), problem.expected(*inputs))


# Importances are near 1/N; N ** (2/tau) does not fit float32, ratios of importances do.
@pytest.mark.parametrize(("n", "tau_info"), [(17, 0.06), (197, 0.1)], ids=["N17-tau0.06", "N197-tau0.1"])
def test_match_stands_low_temperatures(n: int, tau_info: float) -> None:
    problem = Problem(n, most(n, 1, 0), 1, 0, (1.0, tau_info, 40.0), True)
    received = 0.5 + positive(2, n, dtype=torch.float32)
    inputs = randn(2, n, 24, dtype=torch.float32), received / received.sum(1, keepdim=True), torch.ones(2, n)
    same(problem.solve(*inputs), problem.expected(*inputs))


@directions
@pytest.mark.parametrize("lead", [0, 1])
def test_match_of_one_token_keeps_it(lead: int, bidirectional: bool) -> None:
    problem = Problem(1, 0, lead, 0, (1.0, 20.0, 40.0), bidirectional)
    inputs = randn(2, 1, 4), positive(2, 1), torch.ones(2, 1)
    same(problem.solve(*inputs), problem.expected(*inputs))


# Scores of these tokens are exact in every order of summation: the cosines are -1, 0 or 1.
@examples
@given(data=st.data(), problem=problems(taus=((0.0, 1.0),) * 3))
def test_match_breaks_ties_to_the_lower_position(data: st.DataObject, problem: Problem) -> None:
    alphabet = torch.tensor([[0, 0, 0], [1, 0, 0], [-1, 0, 0], [4, 0, 0], [0, 2, 0], [0, 0, -0.5]])
    tokens = st.lists(st.integers(0, 5), min_size=2 * problem.n, max_size=2 * problem.n)
    powers = st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=2 * problem.n, max_size=2 * problem.n)
    x = alphabet[data.draw(tokens)].reshape(2, problem.n, 3)
    importance, size = (torch.tensor(data.draw(powers)).reshape(2, problem.n) for _ in range(2))
    same(problem.solve(x, importance, size), problem.expected(x, importance, size))


@directions
@pytest.mark.parametrize("lead", [0, 1])
@pytest.mark.parametrize("n", [3, 9, 16, 64])
def test_match_of_equal_tokens_takes_the_first(n: int, lead: int, bidirectional: bool) -> None:
    problem = Problem(n, most(n, lead, 0), lead, 0, (1.0, 20.0, 40.0), bidirectional)
    x = randn(1, 1, 48, dtype=torch.float32).expand(2, n, -1)
    keep, gone, into = problem.solve(x, torch.full((2, n), 1 / n), torch.ones(2, n))
    same((keep, gone, into), problem.expected(x, torch.full((2, n), 1 / n), torch.ones(2, n)))
    assert keep[:, into[0, 0]].unique().numel() == 1
    evens = [i for i in range(0, n, 2) if i >= lead]
    leaving = problem.r // 2 if bidirectional else problem.r
    assert gone[0, :leaving].tolist() == evens[:leaving]


@examples
@given(problem=problems(), seed=st.integers(0, 2**20))
def test_match_partitions_the_tokens(problem: Problem, seed: int) -> None:
    n, last = problem.n, problem.n - problem.tail
    keep, gone, into = problem.solve(randn(3, n, 4, seed=seed), positive(3, n, seed=seed), torch.ones(3, n))
    assert (keep.shape, gone.shape, into.shape) == ((3, n - problem.r), (3, problem.r), (3, problem.r))
    for kept, left, went in zip(keep.tolist(), gone.tolist(), into.tolist()):
        assert sorted(kept + left) == list(range(n))
        assert kept[: problem.lead] == list(range(problem.lead))
        assert kept[len(kept) - problem.tail :] == list(range(last, n))
        assert all(problem.lead <= position < last for position in left)
        assert all(problem.lead <= kept[new] < last for new in went)


def test_match_reads_strided_inputs() -> None:
    problem = Problem(17, 8, 1, 0, (1.0, 20.0, 40.0), True)
    inputs = randn(2, 17, 8), positive(2, 17), 1 + positive(2, 17, seed=1)
    same(problem.solve(*map(strided, inputs)), problem.solve(*inputs))


def test_match_ignores_autocast() -> None:
    problem = Problem(64, 31, 1, 0, (1.0, 20.0, 40.0), True)
    inputs = randn(2, 64, 48, dtype=torch.float32), positive(2, 64), torch.ones(2, 64)
    with torch.autocast("cpu", torch.bfloat16):
        inside = problem.solve(*inputs)
    same(inside, problem.solve(*inputs))


@pytest.mark.parametrize(
    ("n", "lead", "tail", "r"), [(9, 0, 0, 5), (9, 1, 0, 5), (9, 5, 2, 2), (4, 2, 2, 1), (9, 0, 0, -1)]
)
def test_match_refuses_r_out_of_range(n: int, lead: int, tail: int, r: int) -> None:
    problem = Problem(n, r, lead, tail, (1.0, 20.0, 40.0), True)
    with pytest.raises(RuntimeError, match=f"r={r} of {n} tokens is out of range"):
        problem.solve(randn(2, n, 4), None, torch.ones(2, n))


@pytest.mark.parametrize("name", ["importance", "size", "kind"])
def test_match_refuses_operands_of_other_tokens(name: str) -> None:
    """Evidence over the keys of attention is not evidence over a residual stream that has other tokens."""
    operands = {"importance": torch.rand(2, 12), "size": torch.ones(2, 12), "kind": torch.zeros(2, 12)}
    operands[name] = torch.ones(2, 15)
    x = torch.randn(2, 12, 8)
    for on in (x, x.to("meta")):
        given = {key: value.to(on.device) for key, value in operands.items()}
        with pytest.raises(RuntimeError, match=rf"{name} \[2, 15\] is not of the tokens of x \[2, 12, 8\]"):
            ops.match(on, given["importance"], given["size"], 3, 1, 0, 1.0, 20.0, 40.0, True, given["kind"])


@directions
@layouts
def test_group_is_the_reference(n: int, lead: int, tail: int, bidirectional: bool) -> None:
    matching = some_matching(n, lead, tail, bidirectional=bidirectional)
    raw, size = positive(2, n), torch.arange(1.0, 2 * n + 1).reshape(2, n)
    index, weight, sizes = ops.group(raw, size, *matching)
    expected_index, expected_weight, expected_sizes = pooling_reference.group(raw, size, *matching)
    assert torch.equal(index, expected_index)
    close(weight, expected_weight)
    assert torch.equal(sizes, expected_sizes)


@directions
@layouts
def test_group_conserves_size_and_weight(n: int, lead: int, tail: int, bidirectional: bool) -> None:
    matching = some_matching(n, lead, tail, bidirectional=bidirectional)
    size = 1 + positive(2, n)
    index, weight, sizes = ops.group(positive(2, n, seed=1), size, *matching)
    close(sizes.sum(1), size.sum(1))
    close(torch.zeros_like(sizes).scatter_add(1, index, weight), torch.ones_like(sizes))


def test_group_reads_strided_inputs() -> None:
    matching = some_matching(17, 1)
    inputs = positive(2, 17), 1 + positive(2, 17, seed=1)
    for a, b in zip(ops.group(*map(strided, inputs), *matching), ops.group(*inputs, *matching)):
        assert torch.equal(a, b)


SHAPES = {"BN": ((2, 17), 1), "BNC": ((2, 17, 6), 1), "BHND": ((2, 3, 17, 4), 2), "BHNN": ((2, 3, 17, 17), 3)}
shapes = pytest.mark.parametrize(("shape", "dim"), SHAPES.values(), ids=SHAPES)


def some_weight(matching: Matching, maximum: bool, dtype: torch.dtype) -> Tensor | None:
    n = matching[0].shape[1] + matching[1].shape[1]
    raw = positive(2, n, seed=3, dtype=torch.promote_types(dtype, torch.float32))
    return None if maximum else pooling_reference.group(raw, raw, *matching)[1]


@pooled
@shapes
@dtypes
def test_pool_is_the_reference(dtype: torch.dtype, shape: tuple[int, ...], dim: int, maximum: bool) -> None:
    matching = some_matching(17, 1)
    x, weight = randn(*shape, dtype=dtype), some_weight(matching, maximum, dtype)
    y = ops.pool(x, weight, *matching, dim)
    assert y.dtype == dtype
    close(y, pooling_reference.pool(x.double(), weight, *matching, dim), dtype)


@pooled
@directions
@layouts
def test_pool_is_the_reference_with_most_removed(
    n: int, lead: int, tail: int, bidirectional: bool, maximum: bool
) -> None:
    matching = some_matching(n, lead, tail, bidirectional=bidirectional)
    x, weight = randn(2, n, 3), some_weight(matching, maximum, torch.float64)
    close(ops.pool(x, weight, *matching, 1), pooling_reference.pool(x, weight, *matching, 1))


@pooled
@shapes
def test_pool_reads_strided_inputs(shape: tuple[int, ...], dim: int, maximum: bool) -> None:
    matching = some_matching(17, 1)
    x, weight = randn(*shape), some_weight(matching, maximum, torch.float64)
    y = ops.pool(strided(x), None if maximum else strided(weight), *matching, dim)
    close(y, ops.pool(x, weight, *matching, dim))


def test_pool_rounds_bfloat16_once() -> None:
    matching = some_matching(65, 1)
    x, weight = randn(2, 65, 48, dtype=torch.bfloat16), some_weight(matching, False, torch.float32)
    y = ops.pool(x, weight, *matching, 1)
    assert torch.equal(y, ops.pool(x.float(), weight, *matching, 1).bfloat16())


@pooled
def test_pool_of_nothing_removed_only_reorders(maximum: bool) -> None:
    matching = some_matching(9, r=0)
    x, weight = randn(2, 9, 3), some_weight(matching, maximum, torch.float64)
    assert torch.equal(ops.pool(x, weight, *matching, 1), torch.stack([x[b, matching[0][b]] for b in range(2)]))


@shapes
@dtypes
def test_unmerge_is_the_reference(dtype: torch.dtype, shape: tuple[int, ...], dim: int) -> None:
    y = randn(*shape, dtype=dtype)
    index = torch.randint(17, (2, 23), generator=torch.Generator().manual_seed(0))
    expected = unmerge_reference.unmerge(y, index, dim)
    assert torch.equal(ops.unmerge(y, index, dim), expected)
    assert torch.equal(ops.unmerge(strided(y), index.t().contiguous().t(), dim), expected)


def qkv(nq: int, nk: int, dtype: torch.dtype = torch.float64, heads: int = 3, dim: int = 8) -> tuple[Tensor, ...]:
    return tuple(randn(2, heads, n, dim, seed=i, dtype=dtype) for i, n in enumerate((nq, nk, nk)))


BIASES = {"none": None, "full": (2, 3, 17, 17), "heads": (1, 3, 17, 17), "keys": (2, 1, 1, 17), "plain": (17, 17)}
biases = pytest.mark.parametrize("bias", BIASES.values(), ids=[f"bias-{name}" for name in BIASES])
sizes = pytest.mark.parametrize("sized", [False, True], ids=["sizes-one", "sized"])


def logits_of(
    bias: tuple[int, ...] | None, sized: bool, n: int, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """log_size and bias."""
    wide = torch.promote_types(dtype, torch.float32)
    log_size = (1 + 3 * positive(2, n, dtype=wide)).log() if sized else None
    return log_size, None if bias is None else randn(*bias, seed=9, dtype=dtype)


@sizes
@biases
@dtypes
def test_attention_is_the_reference(dtype: torch.dtype, bias: tuple[int, ...] | None, sized: bool) -> None:
    q, k, v = qkv(17, 17, dtype)
    extra = logits_of(bias, sized, 17, dtype)
    out = ops.attention(q, k, v, *extra, 0.3, 0.0)
    assert out.dtype == dtype
    close(out, attention_reference.attention(q.double(), k.double(), v.double(), *extra, 0.3), dtype)


@pytest.mark.parametrize(("nq", "nk"), [(1, 1), (1, 17), (17, 2), (16, 197)], ids=lambda n: f"N{n}")
def test_attention_takes_any_number_of_tokens(nq: int, nk: int) -> None:
    q, k, v = qkv(nq, nk)
    log_size, _ = logits_of(None, True, nk, torch.float64)
    out = ops.attention(q, k, v, log_size, None, 0.3, 0.0)
    close(out, attention_reference.attention(q, k, v, log_size, None, 0.3))


def test_attention_counts_a_key_as_often_as_its_size() -> None:
    q, k, v = qkv(5, 4)
    size = torch.tensor([1, 3, 2, 1])
    repeated = ops.attention(q, k.repeat_interleave(size, 2), v.repeat_interleave(size, 2), None, None, 0.3, 0.0)
    close(ops.attention(q, k, v, size.double().log().expand(2, -1), None, 0.3, 0.0), repeated)


def test_attention_reads_strided_inputs() -> None:
    inputs = (*qkv(17, 17), *logits_of((2, 3, 17, 17), True, 17, torch.float64))
    close(ops.attention(*map(strided, inputs), 0.3, 0.0), ops.attention(*inputs, 0.3, 0.0))


def drops_half(out: Tensor, a: Tensor) -> None:
    """``out`` are the attention weights ``a`` with about half of them dropped and the others doubled."""
    dropped = out == 0
    assert 0.3 < dropped.double().mean() < 0.7
    close(out, torch.where(dropped, 0.0, 2 * a))


def test_attention_drops_weights() -> None:
    q, k, _ = qkv(17, 17)
    eye = torch.eye(17, dtype=torch.float64).expand(2, 3, -1, -1)
    torch.manual_seed(0)
    drops_half(ops.attention(q, k, eye, None, None, 0.3, 0.5), attention_reference.probabilities(q, k, None, None, 0.3))


@sizes
@biases
@dtypes
def test_importance_is_the_reference(dtype: torch.dtype, bias: tuple[int, ...] | None, sized: bool) -> None:
    q, k, _ = qkv(17, 17, dtype)
    extra = logits_of(bias, sized, 17, dtype)
    importance = ops.importance(q, k, *extra, 0.3)[0]
    assert importance.dtype == torch.promote_types(dtype, torch.float32)
    expected = attention_reference.importance(q.double(), k.double(), *extra, 0.3)
    # A mean over 51 rows: a tenth of the tolerance of one weight.
    torch.testing.assert_close(importance.double(), expected, rtol=CLOSE[dtype]["rtol"], atol=CLOSE[dtype]["atol"] / 10)
    torch.testing.assert_close(importance.sum(1), torch.ones(2, dtype=importance.dtype), rtol=0, atol=1e-5)


@sizes
@biases
@dtypes
def test_importance_keeps_the_attention_map(dtype: torch.dtype, bias: tuple[int, ...] | None, sized: bool) -> None:
    q, k, _ = qkv(17, 17, dtype)
    extra = logits_of(bias, sized, 17, dtype)
    expected = attention_reference.probabilities(q.double(), k.double(), *extra, 0.3)
    close(attention_map(q, k, *extra, 0.3), expected, dtype)


@pytest.mark.parametrize("n", [1, 2, 197], ids=lambda n: f"N{n}")
def test_importance_takes_any_number_of_tokens(n: int) -> None:
    q, k, _ = qkv(n, n)
    close(ops.importance(q, k, None, None, 0.3)[0], attention_reference.importance(q, k, None, None, 0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_importance_stands_large_logits(dtype: torch.dtype) -> None:
    q, k = torch.zeros(2, 1, 3, 2, dtype=dtype), torch.zeros(2, 1, 3, 2, dtype=dtype)
    q[..., 0], k[..., 1, 0] = 64, 64
    expected = torch.tensor([0.0, 1.0, 0.0]).expand(2, -1)
    assert torch.equal(ops.importance(q, k, None, None, 1.0)[0], expected)
    assert torch.equal(attention_map(q, -k, None, None, 1.0)[0, 0, 0].float(), torch.tensor([0.5, 0.0, 0.5]))


def test_importance_of_a_masked_key_is_zero() -> None:
    q, k, _ = qkv(9, 9)
    bias = torch.zeros(1, 1, 1, 9, dtype=torch.float64)
    bias[..., 4] = -math.inf
    importance = ops.importance(q, k, None, bias, 0.3)[0]
    assert (importance[:, 4] == 0).all()
    close(importance, attention_reference.importance(q, k, None, bias, 0.3))


def test_importance_reads_strided_inputs() -> None:
    inputs = (*qkv(17, 17)[:2], *logits_of((2, 3, 17, 17), True, 17, torch.float64))
    close(ops.importance(*map(strided, inputs), 0.3)[0], ops.importance(*inputs, 0.3)[0])


def ahead(q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, matching: Matching) -> Tensor:
    """``importance`` and ``ahead`` together; ``q`` and ``k`` of the tokens before the fusion, ``v`` after."""
    _, *state = ops.importance(q, k, None, None, 0.3)
    index = pooling_reference.assignment(*matching).argmax(1)
    return ops.ahead(*state, v, index, weight, *matching, 0.0)


@pooled
@directions
@layouts
def test_ahead_is_the_pooled_map(n: int, lead: int, tail: int, bidirectional: bool, maximum: bool) -> None:
    matching = some_matching(n, lead, tail, bidirectional=bidirectional)
    (q, k, _), v = qkv(n, n), randn(2, 3, matching[0].shape[1], 8, seed=7)
    weight = some_weight(matching, maximum, torch.float64)
    a = attention_reference.probabilities(q, k, None, None, 0.3)
    close(ahead(q, k, v, weight, matching), ahead_reference.ahead(a, v, weight, *matching))


@pooled
@dtypes
def test_ahead_is_the_pooled_map_in_every_dtype(dtype: torch.dtype, maximum: bool) -> None:
    matching = some_matching(17, 1)
    (q, k, _), v = qkv(17, 17, dtype), randn(2, 3, 9, 8, seed=7, dtype=dtype)
    weight = some_weight(matching, maximum, dtype)
    a = attention_reference.probabilities(q, k, None, None, 0.3)
    out = ahead(q, k, v, weight, matching)
    assert out.dtype == dtype
    close(out, ahead_reference.ahead(a, v.double(), weight, *matching), dtype)


@pooled
def test_ahead_reads_strided_inputs(maximum: bool) -> None:
    matching = some_matching(17, 1)
    (q, k, _), v = qkv(17, 17), randn(2, 3, 9, 8, seed=7)
    weight = some_weight(matching, maximum, torch.float64)
    close(ahead(strided(q), strided(k), strided(v), weight, matching), ahead(q, k, v, weight, matching))


def test_ahead_drops_weights() -> None:
    q, k, _ = qkv(17, 17)
    _, *state = ops.importance(q, k, None, None, 0.3)
    index, matching = identity(17)
    eye = torch.eye(17, dtype=torch.float64).expand(2, 3, -1, -1)
    torch.manual_seed(0)
    out = ops.ahead(*state, eye, index, torch.ones(2, 17, dtype=torch.float64), *matching, 0.5)
    drops_half(out, attention_reference.probabilities(q, k, None, None, 0.3))


@layouts
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_select_is_the_reference(n: int, lead: int, tail: int, share: float) -> None:
    score, count = randn(2, n, seed=n), int(share * (n - lead - tail))
    for actual, expected in zip(
        ops.select(score, count, lead, tail), selection_reference.select(score, count, lead, tail)
    ):
        assert torch.equal(actual, expected)


def test_select_takes_the_first_of_equal_scores() -> None:
    keep, gone = ops.select(torch.zeros(1, 7), 2, 1, 1)
    assert (keep.tolist(), gone.tolist()) == ([[0, 1, 2, 6]], [[3, 4, 5]])


@pytest.mark.parametrize("count", [-1, 6])
def test_select_refuses_a_count_out_of_range(count: int) -> None:
    with pytest.raises(RuntimeError, match=f"select: {count} of 5 tokens"):
        ops.select(torch.zeros(1, 7), count, 1, 1)


@dtypes
def test_nearest_is_the_reference(dtype: torch.dtype) -> None:
    x = randn(2, 17, 8, seed=5, dtype=dtype)
    for lead, tail in ((0, 0), (1, 0), (2, 1)):
        keep, gone = ops.select(randn(2, 17), 6, lead, tail)
        expected = selection_reference.nearest(x, keep, gone, lead, tail)
        assert torch.equal(ops.nearest(x, keep, gone, lead, tail), expected)


def test_a_protected_token_stands_for_no_other() -> None:
    x = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]])
    keep, gone = torch.tensor([[0, 2]]), torch.tensor([[1]])
    assert ops.nearest(x, keep, gone, 1, 0).tolist() == [[1]]


@pytest.mark.parametrize("dim", [1, 2])
def test_keep_is_the_reference(dim: int) -> None:
    x, index = randn(2, 5, 5, 3), torch.tensor([[0, 3, 1], [4, 2, 0]])
    assert torch.equal(ops.keep(x, index, dim), pooling_reference.keep(x, index, dim))


@dtypes
def test_mlerp_is_the_reference(dtype: torch.dtype) -> None:
    matching = some_matching(17, 1)
    x, weight = randn(2, 17, 6, seed=2, dtype=dtype), positive(2, 17, dtype=dtype)
    close(ops.mlerp(x, weight, *matching), pooling_reference.mlerp(x, weight, *matching), dtype)


def test_mlerp_of_opposite_tokens_stays_finite() -> None:
    x = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    keep, gone, into = torch.tensor([[0]]), torch.tensor([[1]]), torch.tensor([[0]])
    assert ops.mlerp(x, torch.ones(1, 2), keep, gone, into).tolist() == [[1.0]]


@dtypes
def test_policy_attention_is_the_reference(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in qkv(9, 9))
    policy = (randn(2, 9, seed=4) > 0).to(dtype)
    close(ops.policy_attention(q, k, v, policy, 0.3), attention_reference.policy_attention(q, k, v, policy, 0.3), dtype)


def test_policy_attention_to_nobody_is_to_oneself() -> None:
    q, k, v = qkv(9, 9)
    out = ops.policy_attention(q, k, v, torch.zeros(2, 9, dtype=torch.float64), 0.3)
    torch.testing.assert_close(out, v, rtol=0, atol=1e-3)


def test_observe_hands_on_what_it_is_given() -> None:
    x = randn(2, 9, 4)
    assert ops.observe(x, randn(2, 9, 1), "dtem", "trained") is x


def checked(function: Any, *inputs: Tensor) -> bool:
    return torch.autograd.gradcheck(function, [x.clone().requires_grad_() for x in inputs])


@pooled
def test_pool_has_its_gradient(maximum: bool) -> None:
    matching = some_matching(9, 1)
    weight = some_weight(matching, maximum, torch.float64)
    assert checked(lambda x: ops.pool(x, weight, *matching, 1), randn(2, 9, 3))


def test_unmerge_has_its_gradient() -> None:
    index = torch.tensor([[0, 1, 1, 2, 0], [2, 2, 2, 1, 0]])
    assert checked(lambda y: ops.unmerge(y, index, 2), randn(2, 2, 3, 2))


def test_keep_has_its_gradient() -> None:
    index = torch.tensor([[0, 3], [4, 2]])
    assert checked(lambda x: ops.keep(x, index, 1), randn(2, 5, 3))


def test_mlerp_has_its_gradient() -> None:
    matching, weight = some_matching(9, 1), positive(2, 9)
    assert checked(lambda x: ops.mlerp(x, weight, *matching), randn(2, 9, 3))


def test_policy_attention_has_its_gradient() -> None:
    policy = positive(2, 4)
    assert checked(lambda q, k, v, p: ops.policy_attention(q, k, v, p, 0.3), *qkv(4, 4, heads=2, dim=3), policy)


def small_logits() -> tuple[Tensor, Tensor]:
    return logits_of((2, 2, 4, 4), True, 4, torch.float64)


def test_attention_has_its_gradient() -> None:
    log_size, bias = small_logits()
    small = qkv(4, 4, heads=2, dim=3)
    assert checked(lambda q, k, v, b: ops.attention(q, k, v, log_size, b, 0.3, 0.0), *small, bias)


def test_importance_map_has_its_gradient() -> None:
    log_size, bias = small_logits()
    small = qkv(4, 4, heads=2, dim=3)
    assert checked(lambda q, k, b: attention_map(q, k, log_size, b, 0.3), *small[:2], bias)


@pooled
def test_ahead_has_its_gradient(maximum: bool) -> None:
    matching = some_matching(7, 1)
    weight = some_weight(matching, maximum, torch.float64)
    q, k, _ = qkv(7, 7, heads=2, dim=3)
    v = randn(2, 2, matching[0].shape[1], 3, seed=7)
    assert checked(lambda q, k, v: ahead(q, k, v, weight, matching), q, k, v)


def test_what_decides_a_fusion_is_constant() -> None:
    q, k, _ = (x.requires_grad_() for x in qkv(9, 9))
    importance, *state = ops.importance(q, k, None, None, 0.3)
    raw, size = (positive(2, 9, seed=s).requires_grad_() for s in (0, 1))
    _, weight, sizes = ops.group(raw, size, *some_matching(9))
    assert all(x.requires_grad for x in state)
    assert not any(x.requires_grad for x in (importance, weight, sizes))
    # Nothing of the matching is taped: its scores would hold N x N tensors for the backward pass.
    x = randn(2, 9, 4).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: pytest.fail("match saves tensors"), lambda t: t):
        ops.match(x, raw, size, 4, 0, 0, 1.0, 20.0, 40.0, True)


def calls() -> dict[str, tuple[Any, tuple]]:
    matching = some_matching(9, 1, bidirectional=True)
    weight = some_weight(matching, False, torch.float64)
    index = pooling_reference.assignment(*matching).argmax(1)
    tokens, (q, k, v) = randn(2, 9, 6).requires_grad_(), (x.requires_grad_() for x in qkv(9, 9))
    fused = randn(2, 3, 5, 8).requires_grad_()
    log_size, bias = logits_of((1, 3, 9, 9), True, 9, torch.float64)
    state = [x.detach().requires_grad_() for x in ops.importance(q, k, None, None, 0.3)[1:]]
    raw, size = positive(2, 9), 1 + positive(2, 9, seed=1)
    criteria = (1.0, 20.0, 40.0)
    return {
        "match-two-way": (ops.match, (tokens, raw, size, 4, 1, 0, *criteria, True)),
        "match-one-way": (ops.match, (tokens, None, size, 3, 0, 2, *criteria, False)),
        "group": (ops.group, (raw, size, *matching)),
        "pool-weighted": (ops.pool, (tokens, weight, *matching, 1)),
        "pool-maximum": (ops.pool, (tokens, None, *matching, 1)),
        "match_tiles": (
            ops.match_tiles,
            (tokens, raw, positive(2, 9), 3, 1, 0, 2, 4, [2, 2], 5, [1.0, 2.0, 0.0], None),
        ),
        "best": (ops.best, (*tokens.detach().split([4, 5], 1), *raw.detach().split([4, 5], 1), 1.0, None, None)),
        "keep": (ops.keep, (tokens, matching[0], 1)),
        "mlerp": (ops.mlerp, (tokens, raw, *matching)),
        "select": (ops.select, (raw, 3, 1, 0)),
        "nearest": (ops.nearest, (tokens, *matching[:2], 1, 0)),
        "policy_attention": (ops.policy_attention, (q, k, v, positive(2, 9), 0.3)),
        "unmerge": (ops.unmerge, (fused, index, 2)),
        "attention": (ops.attention, (q, k, v, None, None, 0.3, 0.0)),
        "attention-sized-biased": (ops.attention, (q, k, v, log_size, bias, 0.3, 0.0)),
        "importance": (ops.importance, (q, k, log_size, bias, 0.3)),
        "ahead-weighted": (ops.ahead, (*state, fused, index, weight, *matching, 0.0)),
        "ahead-maximum": (ops.ahead, (*state, fused, index, None, *matching, 0.0)),
    }


CALLS = (
    "match-two-way",
    "match-one-way",
    "match_tiles",
    "best",
    "group",
    "pool-weighted",
    "pool-maximum",
    "keep",
    "mlerp",
    "select",
    "nearest",
    "unmerge",
    "attention",
    "attention-sized-biased",
    "policy_attention",
    "importance",
    "ahead-weighted",
    "ahead-maximum",
)


# All four of opcheck's tests apply: schema, autograd registration, fake tensors, AOTAutograd with symbolic shapes.
@pytest.mark.parametrize("name", CALLS)
def test_operator_is_registered_soundly(name: str) -> None:
    op, args = calls()[name]
    results = torch.library.opcheck(op.default, args)
    assert set(results.values()) == {"SUCCESS"}


def calls_of_shaped_operators(dtype: torch.dtype) -> dict[str, Any]:
    """A call of every operator that answers with shapes alone where only those are asked for."""
    x, size = randn(2, 17, 8, dtype=dtype), torch.ones(2, 17)
    q, k, v = (randn(2, 3, 17, 4, seed=s, dtype=dtype) for s in range(3))
    keep, gone, _ = matching = ops.match(x, None, size, 5, 1, 0, 1.0, 0.0, 0.0, True)
    index, weight, _ = ops.group(torch.ones(2, 17), size, *matching)
    _, weights, norm = ops.importance(q, k, None, None, 0.5)
    fused = v[:, :, :12]
    return {
        "match": lambda: ops.match(x, None, size, 5, 1, 0, 1.0, 0.0, 0.0, True),
        "match_tiles": lambda: ops.match_tiles(x, None, size, 9, 1, 0, 4, 4, [2, 2], None, [1.0, 0.0, 0.0]),
        "group": lambda: ops.group(torch.ones(2, 17), size, *matching),
        "pool": lambda: ops.pool(x, weight, *matching, 1),
        "pool by maxima": lambda: ops.pool(x, None, *matching, 1),
        "keep": lambda: ops.keep(x, keep, 1),
        "unmerge": lambda: ops.unmerge(x[:, :12], index, 1),
        "select": lambda: ops.select(size, 11, 1, 0),
        "nearest": lambda: ops.nearest(x, keep, gone, 1, 0),
        "attention": lambda: ops.attention(q, k, v, size.log(), None, 0.5, 0.0),
        "importance": lambda: ops.importance(q, k, size.log(), None, 0.5),
        "ahead": lambda: ops.ahead(weights, norm, fused, index, weight, *matching, 0.0),
        "ahead by maxima": lambda: ops.ahead(weights, norm, fused, index, None, *matching, 0.0),
    }


@dtypes
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_shapes_alone_are_those_of_the_results(dtype: torch.dtype, autocast: bool) -> None:
    calls = calls_of_shaped_operators(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for name, call in calls.items():
            with ShapesAlone():
                promised = call()
            pairs = zip(*((x,) if isinstance(x, Tensor) else x for x in (promised, call())), strict=True)
            for expected, actual in pairs:
                assert (expected.shape, expected.dtype) == (actual.shape, actual.dtype), name
