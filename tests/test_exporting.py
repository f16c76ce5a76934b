"""Exported models: ATen alone, the compiled model's results for any batch, and the files that other runtimes read."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

import mctf_compile
from mctf_compile.exporting.program import export_with, exporting_config
from mctf_compile.kernels.ordering import descending
from mctf_compile.report import Report
from mctf_compile.testing import TinyViT, VitSpec

BATCHES = (1, 3, 8)


def vit(head: str) -> nn.Module:
    return TinyViT(VitSpec(depth=2, head=head, prefix=int(head == "cls"), position=True))


def dinov2() -> nn.Module:
    import timm

    return timm.create_model("vit_small_patch14_reg4_dinov2", depth=2, embed_dim=32, num_heads=2, img_size=56)


def hugging_face() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return ViTModel(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=32,
            patch_size=8,
        )
    )


# A model, the side of its images, and what is asked for. What reads a class token needs one.
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "cls": (lambda: vit("cls"), 16),
    "mean": (lambda: vit("mean"), 16),
    "dinov2": (dinov2, 56),
    "hugging_face": (hugging_face, 32),
}
EVERY_METHOD = {
    "mctf": {"r": 4, "min_tokens": 1},
    "tome": {"r": 3},
    "tofu": {"r": 3, "prune_layers": 1},
    "evit": {"layers": [0, 1]},
    "idlevit": {"keep_ratio": 0.7},
    "random": {"r": 3},
}
CASES = [
    *(("cls", method) for method in EVERY_METHOD),
    *((model, "mctf") for model in MODELS if model != "cls"),
]
cases = pytest.mark.parametrize(("name", "method"), CASES)


def options_of(method: str) -> dict[str, Any]:
    return {"method": method, **EVERY_METHOD[method]}


@cache
def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def images(name: str, batch: int) -> Tensor:
    side = MODELS[name][1]
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(batch))


@cache
def exported(name: str, method: str) -> tuple[ExportedProgram, Report]:
    """From one image, which is to stand for any number of them."""
    return export_with(model_of(name), (images(name, 1),), {}, exporting_config(options_of(method)))


def tensors(output: Any) -> list[Tensor]:
    return [x for x in tree_leaves(output) if isinstance(x, Tensor)]


@cache
def compiled(name: str, method: str, batch: int) -> list[Tensor]:
    """What the model returns that ``torch.compile`` makes, through Dynamo and for one batch size."""
    torch._dynamo.reset()
    options = {**options_of(method), "inner": "eager", "kernels": "aten"}
    run = torch.compile(model_of(name), backend="mctf", options=options, dynamic=False)
    with torch.no_grad():
        torch.manual_seed(5)
        return tensors(run(images(name, batch)))


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    """Within 1e-4; and tokens that were fused are the same ones, to be seen where they are given back."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
        if b.dim() == 3:
            assert torch.equal(groups(a), groups(b))


def groups(x: Tensor) -> Tensor:
    """Which tokens [B, N, C] are copies of one another: bool [B, N, N]."""
    return (x[:, :, None] - x[:, None]).abs().amax(-1) < 1e-5


@cases
def test_an_exported_graph_is_aten_and_fused(name: str, method: str) -> None:
    program, report = exported(name, method)
    assert report.removed > 0
    targets = {n.target for n in program.graph.nodes if n.op == "call_function"}
    assert {t.namespace for t in targets if isinstance(t, torch._ops.OpOverload)} == {"aten"}
    # What is no operator computes with sizes.
    assert {t.__module__ for t in targets if not isinstance(t, torch._ops.OpOverload)} <= {"_operator", "torch"}


@cases
def test_it_is_the_compiled_model_at_every_batch(name: str, method: str) -> None:
    run = exported(name, method)[0].module()
    for batch in BATCHES:
        torch.manual_seed(5)
        with torch.no_grad():
            found = tensors(run(images(name, batch)))
        close(found, compiled(name, method, batch))


def test_weights_keep_their_names_and_outputs_their_form() -> None:
    program, _ = exported("hugging_face", "mctf")
    model = model_of("hugging_face")
    assert set(program.state_dict) == {*model.state_dict()}
    output = program.module()(images("hugging_face", 2))
    assert output.last_hidden_state.shape == (2, 17, 32) and type(output) is type(model(images("hugging_face", 2)))
    assert model.layers[0].attention.q_proj.weight.requires_grad


@pytest.mark.parametrize("n", [0, 1, 7, 64])
def test_descending_is_a_stable_sort(n: int) -> None:
    score = torch.randint(0, 9, (5, n), generator=torch.Generator().manual_seed(n)).float()
    score[1, 1:4] = float("-inf")
    expected = score.argsort(dim=1, descending=True, stable=True)
    assert torch.equal(descending(score), expected)
    assert torch.equal(descending(score.nan_to_num(neginf=-1).int()), expected)


class OneBatch(nn.Module):
    """A model whose author wrote its batch size down."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 3, -1)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (vit("cls"), {}, "call model.eval"),
        (vit("cls").eval(), {"dynamic_r": True}, "an exported graph has one r"),
        (vit("cls").eval(), {"inner": "inductor"}, "inner='inductor' has no effect"),
        (vit("cls").eval(), {"kernels": "cpp"}, "ATen operators alone"),
        (vit("cls").eval(), {"r": "auto", "target": "latency_ms=3"}, "milliseconds"),
        (vit("cls").eval(), {"rr": 3}, "did you mean 'r'"),
        (OneBatch().eval(), {}, "dynamic_batch=False"),
        (Branching().eval(), {}, "torch.export cannot capture the model: "),
    ],
)
def test_what_cannot_be_exported_is_one_line(model: nn.Module, options: dict[str, Any], message: str) -> None:
    with pytest.raises(mctf_compile.MctfError, match=message) as caught:
        mctf_compile.export(model, (torch.randn(2, 3, 16, 16),), **options)
    assert "\n" not in str(caught.value)


def test_a_batch_can_be_fixed_and_a_dense_model_says_so() -> None:
    with pytest.warns(UserWarning, match="the graph stays dense"):
        program = mctf_compile.export(OneBatch().eval(), (torch.randn(2, 3, 4, 4),), dynamic_batch=False)
    assert program.module()(torch.ones(2, 3, 4, 4)).shape == (2, 3, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mctf_compile.export(OneBatch().eval(), (torch.randn(2, 3, 4, 4),), dynamic_batch=False, method="none")
