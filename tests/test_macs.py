"""Counting multiply-accumulates: what was counted before in another graph is counted alike."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from mctf_compile.passes.planning import macs
from mctf_compile.passes.planning.macs import count_macs

aten = torch.ops.aten
x, w, whole = torch.empty(2, 4, 8), torch.empty(6, 8), torch.empty(2, 4, 8, dtype=torch.int64)


def traced(function: Callable[..., Tensor], *inputs: Tensor) -> fx.GraphModule:
    return make_fx(function, pre_dispatch=True, tracing_mode="fake")(*inputs)


def under_autocast(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = aten.linear.default(a, b)
    return aten.bmm.default(y, c)


def of_whole_numbers(a: Tensor) -> Tensor:
    y = aten.mul.Tensor(a, 1)
    return aten.bmm.default(y, aten.mT.default(a))


@pytest.mark.parametrize(
    ("function", "inputs", "expected"),
    [
        # The linear alone makes float32, by which no bfloat16 can be multiplied.
        (under_autocast, (x, w, torch.empty(2, 6, 5, dtype=torch.bfloat16)), 2 * (4 * 8 * 6 + 4 * 6 * 5)),
        # Times 1.0 they would be no whole numbers, by which those can't be multiplied either.
        (of_whole_numbers, (whole,), 2 * 4 * 8 * 4),
        (lambda a: aten.bmm.default(a, aten.mT.default(a)), (x,), 2 * 4 * 8 * 4),
    ],
)
def test_counts_do_not_depend_on_what_was_counted_before(
    function: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(macs, "_calls", {})
    assert count_macs(traced(lambda a, b: aten.linear.default(a, b), x, w)) == 2 * 4 * 8 * 6
    assert count_macs(traced(lambda a: aten.mul.Tensor(a, 1.0), whole)) == 0
    assert (
        count_macs(traced(lambda a: aten.bmm.default(a, aten.mT.default(a)), torch.empty(2, 40, 8))) == 2 * 40 * 8 * 40
    )
    known = len(macs._calls)
    gm = traced(function, *inputs)
    assert count_macs(gm) == expected
    assert len(macs._calls) > known
    assert count_macs(gm) == expected


def test_no_more_calls_are_kept_than_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(macs, "_calls", {})
    monkeypatch.setattr(macs, "CALLS", 3)
    for n in range(1, 9):
        assert count_macs(traced(lambda a, b: aten.linear.default(a, b), torch.empty(n, 8), w)) == n * 8 * 6
        assert len(macs._calls) <= 3
