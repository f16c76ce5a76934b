"""The table of rules against its operators: on fused copies each gives what it gives on all of them, or declines.

The calls are made up from the operators' schemas, for every operator with a rule, every dtype that it takes and every
position of the token axis; each runs eagerly on the fused tokens and on all of their copies.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import islice, product
from unittest.mock import patch

import pytest
import torch
from multiset import POSITIONS, Form, Outcome, draw_forms, exists, program
from torch._ops import OpOverload

from mctf_compile.passes.rules import RULES, attention, contractions, find_rule, reductions
from mctf_compile.passes.rules.base import overload_of
from mctf_compile.testing.operators import DTYPES, ruled_operators

aten = torch.ops.aten

# Calls that are drawn of an operator until tokens meet in one at a position and in a dtype, and until one that they
# meet in runs on fused tokens; where none did in one dtype, so many more in each other.
TRIES, MORE_TRIES = 120, 12

# Operators that no call can be made of here, each with the reason.
WITHOUT_CALLS = {
    "_int_mm.default": "it takes int8 alone, which no call here is made in; tests of quantised models run it"
}
# Operators whose rule says how they run on fused tokens that meet, and that never do here, each with the reason.
NEVER_WEIGHTED = {
    **dict.fromkeys(
        ("rand_like.default", "randn_like.default", "bernoulli.default", "bernoulli.p"),
        "in training alone copies share the number that is drawn",
    ),
    "select_scatter.default": "none of the calls that are drawn writes to a protected token; test_writes does",
}
# Operators in which tokens do not meet at some positions of their axis.
NEVER_MEET = {
    **{name: {2, 3} for name in ("mm.default", "mv.default", "addmm.default")},  # Two dimensions are all they have.
    **{name: {0, 3} for name in ("bmm.default", "baddbmm.default")},  # The first of three is multiplied one by one.
    **{f"adaptive_{kind}_pool1d.default": {3} for kind in ("avg", "max")},  # Three dimensions are all it has.
    **{f"adaptive_max_pool{n}d.default": {0} for n in (2, 3)},  # The first of their dimensions are not pooled.
}

PLACE = {layout: position for position, layouts in POSITIONS.items() for layout in layouts}


@dataclass
class Row:
    """What the calls of one operator came to."""

    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        return [f"{o.shown}: {o.problem}" for o in self.outcomes if o.problem]

    @property
    def dtypes(self) -> list[torch.dtype]:
        """The dtypes of tokens that the operator takes."""
        return sorted({o.dtype for o in self.outcomes}, key=str)

    @property
    def weighted(self) -> bool:
        """Whether tokens met in a call that ran on fused ones."""
        return any(o.weighted for o in self.outcomes)

    def at(self, position: int | str, dtype: torch.dtype) -> list[Outcome]:
        """The calls in which tokens meet, with the token axis at one position."""
        return [o for o in self.outcomes if o.mixes and o.dtype is dtype and PLACE[o.layout] == position]

    def add(self, layout: str, form: Form, alike: bool) -> None:
        """Run a call in every dtype that the operator takes."""
        for dtype in DTYPES:
            if exists(layout, dtype):
                self.outcomes.extend(program(dtype, alike, layout).run(form.of(dtype)))


def row(target: OpOverload) -> Row:
    """Calls of an operator with the tokens at every position.

    Where tokens can meet in it they do at each, in every dtype, and by the form that its rule has for that if it has
    one; calls are drawn until they do.
    """
    found, rule = Row(), find_rule(target)
    number = 1 if rule is RULES[aten.mul.Tensor] else 3
    for position in POSITIONS:
        for i, (layout, form) in enumerate(islice(draw_forms(target, [position], 12), number)):
            found.add(layout, form, i % 2 == 0)
    if not found.outcomes:
        for layout, form in islice(draw_forms(target, list(POSITIONS), 2000), 3):
            found.add(layout, form, True)
    if rule.fused is None and not _reduces(target):
        return found
    tries = dict.fromkeys(POSITIONS, TRIES)
    for position, dtype in product(POSITIONS, found.dtypes):
        met = found.at(position, dtype)
        ran = any(o.weighted and o.dtype is dtype for o in found.outcomes)
        if any(o.weighted for o in met) or (met and (ran or rule.fused is None)) or (ran and position not in range(4)):
            continue
        tried = None
        for layout, form in draw_forms(target, [position], tries[position] if met else TRIES, [dtype]):
            outcomes = [o for o in program(dtype, True, layout).run(form.call) if o.mixes and o.dtype is dtype]
            tried = tried or (outcomes and (layout, form))
            if outcomes and (rule.fused is None or any(o.weighted for o in outcomes)):
                tried = layout, form
                break
        tries[position] = MORE_TRIES
        if tried:
            found.add(*tried, True)
    return found


def _name(target: OpOverload) -> str:
    return str(target).removeprefix("aten.")


def _reduces(target: OpOverload) -> bool:
    """Whether tokens are all that an operator is about: a reduction or a product."""
    return find_rule(target).axes.__module__ in {m.__name__ for m in (reductions, contractions, attention)}


def _overload(name: str) -> OpOverload:
    return overload_of(name.removesuffix(".default"))


@pytest.fixture(scope="module")
def table() -> dict[str, Row]:
    return {_name(target): row(target) for target in ruled_operators()}


def test_on_fused_copies_an_operator_gives_what_it_gives_on_all_or_declines(table):
    assert [f"{name}: {problem}" for name, found in table.items() for problem in found.problems] == []


def test_every_rule_is_exercised(table):
    assert {name for name, found in table.items() if not found.outcomes} == set(WITHOUT_CALLS)
    fused = {name for name, found in table.items() if found.outcomes and find_rule(_overload(name)).fused is not None}
    assert {name for name in fused if not table[name].weighted} == set(NEVER_WEIGHTED)


def test_tokens_meet_at_every_position_in_every_dtype(table):
    """In reductions and products; what moves axes about or works token by token may let them meet nowhere."""
    reducing = {name: found for name, found in table.items() if found.outcomes and _reduces(_overload(name))}
    never = {
        name: {p for p in range(4) if not any(found.at(p, d) for d in found.dtypes)} for name, found in reducing.items()
    }
    assert {name: positions for name, positions in never.items() if positions} == NEVER_MEET
    for name, found in reducing.items():
        everywhere = product(set(range(4)) - never[name], found.dtypes)
        assert [(p, d) for p, d in everywhere if not found.at(p, d)] == [], name


def unweighted(call):
    """Σ x over the fused tokens, as if each were one."""
    return call.emit()


def by_the_number_of_tokens(call):
    """Σ x / M over the fused tokens."""
    x, dims = call.intensive("self"), reductions.reduced(call.call)[0]
    return call.result(x.tensor.to(call.args["dtype"] or x.tensor.dtype).mean(sorted(dims), call.args["keepdim"]))


def of_the_first(call):
    """Whether the first of the tokens is true."""
    x = call.intensive("self").tensor
    return call.result(x.narrow(call.wrapped("dim"), 0, 1).any(call.wrapped("dim"), call.args["keepdim"]))


BROKEN = [
    ("sum.dim_IntList", unweighted, torch.int64),
    ("sum.dim_IntList", unweighted, torch.bool),
    ("mean.dim", by_the_number_of_tokens, torch.float64),
    ("any.dim", of_the_first, torch.bool),
    ("softmax.int", unweighted, torch.float64),
    ("matmul.default", unweighted, torch.int32),
]


@pytest.mark.parametrize(("name", "fused", "dtype"), BROKEN)
def test_a_broken_rule_is_seen(name, fused, dtype):
    target = _overload(name)
    with patch.dict(RULES, {target: replace(RULES[target], fused=fused)}):
        wrong = [o for o in row(target).outcomes if o.problem and o.dtype is dtype]
    assert {PLACE[o.layout] for o in wrong} & {0, 1, 2, 3}


def test_an_operator_without_calls_is_missed(table):
    without = {**table, "sum.default": Row()}
    with pytest.raises(AssertionError, match=r"sum\.default"):
        test_every_rule_is_exercised(without)
