"""Calls that are made up from schemas: every operator with a rule gets some, and they print as they run."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mctf_compile.testing.operators import draw_call, made, ruled_operators

SHAPES = ((2, 6, 4), (2, 4, 6), (2, 4, 2, 3), (6, 4), (2, 3, 2, 1, 2), (3,))


def tensors(dtype: torch.dtype) -> list[torch.Tensor]:
    return [made(shape, dtype, seed) for seed, shape in enumerate(SHAPES)]


def test_every_operator_with_a_rule_gets_calls_that_print_as_they_run():
    choose = random.Random(0).choice
    without = set()
    for target in ruled_operators():
        for dtype in (torch.float32, torch.int64, torch.complex64, torch.float32, torch.float32, torch.bool) * 50:
            call = draw_call(target, tensors(dtype), choose)
            if call is not None:
                break
        else:
            without.add(str(target))
            continue
        held = dict(zip("abcdef", tensors(dtype)))
        program = call.program(list(held))
        printed = eval(program, {"torch": torch, "made": made, **held})
        if torch.Tag.nondeterministic_seeded not in target.tags and "empty" not in program:
            torch.testing.assert_close(printed, call.run(tensors(dtype)), rtol=0, atol=0, equal_nan=True, msg=program)
    # They run on CUDA alone, or return no tensor, or take probabilities, or int8.
    without -= {f"aten.{name}.dtype" for name in ("addmm", "baddbmm", "bmm", "mm")}
    assert without <= {
        "aten.equal.default",
        "aten.rand_like.generator",
        "aten.randn_like.generator",
        "aten.bernoulli.default",
        "aten._int_mm.default",
    }


@pytest.mark.parametrize("target", [torch.ops.aten.sum.dim_IntList, torch.ops.aten.matmul.default])
def test_hypothesis_can_draw_them(target):
    seen = set()

    @settings(max_examples=30, database=None, derandomize=True)
    @given(st.data())
    def draw(data: st.DataObject) -> None:
        call = draw_call(target, tensors(torch.float32), lambda options: data.draw(st.sampled_from(options)))
        if call is not None:
            assert call.given and isinstance(call.run(tensors(torch.float32)), torch.Tensor)
            seen.add(call.program("abcdef"))

    draw()
    assert len(seen) > 5
