"""``kernels/matching/triton.py``: the assignment exactly, the scores within a budget.

Two scores that differ by less than the rounding of one are in no order that can be relied on; so whole matchings are
compared where scores are exact (every tie is one), or far enough apart in the exact arithmetic of the reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from budgets import randn, within_budget
from torch import Tensor

from mctf_compile.kernels.matching import aten, reference
from mctf_compile.kernels.matching import triton as kernels

Matching = tuple[Tensor, Tensor, Tensor]
Taus = tuple[float, float, float]


@dataclass(frozen=True)
class Problem:
    n: int
    lead: int
    tail: int
    r: int

    def __str__(self) -> str:
        return f"N{self.n}-lead{self.lead}-tail{self.tail}-r{self.r}"

    @property
    def counts(self) -> tuple[int, int]:
        """Unprotected tokens at even positions, and at odd ones."""
        middle = range(self.lead, self.n - self.tail)
        return sum(p % 2 == 0 for p in middle), sum(p % 2 for p in middle)


def most(n: int, lead: int, tail: int) -> int:
    return (n - lead - tail) // 2


PROBLEMS = [
    Problem(n, lead, tail, r)
    for n in (1, 2, 3, 17, 197, 198, 257)
    for lead, tail in ((0, 0), (1, 0), (5, 1), (0, 1))
    if lead + tail <= n
    for r in sorted({0, min(1, most(n, lead, tail)), most(n, lead, tail)})
    if n < 100 or r > 1
]
# The tiled kernels take more than 256 tokens on either side; here, any number.
TILED = [Problem(520, 1, 0, 99), Problem(521, 0, 0, 260), Problem(603, 5, 1, 298), Problem(530, 0, 1, 0)]
SMALL = [p for p in PROBLEMS if p.n in (3, 17)]
directions = pytest.mark.parametrize("bidirectional", [True, False], ids=["two-way", "one-way"])
filled = pytest.mark.parametrize("kind", ["apart", "ties", "equal", "masked", "nothing", "signed"])


def some_scores(kind: str, b: int, alpha: int, beta: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "apart":
        order = torch.stack([torch.randperm(alpha * beta, generator=generator) for _ in range(b)])
        return order.reshape(b, alpha, beta).float()
    few = torch.randint(3, (b, alpha, beta), generator=generator).float()
    if kind == "masked":
        return few.masked_fill(torch.rand(few.shape, generator=generator) < 0.7, float("-inf"))
    if kind == "signed":
        return torch.where(few == 0, -0.0, few - 1)
    return {"ties": few, "equal": torch.ones_like(few), "nothing": torch.full_like(few, float("-inf"))}[kind]


def by_tokens(scores: Tensor, problem: Problem, bidirectional: bool) -> Matching:
    """The reference of ``assign``: ``match_image`` over scores put where their tokens are.

    There -inf is the score of protected tokens, so it is a low number here.
    """
    middle = range(problem.lead, problem.n - problem.tail)
    even, odd = ([p for p in middle if p % 2 == parity] for parity in (0, 1))
    images = []
    for image in scores:
        w = torch.full((problem.n, problem.n), float("-inf"))
        pairs = torch.tensor(even, dtype=torch.long)[:, None], torch.tensor(odd, dtype=torch.long)[None, :]
        w[pairs] = image.float().clamp(min=-1e30)
        images.append(reference.match_image(w, problem.r, problem.lead, problem.tail, bidirectional))
    return tuple(torch.tensor(rows, dtype=torch.long).reshape(len(scores), -1) for rows in zip(*images))


def same(actual: Matching, expected: Matching) -> None:
    for name, a, e in zip(("keep", "gone", "into"), actual, expected):
        assert a.dtype == torch.long
        assert a.tolist() == e.tolist(), name


def assigned(scores: Tensor, problem: Problem, bidirectional: bool) -> Matching:
    return kernels.assign(scores, problem.n, problem.r, problem.lead, problem.tail, bidirectional)


def assigned_by_aten(scores: Tensor, problem: Problem, bidirectional: bool) -> Matching:
    return aten.assign(scores, problem.n, problem.r, problem.lead, problem.tail, bidirectional)


@filled
@directions
@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.n < 20], ids=str)
def test_assign_is_the_reference(problem: Problem, bidirectional: bool, kind: str) -> None:
    scores = some_scores(kind, 2, *problem.counts)
    same(assigned(scores, problem, bidirectional), by_tokens(scores, problem, bidirectional))


@pytest.mark.parametrize("kind", ["apart", "ties", "masked"])
@directions
@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.n > 20] + TILED, ids=str)
def test_assign_of_many_is_aten_s(problem: Problem, bidirectional: bool, kind: str) -> None:
    scores = some_scores(kind, 2, *problem.counts)
    same(assigned(scores, problem, bidirectional), assigned_by_aten(scores, problem, bidirectional))


@filled
@directions
@pytest.mark.parametrize("problem", SMALL, ids=str)
def test_tiles_are_the_reference(
    problem: Problem, bidirectional: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "block_for", lambda alpha, beta: None)
    scores = some_scores(kind, 2, *problem.counts, seed=1)
    same(assigned(scores, problem, bidirectional), by_tokens(scores, problem, bidirectional))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_assign_takes_scores_of_16_bits(dtype: torch.dtype) -> None:
    problem = Problem(40, 1, 0, 19)
    scores = some_scores("ties", 2, *problem.counts).to(dtype)
    same(assigned(scores, problem, True), by_tokens(scores, problem, True))


def test_assign_reads_strided_scores() -> None:
    problem = Problem(40, 1, 0, 19)
    scores = some_scores("apart", 2, *problem.counts)
    backwards = scores.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    same(assigned(backwards, problem, True), assigned(scores, problem, True))


@pytest.mark.parametrize("tiled", [False, True])
@directions
def test_assign_of_nans_is_a_matching(bidirectional: bool, tiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in ATen, where a NaN is the highest score."""
    if tiled:
        monkeypatch.setattr(kernels, "block_for", lambda alpha, beta: None)
    problem = Problem(40, 1, 0, 19)
    scores = some_scores("ties", 2, *problem.counts)
    scores = torch.where(some_scores("ties", 2, *problem.counts, seed=1) == 0, float("nan"), scores)
    same(assigned(scores, problem, bidirectional), assigned_by_aten(scores, problem, bidirectional))


@pytest.mark.parametrize(("n", "lead", "tail", "r"), [(9, 0, 0, 5), (9, 1, 0, 5), (9, 5, 2, 2), (9, 0, 0, -1)])
def test_assign_refuses_r_out_of_range(n: int, lead: int, tail: int, r: int) -> None:
    problem = Problem(n, lead, tail, r)
    with pytest.raises(RuntimeError, match=f"r={r} of {n} tokens is out of range"):
        assigned(torch.zeros(1, *problem.counts), problem, True)


def inputs(n: int, c: int = 72, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x, a, s: importances within a factor of 16, sizes from 1 to 4."""
    a = torch.exp2(4 * torch.rand(2, n, generator=torch.Generator().manual_seed(seed + 1)) - 8)
    s = torch.randint(1, 5, (2, n), generator=torch.Generator().manual_seed(seed + 2)).float()
    return randn(2, n, c, seed=seed, dtype=dtype), a, s


TAUS = [(1.0, 20.0, 40.0), (1.0, 0.0, 0.0), (0.5, 1.0, 0.0), (2.0, 0.0, 1.0), (0.0, 20.0, 40.0), (0.0, 0.0, 0.0)]
taus = pytest.mark.parametrize("taus", TAUS, ids=lambda taus: "tau" + "-".join(map(str, taus)))


def scored(x: Tensor, a: Tensor | None, s: Tensor, problem: Problem, taus: Taus) -> None:
    """Scores up to a factor for each image: as shares of the largest."""
    lead, tail = problem.lead, problem.tail
    middle = range(lead, problem.n - tail)
    even, odd = ([p for p in middle if p % 2 == parity] for parity in (0, 1))
    wide = None if a is None else a.double()
    exact = torch.stack(
        [
            reference.scores(x[b].double(), None if wide is None else wide[b], s[b].double(), *taus)[even][:, odd]
            for b in range(2)
        ]
    )
    low = x if x.dtype is torch.float32 else x.float()
    plain = aten.scores(low, a, s, lead, tail, *taus, None)
    actual = kernels.scores(x, a, s, lead, tail, *taus)
    actual, exact, plain = (w / w.amax((1, 2), keepdim=True) for w in (actual, exact, plain))
    within_budget("scores", actual, exact, plain)


@taus
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scores(dtype: torch.dtype, taus: Taus) -> None:
    scored(*inputs(17, dtype=dtype), Problem(17, 1, 0, 0), taus)


@pytest.mark.parametrize(("n", "c"), [(2, 1), (30, 64), (131, 33), (261, 384)])
def test_scores_of_any_size(n: int, c: int) -> None:
    # Of one channel and both signs cosines are -1, and a score has no digit left.
    x, _, s = inputs(n, c)
    scored(x.abs(), None, s, Problem(n, 0, 0, 0), (1.0, 20.0, 40.0))


def test_scores_read_strided_inputs() -> None:
    x, a, s = inputs(17)
    expected = kernels.scores(x, a, s, 1, 0, 1.0, 20.0, 40.0)
    gaps = torch.full((2, 34, 100), float("nan"))[:, ::2, :72].copy_(x)
    columns = x.transpose(1, 2).contiguous().transpose(1, 2)
    for view in (gaps, columns):
        backwards = a.t().contiguous().t(), s.t().contiguous().t()
        assert torch.equal(kernels.scores(view, *backwards, 1, 0, 1.0, 20.0, 40.0), expected)


def test_tokens_of_two_kinds_do_not_match() -> None:
    x, a, s = inputs(17)
    kind = torch.rand(2, 17, generator=torch.Generator().manual_seed(3)) < 0.5
    w = kernels.scores(x, a, s, 1, 0, 1.0, 20.0, 40.0, kind)
    even, odd = kind[:, 2::2], kind[:, 1::2]
    assert torch.equal(w == float("-inf"), even[:, :, None] != odd[:, None, :])


def matched(problem: Problem, taus: Taus, bidirectional: bool, *tokens: Tensor) -> None:
    actual = kernels.match(*tokens, problem.r, problem.lead, problem.tail, *taus, bidirectional)
    wide = (None if t is None else t.double() for t in tokens)
    same(actual, reference.match(*wide, problem.r, problem.lead, problem.tail, *taus, bidirectional))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@directions
@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.n < 20], ids=str)
def test_match_is_the_reference(problem: Problem, bidirectional: bool, dtype: torch.dtype) -> None:
    matched(problem, (1.0, 20.0, 40.0), bidirectional, *inputs(problem.n, dtype=dtype))


@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.n > 20 and p.r] + TILED[:2], ids=str)
def test_match_of_many_is_the_assignment_of_its_scores(problem: Problem) -> None:
    tokens, taus = inputs(problem.n), (1.0, 20.0, 40.0)
    w = kernels.scores(*tokens, problem.lead, problem.tail, *taus)
    for bidirectional in (True, False):
        actual = kernels.match(*tokens, problem.r, problem.lead, problem.tail, *taus, bidirectional)
        same(actual, assigned_by_aten(w, problem, bidirectional))


# Scores of these tokens are exact in every order of summation: the cosines are -1, 0 or 1.
ALPHABET = torch.tensor([[0, 0, 0], [1, 0, 0], [-1, 0, 0], [4, 0, 0], [0, 2, 0], [0, 0, -0.5]])


@directions
@pytest.mark.parametrize("taus", [(1.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.0, 1.0, 1.0)], ids=str)
@pytest.mark.parametrize(
    "problem", [Problem(9, 0, 0, 4), Problem(17, 1, 0, 7), Problem(40, 5, 1, 17), Problem(70, 0, 0, 35)], ids=str
)
def test_match_gives_ties_to_the_lower_position(problem: Problem, taus: Taus, bidirectional: bool) -> None:
    generator = torch.Generator().manual_seed(problem.n)
    x = ALPHABET[torch.randint(6, (2, problem.n), generator=generator)]
    a, s = (torch.exp2(torch.randint(-1, 2, (2, problem.n), generator=generator).float()) for _ in range(2))
    matched(problem, taus, bidirectional, x, a, s)


@directions
@pytest.mark.parametrize("n", [3, 16, 33])
def test_match_of_equal_tokens_takes_the_first(n: int, bidirectional: bool) -> None:
    tokens = torch.ones(2, n, 4), torch.full((2, n), 0.25), torch.ones(2, n)
    matched(Problem(n, 0, 0, n // 2), (1.0, 20.0, 40.0), bidirectional, *tokens)


# Importances are near 1/N; N ** (2/tau) does not fit float32, ratios of importances do.
def test_scores_stand_low_temperatures() -> None:
    x, _, s = inputs(17)
    received = 0.5 + torch.rand(2, 17, generator=torch.Generator().manual_seed(0))
    matched(Problem(17, 1, 0, 8), (1.0, 0.06, 40.0), True, x, received / received.sum(1, keepdim=True), s)


def test_supported() -> None:
    assert kernels.supported(torch.zeros(1).bfloat16())
    assert not kernels.supported(torch.zeros(1).double())
