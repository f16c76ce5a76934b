"""Weights that nothing will change: computed with once, laid out for their products, and fused like any others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from mctf_compile.kernels.linear import op
from mctf_compile.kernels.linear.op import frozen_linear_supported
from mctf_compile.passes.analysis.casts import make_casts_explicit
from mctf_compile.passes.lowering.freezing import freeze

aten, mctf = torch.ops.aten, torch.ops.mctf


class Sliced(nn.Module):
    """Part of a weight, times the inputs, plus noise of a weight's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, self.weight[:3], self.bias[:3] * 2), torch.rand_like(self.bias)


def traced(model: Callable, *inputs: Tensor) -> torch.fx.GraphModule:
    return make_fx(model, pre_dispatch=True, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)


def operators(gm: torch.fx.GraphModule) -> list[object]:
    return [n.target for n in gm.graph.nodes if n.op == "call_function"]


@torch.no_grad()
def test_what_is_computed_of_weights_alone_is_computed_once() -> None:
    model, x = Sliced(), torch.randn(2, 4)
    gm = traced(model, x)
    frozen = freeze(gm)
    assert operators(frozen) == [mctf.frozen_linear.default, aten.rand_like.default]
    assert aten.slice.Tensor in operators(gm)
    torch.testing.assert_close(frozen(x)[0], model(x)[0])
    assert not torch.equal(frozen(x)[1], frozen(x)[1])


class Layer(nn.Module):
    """A linear layer with or without a bias, and what follows it."""

    def __init__(self, biased: bool, follow: Callable[[Tensor, Layer], object] = lambda y, own: y) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(12, 16)), nn.Parameter(torch.randn(12))
        self.table = nn.Parameter(torch.randn(4, 12))
        self.biased, self.follow = biased, follow

    def forward(self, x: Tensor) -> object:
        return self.follow(F.linear(x, self.weight, self.bias if self.biased else None), self)


# What of a layer and of what follows it is one product, and what is left.
FUSED = mctf.frozen_linear.default
MODELS = [
    (Layer(True), [FUSED], (True, None)),
    (Layer(False), [FUSED], (False, None)),
    (Layer(False, lambda y, own: y + own.bias), [FUSED], (True, None)),
    (Layer(False, lambda y, own: F.gelu(y + own.bias)), [FUSED], (True, "none")),
    (Layer(True, lambda y, own: F.gelu(y, approximate="tanh")), [FUSED], (True, "tanh")),
    (Layer(False, lambda y, own: F.gelu(y).tanh()), [FUSED, aten.tanh.default], (False, "none")),
    (Layer(True, lambda y, own: (F.gelu(y), y)), [FUSED, aten.gelu.default], (True, None)),
    (Layer(True, lambda y, own: y + own.bias), [FUSED, aten.add.Tensor], (True, None)),
    (Layer(False, lambda y, own: F.gelu(y + y)), [FUSED, aten.add.Tensor, aten.gelu.default], (False, None)),
    (Layer(False, lambda y, own: torch.add(y, own.bias, alpha=2)), [FUSED, aten.add.Tensor], (False, None)),
    (Layer(False, lambda y, own: y + own.table), [FUSED, aten.add.Tensor], (False, None)),
]


@pytest.mark.parametrize(("model", "left", "taken"), MODELS)
@torch.no_grad()
def test_a_product_takes_the_bias_and_the_gelu_that_follow(model: nn.Module, left: list, taken: tuple) -> None:
    x = torch.randn(4, 16)
    frozen = freeze(traced(model, x))
    assert operators(frozen) == left
    (packed,) = frozen.graph.find_nodes(op="call_function", target=FUSED)
    assert (packed.args[2] is not None, packed.args[3]) == taken
    torch.testing.assert_close(frozen(x), model(x))


@torch.no_grad()
def test_what_onednn_does_not_have_stays_a_linear_layer() -> None:
    double = traced(Layer(True).double(), torch.randn(2, 16, dtype=torch.float64))
    assert operators(freeze(double)) == [aten.linear.default]
    # A weight that is an input, and a single row.
    given = traced(lambda x, weight: F.linear(x, weight), torch.randn(2, 16), torch.randn(12, 16))
    assert operators(freeze(given)) == [aten.linear.default]
    assert operators(freeze(traced(Layer(True), torch.randn(16)))) == [aten.linear.default]
    with torch.backends.mkldnn.flags(enabled=False):
        assert operators(freeze(traced(Layer(True), torch.randn(2, 16)))) == [aten.linear.default]


@torch.no_grad()
def test_under_autocast_the_weight_is_cast_once() -> None:
    model, x = Layer(True, lambda y, own: F.gelu(y)), torch.randn(4, 3, 16)
    if not frozen_linear_supported(model.weight, torch.bfloat16):
        pytest.skip("oneDNN has no products of torch.bfloat16 on this machine")
    with torch.autocast("cpu", torch.bfloat16):
        gm = traced(model, x)
        make_casts_explicit(gm)
        (linear,) = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
        frozen = freeze(gm)
        got = frozen(x)
    assert linear.meta["val"].dtype is torch.bfloat16
    assert operators(frozen) == [aten.to.dtype, FUSED]
    assert all(t.dtype is torch.bfloat16 for _, t in frozen.named_buffers())
    expected = product(*(t.bfloat16() for t in (x, model.weight, model.bias)), "none")
    torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=2**-10)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: str | None) -> Tensor:
    """``frozen_linear`` in float64."""
    y = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    return y if gelu is None else F.gelu(y, approximate=gelu)


@pytest.mark.parametrize("gelu", [None, "none", "tanh"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_packed_product_is_that_of_float64(dtype: torch.dtype, biased: bool, gelu: str | None) -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 40, dtype=dtype) / 6
    if not frozen_linear_supported(weight, dtype):
        pytest.skip(f"oneDNN has no products of {dtype} on this machine")
    bias = torch.randn(24, dtype=dtype) if biased else None
    # More rows and fewer than the weight was packed for, none, and rows that do not lie side by side.
    for x in (
        torch.randn(6, 40),
        torch.randn(2, 300, 40),
        torch.randn(1, 40),
        torch.randn(2, 0, 40),
        torch.randn(2, 3, 5, 40),
        torch.randn(40, 7).t(),
        torch.randn(3, 9, 40)[:, 2:5],
    ):
        x = x.to(dtype)
        y = mctf.frozen_linear(x, weight, bias, gelu)
        assert y.dtype is dtype
        rounding = 1e-5 if dtype is torch.float32 else 2**-8
        torch.testing.assert_close(y.double(), product(x, weight, bias, gelu), rtol=rounding, atol=rounding / 4)


@torch.no_grad()
def test_a_weight_is_packed_once_and_for_as_long_as_it_lives() -> None:
    weight, x = torch.randn(8, 4), torch.randn(3, 4)
    with torch.profiler.profile() as record:
        for _ in range(3):
            mctf.frozen_linear(x, weight, None, None)
    assert sum(e.name == "mkldnn::_reorder_linear_weight" for e in record.events()) == 1
    assert weight in op._packed
    before = len(op._packed)
    del weight
    assert len(op._packed) == before - 1


@pytest.mark.parametrize("dynamic_r", [False, True])
@torch.no_grad()
def test_a_model_that_is_to_be_frozen_fuses(dynamic_r: bool) -> None:
    torch.manual_seed(0)
    model, x = timm.create_model("test_vit").eval(), torch.randn(2, 3, 160, 160)
    options = {"r": 8, "inner": "aot_eager", "dynamic_r": dynamic_r, "strict": True}
    expected = torch.compile(model, backend="mctf", options=options)(x)
    torch._dynamo.reset()
    with torch._inductor.config.patch(freezing=True):
        frozen = torch.compile(model, backend="mctf", options=options)
        torch.testing.assert_close(frozen(x), expected, rtol=1e-4, atol=1e-5)
    model.head.weight.zero_()
    torch.testing.assert_close(frozen(x), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_weights_that_are_attributes_and_not_frozen_may_change() -> None:
    torch.manual_seed(0)
    model, x = timm.create_model("test_vit").eval(), torch.randn(2, 3, 160, 160)
    with torch._dynamo.config.patch(prepare_freezing=True):
        compiled = torch.compile(model, backend="mctf", options={"r": 8, "inner": "aot_eager", "strict": True})
        compiled(x)
    model.head.weight.zero_()
    torch.testing.assert_close(compiled(x), model.head.bias.expand(2, -1))
