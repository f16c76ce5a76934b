"""Whole models on the Triton kernels against the same models on ATen."""

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from mctf_compile import set_r
from mctf_compile.testing import TinyViT, VitSpec

IMAGES = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def vit() -> nn.Module:
    torch.manual_seed(1)
    return timm.create_model("vit_tiny_patch16_224", img_size=48, patch_size=8, depth=3).eval()


def fused(model: nn.Module, kernels: str, **options) -> nn.Module:
    options = {"inner": "eager", "kernels": kernels, "strict": True, **options}
    return torch.compile(copy.deepcopy(model), backend="mctf", options=options, dynamic=False)


def on_both(model: nn.Module, *inputs: Tensor, **options) -> list[Tensor]:
    with torch.no_grad():
        return [fused(model, kernels, **options)(*inputs) for kernels in ("triton", "aten")]


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4},
        {"r": 5, "matching": "one_way", "pooling": "size"},
        {"r": 4, "attention": "exact"},
        {"r": 4, "proportional": False, "tau_sim": 2.0, "tau_size": 0},
        {"r": 4, "protected": 0},
        {"r": [0, 18, 3]},
        {"method": "tome", "r": 4},
        {"method": "evit"},
    ],
    ids=str,
)
def test_methods_and_options(options):
    torch.testing.assert_close(*on_both(vit(), IMAGES, **options), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "spec",
    [
        VitSpec(grid=5, prefix=0, suffix=2, head="mean"),
        VitSpec(grid=5, spelling="softmax"),
        VitSpec(grid=5, side="bias"),
        VitSpec(grid=5, side="padding"),
        VitSpec(grid=5, side="rope", position=True),
        VitSpec(head="class_attention"),
    ],
    ids=str,
)
def test_architectures(spec):
    model = TinyViT(spec).eval()
    torch.testing.assert_close(*on_both(model, *model.example(2, 1), r=3, min_tokens=1), rtol=0, atol=2e-6)


def test_gradients():
    def gradients(kernels: str) -> list[Tensor]:
        compiled = fused(vit().train(), kernels, r=4)
        compiled(IMAGES).square().sum().backward()
        return [p.grad for p in compiled.parameters()]

    for got, want in zip(gradients("triton"), gradients("aten"), strict=True):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_low_precision():
    model = vit().bfloat16()
    got, low = on_both(model, IMAGES.bfloat16(), r=4)
    with torch.no_grad():
        exact = fused(vit(), "aten", r=4)(IMAGES)
    assert (got - exact).abs().max() <= 2 * (low - exact).abs().max()


def test_every_r_through_one_graph():
    reductions = (4, 0, 1, 18)
    with torch.no_grad():
        expected = [fused(vit(), "aten", r=r, strict=False)(IMAGES) for r in reductions]
        one = fused(vit(), "triton", r=4, dynamic_r=True)
        one(IMAGES)
        for r, want in zip(reductions, expected):
            set_r(one, r)
            with torch._dynamo.config.patch(error_on_recompile=True):
                torch.testing.assert_close(one(IMAGES), want, rtol=0, atol=2e-6)
