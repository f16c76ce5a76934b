"""The benchmark: the order of its calls, its statistics, and that wrong outputs give no speed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mctf_compile import ConfigError, Report
from mctf_compile.bench import BenchResult, Timing, WrongOutputError, bench, first_calls, interleave


def test_interleave_runs_the_candidates_in_turn() -> None:
    calls: list[str] = []
    candidates = {name: lambda name=name: calls.append(name) for name in "ABC"}
    timings = interleave(candidates, rounds=2, warmup=1)
    assert "".join(calls) == "ABC" * 3
    assert [t.name for t in timings.values()] == list("ABC")
    assert all(len(t.milliseconds) == 2 and min(t.milliseconds) >= 0 for t in timings.values())


def test_interleave_tells_its_progress() -> None:
    told: list[tuple[str, int, int]] = []
    interleave({"A": lambda: None}, rounds=2, warmup=1, progress=lambda *step: told.append(step))
    assert told == [("rounds", 1, 3), ("rounds", 2, 3), ("rounds", 3, 3)]


@pytest.mark.parametrize(
    ("milliseconds", "median", "spread"),
    [([3.0], 3.0, 0.0), ([1.0, 100.0, 2.0], 2.0, 49.5), ([4.0, 1.0, 3.0, 2.0, 5.0], 3.0, 2.0)],
)
def test_median_and_spread(milliseconds: list[float], median: float, spread: float) -> None:
    timing = Timing("A", milliseconds)
    assert (timing.median, timing.spread) == (median, spread)


def result_of(**medians: float) -> BenchResult:
    timings = {name: Timing(name, [ms]) for name, ms in medians.items()}
    return BenchResult(timings, dict.fromkeys(medians, 1.0), Report([], lambda: (300, 200)))


def test_ratios_are_those_of_the_medians() -> None:
    result = result_of(eager=30.0, inductor=24.0, mctf=20.0)
    assert result.best_dense == "inductor"
    assert result.macs_ratio == pytest.approx(1.5)
    assert result.speedup("eager") == pytest.approx(1.5) and result.realized("eager") == pytest.approx(1.0)
    values = result.to_dict()
    assert values["speedup_over_inductor"] == values["speedup_over_best_dense"] == pytest.approx(1.2)
    assert values["realized_over_inductor"] == pytest.approx(0.8)


def test_the_better_dense_can_be_eager() -> None:
    values = result_of(eager=20.0, inductor=24.0, mctf=20.0).to_dict()
    assert values["best_dense"] == "eager" and values["speedup_over_best_dense"] == pytest.approx(1.0)
    assert values["speedup_over_inductor"] == pytest.approx(1.2)


def test_without_inductor_nothing_is_compared_with_it() -> None:
    values = result_of(eager=30.0, mctf=20.0).to_dict()
    assert values["speedup_over_inductor"] is None and values["realized_over_inductor"] is None


def with_last_column(x: Tensor, value: float) -> Tensor:
    return torch.cat([x[:, :-1], torch.full_like(x[:, -1:], value)], 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: with_last_column(x, float("nan")), "output 0 of mctf has values that are not finite"),
        (lambda x: with_last_column(x, float("inf")), "output 0 of mctf has values that are not finite"),
        (lambda x: x[:, 1:], r"mctf returns the shapes \[\(2, 3\)\] instead of \[\(2, 4\)\]"),
        (lambda x: (x, x), r"mctf returns the shapes \[\(2, 4\), \(2, 4\)\]"),
    ],
)
def test_a_wrong_output_is_refused(wrong: Callable[[Tensor], object], message: str) -> None:
    x = torch.ones(2, 4)
    with pytest.raises(WrongOutputError, match=message):
        first_calls({"eager": lambda: x, "mctf": lambda: wrong(x)})


class Broken(nn.Module):
    """A model without a finite output."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 0


def test_no_speed_is_reported_where_the_outputs_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mctf_compile.bench.interleave", lambda *_: pytest.fail("timed in spite of a wrong output"))
    with pytest.raises(WrongOutputError, match="no time is reported"):
        bench(Broken(), [torch.ones(2, 4)], {"inner": "eager"}, with_inductor=False, report=Report([], 1, 1))


def test_a_bad_option_is_refused_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match="did you mean 'tau_sim'"):
        bench(Broken(), [torch.ones(2, 4)], {"tau_simm": 1.0})
