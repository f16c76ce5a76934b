"""The model families: each fuses in every scheduled block, keeps its contract, and passes the theorem."""

import pytest
import timm
import torch
from torch import nn

import mctf_compile
from mctf_compile.testing import Recorder, repeated_patches
from mctf_compile.testing.soundness import ONLY_SIMILARITY

SMALL = {"depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 10}

# name, arguments, prefix tokens
FAMILIES = [
    ("deit_tiny_patch16_224", {}, 1),
    ("deit_tiny_distilled_patch16_224", {}, 2),
    ("deit3_small_patch16_224", {}, 1),
    ("vit_tiny_patch16_224", {}, 1),
    ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}, 0),
    ("vit_tiny_patch16_224", {"global_pool": "avg"}, 1),
    ("vit_base_patch16_siglip_224", {}, 0),
    ("vit_base_patch16_clip_224", {}, 1),
    ("vit_small_patch14_dinov2", {"img_size": 112}, 1),
    ("vit_small_patch14_reg4_dinov2", {"img_size": 112}, 5),
    ("vit_giant_patch14_dinov2", {"img_size": 112}, 1),
    ("vit_base_patch16_gap_224", {}, 0),
    ("vit_base_patch16_plus_240", {}, 1),
    ("vit_base_patch16_xp_224", {}, 1),
    ("vit_small_patch16_18x2_224", {}, 1),
    ("vit_base_patch16_rpn_224", {}, 0),
    ("vit_tiny_patch16_224", {"qk_norm": True}, 1),
    ("flexivit_small", {}, 1),
]


def build(name: str, arguments: dict, **extra) -> nn.Module:
    """A small copy of a timm model with random weights and no position information."""
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL, **arguments, **extra)
    for key, parameter in model.named_parameters():
        if "pos_embed" in key:
            nn.init.zeros_(parameter)
        elif parameter.dim() == 1:
            # Biases and scales that are zero or one at the start would hide mistakes.
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def images_for(model: nn.Module, kinds: int = 1) -> torch.Tensor:
    grid, patch = model.patch_embed.grid_size[0], model.patch_embed.patch_size[0]
    return repeated_patches(2, grid, kinds, seed=0, patch=patch)


@pytest.mark.parametrize(("name", "arguments", "prefix"), FAMILIES, ids=str)
def test_a_timm_family_fuses_everywhere_and_duplicates_change_nothing(name, arguments, prefix):
    model = build(name, arguments)
    images = images_for(model)
    recorder = Recorder({"r": 9, **ONLY_SIMILARITY})
    with torch.no_grad():
        dense, fused = model(images), recorder.run(model, images)
    torch.testing.assert_close(fused, dense, atol=1e-4, rtol=1e-4)
    (report,) = recorder.reports
    scheduled = [b for b in report.blocks if b.reason is None or "reads the same tokens" not in b.reason]
    assert [b.index for b in scheduled if b.reason is not None and "not among the layers" not in b.reason] == []
    assert report.removed >= 18 and report.unmerged == []
    body = model.patch_embed.num_patches
    assert report.blocks[0].tokens_in == prefix + body
    groups = recorder.index()
    assert (groups[:, :prefix] == torch.arange(prefix)).all(), "prefix tokens keep their places"


def test_distilled_heads_read_their_own_tokens():
    model = build("deit_tiny_distilled_patch16_224", {})
    model.set_distilled_training(True)
    images = images_for(model)
    model.train()
    recorder = Recorder({"r": 9, **ONLY_SIMILARITY})
    for a, b in zip(model(images), recorder.run(model, images), strict=True):
        torch.testing.assert_close(b, a, atol=1e-4, rtol=1e-4)
    assert recorder.reports[0].removed == 18


def test_drop_path_and_dropout_train():
    model = build("vit_tiny_patch16_224", {"drop_path_rate": 0.2, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1}).train()
    recorder = Recorder({"r": 9})
    recorder.run(model, torch.randn(2, 3, 224, 224)).sum().backward()
    assert recorder.reports[0].removed == 18
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_torchvision_vit_fuses():
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(32, 4, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=10).eval()
    nn.init.zeros_(model.encoder.pos_embedding)
    nn.init.normal_(model.heads.head.weight)
    images = repeated_patches(2, 8, 1, seed=0)
    recorder = Recorder({"r": 9, **ONLY_SIMILARITY})
    with torch.no_grad():
        torch.testing.assert_close(recorder.run(model, images), model(images), atol=1e-4, rtol=1e-4)
    assert [b.tokens_out for b in recorder.reports[0].blocks] == [65, 56, 47]


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize(("batch_first", "train"), [(True, False), (True, True), (False, True)])
def test_transformer_encoder_fuses(norm_first, batch_first, train):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=batch_first, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).train(train)
    tokens = torch.randn(2, 1, 16).expand(2, 40, 16).contiguous()
    tokens = tokens if batch_first else tokens.transpose(0, 1).contiguous()
    recorder = Recorder({"r": 9, **ONLY_SIMILARITY})
    with torch.set_grad_enabled(train):
        torch.testing.assert_close(recorder.run(model, tokens), model(tokens), atol=1e-4, rtol=1e-4)
    assert [b.tokens_out for b in recorder.reports[0].blocks] == [40, 31, 22]


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("mixer_s32_224", {}, "the graph has no self-attention over tokens"),
        ("resnet18", {}, "the graph has no self-attention over tokens"),
        ("xcit_nano_12_p16_224", {"depth": 2}, "attention over channels (cross-covariance)"),
        ("efficientvit_b0", {}, "attention without a softmax between queries and keys"),
        (
            "swin_tiny_patch4_window7_224",
            {"depths": (2,), "num_heads": (3,)},
            "attention runs within windows of 7×7 tokens of a grid of 56×56",
        ),
        ("pvt_v2_b0", {}, "would be given back within the block: a 3×3 convolution mixes the original tokens"),
    ],
)
def test_what_cannot_fuse_stays_dense_with_a_reason(name, arguments, reason):
    torch.manual_seed(0)
    model = timm.create_model(name, **arguments).eval()
    images = torch.randn(1, *model.default_cfg["input_size"])
    recorder = Recorder({"r": 8})
    with torch.no_grad():
        assert torch.equal(recorder.run(model, images), model(images))
    assert reason in str(recorder.reports[0])


def test_a_convolution_between_stages_gets_the_original_tokens_back():
    torch.manual_seed(0)
    model = timm.create_model("pit_ti_224").eval()
    images = torch.randn(1, 3, 224, 224)
    recorder = Recorder({"r": 8})
    with torch.no_grad():
        dense, fused = model(images), recorder.run(model, images)
    report = recorder.reports[0]
    assert fused.shape == dense.shape and fused.isfinite().all()
    assert report.removed > 0 and all("a 3×3 convolution mixes the original tokens" in line for line in report.unmerged)
    assert report.macs_after < report.macs_before


def test_causal_attention_is_declined_by_name():
    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(16, 48)

        def forward(self, x):
            q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            return x + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    report = mctf_compile.explain(nn.Sequential(Causal(), Causal()), torch.randn(2, 30, 16), r=4)
    assert [b.reason for b in report.blocks] == ["causal attention needs the order of the original tokens"] * 2
