"""LV-ViT and T2T-ViT: what their papers publish, and token fusion in them as in any model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import mctf_compile
from mctf_compile import losses
from mctf_compile.cli import main
from mctf_compile.errors import ConfigError
from mctf_compile.measuring.timm_models import input_size, make_model
from mctf_compile.models import MODELS, LVViT, T2TViT, draw_box, load_official
from mctf_compile.testing import assert_rewrite_sound
from mctf_compile.testing.soundness import ONLY_SIMILARITY

# Millions of parameters, and GMACs, dense and at some r: measured on the code that the authors of the papers published.
# Theirs are "26M, 6.6" and "21.5M, 4.8", rounded.
PUBLISHED: dict[str, tuple[float, float, dict[int, float]]] = {
    "lv_vit_small": (26.15, 6.55, {8: 4.95, 12: 4.17, 16: 3.58}),
    "t2t_vit_14": (21.55, 4.78, {8: 3.61, 12: 3.03, 16: 2.50}),
    "t2t_vit_t_14": (21.54, 6.09, {8: 4.73, 16: 3.50}),
}
TINY: dict[str, Any] = {"img_size": 64, "classes": 5, "depth": 3, "width": 24, "heads": 2}


@pytest.mark.parametrize("name", PUBLISHED)
def test_work_is_what_was_measured_on_the_published_code(name: str) -> None:
    parameters, dense, fused = PUBLISHED[name]
    model = MODELS[name]().eval()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=0.01)
    for r, expected in fused.items():
        report = mctf_compile.explain(model, torch.randn(1, 3, 224, 224), r=r)
        assert report.macs_before / 1e9 == pytest.approx(dense, rel=0.01)
        assert report.macs_after / 1e9 == pytest.approx(expected, rel=0.01)


def spread(model: nn.Module) -> nn.Module:
    """Without positions, and with no parameter at zero or one."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if name == "pos_embed":
            parameter.data.zero_()
        elif parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def uniform(batch: int) -> Tensor:
    """Images of one colour each: of the 4 x 4 tokens, the inner four are equal, and those of a side are pairs."""
    return torch.randn(batch, 3, 1, 1, generator=torch.Generator().manual_seed(1)).expand(-1, -1, 64, 64).contiguous()


# One block fuses: how those that it leaves are ordered, where their scores are equal, depends on rounding. Attention
# between the splits of tokens counts as two blocks.
@pytest.mark.parametrize(
    ("model", "fusing"),
    [
        (LVViT(**TINY), {"layers": [1]}),
        (T2TViT(**TINY), {"layers": [1]}),
        (T2TViT(**TINY, layer="transformer"), {"layers": [3]}),
    ],
    ids=["lv_vit", "t2t_vit", "t2t_vit_t"],
)
def test_equal_tokens_lose_nothing(model: nn.Module, fusing: dict[str, Any]) -> None:
    report = assert_rewrite_sound(
        spread(model).eval(), uniform(2), duplicates=True, r=2, min_tokens=1, **ONLY_SIMILARITY, **fusing
    )
    assert sum(block.removed for block in report.blocks) == 2


def test_token_labels_train_fused_with_mixed_tokens() -> None:
    """Dense outputs of every patch, a box that changes with every step, and gradients of the eager model."""
    model = spread(LVViT(**TINY)).train()
    images, labels = uniform(4), torch.arange(4)
    patch_labels = torch.rand(4, 16, 5).softmax(-1)
    fast = torch.compile(
        model,
        backend="mctf",
        options={"r": 1, "layers": [1], "min_tokens": 1, "inner": "aot_eager", **ONLY_SIMILARITY},
    )
    boxes = [torch.zeros(4, 4, dtype=torch.bool) for _ in range(3)]
    boxes[1][1, 1] = True
    boxes[2][1:, 2:] = True
    for box in boxes:
        with torch._dynamo.config.patch(error_on_recompile=True):
            results = [run(images, box) for run in (model, fast)]
        gradients = []
        for logits, patches in results:
            assert (logits.shape, patches.shape) == ((4, 5), (4, 16, 5))
            loss = losses.token_labeling(logits, patches, labels, patch_labels, box)
            gradients.append(torch.autograd.grad(loss, list(model.blocks.parameters())))
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)
    removed = mctf_compile.explain(model, images, boxes[0], r=1, layers=[1], min_tokens=1)
    assert sum(block.removed for block in removed.blocks) == 1


def test_tokens_of_a_box_are_those_of_another_image() -> None:
    """With blocks that add nothing, a patch's logits are those of the image that it came from, where it came from."""
    model = spread(LVViT(**{**TINY, "depth": 1})).train()
    for block in model.blocks:
        for layer in (block.attn.proj, block.mlp.fc2):
            layer.weight.data.zero_()
            layer.bias.data.zero_()
    images = torch.randn(2, 3, 64, 64)
    box = torch.zeros(4, 4, dtype=torch.bool)
    box[0, 1:3] = True
    plain, mixed = model(images)[1], model(images, box)[1]
    torch.testing.assert_close(mixed, plain)
    # And the tokens did change hands: the class token would see others.
    stem = model.patch_embed(images)
    seen: list[Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(images, box)
    torch.testing.assert_close(seen[0][:, 1:].mT.unflatten(2, (4, 4))[0, :, 0, 1:3], stem[1, :, 0, 1:3])


def test_loss_of_token_labels() -> None:
    """Against sums written out in float64."""
    torch.manual_seed(0)
    logits, patches = torch.randn(2, 3).double(), torch.randn(2, 4, 3).double()
    targets = torch.rand(2, 4, 3).double().softmax(-1)
    box = torch.tensor([[True, False], [False, False]])
    labels = torch.tensor([0, 2])
    expected = 0.0
    for i in range(2):
        own, other = (-logits[i].log_softmax(-1)[labels[j]].item() for j in (i, 1 - i))
        expected += (0.75 * own + 0.25 * other) / 2
        for n in range(4):
            expected += 0.5 * -(targets[i, n] * patches[i, n].log_softmax(-1)).sum().item() / 8
    assert losses.token_labeling(logits, patches, labels, targets, box).item() == pytest.approx(expected)
    no_box = losses.token_labeling(logits, patches, labels, targets, weight=0)
    assert no_box.item() == pytest.approx(cross_entropy(logits, labels).item())


def test_boxes_cover_any_share_of_the_grid() -> None:
    generator = torch.Generator().manual_seed(0)
    boxes = [draw_box(14, 14, generator) for _ in range(300)]
    for box in boxes:
        rows, columns = box.any(1), box.any(0)
        # A box: all of its rows have all of its columns.
        assert torch.equal(box, rows[:, None] & columns)
    shares = torch.tensor([box.float().mean() for box in boxes])
    assert shares.min() < 0.02 and shares.max() > 0.7 and 0.2 < shares.mean() < 0.5


BLOCK = {
    "norm1.weight": (384,),
    "norm1.bias": (384,),
    "attn.qkv.weight": (1152, 384),
    "attn.proj.weight": (384, 384),
    "attn.proj.bias": (384,),
    "norm2.weight": (384,),
    "norm2.bias": (384,),
    "mlp.fc1.weight": (1152, 384),
    "mlp.fc1.bias": (1152,),
    "mlp.fc2.weight": (384, 1152),
    "mlp.fc2.bias": (384,),
}
ENDS = {
    "cls_token": (1, 1, 384),
    "pos_embed": (1, 197, 384),
    "norm.weight": (384,),
    "norm.bias": (384,),
    "head.weight": (1000, 384),
    "head.bias": (1000,),
}


def performer(given: int) -> dict[str, tuple[int, ...]]:
    return {
        "norm1.weight": (given,),
        "norm1.bias": (given,),
        "kqv.weight": (192, given),
        "kqv.bias": (192,),
        "proj.weight": (64, 64),
        "proj.bias": (64,),
        "norm2.weight": (64,),
        "norm2.bias": (64,),
        "mlp.0.weight": (64, 64),
        "mlp.0.bias": (64,),
        "mlp.2.weight": (64, 64),
        "mlp.2.bias": (64,),
        "w": (32, 64),
    }


def transformer(given: int) -> dict[str, tuple[int, ...]]:
    return {
        "norm1.weight": (given,),
        "norm1.bias": (given,),
        "attn.qkv.weight": (192, given),
        "attn.proj.weight": (64, 64),
        "attn.proj.bias": (64,),
        "norm2.weight": (64,),
        "norm2.bias": (64,),
        "mlp.fc1.weight": (64, 64),
        "mlp.fc1.bias": (64,),
        "mlp.fc2.weight": (64, 64),
        "mlp.fc2.bias": (64,),
    }


def batch_norm(name: str) -> dict[str, tuple[int, ...]]:
    parts = ("weight", "bias", "running_mean", "running_var")
    return {**{f"{name}.{part}": (64,) for part in parts}, f"{name}.num_batches_tracked": ()}


def within(prefix: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def of_blocks(depth: int) -> dict[str, tuple[int, ...]]:
    return {name: shape for i in range(depth) for name, shape in within(f"blocks.{i}", BLOCK).items()}


# The names and shapes of the checkpoints that the papers' authors published.
OFFICIAL: dict[str, dict[str, tuple[int, ...]]] = {
    "lv_vit_small": {
        **ENDS,
        "aux_head.weight": (1000, 384),
        "aux_head.bias": (1000,),
        "patch_embed.conv1.weight": (64, 3, 7, 7),
        **batch_norm("patch_embed.bn1"),
        "patch_embed.conv2.weight": (64, 64, 3, 3),
        **batch_norm("patch_embed.bn2"),
        "patch_embed.conv3.weight": (64, 64, 3, 3),
        **batch_norm("patch_embed.bn3"),
        "patch_embed.proj.weight": (384, 64, 8, 8),
        "patch_embed.proj.bias": (384,),
        **of_blocks(16),
    },
    **{
        name: {
            **ENDS,
            **within("tokens_to_token.attention1", layer(147)),
            **within("tokens_to_token.attention2", layer(576)),
            "tokens_to_token.project.weight": (384, 576),
            "tokens_to_token.project.bias": (384,),
            **of_blocks(14),
        }
        for name, layer in (("t2t_vit_14", performer), ("t2t_vit_t_14", transformer))
    },
}


def generated(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        n: torch.tensor(7) if n.endswith("num_batches_tracked") else torch.rand(shape, generator=generator)
        for n, shape in OFFICIAL[name].items()
    }


@pytest.mark.parametrize("name", OFFICIAL)
def test_published_checkpoints_load(name: str, tmp_path: Path) -> None:
    weights = generated(name)
    torch.save(
        {"epoch": 3, "state_dict_ema": {f"module.{n}": value for n, value in weights.items()}}, tmp_path / "a.pth"
    )
    model = MODELS[name]()
    load_official(model, tmp_path / "a.pth")
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[n]) for n, value in model.state_dict().items())


def test_heads_of_other_classes_stay(tmp_path: Path) -> None:
    weights = generated("lv_vit_small")
    torch.save(weights, tmp_path / "a.pth")
    model = MODELS["lv_vit_small"](classes=10)
    before = {n: value.clone() for n, value in model.state_dict().items()}
    load_official(model, tmp_path / "a.pth")
    for n, value in model.state_dict().items():
        assert torch.equal(value, before[n] if n.startswith(("head.", "aux_head.")) else weights[n])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("norm.bias"), "lacks norm.bias"),
        (lambda w: w.update({"head_dist.weight": torch.zeros(1)}), "also has head_dist.weight"),
        (lambda w: w.update(pos_embed=torch.zeros(1, 577, 384)), "has in another shape pos_embed"),
    ],
)
def test_checkpoints_of_other_models_are_refused(change: Any, said: str, tmp_path: Path) -> None:
    weights = generated("t2t_vit_14")
    change(weights)
    torch.save(weights, tmp_path / "a.pth")
    with pytest.raises(ConfigError, match=said):
        load_official(MODELS["t2t_vit_14"](), tmp_path / "a.pth")


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_text("nothing")
    with pytest.raises(ConfigError, match=r"a\.pth cannot be read as a state dict"):
        load_official(MODELS["t2t_vit_14"](), tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: LVViT(img_size=100), "img_size=100 must be a multiple of patch=16"),
        (lambda: T2TViT(img_size=100), "img_size=100 must be a multiple of 16"),
        (lambda: T2TViT(layer="linformer"), "must be 'performer' or 'transformer'"),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments_are_named(made: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        made()


def test_commands_know_the_models(capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model("t2t_vit_14", 64, pretrained=False)
    assert isinstance(model, T2TViT) and model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)
    assert input_size(model, None) == (3, 64, 64)
    assert main(["explain", "lv_vit_smal"]) != 0
    assert "lv_vit_small" in capsys.readouterr().err
    assert main(["explain", "lv_vit_small", "--pretrained"]) != 0
    assert "--weights" in capsys.readouterr().err
