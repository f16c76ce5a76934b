"""The benchmark: the order of its calls, its statistics, and that wrong outputs give no speed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mctf_compile import ConfigError, MctfError, Report
from mctf_compile.exporting.targets import Onnx, OnnxInt8
from mctf_compile.measuring import bench as measuring
from mctf_compile.measuring import candidates as ways
from mctf_compile.measuring.bench import (
    TOLERANCES,
    BenchResult,
    Timing,
    WrongOutputError,
    bench,
    check_fused,
    first_calls,
    interleave,
    relative_errors,
    tolerance_of,
)
from mctf_compile.testing import TinyViT, VitSpec


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


def test_the_fastest_of_all_dense_ones_is_compared_with() -> None:
    result = result_of(**{"eager": 30.0, "inductor": 24.0, "max-autotune-freezing": 22.0, "mctf": 20.0})
    values = result.to_dict()
    assert values["best_dense"] == "max-autotune-freezing"
    assert values["speedup_over_best_dense"] == pytest.approx(1.1)
    assert values["realized_over_best_dense"] == pytest.approx(1.1 / 1.5)


def test_the_fastest_of_all_fused_ones_is_compared() -> None:
    result = result_of(**{"eager": 30.0, "mctf": 20.0, "mctf-freezing": 15.0})
    assert (result.best_dense, result.best_fused) == ("eager", "mctf-freezing")
    assert result.to_dict()["best_fused"] == "mctf-freezing" and result.speedup("eager") == pytest.approx(2.0)
    assert result.speedup_quartiles("eager") == pytest.approx((2.0, 2.0))


def test_the_spread_of_the_speedup_is_taken_round_by_round() -> None:
    # The machine is ten times slower in the second round; the ratios are 2, 1.5 and 1.
    timings = {"eager": Timing("eager", [20.0, 150.0, 10.0]), "mctf": Timing("mctf", [10.0, 100.0, 10.0])}
    result = BenchResult(timings, dict.fromkeys(timings, 1.0), Report([], lambda: (300, 200)))
    assert result.speedup_quartiles("eager") == pytest.approx((1.25, 1.75))


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


def test_a_dense_candidate_must_agree_with_eager() -> None:
    x = torch.ones(2, 4)
    seconds, errors = first_calls({"eager": lambda: x, "freezing": lambda: x * (1 + 5e-5)})
    assert list(seconds) == ["eager", "freezing"] and errors["freezing"] == pytest.approx(5e-5, rel=1e-2)
    with pytest.raises(WrongOutputError, match=r"the output of freezing is 2\.0e-04 away from dense eager's"):
        first_calls({"eager": lambda: x, "freezing": lambda: x * (1 + 2e-4)})


def test_errors_are_those_of_each_image() -> None:
    expected = [torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]]), torch.tensor([2.0, 1.0, 1.0])]
    output = [torch.tensor([[3.0, 3.0], [0.0, 0.0], [1.0, 0.0]]), torch.tensor([2.0, 1.0, 1.5])]
    assert relative_errors(output, expected) == pytest.approx([0.2, 0.0, 0.5])
    # Tensors with no dimension in common are one image; whole numbers are not compared.
    assert relative_errors([output[1], output[0]], [expected[1], expected[0][:2]][:1]) == pytest.approx([0, 0, 0.5])
    assert relative_errors([torch.tensor(2.0)], [torch.tensor(1.0)]) == [1.0]
    assert relative_errors([torch.tensor([1])], [torch.tensor([2])]) == [0.0]


def test_the_coarsest_dtype_tells_the_tolerance() -> None:
    model, x = nn.Linear(2, 2), torch.ones(1, 2)
    assert tolerance_of(model, [x]) == TOLERANCES[torch.float32]
    assert tolerance_of(model, [x], torch.bfloat16) == TOLERANCES[torch.bfloat16]
    assert tolerance_of(model.double(), [x.double()]) == TOLERANCES[torch.float64]
    assert tolerance_of(model.bfloat16(), [x.bfloat16()]) == TOLERANCES[torch.bfloat16]


class Fused:
    """What stands for a rewrite: images whose sum is above ``tipped`` come out as if another token had been fused."""

    def __init__(self, tipped: float = float("inf"), by: float = 0.0, wrong: float = 0.0) -> None:
        self.tipped, self.by, self.wrong = tipped, by, wrong

    def __call__(self, x: Tensor) -> Tensor:
        tipped = (x.sum(1, keepdim=True) > self.tipped) * self.by
        return torch.ones_like(x) * (1.1 + tipped + self.wrong)


def dense(x: Tensor) -> Tensor:
    return torch.ones_like(x)


IMAGES = torch.tensor([[0.0, 1.0], [0.0, 3.0], [0.0, 5.0]])


def test_images_whose_choices_tip_are_allowed_for() -> None:
    # Fusion moves an output by 9 % of its norm; two ways to fuse may lie 18 % apart.
    found = check_fused("mctf", Fused(tipped=4, by=0.1), Fused(), dense, [IMAGES], 1e-4)
    assert found == 0.0
    with pytest.raises(WrongOutputError, match=r"is 2.7e-01 away .* fusion itself moves it by 9.1e-02"):
        check_fused("mctf", Fused(tipped=4, by=0.3), Fused(), dense, [IMAGES], 1e-4)


def test_one_image_at_least_must_agree() -> None:
    wrong = Fused(wrong=0.01)
    with pytest.raises(WrongOutputError, match="of 12 images none comes out of mctf as its own rewrite"):
        check_fused("mctf", wrong, Fused(), dense, [IMAGES], 1e-4)
    # In half precision a choice tips in every image.
    assert check_fused("mctf", wrong, Fused(), dense, [IMAGES], TOLERANCES[torch.bfloat16]) == pytest.approx(0.01 / 1.1)


def test_other_batches_are_looked_at_for_an_image_that_agrees() -> None:
    tips_as_given = lambda x: torch.ones_like(x) * (1.2 if x[0, 0] == 0 else 1.1)
    assert check_fused("mctf", tips_as_given, Fused(), dense, [IMAGES[:1]], 1e-4) == pytest.approx(0.1 / 1.1 / 2)


def test_a_rewrite_that_fuses_at_random_agrees_with_nothing() -> None:
    torch.manual_seed(0)
    at_random = lambda x: torch.ones_like(x) * (1.1 + 0.01 * torch.rand(len(x), 1))
    assert 0 < check_fused("mctf", at_random, at_random, dense, [IMAGES], 1e-4) < 0.01


class Broken(nn.Module):
    """A model without a finite output."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 0


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "interleave", lambda *_: pytest.fail("timed in spite of a wrong output"))


@pytest.mark.usefixtures("untimed")
def test_no_speed_is_reported_where_the_outputs_are_wrong() -> None:
    with pytest.raises(WrongOutputError, match="No time is reported"):
        bench(Broken(), [torch.ones(2, 4)], {"inner": "eager"}, candidates=["eager", "mctf"], report=Report([], 1, 1))


def tiny() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    return TinyViT(VitSpec()).eval(), [torch.randn(2, 3, 32, 32)]


@pytest.mark.usefixtures("untimed")
def test_a_compiler_that_breaks_the_fused_graph_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    made = measuring.candidate

    def broken(name: str, model: nn.Module, inputs: list, options: dict) -> Callable[..., Tensor]:
        run = made(name, model, inputs, options)
        return (lambda x: run(x) + 1e-3) if name == "mctf" and options["inner"] == "aot_eager" else run

    monkeypatch.setattr(measuring, "candidate", broken)
    model, inputs = tiny()
    with pytest.raises(WrongOutputError, match="none comes out of mctf as its own rewrite run by inner='eager' says"):
        bench(model, inputs, {"r": 4, "min_tokens": 4, "inner": "aot_eager"}, candidates=["eager", "mctf"])


def test_a_right_one_is_timed() -> None:
    model, inputs = tiny()
    result = bench(model, inputs, {"r": 4, "min_tokens": 4, "inner": "aot_eager"}, 2, candidates=["mctf", "eager"])
    assert list(result.timings) == ["eager", "mctf"] and result.errors["mctf"] < 1e-4 and result.report.fused


def test_frozen_weights_are_constants_of_the_graph() -> None:
    """Inductor freezes only what Dynamo made an attribute of the graph."""
    seen = []

    def backend(gm: torch.fx.GraphModule, inputs: list) -> Callable[..., object]:
        seen.append(len(inputs))
        return gm.forward

    for name in ("inductor", "freezing", "freezing-dynamic", "mctf", "mctf-freezing"):
        torch._dynamo.reset()
        with torch.no_grad(), ways.compiling(name):
            torch.compile(nn.Linear(2, 2), backend=backend)(torch.ones(1, 2))
    assert seen == [3, 1, 1, 3, 1]


def test_one_dense_candidate_is_compiled_for_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor packs float32 weights for oneDNN there, and leaves them to BLAS where the batch is fixed."""
    given = {}
    for name in ways.CANDIDATES:
        monkeypatch.setattr(torch, "compile", lambda model, name=name, **kwargs: given.setdefault(name, kwargs))
        ways.candidate(name, nn.Linear(2, 2), [], {})
    dynamic = {name for name, kwargs in given.items() if kwargs.get("dynamic")}
    assert dynamic == {"freezing-dynamic"} and given["freezing-dynamic"]["options"] == {"freezing": True}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["eager", "inductr", "mctf"], "no candidate 'inductr'; did you mean 'inductor'"),
        (["eager"], "compares nothing"),
        (["mctf", "mctf-freezing"], "compares nothing"),
    ],
)
def test_candidates_that_are_no_comparison_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench(Broken(), [torch.ones(2, 4)], candidates=names)


RUNTIMES = ["onnxruntime", "openvino", "mctf-onnxruntime", "mctf-openvino"]


def test_other_runtimes_run_the_model_dense_and_fused() -> None:
    """Each on as many threads as PyTorch, and compared with the dense model in the same runtime."""
    for package in ("onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package)
    model, inputs = tiny()
    options = {"r": 4, "min_tokens": 4, "inner": "eager"}
    result = bench(model, inputs, options, 2, warmup=0, candidates=["eager", *RUNTIMES, "mctf"])
    assert list(result.timings) == ["eager", "onnxruntime", "openvino", "mctf", "mctf-onnxruntime", "mctf-openvino"]
    assert max(result.errors.values()) < 1e-4 and result.report.fused
    found = result.to_dict()["candidates"]
    for name in ("onnxruntime", "openvino"):
        dense, fused = (found[n]["median_ms"] for n in (name, f"mctf-{name}"))
        assert found[f"mctf-{name}"]["speedup_over_alike"] == pytest.approx(dense / fused)
    assert [values["speedup_over_alike"] for values in found.values()].count(None) == 4


def test_integers_may_round_as_8_bits_do_and_nothing_else_may(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    model, inputs = tiny()
    options = {"r": 4, "min_tokens": 4}
    names = ["onnxruntime", "onnxruntime-int8", "mctf-onnxruntime", "mctf-onnxruntime-int8"]
    result = bench(model, inputs, options, 2, warmup=0, candidates=names)
    assert [result.alike(name) for name in result.timings] == [None, None, *names[:2]]
    assert all((result.errors[name] > 1e-4) == name.endswith("int8") for name in names)
    load = OnnxInt8.load
    for target, file in ((OnnxInt8, "onnxruntime-int8"), (Onnx, "onnxruntime")):
        far = 0.3 if target is OnnxInt8 else 0.05
        with monkeypatch.context() as patched:
            patched.setattr(target, "load", lambda *of, far=far: lambda x: [(1 + far) * y for y in load(*of)(x)])
            with pytest.raises(WrongOutputError, match=f"the output of {file} is"):
                bench(model, inputs, options, 2, warmup=0, candidates=[file, "mctf"])


@pytest.mark.parametrize("threads", [1, 2])
def test_a_runtime_computes_on_as_many_threads_as_pytorch(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    asked, session = [], onnxruntime.InferenceSession

    def noted(path: str, options: object, **kwargs: object) -> object:
        asked.append(options.intra_op_num_threads)
        return session(path, options, **kwargs)

    monkeypatch.setattr(onnxruntime, "InferenceSession", noted)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x = torch.randn(2, 4)
    model = nn.Linear(4, 3).eval()
    with torch.no_grad():
        (y,) = ways.candidate("onnxruntime", model, [x], {})(x)
        torch.testing.assert_close(y, model(x))
    assert asked == [threads]


@pytest.mark.parametrize("name", ["onnxruntime", "mctf-openvino"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"autocast": torch.bfloat16}, "{} computes in the dtype of the weights, and not under autocast"),
        ({"training": True}, "{} runs a file, which keeps the mode of the model"),
        ({"device": "meta"}, "{} is measured on a CPU, and the inputs are on 'meta'"),
    ],
)
def test_what_a_runtime_cannot_run_is_refused_before_anything_runs(name: str, change: dict, message: str) -> None:
    model, (images,) = tiny()
    model.train(change.get("training", False))
    images = images.to(change.get("device", "cpu"))
    with pytest.raises(ConfigError, match=message.format(name)):
        bench(model, [images], {}, candidates=["eager", "mctf", name], autocast=change.get("autocast"))


def test_an_option_that_no_file_takes_is_refused_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match="dynamic_r=True is for backend='mctf'"):
        bench(*tiny(), {"dynamic_r": True}, candidates=["eager", "mctf-onnxruntime"])


def test_a_runtime_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mctf_compile.exporting.targets.find_spec", lambda name: None)
    with pytest.raises(MctfError, match=r"openvino.*pip install 'mctf-compile\[openvino\]'"):
        bench(*tiny(), {}, candidates=["openvino", "mctf"])


def test_a_bad_option_is_refused_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match="did you mean 'tau_sim'"):
        bench(Broken(), [torch.ones(2, 4)], {"tau_simm": 1.0})
