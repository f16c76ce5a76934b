"""Weights that nothing will change: computed with once, laid out for their products, and fused like any others."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from mctf_compile.passes.freezing import freeze

aten = torch.ops.aten


class Sliced(nn.Module):
    """Part of a weight, times the inputs, plus noise of a weight's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, self.weight[:3], self.bias[:3] * 2), torch.rand_like(self.bias)


def traced(model: nn.Module, *inputs: Tensor) -> torch.fx.GraphModule:
    return make_fx(model, pre_dispatch=True, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)


def operators(gm: torch.fx.GraphModule) -> list[object]:
    return [n.target for n in gm.graph.nodes if n.op == "call_function"]


@torch.no_grad()
def test_what_is_computed_of_weights_alone_is_computed_once() -> None:
    model, x = Sliced(), torch.randn(2, 4)
    gm = traced(model, x)
    frozen = freeze(gm)
    assert operators(frozen) == [aten.linear.default, aten.rand_like.default]
    assert aten.slice.Tensor in operators(gm)
    torch.testing.assert_close(frozen(x)[0], model(x)[0])
    assert not torch.equal(frozen(x)[1], frozen(x)[1])


@pytest.mark.parametrize(("dtype", "strides"), [(torch.float32, (1, 3)), (torch.float64, (1, 3)),
                                                (torch.bfloat16, (4, 1))])
@torch.no_grad()
def test_the_weight_of_a_product_lies_as_the_product_reads_it(dtype: torch.dtype, strides: tuple[int, int]) -> None:
    frozen = freeze(traced(Sliced().to(dtype), torch.randn(2, 4, dtype=dtype)))
    (linear,) = frozen.graph.find_nodes(op="call_function", target=aten.linear.default)
    weight = getattr(frozen, linear.args[1].target)
    assert weight.shape == (3, 4) and weight.stride() == strides
    assert not weight.requires_grad


@torch.no_grad()
def test_under_autocast_a_weight_stays_as_it_is() -> None:
    gm = traced(Sliced(), torch.randn(2, 4))
    with torch.autocast("cpu", torch.bfloat16):
        frozen = freeze(gm)
    (linear,) = frozen.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert getattr(frozen, linear.args[1].target).stride() == (4, 1)


@pytest.mark.parametrize("dynamic_r", [False, True])
@torch.no_grad()
def test_a_model_that_is_to_be_frozen_fuses(dynamic_r: bool) -> None:
    torch.manual_seed(0)
    model, x = timm.create_model("test_vit").eval().double(), torch.randn(2, 3, 160, 160, dtype=torch.float64)
    options = {"r": 8, "inner": "aot_eager", "dynamic_r": dynamic_r, "strict": True}
    expected = torch.compile(model, backend="mctf", options=options)(x)
    torch._dynamo.reset()
    with torch._inductor.config.patch(freezing=True):
        frozen = torch.compile(model, backend="mctf", options=options)
        torch.testing.assert_close(frozen(x), expected, rtol=0, atol=1e-10)
    model.head.weight.zero_()
    torch.testing.assert_close(frozen(x), expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_weights_that_are_attributes_and_not_frozen_may_change() -> None:
    torch.manual_seed(0)
    model, x = timm.create_model("test_vit").eval(), torch.randn(2, 3, 160, 160)
    with torch._dynamo.config.patch(prepare_freezing=True):
        compiled = torch.compile(model, backend="mctf", options={"r": 8, "inner": "aot_eager", "strict": True})
        compiled(x)
    model.head.weight.zero_()
    torch.testing.assert_close(compiled(x), model.head.bias.expand(2, -1))
