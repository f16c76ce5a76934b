"""``kernels/shift/triton.py`` against float64."""

from __future__ import annotations

import pytest
import torch
from budgets import randn, some_codes, within_budget
from torch import Tensor

from mctf_compile.kernels.shift import reference
from mctf_compile.kernels.shift.triton import COLUMNS, ROWS, shift_linear, supported

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def multiplied(x: Tensor, codes: Tensor, bias: Tensor | None) -> None:
    exact = torch.nn.functional.linear(x.double(), reference.powers(codes, torch.float64))
    exact = exact if bias is None else exact + bias.double()
    plain = torch.nn.functional.linear(x, reference.powers(codes, x.dtype), bias)
    terms = x.double().abs() @ reference.powers(codes, torch.float64).abs().t()
    within_budget("shift_linear", shift_linear(x, codes, bias), exact, plain, terms)


@dtypes
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    ("rows", "outputs", "channels"),
    [(1, 1, 1), (3, 5, 31), (ROWS + 1, COLUMNS - 1, 64), (7, COLUMNS + 1, 200), (2 * ROWS, 2 * COLUMNS, 96)],
)
def test_products_are_those_of_the_powers(
    rows: int, outputs: int, channels: int, biased: bool, dtype: torch.dtype
) -> None:
    bias = randn(outputs, seed=2, dtype=dtype) if biased else None
    multiplied(randn(rows, channels, seed=1, dtype=dtype), some_codes(outputs, channels), bias)


def test_every_code_is_its_power_of_two() -> None:
    codes = torch.arange(-15, 16, dtype=torch.int8)[:, None]
    assert torch.equal(shift_linear(torch.ones(1, 1), codes, None)[0], reference.powers(codes, torch.float32)[:, 0])


@pytest.mark.parametrize("shape", [(2, 5, 12), (2, 3, 2, 12), (0, 12)], ids=str)
def test_rows_of_any_shape_and_strides(shape: tuple[int, ...]) -> None:
    codes, x = some_codes(9, 12), randn(*shape, seed=1)
    gaps = torch.full((*shape[:-1], 24), float("nan"))[..., ::2].copy_(x)
    backwards = some_codes(12, 9).t().copy_(codes)
    expected = shift_linear(x, codes, None)
    assert expected.shape == (*shape[:-1], 9)
    assert torch.equal(shift_linear(gaps, backwards, None), expected)


def test_supported() -> None:
    codes = some_codes(3, 4)
    assert supported(torch.zeros(2, 4), codes) and supported(torch.zeros(1, 2, 4).bfloat16(), codes)
    assert not supported(torch.zeros(2, 4).double(), codes) and not supported(torch.zeros(4), codes)
