"""Vision Transformers that no library has: plain PyTorch, in which token fusion needs no line of its own."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from mctf_compile.models.checkpoints import load_official
from mctf_compile.models.lv_vit import LVViT, draw_box, lv_vit_small
from mctf_compile.models.t2t_vit import T2TViT, t2t_vit_14, t2t_vit_t_14

# By the names that the command line takes.
MODELS: dict[str, Callable[..., nn.Module]] = {
    "lv_vit_small": lv_vit_small,
    "t2t_vit_14": t2t_vit_14,
    "t2t_vit_t_14": t2t_vit_t_14,
}

__all__ = [
    "MODELS",
    "LVViT",
    "T2TViT",
    "draw_box",
    "load_official",
    "lv_vit_small",
    "t2t_vit_14",
    "t2t_vit_t_14",
]


def made(name: str, img_size: int | None = None) -> nn.Module:
    """The model of a name in ``MODELS``, with random weights."""
    return MODELS[name](**({} if img_size is None else {"img_size": img_size}))
