"""``kernels/pooling/triton.py`` and ``kernels/unmerge/triton.py`` against float64."""

from __future__ import annotations

import pytest
import torch
from budgets import randn, within_budget
from torch import Tensor

from mctf_compile.kernels.matching import reference as matching_reference
from mctf_compile.kernels.pooling import aten, reference
from mctf_compile.kernels.pooling.triton import group, pool, pool_backward, supported, supported_group
from mctf_compile.kernels.unmerge import reference as unmerge_reference
from mctf_compile.kernels.unmerge.triton import supported as supported_unmerge
from mctf_compile.kernels.unmerge.triton import unmerge, unmerge_backward

Matching = tuple[Tensor, Tensor, Tensor]

# (tokens, lead, tail, r)
PROBLEMS = [(1, 0, 0, 0), (2, 0, 0, 1), (17, 1, 0, 0), (17, 5, 1, 1), (17, 0, 0, 8), (197, 1, 0, 16), (198, 1, 1, 98)]
problems = pytest.mark.parametrize(
    ("n", "lead", "tail", "r"), [pytest.param(*p, id="N{}-lead{}-tail{}-r{}".format(*p)) for p in PROBLEMS]
)
dtypes = pytest.mark.parametrize(
    "dtype", [pytest.param(d, id=str(d).removeprefix("torch.")) for d in (torch.float32, torch.bfloat16, torch.float16)]
)
# The widths of tiles, one channel more than one holds, and tokens in every place.
SHAPES = {
    "BN": ((2, 17), 1), "BNC1": ((2, 17, 1), 1), "BNC6": ((2, 17, 6), 1), "BNC130": ((2, 17, 130), 1),
    "BNHD": ((2, 17, 3, 8), 1), "BHND": ((2, 3, 17, 20), 2), "BHNN": ((2, 2, 5, 17), 3),
}  # fmt: skip
shapes = pytest.mark.parametrize(("shape", "dim"), SHAPES.values(), ids=SHAPES)


def some_matching(n: int, lead: int = 1, tail: int = 0, r: int = 7) -> Matching:
    x = randn(2, n, 6, seed=n + r, dtype=torch.float64)
    return matching_reference.match(x, None, torch.ones(2, n), r, lead, tail, 1.0, 0.0, 0.0, True)


def crowded(n: int, m: int) -> Matching:
    """Of ``n`` tokens all but ``m`` went into the last but one."""
    keep = torch.arange(n).flip(0)[:m].expand(2, -1)
    gone = torch.arange(n - m).expand(2, -1)
    return keep, gone, torch.full_like(gone, max(m - 2, 0))


def positive(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (0.1 + randn(*shape, seed=seed).abs()).to(dtype)


def strided(x: Tensor) -> Tensor:
    """Equal to ``x``, with every stride doubled and the dimensions laid out backwards."""
    reverse = list(range(x.dim()))[::-1]
    out = torch.full([2 * s for s in x.shape[::-1]], float("nan"), dtype=x.dtype)[(slice(None, None, 2),) * x.dim()]
    return out.copy_(x.permute(reverse)).permute(reverse)


def grouped(raw: Tensor, size: Tensor, matching: Matching) -> None:
    index, weight, sizes = group(raw, size, *matching)
    expected_index, expected_weight, expected_sizes = reference.group(raw.double(), size.double(), *matching)
    _, plain_weight, plain_sizes = aten.group(raw, size, *matching)
    assert torch.equal(index, expected_index)
    within_budget("weight", weight, expected_weight, plain_weight)
    within_budget("size", sizes, expected_sizes, plain_sizes)


@dtypes
@problems
def test_group(n: int, lead: int, tail: int, r: int, dtype: torch.dtype) -> None:
    raw, size = positive(2, n, dtype=dtype), 1 + positive(2, n, seed=1, dtype=dtype)
    grouped(raw, size, some_matching(n, lead, tail, r))


@pytest.mark.parametrize(("n", "m"), [(40, 1), (90, 3), (130, 40)])
def test_group_of_many(n: int, m: int) -> None:
    grouped(positive(2, n), 1 + positive(2, n, seed=1), crowded(n, m))


def test_group_reads_strided_inputs() -> None:
    matching, raw, size = some_matching(17), positive(2, 17), positive(2, 17, seed=1)
    backwards = tuple(t.t().contiguous().t() for t in matching)
    for a, b in zip(group(strided(raw), strided(size), *backwards), group(raw, size, *matching)):
        assert torch.equal(a, b)


def test_group_whose_attention_underflows_has_a_mean() -> None:
    matching = some_matching(17)
    index, weight, _ = group(torch.zeros(2, 17), torch.ones(2, 17), *matching)
    assert torch.equal(weight, 1 / torch.ones(2, 17).scatter_add(1, matching[2], torch.ones(2, 7)).gather(1, index))


def test_group_keeps_a_nan_to_itself() -> None:
    matching = some_matching(17)
    raw = positive(2, 17)
    raw[0, 0] = float("nan")
    weight = group(raw, torch.ones(2, 17), *matching)[1]
    assert weight[0, 0].isnan()
    assert weight.isnan().sum() == 1


def pooled(x: Tensor, matching: Matching, dim: int) -> None:
    raw = positive(2, x.shape[dim], seed=3)
    weight = reference.group(raw, raw, *matching)[1]
    y = pool(x, weight, *matching, dim)
    plain = aten.pool(x, weight, *matching, dim)
    within_budget("y", y, reference.pool(x.double(), weight.double(), *matching, dim), plain)

    # The gradient as autograd has it in float64, and in the low precision.
    dy = randn(*y.shape, seed=4, dtype=x.dtype)
    exact, low = x.double().requires_grad_(), x.clone().requires_grad_()
    reference.pool(exact, weight.double(), *matching, dim).backward(dy.double())
    aten.pool(low, weight, *matching, dim).backward(dy)
    dx = pool_backward(dy, weight, *matching, dim)
    within_budget("dx", dx, exact.grad, low.grad)

    assert torch.equal(pool(strided(x), strided(weight), *matching, dim), y)
    assert torch.equal(pool_backward(strided(dy), weight, *matching, dim), dx)


@dtypes
@shapes
def test_pool(shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    pooled(randn(*shape, dtype=dtype), some_matching(17), dim)


@problems
def test_pool_of_any_matching(n: int, lead: int, tail: int, r: int) -> None:
    pooled(randn(2, n, 3), some_matching(n, lead, tail, r), 1)


@pytest.mark.parametrize(("n", "m"), [(40, 1), (90, 3), (130, 40)])
def test_pool_of_many(n: int, m: int) -> None:
    pooled(randn(2, n, 20, dtype=torch.bfloat16), crowded(n, m), 1)


def test_pool_reads_nothing_that_others_hold() -> None:
    """What is not a number stays in its own group."""
    matching = some_matching(17)
    x, weight = randn(2, 17, 20), torch.ones(2, 17)
    x[:, matching[1][0, 0]] = float("nan")
    nan = pool(x, weight, *matching, 1).isnan().any(-1)
    assert torch.equal(nan, aten.pool(x, weight, *matching, 1).isnan().any(-1))
    assert nan[0].sum() == 1


def unmerged(y: Tensor, index: Tensor, dim: int) -> None:
    x = unmerge(y, index, dim)
    assert torch.equal(x, unmerge_reference.unmerge(y, index, dim))
    assert torch.equal(unmerge(strided(y), index.t().contiguous().t(), dim), x)

    dx = randn(*x.shape, seed=4, dtype=y.dtype)
    exact, low = y.double().requires_grad_(), y.clone().requires_grad_()
    unmerge_reference.unmerge(exact, index, dim).backward(dx.double())
    low.gather(dim, aten.along(index, low, dim)).backward(dx)
    dy = unmerge_backward(dx, index, y.shape[dim], dim)
    within_budget("dy", dy, exact.grad, low.grad)
    assert torch.equal(unmerge_backward(strided(dx), index, y.shape[dim], dim), dy)


@dtypes
@shapes
def test_unmerge(shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    unmerged(randn(*shape, dtype=dtype), torch.randint(17, (2, 23), generator=torch.Generator().manual_seed(0)), dim)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 1), (17, 17), (100, 1), (197, 21), (257, 9)])
def test_unmerge_of_any_map(n: int, m: int) -> None:
    index = torch.randint(m, (2, n), generator=torch.Generator().manual_seed(n))
    unmerged(randn(2, m, 5), index, 1)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float64], ids=str)
def test_unmerge_moves_what_is_no_float(dtype: torch.dtype) -> None:
    y = (randn(2, 5, 3) > 0).to(dtype)
    index = torch.tensor([[4, 0, 0, 2, 1, 3], [1, 1, 1, 1, 1, 1]])
    assert torch.equal(unmerge(y, index, 1), unmerge_reference.unmerge(y, index, 1))


def test_supported() -> None:
    x = torch.zeros(2, 3)
    assert supported(x.bfloat16(), x)
    assert not supported(x, None)
    assert not supported(x.double(), x)
    assert not supported(x > 0, x)
    assert supported_group(x, x)
    assert not supported_group(x.double(), x)
    assert supported_unmerge(x.half())
    assert not supported_unmerge(x.double())
