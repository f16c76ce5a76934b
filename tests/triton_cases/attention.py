"""``kernels/attention/triton.py`` and ``triton_backward.py`` against float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from budgets import randn, within_budget
from torch import Tensor

from mctf_compile.kernels.attention import reference
from mctf_compile.kernels.attention.triton import attention_forward, importance, supported
from mctf_compile.kernels.attention.triton_backward import attention_backward


@dataclass(frozen=True)
class Case:
    """Attention of B images and H heads; the bias is one of ``BIASES``."""

    nq: int
    nk: int
    d: int
    dv: int
    dtype: torch.dtype = torch.float32
    bias: str = "none"
    sized: bool = True
    batch: int = 2
    heads: int = 2

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"N{self.nq}x{self.nk}-D{self.d}x{self.dv}-{dtype}-{self.bias}{'' if self.sized else '-unsized'}"

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """q, k, v, log_size, bias. Views of one fused projection where the shapes allow it."""
        b, h = self.batch, self.heads
        if self.nq == self.nk and self.d == self.dv:
            q, k, v = randn(b, self.nq, 3, h, self.d, dtype=self.dtype).permute(2, 0, 3, 1, 4)
        else:
            # Channels are not the last in memory here, and rows have gaps.
            q = randn(b, h, self.d, self.nq, seed=1, dtype=self.dtype).transpose(2, 3)
            k = randn(b, self.nk, h, 2 * self.d, seed=2, dtype=self.dtype)[..., ::2].transpose(1, 2)
            v = randn(b, h, self.nk, self.dv, seed=3, dtype=self.dtype)
        log_size = (1 + 3 * randn(b, self.nk, seed=4).abs()).log() if self.sized else None
        return q, k, v, log_size, BIASES[self.bias](self)

    @property
    def scale(self) -> float:
        return self.d**-0.5


def padding(case: Case, value: float = float("-inf")) -> Tensor:
    """The last keys of the second image are no tokens."""
    bias = torch.zeros(case.batch, 1, 1, case.nk, dtype=case.dtype)
    bias[1, ..., (case.nk + 1) // 2 :] = value
    return bias


def masked_rows(case: Case) -> Tensor:
    """Every third query sees nothing at all, the others nothing of the first keys, a whole tile of them."""
    bias = torch.zeros(1, 1, case.nq, case.nk, dtype=case.dtype)
    bias[..., : case.nk - 1] = float("-inf")
    bias[:, :, ::3] = float("-inf")
    return bias


BIASES = {
    "none": lambda c: None,
    "full": lambda c: randn(c.batch, c.heads, c.nq, c.nk, seed=5, dtype=c.dtype),
    "position": lambda c: randn(1, c.heads, c.nq, c.nk, seed=5, dtype=c.dtype),
    "matrix": lambda c: randn(c.nq, c.nk, seed=5, dtype=c.dtype),
    "shared": lambda c: randn(1, 1, 1, c.nk, seed=5, dtype=c.dtype),
    "keys": lambda c: randn(c.batch, 1, 1, c.nk, seed=5, dtype=c.dtype),
    "queries": lambda c: randn(1, c.heads, c.nq, 1, seed=5, dtype=c.dtype),
    "padding": padding,
    "rows": masked_rows,
    "lowest": lambda c: padding(c, torch.finfo(c.dtype).min),
}

CASES = [
    *(Case(n, n, 32, 32) for n in (1, 2, 17)),
    *(Case(n, n, 32, 32, heads=1) for n in (198, 257)),
    *(Case(17, 17, d, d, dtype) for d in (16, 72, 80, 128) for dtype in (torch.float32, torch.bfloat16)),
    Case(17, 17, 256, 256, torch.bfloat16),
    Case(197, 197, 64, 64, torch.bfloat16),
    Case(197, 197, 64, 64, torch.float16, sized=False),
    *(Case(nq, nk, 64, 48) for nq, nk in ((1, 198), (5, 70), (70, 5))),
    *(Case(70, 70, 32, 32, bias=bias) for bias in BIASES if bias != "none"),
    Case(70, 66, 32, 16, torch.bfloat16, "position"),
    Case(70, 66, 32, 16, torch.bfloat16, "rows"),
    # The bias takes channels by parts.
    Case(17, 33, 80, 48, bias="position"),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


def plain(
    q: Tensor, k: Tensor, v: Tensor, log_size: Tensor | None, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention and the log-sum-exp in the dtype of the inputs, the softmax in float32 or wider."""
    logits = (q @ k.transpose(-2, -1)).to(torch.promote_types(q.dtype, torch.float32)) * scale
    if bias is not None:
        logits = logits + bias
    if log_size is not None:
        logits = logits + log_size[:, None, None, :].to(logits.dtype)
    lse = logits.detach().logsumexp(-1)
    empty = logits.detach().amax(-1, keepdim=True) == float("-inf")
    weights = torch.where(empty, 0.0, torch.where(empty, 0.0, logits).softmax(-1))
    return weights.to(v.dtype) @ v, lse


def widened(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.double() for t in tensors)


@cases
def test_forward(case: Case) -> None:
    inputs = case.inputs()
    o, lse = attention_forward(*inputs, case.scale)
    exact_o, exact_lse = plain(*widened(*inputs), case.scale)
    plain_o, plain_lse = plain(*inputs, case.scale)
    within_budget("o", o, exact_o, plain_o)
    seen = exact_lse > float("-inf")
    assert torch.equal(lse > float("-inf"), seen)
    within_budget("lse", lse[seen] * math.log(2), exact_lse[seen], plain_lse[seen])
    assert not o[~seen].any()


def exact_gradients(*inputs: Tensor | None, scale: float, do: Tensor) -> list[Tensor | None]:
    """By autograd, in float64."""
    leaves = [None if t is None else t.requires_grad_() for t in widened(*inputs)]
    plain(*leaves, scale)[0].backward(do.double())
    return [None if leaf is None else leaf.grad for leaf in leaves]


def plain_gradients(
    q: Tensor, k: Tensor, v: Tensor, log_size: Tensor | None, bias: Tensor | None, scale: float, do: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and the gradient of the logits, by the formulas, from the weights as the log-sum-exp gives them."""
    o, lse = plain(q, k, v, log_size, bias, scale)
    weights = weights_of(q, k, log_size, bias, scale, lse)
    delta = (do.to(lse.dtype) * o.to(lse.dtype)).sum(-1, keepdim=True)
    slope = weights * ((do @ v.transpose(-2, -1)).to(lse.dtype) - delta)
    return *products(q, k, v, weights, slope, do, scale), slope


def weights_of(q: Tensor, k: Tensor, log_size: Tensor | None, bias: Tensor | None, scale: float, lse: Tensor) -> Tensor:
    logits = (q @ k.transpose(-2, -1)).to(lse.dtype) * scale
    logits = logits if bias is None else logits + bias
    logits = logits if log_size is None else logits + log_size[:, None, None, :].to(logits.dtype)
    return torch.exp(logits - torch.where(lse == float("-inf"), float("inf"), lse)[..., None])


def products(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor, slope: Tensor, do: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dk = slope.transpose(-2, -1).to(q.dtype) @ q
    return (slope.to(k.dtype) @ k) * scale, dk * scale, weights.transpose(-2, -1).to(v.dtype) @ do


def gradient_terms(
    q: Tensor, k: Tensor, v: Tensor, log_size: Tensor | None, bias: Tensor | None, scale: float, do: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The sums of ``plain_gradients`` over absolute values, in float64; and the last place of the weights.

    A weight is an exponential: its relative error is the absolute one of a logit, whose terms are float32.
    """
    dtype = q.dtype
    q, k, v, log_size, bias, do = widened(q, k, v, log_size, bias, do)
    o, lse = plain(q, k, v, log_size, bias, scale)
    weights = weights_of(q, k, log_size, bias, scale, lse)
    q, k, v, o, do = (t.abs() for t in (q, k, v, o, do))
    logits = (q @ k.transpose(-2, -1)) * scale
    logits = logits if bias is None else logits + bias.abs().nan_to_num(posinf=0)
    logits = logits if log_size is None else logits + log_size.abs()[:, None, None, :]
    weights = weights * (1 + logits * (torch.finfo(torch.float32).eps / torch.finfo(dtype).eps))
    slope = weights * (do @ v.transpose(-2, -1) + (do * o).sum(-1, keepdim=True))
    return *products(q, k, v, weights, slope, do, scale), slope, weights


@cases
def test_backward(case: Case) -> None:
    inputs = case.inputs()
    o, lse = attention_forward(*inputs, case.scale)
    # As it comes back from the output projection: of a token, all heads.
    do = randn(case.batch, case.nq, case.heads, case.dv, seed=6, dtype=case.dtype).transpose(1, 2)
    *actual, dbias = attention_backward(do, *inputs, case.scale, o, lse, inputs[4] is not None)
    *exact, _, exact_dbias = exact_gradients(*inputs, scale=case.scale, do=do)
    *expected, slope = plain_gradients(*inputs, case.scale, do)
    *terms, slope_terms, _ = gradient_terms(*inputs, case.scale, do)
    for name, *parts in zip(("dq", "dk", "dv"), actual, exact, expected, terms):
        within_budget(name, *parts)
    if dbias is not None:
        shape = inputs[4].shape
        expected_dbias = slope.sum_to_size(shape).to(case.dtype)
        within_budget("dbias", dbias, exact_dbias, expected_dbias, slope_terms.sum_to_size(shape))


def received(lse: Tensor, *inputs: Tensor | float | None) -> Tensor:
    return weights_of(*inputs, lse).mean((1, 2))


@cases
def test_importance(case: Case) -> None:
    q, k, v, *terms = case.inputs()
    a, lse = importance(q, k, *terms, case.scale)
    exact_lse = plain(*widened(q, k, v, *terms), case.scale)[1]
    exact = received(exact_lse, *widened(q, k, *terms), case.scale)
    # Results and logits are float32 whatever q and k are, which bounds the error more tightly than their dtype.
    wide = q.float(), k.float(), v.float(), *terms
    plain_lse = plain(*wide, case.scale)[1]
    expected = received(plain_lse, *wide[:2], *terms, case.scale)
    magnitude = gradient_terms(*wide, case.scale, randn(*q.shape[:3], case.dv))[4]
    within_budget("importance", a, exact, expected, magnitude.mean((1, 2)))
    seen = exact_lse > float("-inf")
    assert torch.equal(lse > float("-inf"), seen)
    within_budget("lse", lse[seen] * math.log(2), exact_lse[seen], plain_lse[seen])


def test_the_exact_result_is_the_reference() -> None:
    case = Case(17, 9, 16, 24, torch.float64, "position")
    inputs = case.inputs()
    expected = reference.attention(*inputs, case.scale)
    torch.testing.assert_close(plain(*inputs, case.scale)[0], expected)


def test_the_lowest_number_masks() -> None:
    q, k, v, log_size, _ = Case(5, 5, 16, 16).inputs()
    o, lse = attention_forward(q, k, v, log_size, torch.full((5, 1), torch.finfo(torch.float32).min), 1.0)
    assert not o.any()
    assert (lse == float("-inf")).all()


def test_joining_the_heads_copies_nothing() -> None:
    case = Case(17, 17, 32, 32)
    o, _ = attention_forward(*case.inputs(), case.scale)
    assert o.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("case", "dropout_p", "taken"),
    [
        (Case(2, 2, 16, 16), 0.0, True),
        (Case(2, 2, 16, 16), 0.1, False),
        (Case(2, 2, 16, 16, torch.float64), 0.0, False),
        (Case(2, 3, 16, 129), 0.0, False),
        (Case(2, 3, 256, 16, torch.bfloat16), 0.0, True),
        (Case(2, 3, 16, 257, torch.bfloat16), 0.0, False),
    ],
)
def test_supported(case: Case, dropout_p: float, taken: bool) -> None:
    assert supported(*case.inputs()[:3], dropout_p) is taken
