"""``r="auto"`` and ``profit``: what is left open is settled by counting, or by running."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import fx, nn
from vectors import capture

import mctf_compile
from mctf_compile import ConfigError, FusionConfig, set_r
from mctf_compile.compiler import rewrite, run_pipeline
from mctf_compile.inner.clock import Clock
from mctf_compile.options.schedule import distribute, least
from mctf_compile.passes.planning.costs import Costs, unprofitable
from mctf_compile.passes.planning.macs import count_macs, macs_by_counts
from mctf_compile.passes.planning.plan import tokens_remaining

IMAGES = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
DEPTH = 4


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def vit(**options) -> nn.Module:
    torch.manual_seed(1)
    model = timm.create_model("vit_tiny_patch16_224", img_size=48, patch_size=8, depth=DEPTH, **options)
    return model.eval()


@pytest.fixture(scope="module")
def graph() -> tuple[fx.GraphModule, list[torch.Tensor]]:
    """The graph of ``vit()``, and its inputs."""
    with torch.no_grad():
        return capture(vit(), IMAGES)


def captured(function, model: nn.Module = None, images: torch.Tensor = IMAGES):
    """What ``function`` says of the graph that Dynamo captures."""
    said = []

    def backend(gm, inputs):
        said.append(function(gm, inputs))
        return gm.forward

    with torch.no_grad():
        torch.compile(model or vit(), backend=backend, dynamic=False)(images)
    return said[0]


def compiled(model: nn.Module, **options) -> nn.Module:
    return torch.compile(copy.deepcopy(model), backend="mctf", options={"inner": "eager", **options}, dynamic=False)


def removed(report: mctf_compile.Report) -> list[int]:
    return [block.removed for block in report.blocks]


@pytest.mark.parametrize("r", [0, 1, 3, 8, [0, 5, 0, 2]], ids=str)
@pytest.mark.parametrize("method", ["mctf", "tome"])
def test_symbolic_counts_are_those_of_the_static_graph(method, r, graph):
    config = FusionConfig(method=method, r=r)
    state = run_pipeline(*graph, FusionConfig(method=method, r=5), adjustable=True)[0]
    symbolic = macs_by_counts(state.result, state.counts)(tokens_remaining(state, config.method))
    static = rewrite(*graph, config)[1].macs_after
    if r in (0, [0, 5, 0, 2]):
        # A block that fuses nothing still compares its tokens, where it may be told to fuse some at the next call.
        assert static < symbolic < 1.01 * static
    else:
        assert symbolic == static


@pytest.mark.parametrize("target", ["gmacs=0.05", "gmacs=0.04", "speedup=1.2", "speedup=1.5"])
@pytest.mark.parametrize("method", ["mctf", "tome", "tofu", "random"])
def test_the_target_is_met_by_the_fewest_tokens(method, target, graph):
    _, report = rewrite(*graph, FusionConfig(method=method, r="auto", target=target))
    quantity, value = target.split("=")
    goal = float(value) * 2e9 if quantity == "gmacs" else report.macs_before / float(value)
    assert report.macs_after <= goal and target in report.summary
    total, blocks = sum(removed(report)), [i for i, r in enumerate(removed(report)) if r]
    _, fewer = rewrite(*graph, FusionConfig(method=method, r=distribute(total - 1, blocks, DEPTH)))
    assert fewer.macs_after > goal


def test_auto_runs_as_the_list_that_it_found():
    model = vit()
    found = removed(mctf_compile.explain(model, IMAGES, r="auto", target="speedup=1.4"))
    with torch.no_grad():
        got = compiled(model, r="auto", target="speedup=1.4")(IMAGES)
        assert torch.equal(got, compiled(model, r=found)(IMAGES))


def test_a_target_that_the_dense_model_meets_leaves_it_dense():
    report = mctf_compile.explain(vit(), IMAGES, r="auto", target="gmacs=1")
    assert not report.fused and report.reason == "the dense model meets the target gmacs=1"


@pytest.mark.parametrize("target", ["gmacs=0.001", "speedup=30"])
def test_a_target_out_of_reach_says_what_can_be_reached(target):
    with pytest.raises(ConfigError, match=r"out of reach: .* GMACs per image, \d\.\d\dx fewer"):
        mctf_compile.explain(vit(), IMAGES, r="auto", target=target)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": "auto"}, "r='auto' needs a target"),
        ({"r": 8, "target": "gmacs=2"}, "target='gmacs=2' has no effect with r=8"),
        ({"r": "auto", "target": "flops=3"}, "'speedup=1.5'"),
        ({"r": "auto", "target": "speedup=1"}, "above 1"),
        ({"r": "auto", "target": "gmacs=nan"}, "'gmacs=2.6'"),
        ({"r": "auto", "target": 2.6}, "'gmacs=2.6'"),
        ({"r": "automatic"}, "no preset; the presets are 'fast', 'auto'"),
        ({"profit": "yes"}, "profit='yes' is not one of"),
        ({"method": "evit", "profit": "model"}, "profit='model' is about the option r, which method 'evit'"),
        ({"method": "evit", "target": "gmacs=2"}, "method 'evit' takes no option 'target'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ConfigError) as error:
        FusionConfig(**options)
    assert message in str(error.value)


def test_set_r_goes_back_to_the_target():
    model = vit()
    adjustable = compiled(model, r="auto", target="speedup=1.4", dynamic_r=True)
    fixed = compiled(model, r=3, dynamic_r=True)
    with torch.no_grad():
        at_target = adjustable(IMAGES)
        found = removed(mctf_compile.explain(model, IMAGES, r="auto", target="speedup=1.4"))
        torch.testing.assert_close(at_target, compiled(model, r=found)(IMAGES), rtol=0, atol=1e-5)
        set_r(adjustable, 3)
        torch.testing.assert_close(adjustable(IMAGES), fixed(IMAGES), rtol=0, atol=1e-5)
        set_r(adjustable, "auto")
        assert torch.equal(adjustable(IMAGES), at_target)
    with pytest.raises(ConfigError, match="needs a target"):
        set_r(fixed, "auto")


def test_fusions_are_dropped_from_the_least_useful_on():
    per_mac = 1e-9

    def verdicts(gm, inputs):
        state = run_pipeline(gm, inputs, FusionConfig(r=6), adjustable=True)[0]
        macs = macs_by_counts(state.result, state.counts)
        # What the fusion of each block saves as long as the others fuse.
        counts = {
            i: rewrite(gm, inputs, FusionConfig(r=[0, *(6 * (j != i) for j in (1, 2, 3))]))[1].macs_after
            for i in range(DEPTH)
        }
        saved = {i: (counts[i] - counts[0]) * per_mac for i in (1, 2, 3)}

        def declined(cost: float) -> dict[int, str]:
            return unprofitable(state, macs, Costs(per_mac, dict.fromkeys((1, 2, 3), cost), "given"))

        return saved, declined

    saved, declined = captured(verdicts)
    assert saved[1] > saved[2] > saved[3] > 0
    assert declined(0.0) == {} and set(declined(1.0)) == {1, 2, 3}
    between = declined((saved[3] + saved[2]) / 2)
    assert set(between) == {3} and between[3].startswith("fusing 6 tokens here would save ")


def test_the_model_leaves_a_tiny_batch_dense_and_fuses_a_large_one():
    small = mctf_compile.explain(vit(), IMAGES[:1], r=1, profit="model")
    assert not small.fused and "would save" in small.blocks[1].reason and "estimated for cpu" in small.blocks[1].reason
    large = timm.create_model("vit_base_patch16_224", depth=3).eval()
    assert mctf_compile.explain(large, torch.zeros(8, 3, 224, 224), profit="model").fused


def test_a_target_is_met_without_the_blocks_that_do_not_pay(monkeypatch):
    def last_is_dear(blocks):
        return Costs(1e-9, {b.index: float(b.index == DEPTH - 1) for b in blocks}, "given")

    monkeypatch.setattr("mctf_compile.passes.planning.budget.nominal", last_is_dear)
    report = mctf_compile.explain(vit(), IMAGES, r="auto", target="speedup=1.3", profit="model")
    assert removed(report)[DEPTH - 1] == 0 and "given" in report.blocks[DEPTH - 1].reason
    assert report.macs_before / report.macs_after >= 1.3


class Synthetic:
    """Stands for the clock: a run takes time for its multiply-accumulates and for each fusion."""

    per_mac, fusion, base = 1e-9, 2e-3, 5e-3

    def __init__(self, state) -> None:
        self.macs = macs_by_counts(state.result, state.counts)
        self.dense, self.fusions = count_macs(state.normal), len(state.plan.fusing)

    def seconds(self, *variants):
        return [
            self.base
            + self.per_mac * (self.dense if left is None else self.macs(left))
            + (0 if left is None else self.fusion * self.fusions)
            for left in variants
        ]


def test_a_latency_is_met_by_the_fewest_tokens(monkeypatch):
    monkeypatch.setattr("mctf_compile.compiler.Clock", Synthetic)
    model = vit()
    report = mctf_compile.explain(model, IMAGES, r="auto", target="latency_ms=100")
    taken = 1e3 * (Synthetic.base + 3 * Synthetic.fusion + Synthetic.per_mac * report.macs_after)
    assert 0.97 * 100 <= taken <= 100 and f"latency_ms=100: {taken:.2f} ms measured" in report.summary
    assert mctf_compile.explain(model, IMAGES, r="auto", target="latency_ms=900").reason.startswith(
        "the dense model meets the target latency_ms=900"
    )
    with pytest.raises(ConfigError, match="latency_ms=20' is out of reach"):
        mctf_compile.explain(model, IMAGES, r="auto", target="latency_ms=20")


@pytest.mark.parametrize("target", [None, "speedup=1.2", "latency_ms=125"])
def test_measured_costs_decide_which_blocks_fuse(monkeypatch, target):
    monkeypatch.setattr("mctf_compile.compiler.Clock", Synthetic)
    monkeypatch.setattr(Synthetic, "fusion", 9e-3)
    options = {"r": 6} if target is None else {"r": "auto", "target": target}
    report = mctf_compile.explain(vit(), IMAGES, profit="measure", **options)
    dense = [i for i, block in enumerate(report.blocks) if block.reason and "(measured)" in block.reason]
    assert dense and report.fused and min(dense) > max(i for i, r in enumerate(removed(report)) if r)
    if target == "speedup=1.2":
        assert report.macs_before / report.macs_after >= 1.2


@pytest.mark.parametrize("options", [{"profit": "measure"}, {"r": "auto", "target": "latency_ms=10000"}], ids=str)
def test_running_leaves_no_trace(options):
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = vit(drop_rate=0.1).train()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls.add_(1)
            return self.vit(x)

    model = Counting()

    def states(gm, inputs):
        before = torch.get_rng_state(), model.calls.clone()
        run_pipeline(gm, inputs, FusionConfig(inner="eager", **options))
        return zip(before, (torch.get_rng_state(), model.calls.clone()))

    for before, after in captured(states, model):
        assert torch.equal(before, after)


def test_a_clock_times_what_it_is_given():
    def runs(gm, inputs):
        config = FusionConfig(inner="aot_eager")
        state = run_pipeline(gm, inputs, config, adjustable=True)[0]
        clock = Clock(state)
        left = tokens_remaining(state, FusionConfig(r=4).method)
        return clock._run(None)(), clock._run(left)(), clock.seconds(None, left)

    model = vit()
    dense, fused, seconds = captured(runs, model)
    assert len(seconds) == 2 and min(seconds) > 0
    with torch.no_grad():
        torch.testing.assert_close(dense[0], model(IMAGES), rtol=0, atol=1e-5)
        torch.testing.assert_close(fused[0], compiled(model, r=4)(IMAGES), rtol=0, atol=1e-5)


def test_nothing_to_run_on_is_said():
    with pytest.raises(ConfigError, match="give it real inputs"):
        mctf_compile.explain(vit().to("meta"), IMAGES.to("meta"), profit="measure")


def test_least_and_spread():
    assert [least(lambda k, n=n: k >= n, 9) for n in (0, 1, 5, 9, 10)] == [0, 1, 5, 9, None]
    assert distribute(7, [1, 2, 4], 5) == [0, 2, 2, 0, 3] and distribute(0, [], 2) == [0, 0]
