"""Shift layers: weights that are powers of two, to train and packed into bytes, with tokens fused around them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.nn.utils import parametrize

import mctf_compile
from mctf_compile import ConfigError, FusionConfig, backend, rewrite, shiftadd
from mctf_compile.kernels.shift import reference
from mctf_compile.passes.lowering import triton
from mctf_compile.passes.lowering.choose_kernels import choose_kernels
from mctf_compile.testing import TinyViT, VitSpec, assert_rewrite_sound
from mctf_compile.testing.models import repeated_patches
from mctf_compile.testing.soundness import ONLY_SIMILARITY

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tiny(**changes: object) -> TinyViT:
    torch.manual_seed(0)
    return TinyViT(VitSpec(**changes)).eval()


def power_of_two(w: float) -> float:
    """The formula, for one weight."""
    if w == 0:
        return 0.0
    return math.copysign(2.0 ** min(max(round(math.log2(abs(w))), -14), 0), w)


def shift_layers(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and parametrize.is_parametrized(m)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_code_is_its_power_of_two(dtype: torch.dtype) -> None:
    codes = torch.arange(-15, 16, dtype=torch.int8).view(31, 1)
    found = torch.ops.mctf.powers(codes, dtype)
    assert found.dtype is dtype
    assert torch.equal(found, reference.powers(codes, dtype))
    compiled = torch.compile(torch.ops.mctf.powers, fullgraph=True)
    assert torch.equal(compiled(codes, dtype), found)


def test_weights_are_the_nearest_powers_of_two() -> None:
    torch.manual_seed(0)
    weight = torch.cat([torch.randn(200) * 10.0 ** torch.randint(-6, 2, (200,)), torch.tensor([0.0, 1.0, -0.5])])
    expected = torch.tensor([power_of_two(w) for w in weight.tolist()])
    assert torch.equal(shiftadd.PowerOfTwo()(weight), expected)
    layer = shiftadd.ShiftLinear(weight[None], None)
    assert torch.equal(torch.ops.mctf.powers(layer.codes, torch.float32)[0], expected)
    assert layer.codes.dtype is torch.int8 and layer.codes.abs().max() == 15


def test_the_graph_says_which_layers_shift() -> None:
    """Those of attention and MLP, whatever they are called; not the embedding, the head, or a layer beside."""
    model = tiny(depth=2, spelling="separate", mlp="swiglu")
    shiftadd.shift(model, IMAGES)
    found = shift_layers(model)
    assert "head" not in found and "score" not in found
    blocks = [n for n, m in model.named_modules() if n.startswith("blocks.") and isinstance(m, nn.Linear)]
    assert sorted(found) == sorted(blocks) and len(found) == 12


def test_gradients_go_straight_through() -> None:
    """Those of a plain model that has the powers of two as its weights."""
    model = tiny(depth=2).train()
    plain = copy.deepcopy(model)
    shiftadd.shift(model, IMAGES)
    names = shift_layers(model)
    for name in names:
        layer = plain.get_submodule(name)
        layer.weight.data.apply_(power_of_two)
    expected = plain(IMAGES)
    torch.testing.assert_close(model(IMAGES), expected)
    expected.square().sum().backward()
    compiled = torch.compile(model, backend="mctf", options={"method": "none", "inner": "aot_eager"})
    for run in (model, compiled):
        model.zero_grad()
        run(IMAGES).square().sum().backward()
        for name in names:
            trained = model.get_submodule(name).parametrizations.weight.original.grad
            torch.testing.assert_close(trained, plain.get_submodule(name).weight.grad, rtol=1e-4, atol=1e-6)


def test_packed_layers_compute_the_same_bit_for_bit(tmp_path: Path) -> None:
    model = tiny()
    dense = copy.deepcopy(model)
    shiftadd.shift(model, IMAGES)
    with torch.no_grad():
        expected = model(IMAGES)
        layers = [dense.get_submodule(n).weight for n in shift_layers(model)]
        shiftadd.pack(model)
        assert torch.equal(model(IMAGES), expected)
        assert not torch.allclose(dense(IMAGES), expected)
    codes = [m.codes for m in model.modules() if isinstance(m, shiftadd.ShiftLinear)]
    assert 4 * sum(c.nbytes for c in codes) == sum(w.nbytes for w in layers)
    # What is saved has them, and another packed model takes it.
    torch.save(model.state_dict(), tmp_path / "packed.pt")
    other = shiftadd.pack(shiftadd.shift(tiny(depth=3), IMAGES))
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(torch.load(tmp_path / "packed.pt", weights_only=True))
    with torch.no_grad():
        assert torch.equal(other(IMAGES), expected)


@pytest.mark.parametrize("packed", [False, True], ids=["trained", "packed"])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_tokens_fuse_as_before(packed: bool, inner: str) -> None:
    """The same blocks fuse, and what is fused of shift layers is what is fused of plain ones with their weights."""
    model = shiftadd.shift(tiny(depth=2), IMAGES)
    plain = tiny(depth=2)
    for name in shift_layers(model):
        plain.get_submodule(name).weight.data.copy_(model.get_submodule(name).weight)
    if packed:
        shiftadd.pack(model)
    options = {"r": 4, "min_tokens": 1}
    reports = [mctf_compile.explain(m, IMAGES, **options) for m in (model, plain)]
    assert [str(b) for b in reports[0].blocks] == [str(b) for b in reports[1].blocks]
    assert reports[0].macs_after == reports[1].macs_after < reports[0].macs_before
    torch._dynamo.reset()
    with torch.no_grad():
        results = [
            torch.compile(m, backend="mctf", options={**options, "inner": inner})(IMAGES) for m in (model, plain)
        ]
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def lowered(model: nn.Module, autocast: bool = False, **options: object) -> tuple[list[str], list[str], Tensor]:
    """The operators of the compiled graph, what it says of kernels that were not taken, and its output."""
    graphs: list[fx.GraphModule] = []
    remarks: list[str] = []

    def backend(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        fused, report = rewrite(gm, inputs, FusionConfig(r=4, min_tokens=1, **options))
        graphs.append(fused)
        remarks.extend(report.remarks)
        return fused.forward

    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = torch.compile(model, backend=backend, dynamic=False)(IMAGES)
    return [str(n.target).partition(".default")[0] for n in graphs[0].graph.nodes], remarks, out


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_packed_layers_run_on_their_codes(autocast: bool) -> None:
    """In C++, without weights in memory; in low precisions the codes are as exact."""
    model = shiftadd.pack(shiftadd.shift(tiny(depth=2), IMAGES))
    with torch.no_grad():
        found, remarks, out = lowered(model, autocast, kernels="cpp")
        plain, _, expected = lowered(model, autocast, kernels="aten")
    layers = len([m for m in model.modules() if isinstance(m, shiftadd.ShiftLinear)])
    # One projection is taken apart: the values are computed of the fused tokens.
    assert (found.count("mctf.shift_linear_cpp"), plain.count("mctf.powers")) == (layers + 1, layers)
    assert "mctf.powers" not in found and remarks == []
    near = {"rtol": 0.05, "atol": 0.05} if autocast else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(out, expected, **near)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_packed_layers_run_on_their_codes_where_nothing_fuses(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the backend, with no reduction, and in eager mode, the numbers are the same."""
    seen: list[str] = []

    def watched(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        seen.extend(str(n.target) for n in gm.graph.nodes)
        return gm.forward

    monkeypatch.setattr(backend, "inner_compiler", lambda config: watched)
    model = shiftadd.pack(shiftadd.shift(tiny(depth=2), IMAGES))
    torch._dynamo.reset()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        options = {"method": "none", "kernels": "cpp"}
        found = torch.compile(model, backend="mctf", options=options, dynamic=False)(IMAGES)
        expected = model(IMAGES)
    layers = len([m for m in model.modules() if isinstance(m, shiftadd.ShiftLinear)])
    assert seen.count("mctf.shift_linear_cpp.default") == layers and "mctf.powers.default" not in seen
    near = {"rtol": 0.05, "atol": 0.05} if autocast else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found, expected, **near)


def test_packed_layers_stay_aten_where_gradients_pass() -> None:
    model = shiftadd.pack(shiftadd.shift(tiny(depth=2), IMAGES))
    found, remarks, out = lowered(model, kernels="cpp")
    assert "mctf.shift_linear_cpp" not in found and any("powers" in r and "no gradient" in r for r in remarks)
    out.sum().backward()
    assert model.embed.weight.grad.isfinite().all()


def test_a_gpu_has_products_with_codes_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is optional, and this test is about it")
    monkeypatch.setattr(triton, "problem", lambda device: None)
    gm = make_fx(lambda x, codes: F.linear(x, torch.ops.mctf.powers(codes, x.dtype)), pre_dispatch=True)(
        torch.randn(2, 5, 8), torch.ones(3, 8, dtype=torch.int8)
    )
    chosen, _ = choose_kernels(gm, "triton", [torch.randn(2, 5, 8, requires_grad=True), torch.ones(3, 8)])
    assert [str(n.target) for n in chosen.graph.nodes if n.op == "call_function"] == [
        "mctf.shift_linear_triton.default"
    ]


class Odd(nn.Module):
    """Codes that are a weight, and are read in another way as well."""

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.vit = tiny(depth=2, head="dense")
        self.layer = shiftadd.ShiftLinear(torch.randn(16, 16), torch.randn(16))
        self.read = read

    def forward(self, images: Tensor) -> Tensor:
        x = self.vit(images)
        weight = torch.ops.mctf.powers(self.layer.codes, x.dtype)
        return F.linear(x, weight, self.layer.bias).mean(1) + F.linear(x.mean(1), self.read(weight))


@pytest.mark.parametrize(
    ("read", "taken"),
    [
        (lambda w: w[:, 1:].repeat(1, 2)[:, :16], 1),
        (lambda w: w.to(torch.int32).to(w.dtype), 1),
        (lambda w: w.to(torch.float8_e4m3fn).to(w.dtype), 1),
        (lambda w: w.abs(), 1),
        (lambda w: w.half().to(w.dtype), 2),
    ],
    ids=["repeated", "whole", "float8", "absolute", "half"],
)
def test_weights_that_something_else_reads_are_made(read: Callable[[Tensor], Tensor], taken: int) -> None:
    model = Odd(read).eval()
    with torch.no_grad():
        found, _, out = lowered(model, kernels="cpp")
        torch.testing.assert_close(out, lowered(model, kernels="aten")[2], rtol=1e-4, atol=1e-5)
    assert (found.count("mctf.shift_linear_cpp"), found.count("mctf.powers")) == (taken, taken == 1)


@settings(max_examples=12, deadline=None)
@given(
    st.builds(
        VitSpec,
        depth=st.just(2),
        prefix=st.integers(0, 2),
        spelling=st.sampled_from(("sdpa", "softmax", "einsum", "flat", "separate")),
        norm=st.sampled_from(("pre", "post", "parallel")),
        mlp=st.sampled_from(("gelu", "swiglu")),
        head=st.sampled_from(("mean", "max", "dense", "spread")),
        layout=st.sampled_from(("bnc", "nbc")),
        layer_scale=st.booleans(),
        qk_norm=st.booleans(),
    ),
    st.booleans(),
    st.integers(1, 6),
    st.integers(0, 99),
)
def test_fused_shift_layers_are_sound(spec: VitSpec, packed: bool, r: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = TinyViT(spec).eval()
    images = repeated_patches(2, spec.grid, 3, seed)
    shiftadd.shift(model, images)
    if packed:
        shiftadd.pack(model)
    assert_rewrite_sound(model, images, r=r, min_tokens=1, **ONLY_SIMILARITY)


class Lines(nn.Module):
    """A model without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_models_without_such_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match="no block of this model has a linear layer"):
        shiftadd.shift(Lines(), torch.randn(2, 3))
    with pytest.raises(ConfigError, match="no shift layers; mctf_compile"):
        shiftadd.pack(Lines())
    with pytest.raises(ConfigError, match="needs example inputs"):
        shiftadd.shift(tiny())
    model = shiftadd.shift(tiny(), IMAGES)
    with pytest.raises(ConfigError, match="could be a shift layer"):
        shiftadd.shift(model, IMAGES)
