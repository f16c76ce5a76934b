"""``kernels/ahead/triton.py`` against float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from attention import Case as Attention
from attention import gradient_terms, weights_of, widened
from attention import plain as plain_attention
from budgets import randn, within_budget
from torch import Tensor

import mctf_compile  # noqa: F401  registers torch.ops.mctf
from mctf_compile.kernels.ahead import reference
from mctf_compile.kernels.ahead.triton import add_groups, ahead_backward, ahead_forward, supported
from mctf_compile.kernels.attention.triton import importance
from mctf_compile.kernels.matching import reference as matching
from mctf_compile.kernels.pooling import reference as pooling
from mctf_compile.kernels.pooling.aten import combine

ops = torch.ops.mctf


@dataclass(frozen=True)
class Case:
    """Attention of n tokens of which r leave; the first ``lead`` are protected."""

    n: int
    r: int
    d: int = 32
    dtype: torch.dtype = torch.float32
    lead: int = 1
    bias: str = "none"
    sized: bool = True
    heads: int = 2

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"N{self.n}-r{self.r}-D{self.d}-{dtype}-lead{self.lead}-{self.bias}{'' if self.sized else '-unsized'}"

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """q, k, v, log_size, bias: q and k of one projection; v of another, of the fused tokens."""
        attention = Attention(self.n, self.n, self.d, self.d, self.dtype, self.bias, self.sized, heads=self.heads)
        q, k, _, log_size, bias = attention.inputs()
        v = randn(2, self.n - self.r, self.heads, self.d, seed=7, dtype=self.dtype).transpose(1, 2)
        return q, k, v, log_size, bias

    def map(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """index, weight, keep, gone, into."""
        tokens, sizes = randn(2, self.n, 6, seed=8), torch.ones(2, self.n)
        found = matching.match(tokens, None, sizes, self.r, self.lead, 0, 1.0, 0.0, 0.0, True)
        index, weight, _ = pooling.group(0.1 + randn(2, self.n, seed=9).abs(), sizes, *found)
        return index, weight, *found

    @property
    def scale(self) -> float:
        return self.d**-0.5


CASES = [
    Case(1, 0),
    Case(2, 0),
    Case(2, 1, lead=0),
    Case(17, 0),
    Case(17, 8),
    Case(197, 16, 64, torch.bfloat16),
    Case(198, 99, 16, lead=0, heads=1),
    Case(257, 20, 16, lead=5, heads=1),
    *(Case(17, 6, d, torch.bfloat16) for d in (16, 72, 80, 128, 256)),
    Case(70, 32, 64, torch.float16, lead=5, sized=False),
    *(Case(40, 12, bias=bias) for bias in ("full", "position", "keys", "padding", "rows")),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


def exact(q: Tensor, k: Tensor, v: Tensor, log_size: Tensor | None, bias: Tensor | None, case: Case) -> Tensor:
    """The paper's pooled map, in float64; rows that are masked out as a whole attend to nothing."""
    _, weight, *found = case.map()
    lse = plain_attention(q, k, k, log_size, bias, case.scale)[1]
    logits = weights_of(q, k, log_size, bias, case.scale, torch.where(lse == float("-inf"), lse, 0.0))
    return reference.ahead(logits / logits.sum(-1, keepdim=True).clamp(min=1e-300), v, weight, *found)


def plain(q: Tensor, k: Tensor, v: Tensor, log_size: Tensor | None, bias: Tensor | None, case: Case) -> Tensor:
    """The ATen operators, in the dtype of the inputs."""
    _, *state = ops.importance(q, k, log_size, bias, case.scale)
    return ops.ahead(*state, v, *case.map(), 0.0)


def leaves_of(*inputs: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.detach().clone().requires_grad_() for t in inputs]


def forward(case: Case, inputs: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, log_size, bias = inputs
    _, lse = importance(q, k, log_size, bias, case.scale)
    return *ahead_forward(q, k, v, log_size, bias, case.scale, lse, *case.map()), lse


def whole(case: Case, v: Tensor, do: Tensor) -> tuple[Tensor, Tensor]:
    """v of every key, and the gradient of every row."""
    index, weight = case.map()[:2]
    at = index[:, None, :, None].expand(-1, case.heads, -1, case.d)
    return v.gather(2, at), do.gather(2, at) * weight[:, None, :, None].to(do.dtype)


@cases
def test_forward(case: Case) -> None:
    inputs = case.inputs()
    q, k, v, log_size, bias = inputs
    y, rows, _ = forward(case, inputs)
    _, weight, *found = case.map()
    # What a row adds up to in absolute values, weights with the error of their logits, is what its group does.
    v_all, _ = whole(case, v, v)
    weights = gradient_terms(q, k, v_all, log_size, bias, case.scale, torch.zeros_like(v_all))[4]
    terms = combine((weights @ v_all.double().abs()) * weight[:, None, :, None], *found, 2, "sum")
    within_budget("y", y, exact(*widened(*inputs), case), plain(*inputs, case).detach(), terms)
    assert rows.shape[2] == case.n


@cases
def test_backward(case: Case) -> None:
    inputs = case.inputs()
    _, rows, lse = forward(case, inputs)
    do = randn(2, case.n - case.r, case.heads, case.d, seed=6, dtype=case.dtype).transpose(1, 2)
    *actual, dbias = ahead_backward(do, *inputs, case.scale, lse, *case.map(), rows, inputs[4] is not None)
    ideal, low = leaves_of(*widened(*inputs)), leaves_of(*inputs)
    exact(*ideal, case).backward(do.double())
    plain(*low, case).backward(do)

    v_all, do_all = whole(case, inputs[2], do)
    *terms, slope, _ = gradient_terms(*inputs[:2], v_all, *inputs[3:], case.scale, do_all)
    terms[2] = combine(terms[2], *case.map()[2:], 2, "sum")
    for name, a, e, p, t in zip(("dq", "dk", "dv"), actual, ideal, low, terms):
        within_budget(name, a, e.grad, p.grad, t)
    if dbias is not None:
        within_budget("dbias", dbias, ideal[4].grad, low[4].grad, slope.sum_to_size(dbias.shape))


@pytest.mark.parametrize(("m", "r"), [(1, 0), (16, 1), (65, 40), (20, 20)])
def test_groups_of_many(m: int, r: int) -> None:
    """All into one, and each into its own, where r is beyond one tile."""
    order = torch.stack([torch.randperm(m + r, generator=torch.Generator().manual_seed(s)) for s in range(2)])
    keep, gone = order[:, :m], order[:, m:]
    into = torch.stack([torch.full((r,), m - 1), torch.arange(r) % m])
    x = randn(2, 3, m + r, 24, dtype=torch.bfloat16)
    expected = combine(x.double(), keep, gone, into, 2, "sum")
    # One rounding: half a unit in the last place.
    within = torch.finfo(torch.bfloat16).eps / 2 * combine(x.double().abs(), keep, gone, into, 2, "sum").max()
    assert (add_groups(x, keep, gone, into).double() - expected).abs().max() <= within


def test_supported() -> None:
    q, k, v, *_ = Case(4, 1).inputs()
    weight = torch.ones(2, 4)
    assert supported(q, k, v, weight)
    assert not supported(q, k, v, None)
    assert not supported(q, k, v, weight, 0.1)
    assert not supported(q.double(), k.double(), v.double(), weight)
