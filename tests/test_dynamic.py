"""``dynamic_r``: one compiled model, every reduction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import timm
import torch
from torch import nn
from vectors import capture

import mctf_compile
from mctf_compile import ConfigError, FusionConfig, set_r
from mctf_compile.inner.regional import CompiledRegion
from mctf_compile.methods import METHODS, Choice, Combine, Evidence, Merging, Site

IMAGES = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
DEPTH = 4
# 37 tokens: none, one, odd and even numbers, ratios, lists, more than there are.
REDUCTIONS = [
    4,
    0,
    1,
    2,
    3,
    5,
    6,
    7,
    8,
    9,
    10,
    11,
    12,
    13,
    14,
    18,
    100,
    0.1,
    0.25,
    [0, 3, 0, 5],
    [4, 0, 1, 2],
    (3, -0.5),
]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    # Static compiles to compare with: all of one forward function.
    with torch._dynamo.config.patch(recompile_limit=100):
        yield


@pytest.fixture
def compilations(monkeypatch) -> list[tuple[int, ...]]:
    """The numbers for which a region was compiled."""
    made = []
    compile_one = CompiledRegion._compile

    def noted(self, numbers, tensors):
        made.append(numbers)
        return compile_one(self, numbers, tensors)

    monkeypatch.setattr(CompiledRegion, "_compile", noted)
    return made


def vit(**options) -> nn.Module:
    torch.manual_seed(1)
    return timm.create_model("vit_tiny_patch16_224", img_size=48, patch_size=8, depth=DEPTH, **options).eval()


def adjustable(model: nn.Module, inner: str = "eager", **options) -> nn.Module:
    options = {"inner": inner, "dynamic_r": True, **options}
    return torch.compile(model, backend="mctf", options=options, dynamic=False)


def rewriter(model: nn.Module, images: torch.Tensor) -> Callable[..., torch.Tensor]:
    """What a model computes on images where it is fused by given options, and by no others."""
    gm, inputs = capture(model, images)

    def outputs(**options) -> torch.Tensor:
        fused, _ = mctf_compile.rewrite(gm, inputs, FusionConfig.from_options(options))
        return fused(*inputs)[0]

    return outputs


@pytest.fixture(scope="module")
def static_results() -> list[torch.Tensor]:
    """What each of the reductions gives that is compiled for it alone."""
    with torch.no_grad():
        static = rewriter(vit(), IMAGES)
        return [static(r=r) for r in REDUCTIONS]


@pytest.mark.parametrize("start", [4, 0], ids=["from-4", "from-0"])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_every_r_equals_the_static_compile_and_none_recompiles(inner, start, static_results, compilations):
    compiled = adjustable(vit(), inner, r=start)
    with torch.no_grad():
        compiled(IMAGES)
        first = len(compilations)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for r, want in zip(REDUCTIONS, static_results, strict=True):
                set_r(compiled, r)
                torch.testing.assert_close(compiled(IMAGES), want, rtol=0, atol=1e-5, msg=lambda m, r=r: f"r={r}: {m}")
    assert len(compilations) == first


@pytest.mark.parametrize(
    "options",
    [
        {"method": "tome"},
        {"attention": "exact"},
        {"attention": "current"},
        {"matching": "one_way"},
        {"pooling": "max"},
        {"layers": [1, 3]},
        {"method": "tofu"},
        {"method": "pitome"},
        {"min_tokens": 30},
    ],
    ids=str,
)
def test_other_methods_and_options(options):
    with torch.no_grad():
        static = rewriter(vit(), IMAGES)
        compiled = adjustable(vit(), "aot_eager", r=3, **options)
        for r in (3, 0, 1, 6, 40):
            set_r(compiled, r)
            torch.testing.assert_close(compiled(IMAGES), static(r=r, **options), rtol=0, atol=1e-5)


def test_attention_spelled_out():
    model = vit()
    for block in model.blocks:
        block.attn.fused_attn = False
    with torch.no_grad():
        static = rewriter(model, IMAGES)
        compiled = adjustable(model, "aot_eager", r=3)
        for r in (3, 0, 1, 6, 40):
            set_r(compiled, r)
            torch.testing.assert_close(compiled(IMAGES), static(r=r), rtol=0, atol=1e-5)


def test_a_context_manager_gives_the_old_r_back():
    compiled = adjustable(vit(), r=4)
    with torch.no_grad():
        before = compiled(IMAGES)
        with set_r(compiled, 9):
            within = compiled(IMAGES)
        assert torch.equal(compiled(IMAGES), before) and not torch.equal(within, before)
        with pytest.raises(KeyError), set_r(compiled, 0):
            raise KeyError
        assert torch.equal(compiled(IMAGES), before)


def test_training_with_another_r_at_every_step():
    model = vit()
    compiled = adjustable(model.train(), "aot_eager", r=4)

    def gradients(forward: nn.Module) -> list[torch.Tensor]:
        model.zero_grad()
        forward(IMAGES).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    for r in (4, 0, 7, 2):
        set_r(compiled, r)
        reference = torch.compile(model, backend="mctf", options={"inner": "eager", "r": r}, dynamic=False)
        for got, want in zip(gradients(compiled), gradients(reference), strict=True):
            assert (got - want).abs().max() <= 2e-5 * want.abs().max()


def test_another_batch_has_the_r_that_was_set():
    model, images = vit(), torch.randn(5, 3, 48, 48)
    with torch.no_grad():
        want = rewriter(model, images)(r=6)
        options = {"inner": "aot_eager", "dynamic_r": True, "r": 4}
        compiled = torch.compile(model, backend="mctf", options=options, dynamic=True)
        compiled(IMAGES)
        set_r(compiled, 6)
        torch.testing.assert_close(compiled(images), want, rtol=0, atol=1e-5)


def test_r_0_is_dense():
    model = vit()
    compiled = adjustable(model, r=4)
    with torch.no_grad(), set_r(compiled, 0):
        torch.testing.assert_close(compiled(IMAGES), model(IMAGES), rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["function", "in place"])
def test_functions_and_modules_compiled_in_place(form):
    model = vit()
    options = {"inner": "eager", "dynamic_r": True, "r": 4}
    if form == "function":
        compiled = torch.compile(lambda x: model(x), backend="mctf", options=options)
    else:
        model.compile(backend="mctf", options=options)
        compiled = model
    with torch.no_grad():
        before = compiled(IMAGES)
        set_r(compiled, 9)
        assert not torch.equal(compiled(IMAGES), before)


def test_errors_say_what_to_do():
    fixed = torch.compile(vit(), backend="mctf", options={"r": 4})
    for wrong in (fixed, vit(), 3):
        with pytest.raises(ConfigError, match="dynamic_r"):
            set_r(wrong, 4)
    compiled = adjustable(vit(), r=4)
    with pytest.raises(ConfigError, match="negative"):
        set_r(compiled, -1)
    with torch.no_grad():
        compiled(IMAGES)
        set_r(compiled, [1, 2])
        with pytest.raises(ConfigError, match="2 entries, but the model has 4"):
            compiled(IMAGES)
    with pytest.raises(ConfigError, match="'evit' does not have"):
        adjustable(vit(), method="evit")(IMAGES)


def test_explain_and_rewrite_are_of_the_r_in_the_options():
    report = mctf_compile.explain(vit(), IMAGES, r=4, dynamic_r=True)
    assert [block.removed for block in report.blocks] == [0, 4, 4, 4]


@dataclass(frozen=True)
class Shortest(Merging):
    """Drops the tokens of the smallest norm; ``counted`` makes of their number what the method computes with."""

    name = "shortest"
    source = "none"
    site = Site.BETWEEN
    counted = staticmethod(lambda r: r)

    def choose(self, evidence: Evidence, r: int) -> Choice:
        order = evidence.x.norm(dim=-1)[:, evidence.lead :].argsort(1) + evidence.lead
        r = self.counted(r)
        prefix = torch.arange(evidence.lead, device=order.device).expand(len(order), -1)
        return Choice(torch.cat([prefix, order[:, r:]], 1), order[:, :r], None, combine=Combine.DROP)


@pytest.fixture
def shortest(monkeypatch):
    monkeypatch.setitem(METHODS, "shortest", Shortest)


@pytest.mark.usefixtures("shortest")
def test_a_method_of_ones_own():
    with torch.no_grad():
        static = rewriter(vit(), IMAGES)
        compiled = adjustable(vit(), "aot_eager", r=3, method="shortest")
        for r in (3, 0, 1, 9):
            set_r(compiled, r)
            torch.testing.assert_close(compiled(IMAGES), static(r=r, method="shortest"), rtol=0, atol=1e-5)


COUNTED = [int, lambda r: len(range(r)), lambda r: r if r > 2 else 0, lambda r: torch.tensor([1, 2])[: int(r)].numel()]


@pytest.mark.usefixtures("shortest")
@pytest.mark.parametrize("counted", COUNTED, ids=["int", "range", "branch", "index"])
@pytest.mark.parametrize(
    "options", [{"dynamic_r": True}, {"r": "auto", "target": "speedup=1.2"}], ids=["dynamic", "target"]
)
def test_a_method_that_chooses_by_the_number_itself_is_refused(counted, options, monkeypatch):
    monkeypatch.setattr(Shortest, "counted", staticmethod(counted))
    options = {"inner": "eager", "method": "shortest", "r": 3, **options}
    with pytest.raises(ConfigError, match=r"'shortest' cannot choose another number .*line \d+ of .*test_dynamic.py"):
        torch.compile(vit(), backend="mctf", options=options)(IMAGES)
    # With a number that stays, it may.
    torch.compile(vit(), backend="mctf", options={"inner": "eager", "method": "shortest", "r": 3, "strict": True})(
        IMAGES
    )


def test_a_choice_that_combines_says_with_which():
    with pytest.raises(ConfigError, match="into=None does not say with which"):
        Choice(torch.zeros(1, 2).long(), torch.zeros(1, 1).long(), None)
