"""Counting multiply-accumulates: what was counted before in another graph is counted alike."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mctf_compile.kernels.library import macs_of, says_macs
from mctf_compile.kernels.matching import aten as matching
from mctf_compile.passes.planning import macs
from mctf_compile.passes.planning.macs import count_macs

aten = torch.ops.aten


def overloads() -> list[torch._ops.OpOverload]:
    """Every operator of this project."""
    names = {schema.name.partition("::")[2] for schema in torch._C._jit_get_all_schemas() if "mctf::" in schema.name}
    return [getattr(torch.ops.mctf, name).default for name in sorted(names)]


# Before a test adds any.
SAID = {operator for operator in overloads() if says_macs(operator)}
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


def executed(function: Callable[..., object], *args: object) -> int:
    """The multiply-accumulates of the ATen operators that a call consists of."""
    with FlopCounterMode(display=False, custom_mapping=macs.COUNTED) as counter, torch.no_grad():
        function(*args)
    return counter.get_total_flops() // 2


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_operators_multiply_as_much_as_they_say(data: st.DataObject) -> None:
    """What an operator says of itself is what PyTorch's counter finds in the operators that it consists of."""
    drawn = data.draw
    b, h, c, d, lead, tail = (drawn(st.integers(low, 3)) for low in (1, 1, 1, 1, 0, 0))
    height, width = drawn(st.integers(1, 5)), drawn(st.integers(1, 5))
    free = height * width
    n = lead + free + tail
    r = drawn(st.integers(0, free // 2))
    taus = [drawn(st.sampled_from((0.0, 1.0, 2.0))), 20.0, 0.0]
    x, size, scores = torch.randn(b, n, c), torch.ones(b, n), torch.rand(b, n)
    q, k, v = torch.randn(b, h, n, d), torch.randn(b, h, n, d), torch.randn(b, h, n, c)
    ops = torch.ops.mctf
    match = (x, scores, size, r, lead, tail, *taus, drawn(st.booleans()))
    keep, gone, _ = found = ops.match(*match)
    index, weight, _ = ops.group(scores, size, *found)
    _, weights, norm = ops.importance(q, k, None, None, 1.0)
    routed = (x, scores > 0.5, torch.randn(d, c), None, torch.randn(d, c), None)
    calls = {
        ops.match: match,
        ops.group: (scores, size, *found),
        ops.pool: (x, drawn(st.sampled_from((weight, None))), *found, 1),
        ops.keep: (x, keep, 1),
        ops.unmerge: (x[:, : n - r], index, 1),
        ops.importance: (q, k, size.log(), None, 1.0),
        ops.attention: (q, k, v, size.log(), None, 1.0, 0.0),
        ops.ahead: (weights, norm, v[:, :, : n - r], index, drawn(st.sampled_from((weight, None))), *found, 0.0),
        ops.select: (scores, free - r, lead, tail),
        ops.nearest: (x, keep, gone, lead, tail),
        ops.binary_attention: (q, k, v),
        ops.sized_binary_attention: (q, k, v, size),
        ops.binary_importance: (q, k, size),
        ops.neighbours: (v, torch.randn(h * c, 1, 3, 3), lead, height, width),
        ops.powers: (torch.ones(c, d, dtype=torch.int8), torch.float32),
    }
    for operator, args in calls.items():
        assert macs_of(operator.default, args, {}) == executed(operator, *args), operator
    # Each token is multiplied by one of the two weights.
    for routed_by in (ops.routed_linear, ops.dispatched_linear):
        assert macs_of(routed_by.default, routed, {}) == executed(F.linear, *routed[:1], routed[2])
    tile = [drawn(st.integers(1, 3)), drawn(st.integers(1, 3))]
    receive, leave = matching.tiles(height, width, tile, None)
    tiled = (x, scores, size, min(r, len(leave)), lead, tail, height, width, tile, None, taus)
    of_a, of_b = size[:, : len(leave)], size[:, : len(receive)]
    best = (x[:, leave], x[:, receive], of_a, of_b, taus[0], None, None)
    if leave:
        assert macs_of(ops.match_tiles.default, tiled, {}) == macs_of(ops.best.default, best, {})
        assert macs_of(ops.best.default, best, {}) == executed(matching.best, *best)
    others = ops.routed_linear, ops.dispatched_linear, ops.match_tiles, ops.best, ops.assign
    assert SAID == {op.default for op in (*calls, *others)}


def test_arguments_by_name_are_counted_alike() -> None:
    x, size = torch.randn(1, 9, 4), torch.ones(1, 9)
    given = {"importance": None, "size": size, "r": 2, "lead": 1, "tail": 0, "tau_sim": 1.0}
    rest = {"tau_info": 0.0, "tau_size": 0.0, "bidirectional": True}
    assert macs_of(torch.ops.mctf.match.default, (x,), {**given, **rest}) == 4 * 4 * 5
