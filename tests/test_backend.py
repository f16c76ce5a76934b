"""The backend as users meet it: torch.compile with options, in every numeric and graph situation."""

import copy
import pickle
import subprocess
import sys
import warnings
from dataclasses import FrozenInstanceError, replace

import pytest
import timm
import torch
from torch._dynamo.utils import counters

import mctf_compile
from mctf_compile import ConfigError, FusionConfig, NothingFusedError, PassError, compiler
from mctf_compile.passes import ANALYSIS, LOWERING, REWRITING


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()


def tiny(**kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=96, depth=3, embed_dim=48, num_heads=3, num_classes=10, **kwargs
    ).eval()


def compiled(model, inner="eager", **options):
    arguments = {k: options.pop(k) for k in ("fullgraph", "dynamic", "mode") if k in options}
    return torch.compile(model, backend="mctf", options={"r": 8, "inner": inner, **options}, **arguments)


IMAGES = torch.randn(4, 3, 96, 96, generator=torch.Generator().manual_seed(0))


def test_a_process_that_never_imports_the_package_can_use_it():
    program = (
        "import torch, timm\n"
        "m = timm.create_model('vit_tiny_patch16_224', img_size=96, depth=2, embed_dim=48, num_heads=3).eval()\n"
        "c = torch.compile(m, backend='mctf', options={'r': 8, 'inner': 'eager', 'strict': True})\n"
        "print(tuple(c(torch.randn(1, 3, 96, 96)).shape))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "(1, 1000)", done.stderr


def test_the_backend_is_listed_once():
    assert torch._dynamo.list_backends().count("mctf") == 1


@pytest.mark.parametrize(
    ("context", "inners"),
    [
        (torch.no_grad, ("eager", "aot_eager", "inductor")),
        (torch.inference_mode, ("eager", "aot_eager")),
        (torch.enable_grad, ("eager", "aot_eager")),
    ],
)
def test_every_inner_compiler_computes_the_same(context, inners):
    model = tiny()
    with context():
        expected = compiled(model, inners[0], fullgraph=True)(IMAGES)
        for inner in inners[1:]:
            torch._dynamo.reset()
            got = compiled(model, inner, fullgraph=True)(IMAGES)
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


def test_batch_sizes_share_one_symbolic_graph():
    model = tiny()
    fast = compiled(model)
    with torch.no_grad():
        got = {b: fast(IMAGES.repeat(3, 1, 1, 1)[:b]) for b in (2, 3, 5, 7, 9, 1)}
        # One static graph, one symbolic, one for the batch of 1, which Dynamo never makes symbolic.
        assert counters["stats"]["unique_graphs"] == 3
        for batch, result in got.items():
            torch._dynamo.reset()
            static = compiled(model, dynamic=False)(IMAGES.repeat(3, 1, 1, 1)[:batch])
            torch.testing.assert_close(result, static, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_autocast_keeps_dtypes_and_stays_near_float32(inner):
    model = tiny()
    with torch.no_grad():
        exact = compiled(model)(IMAGES)
        torch._dynamo.reset()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            dense, got = model(IMAGES), compiled(model, inner)(IMAGES)
    assert got.dtype == dense.dtype == torch.bfloat16
    noise = (dense - model(IMAGES)).abs().max()
    # bf16 noise can flip a match between near-equal tokens; the result stays within a few times the noise.
    assert (got - exact).abs().max() < 10 * noise


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.bfloat16, 0.1)])
def test_other_precisions(dtype, tolerance):
    model = tiny()
    with torch.no_grad():
        exact = compiled(model, pooling="size", tau_info=0)(IMAGES)
        torch._dynamo.reset()
        got = compiled(model.to(dtype), "aot_eager", pooling="size", tau_info=0)(IMAGES.to(dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), exact, atol=tolerance * exact.abs().max().item() + 1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["approx", "exact", "current"])
def test_gradients_under_aot_equal_those_of_plain_autograd(attention):
    """``inner="eager"`` runs the fused graph under PyTorch's own autograd, operator by operator."""
    grads = []
    for inner in ("eager", "aot_eager"):
        torch._dynamo.reset()
        model = tiny().train()
        compiled(model, inner, attention=attention)(IMAGES).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(b, a, atol=1e-4, rtol=1e-3)


def test_options_are_not_changed():
    options = {"r": 8, "inner": "eager", "inductor": {}}
    before = {k: (dict(v) if isinstance(v, dict) else v) for k, v in options.items()}
    with torch.no_grad():
        torch.compile(tiny(), backend="mctf", options=options)(IMAGES)
    assert options == before


@pytest.mark.parametrize(
    "options",
    [
        {"r": 8},
        {"r": [0, 4, 2]},
        {"r": (8, 0.5)},
        {"layers": [1, 2]},
        {"r": "auto", "target": "speedup=2"},
        {"inductor": {"max_autotune": True, "pre_grad_fusion_options": {}}},
        {"method": "tofu"},
    ],
    ids=str,
)
def test_a_config_is_a_value(options):
    config, same = FusionConfig(**options), FusionConfig(**copy.deepcopy(options))
    assert config == same and hash(config) == hash(same) and {config: 1}[same] == 1
    assert config != FusionConfig(r=7) and pickle.loads(pickle.dumps(config)) == config
    for holder, field in ((config, "method"), (config, "r"), (config.method, "layers"), (config.lowering, "inner")):
        with pytest.raises(FrozenInstanceError):
            setattr(holder, field, None)


def test_a_config_does_not_follow_the_values_that_it_was_made_of():
    r, patches = [0, 4, 2], {"pre_grad_fusion_options": {}}
    config = FusionConfig(r=r, inductor=patches)
    r.append(3)
    patches["pre_grad_fusion_options"]["a"] = 1
    patches["max_autotune"] = True
    assert config == FusionConfig(r=[0, 4, 2], inductor={"pre_grad_fusion_options": {}})


def test_a_list_per_block_is_no_r_with_an_inflection():
    assert FusionConfig(r=[8, 1]) != FusionConfig(r=(8, 1))
    assert FusionConfig(r=[8, 1]).method.requested != FusionConfig(r=(8, 1)).method.requested


def test_an_inductor_mode_by_either_way():
    config = FusionConfig.from_options({"inductor": {"mode": "max-autotune"}})
    assert FusionConfig.from_options({}, mode="max-autotune") == config
    with pytest.raises(ConfigError, match="disagree"):
        FusionConfig.from_options({"inductor": {"mode": "max-autotune"}}, mode="reduce-overhead")


BAD = [
    ({"rr": 3}, "unknown option 'rr'; did you mean 'r'"),
    ({"methods": "mctf"}, "did you mean 'method'"),
    ({"method": "tomee"}, "unknown method 'tomee'; the methods are: .*mctf"),
    ({"r": -1}, "r=-1 is negative"),
    ({"r": "fats"}, "the presets are 'fast'"),
    ({"r": True}, "must be a number"),
    ({"r": 2.5}, "a float is a ratio"),
    ({"r": [8, -2, 8]}, r"r\[1\]=-2 is negative"),
    ({"r": [8, 8]}, "r is a list of 2 entries, but the model has 3 attention blocks"),
    ({"r": (8, 3)}, "inflection from -1 to 1"),
    ({"layers": [7]}, "block 7 does not exist; the model has 3"),
    ({"layers": "all"}, "must be a list of block numbers"),
    ({"tau_sim": -1}, "tau_sim=-1 must be a number >= 0"),
    ({"attention": "aprox"}, "did you mean 'approx'"),
    ({"matching": 3}, "matching=3 is not one of"),
    ({"pooling": "meen"}, "did you mean 'mean'"),
    ({"inner": "induktor"}, "did you mean 'inductor'"),
    ({"protected": -1}, "whole number >= 0 or 'auto'"),
    ({"min_tokens": 0}, "whole number >= 1"),
    ({"strict": "yes"}, "must be True or False"),
    ({"inductor": {"nope": 1}, "inner": "inductor"}, "'nope' is no Inductor config entry"),
    ({"inductor": {"mode": "fastest"}, "inner": "inductor"}, "'fastest' is no Inductor mode"),
    ({"inductor": {"max_autotune": True}}, "no effect with inner='eager'"),
    ({"kernels": "triton"}, "kernels='triton': .*; use 'auto' or 'aten'"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(o) for o, _ in BAD])
def test_bad_options_name_themselves_before_anything_is_compiled(options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        compiled(tiny(), **options)(IMAGES)
    # It can be sent to another process, as the same error.
    copied = pickle.loads(pickle.dumps(caught.value))
    assert type(copied) is ConfigError and str(copied) == str(caught.value)


def dense_warnings(model, images, **options) -> list[str]:
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        result = compiled(model, **options)(images)
    assert torch.equal(result, model(images))
    return [str(w.message) for w in caught if "mctf" in str(w.message)]


def test_a_model_without_attention_stays_dense_with_one_warning():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    (message,) = dense_warnings(model, torch.randn(2, 4))
    assert "no self-attention over tokens" in message


def test_an_empty_batch_stays_dense_with_one_warning():
    (message,) = dense_warnings(tiny(), IMAGES[:0])
    assert "the batch is empty" in message


def test_an_r_that_leaves_nothing_stays_dense_with_one_warning():
    (message,) = dense_warnings(tiny(), IMAGES, min_tokens=500)
    assert "r clamped from 8 to 0 by min_tokens=500" in message


def test_r_0_does_not_warn():
    assert dense_warnings(tiny(), IMAGES, r=0) == []


def test_strict_raises_with_the_reasons():
    with pytest.raises(NothingFusedError, match="block 1: r clamped from 8 to 0 by min_tokens=500"):
        compiled(tiny(), strict=True, min_tokens=500)(IMAGES)


def test_an_error_of_the_inner_compiler_is_told_by_its_cause(monkeypatch):
    def fail(state):
        raise KeyError("no such kernel")

    monkeypatch.setattr("mctf_compile.backend.compile_lowered", fail)
    with pytest.raises(Exception, match="no such kernel") as caught:
        compiled(tiny())(IMAGES)
    assert isinstance(mctf_compile.cause_of(caught.value), KeyError)
    assert mctf_compile.cause_of(ValueError("another")).args == ("another",)


def test_integer_images_that_the_model_converts_are_fine():
    class Bytes(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny()

        def forward(self, x):
            return self.model(x.float() / 255)

    images = torch.randint(0, 255, (2, 3, 96, 96), dtype=torch.uint8)
    assert mctf_compile.explain(Bytes(), images, r=8).removed == 16


def test_unprotecting_the_class_token_is_said():
    report = mctf_compile.explain(tiny(), IMAGES, r=8, protected=0)
    assert "position 0 may then hold another token" in report.blocks[1].note


def test_explain_leaves_the_model_and_dynamo_usable():
    model = tiny()
    report = mctf_compile.explain(model, IMAGES, r=8)
    assert "block 1, blocks.1.attn: 37 -> 29" in str(report)
    with torch.no_grad():
        assert compiled(model)(IMAGES).shape == (4, 10)


PASSES = [
    (stage, step.name)
    for stage in ("ANALYSIS", "REWRITING", "LOWERING")
    for step in getattr(mctf_compile.passes, stage)
]


def break_pass(monkeypatch, stage, name):
    def fail(state):
        raise KeyError("a fault")

    steps = [replace(step, run=fail) if step.name == name else step for step in getattr(mctf_compile.passes, stage)]
    monkeypatch.setattr(compiler, stage, tuple(steps))


@pytest.mark.parametrize(("stage", "name"), PASSES, ids=str)
def test_a_pass_that_fails_leaves_the_graph_dense_with_one_warning(stage, name, monkeypatch, faults_decline):
    break_pass(monkeypatch, stage, name)
    (message,) = dense_warnings(tiny(), IMAGES)
    assert f"pass {name} failed after" in message and "KeyError('a fault') (line" in message and __file__ in message


@pytest.mark.parametrize("asked_by", ["strict", "environment"])
def test_a_pass_that_fails_is_an_error_where_that_is_asked_for(asked_by, monkeypatch, faults_decline):
    break_pass(monkeypatch, "LOWERING", "regions")
    assert "pass regions failed" in mctf_compile.explain(tiny(), IMAGES, r=8).reason
    if asked_by == "environment":
        monkeypatch.setenv("MCTF_FAULTS", "raise")
    with pytest.raises(PassError, match="pass regions failed"):
        compiled(tiny(), strict=asked_by == "strict")(IMAGES)


def test_a_graph_break_makes_two_sound_graphs():
    class Broken(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = tiny(global_pool=""), tiny()

        def forward(self, x):
            tokens = self.first.forward_features(x)
            torch._dynamo.graph_break()
            return self.second(x), tokens

    model = Broken().eval()
    with torch.no_grad():
        dense, fused = model(IMAGES), compiled(model)(IMAGES)
    assert [t.shape for t in fused] == [t.shape for t in dense]


def test_every_graph_is_dumped_after_every_pass(tmp_path, monkeypatch):
    monkeypatch.setenv("MCTF_DEBUG", str(tmp_path))
    for method in ("mctf", "tome"):
        mctf_compile.explain(tiny(), IMAGES, method=method, r=8)
    folders = sorted(tmp_path.iterdir())
    assert [folder.name for folder in folders] == ["graph_0", "graph_1"]
    for folder in folders:
        assert sorted(p.name for p in folder.iterdir()) == [
            f"{i:02}-{step.name}.txt" for i, step in enumerate((*ANALYSIS, *REWRITING, *LOWERING))
        ]
    first, second = (next(folder.glob("*-rewrite.txt")).read_text() for folder in folders)
    assert "mctf.ahead" in first and "mctf.ahead" not in second


def test_explaining_what_has_no_graph_is_a_clear_error():
    with pytest.raises(mctf_compile.MctfError, match="captured no graph"):
        mctf_compile.explain(torch.nn.Identity(), 3)
