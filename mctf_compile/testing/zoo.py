"""The models that ``mctf coverage`` compiles: many families, small or shallow, with random weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mctf_compile.testing.models import repeated_patches

# Names of parameters and buffers that tell positions apart.
POSITION = (
    "pos_embed",
    "position",
    "pos_emb",
    "pos_proj",
    "rel_pos",
    "relative",
    "rpe",
    "rope",
    "freq",
    "bands",
    "attention_bias",
    "pos_block",
)


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    ``kind``: A, token-wise operators and global attention; B, with side tensors that have the token axis;
    C, with operators on the grid in between; D, windows, convolutions and mixers throughout.
    ``library`` and ``arguments`` say how it is made; ``size`` and ``patch`` shape its images.
    """

    name: str
    kind: str
    library: str
    size: int = 224
    patch: int = 16
    arguments: dict[str, Any] = field(default_factory=dict)

    def make(self) -> nn.Module:
        """The model in eval mode: random weights, none of them zero or one throughout, no positions."""
        torch.manual_seed(0)
        model = MAKERS[self.library](self).eval()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            if "period" in name:
                # Rotary tables turn by position / period.
                tensor.data.fill_(float("inf"))
            elif any(word in name.lower() for word in POSITION):
                tensor.data.zero_()
            elif isinstance(tensor, nn.Parameter) and tensor.dim() < 2:
                # Scales and biases that start at zero or one would hide mistakes.
                tensor.data += 0.05 * torch.randn_like(tensor)
        return model

    def inputs(self, batch: int = 2) -> tuple[Tensor, ...]:
        """Images [B, 3, size, size] of three kinds of patches (for a video model: of equal frames)."""
        grid = -(-self.size // self.patch)
        images = repeated_patches(batch, grid, 3, seed=0, patch=self.patch)[..., : self.size, : self.size]
        frames = self.arguments.get("num_frames", self.arguments.get("frames_per_clip"))
        if frames:
            return (images[:, None].expand(-1, frames, -1, -1, -1).contiguous(),)
        return (images,)


def _timm(entry: Entry) -> nn.Module:
    import timm

    return timm.create_model(entry.name, **entry.arguments)


def _torchvision(entry: Entry) -> nn.Module:
    import torchvision

    if entry.name == "VisionTransformer":
        model: nn.Module = torchvision.models.VisionTransformer(**entry.arguments)
    else:
        model = torchvision.models.get_model(entry.name, weights=None, **entry.arguments)
    return model


class _Readout(nn.Module):
    """A transformers model as a function from pixels to plain tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return tuple(v for v in self.model(pixels).to_tuple() if isinstance(v, Tensor))


def _transformers(entry: Entry) -> nn.Module:
    import transformers

    model = getattr(transformers, entry.name)
    config = model.config_class(**entry.arguments)
    return _Readout(model(config))


# Numbers of words in a text, and the time that a denoiser is asked about.
WORDS, TIME = 7, 10


class _Denoiser(nn.Module):
    """A diffusers model as a function from latents to what it predicts, at one time and for a text of equal words."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, config = model, model.config
        widths = ("joint_attention_dim", "caption_channels", "cross_attention_dim")
        width = next((config[name] for name in widths if config.get(name)), 0)
        self.takes = set(inspect.signature(model.forward).parameters)
        if not config.get("num_embeds_ada_norm") or width:
            self.takes.discard("class_labels")
        self.packed = "img_ids" in self.takes
        self.text, self.pooled = torch.randn(width), torch.randn(config.get("pooled_projection_dim", 0))

    def forward(self, latents: Tensor) -> tuple[Tensor, ...]:
        """Latents [B, 3, H, W], or [B, HW, 3] to a model that takes them packed."""
        images = latents.shape[0]
        x = latents.flatten(2).transpose(1, 2) if self.packed else latents
        given = {
            "timestep": torch.full((images,), TIME),
            "class_labels": torch.zeros(images, dtype=torch.long),
            "encoder_hidden_states": self.text.expand(images, WORDS, -1),
            "pooled_projections": self.pooled.expand(images, -1),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            "img_ids": torch.zeros(x.shape[1], 3),
            "txt_ids": torch.zeros(WORDS, 3),
            "return_dict": False,
        }
        predicted: tuple[Tensor, ...] = self.model(x, **{k: v for k, v in given.items() if k in self.takes})
        return predicted


def _diffusers(entry: Entry) -> nn.Module:
    import diffusers

    return _Denoiser(getattr(diffusers, entry.name)(**entry.arguments))


MAKERS: dict[str, Callable[[Entry], nn.Module]] = {
    "diffusers": _diffusers,
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": _transformers,
}


def _entries(kind: str, library: str, *rows: tuple[Any, ...]) -> list[Entry]:
    """Rows of (name, arguments, image size, patch size), the last two optional."""
    defaults: tuple[Any, ...] = ({}, 224, 16)
    made = []
    for name, *rest in rows:
        arguments, size, patch = [*rest, *defaults[len(rest) :]]
        made.append(Entry(name, kind, library, size, patch, arguments))
    return made


_D = {"depth": 3}
_HF = {"num_hidden_layers": 3, "hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 96, "image_size": 112}
_HF_PATCH = {**_HF, "patch_size": 16}
_LATENTS = {"num_attention_heads": 3, "attention_head_dim": 16, "num_layers": 3, "in_channels": 3}
_PATCHED = {**_LATENTS, "out_channels": 3, "sample_size": 16, "patch_size": 2}

ZOO: list[Entry] = [
    *_entries(
        "A",
        "timm",
        ("deit_tiny_patch16_224", _D),
        ("deit_tiny_distilled_patch16_224", _D),
        ("deit3_small_patch16_224", _D),
        ("vit_tiny_patch16_224", _D),
        ("vit_tiny_patch16_384", _D, 384),
        ("vit_small_patch32_224", _D, 224, 32),
        ("vit_base_patch16_siglip_224", _D),
        ("vit_base_patch16_clip_224", _D),
        ("vit_base_patch16_clip_quickgelu_224", _D),
        ("vit_so150m_patch16_reg4_map_256", _D, 256),
        ("vit_so150m2_patch16_reg1_gap_256", _D, 256),
        ("vit_giantopt_patch16_siglip_256", {**_D, "embed_dim": 192, "num_heads": 3}, 256),
        ("vit_small_patch14_dinov2", {**_D, "img_size": 112}, 112, 14),
        ("vit_small_patch14_reg4_dinov2", {**_D, "img_size": 112}, 112, 14),
        ("vit_base_patch16_gap_224", _D),
        ("vit_base_patch16_plus_240", _D, 240),
        ("vit_base_patch16_xp_224", _D),
        ("vit_small_patch16_18x2_224", _D),
        ("vit_base_patch16_rpn_224", _D),
        ("vit_base_mci_224", _D),
        ("vit_dlittle_patch16_reg1_gap_256", _D, 256),
        ("vit_dpwee_patch16_reg1_gap_256", _D, 256),
        ("vit_base_r50_s16_224", _D),
        ("flexivit_small", _D, 240),
        ("aimv2_large_patch14_224", {**_D, "embed_dim": 192, "num_heads": 3}, 224, 14),
        ("beit3_base_patch16_224", _D),
        ("vit_intern300m_patch14_448", {**_D, "embed_dim": 192, "num_heads": 3, "img_size": 112}, 112, 14),
        ("eva_giant_patch14_224", {**_D, "embed_dim": 192, "num_heads": 3}, 224, 14),
        ("naflexvit_base_patch16_gap", _D, 384),
        ("cait_xxs24_224", _D),
    ),
    *_entries(
        "A",
        "transformers",
        ("ViTModel", _HF_PATCH, 112),
        ("DeiTModel", _HF_PATCH, 112),
        ("Dinov2Model", {**_HF, "patch_size": 14}, 112, 14),
        ("Dinov2WithRegistersModel", {**_HF, "patch_size": 14}, 112, 14),
        ("CLIPVisionModel", _HF_PATCH, 112),
        ("SiglipVisionModel", _HF_PATCH, 112),
        ("ViTMSNModel", _HF_PATCH, 112),
        ("IJepaModel", _HF_PATCH, 112),
        ("ViTMAEModel", {**_HF_PATCH, "mask_ratio": 0.25}, 112),
        ("VideoMAEModel", {**_HF_PATCH, "num_frames": 4}, 112),
        ("VivitModel", {**_HF, "num_frames": 4, "tubelet_size": [2, 16, 16]}, 112),
        ("YolosModel", {**_HF, "patch_size": 16, "image_size": [112, 112]}, 112),
        ("Aimv2VisionModel", _HF_PATCH, 112),
    ),
    *_entries(
        "A",
        "torchvision",
        (
            "VisionTransformer",
            {"image_size": 112, "patch_size": 16, "num_layers": 3, "num_heads": 3, "hidden_dim": 48, "mlp_dim": 96},
            112,
        ),
    ),
    *_entries(
        "A",
        "diffusers",
        ("DiTTransformer2DModel", {**_PATCHED, "num_embeds_ada_norm": 10}, 16, 2),
        ("PixArtTransformer2DModel", {**_PATCHED, "cross_attention_dim": 48, "caption_channels": 24}, 16, 2),
        (
            "SD3Transformer2DModel",
            {
                **_PATCHED,
                "joint_attention_dim": 24,
                "caption_projection_dim": 48,
                "pooled_projection_dim": 20,
                "pos_embed_max_size": 16,
            },
            16,
            2,
        ),
    ),
    *_entries(
        "B",
        "timm",
        ("beit_base_patch16_224", _D),
        ("beitv2_base_patch16_224", _D),
        ("vit_relpos_small_patch16_224", _D),
        ("vit_relpos_medium_patch16_cls_224", _D),
        ("vit_relpos_base_patch16_clsgap_224", _D),
        ("vit_srelpos_small_patch16_224", _D),
        ("convit_tiny", {"depth": 4, "local_up_to_layer": 2}),
        ("eva02_tiny_patch14_224", _D, 224, 14),
        ("vit_small_patch16_dinov3", _D, 256),
        ("vit_7b_patch16_dinov3", {**_D, "embed_dim": 192, "num_heads": 3}, 256),
        ("vit_small_patch16_rope_224", _D),
        ("vit_small_patch16_rope_mixed_224", _D),
        ("vit_small_patch16_rope_ape_224", _D),
        ("vit_medium_patch16_rope_reg1_gap_256", _D, 256),
        ("vit_betwixt_patch16_rope_reg4_gap_256", _D, 256),
        ("vit_pe_core_tiny_patch16_384", _D, 384),
        ("vit_pe_spatial_tiny_patch16_512", {**_D, "img_size": 256}, 256),
    ),
    *_entries(
        "B",
        "transformers",
        ("BeitModel", {**_HF_PATCH, "use_relative_position_bias": True}, 112),
        ("Data2VecVisionModel", {**_HF_PATCH, "use_shared_relative_position_bias": True}, 112),
        ("DINOv3ViTModel", _HF_PATCH, 112),
        ("PixtralVisionModel", {**_HF_PATCH, "head_dim": 16}, 112),
        (
            "VJEPA2Model",
            {
                "crop_size": 64,
                "frames_per_clip": 4,
                "hidden_size": 48,
                "num_attention_heads": 2,
                "num_hidden_layers": 3,
                "pred_hidden_size": 24,
                "pred_num_attention_heads": 2,
                "pred_num_hidden_layers": 2,
            },
            64,
        ),
    ),
    *_entries(
        "B",
        "diffusers",
        (
            "FluxTransformer2DModel",
            {
                **_LATENTS,
                "num_single_layers": 2,
                "joint_attention_dim": 24,
                "pooled_projection_dim": 20,
                "axes_dims_rope": (4, 6, 6),
            },
            16,
            1,
        ),
    ),
    *_entries(
        "C",
        "timm",
        ("pit_ti_224",),
        ("crossvit_tiny_240", {}, 240),
        ("tnt_s_patch16_224",),
        ("xcit_nano_12_p16_224",),
        ("levit_128s",),
        ("levit_conv_128s",),
        ("volo_d1_224",),
        ("nest_tiny",),
        ("coat_tiny",),
        ("coat_lite_tiny",),
        ("coatnet_0_rw_224",),
        ("coatnet_nano_rw_224",),
        ("swin_tiny_patch4_window7_224",),
        ("mvitv2_tiny",),
        ("hiera_tiny_224",),
        ("twins_svt_small",),
        ("twins_pcpvt_small",),
        ("pvt_v2_b0",),
        ("samvit_base_patch16_224", _D),
        ("davit_tiny",),
        ("vitamin_small_224",),
        ("tiny_vit_5m_224",),
        ("efficientformer_l1",),
        ("efficientformerv2_s0",),
        ("nextvit_small",),
        ("visformer_tiny",),
        ("fastvit_sa12", {}, 256),
        ("mobilevit_xxs", {}, 256),
        ("mobilevitv2_050", {}, 256),
        ("hieradet_small",),
        ("botnet26t_256", {}, 256),
        ("edgenext_xx_small",),
    ),
    *_entries(
        "C", "transformers", ("SegformerModel", {"image_size": 64}, 64, 4), ("PvtModel", {"image_size": 64}, 64, 4)
    ),
    *_entries(
        "C",
        "diffusers",
        (
            "UNet2DConditionModel",
            {
                "sample_size": 16,
                "in_channels": 3,
                "out_channels": 3,
                "block_out_channels": (32, 64),
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
                "layers_per_block": 1,
                "cross_attention_dim": 24,
                "attention_head_dim": 8,
                "norm_num_groups": 8,
            },
            16,
            1,
        ),
    ),
    *_entries(
        "D",
        "timm",
        ("swinv2_tiny_window8_256", {}, 256, 4),
        ("maxvit_tiny_rw_224", {}),
        ("gcvit_xxtiny",),
        ("mixer_s16_224",),
        ("gmlp_s16_224",),
        ("resmlp_12_224",),
        ("poolformer_s12",),
        ("focalnet_tiny_srf",),
        ("efficientvit_b0",),
        ("efficientvit_m0",),
        ("halonet26t", {}, 256),
        ("convnext_atto",),
        ("resnet18",),
        ("eca_halonext26ts", {}, 256),
        ("sequencer2d_s",),
        ("convformer_s18",),
    ),
    *_entries("D", "torchvision", ("swin_t",), ("maxvit_t",)),
    *_entries("D", "transformers", ("TimesformerModel", {**_HF_PATCH, "num_frames": 4}, 112)),
]
