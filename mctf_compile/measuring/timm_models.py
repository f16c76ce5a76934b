"""Models by name, timm's and our own, and how their images are prepared."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mctf_compile import models as own
from mctf_compile import packages
from mctf_compile.errors import ConfigError
from mctf_compile.models.checkpoints import state_dict_in

timm, data = map(packages.timm, ("timm", "timm.data"))


def make_model(name: str, img_size: int | None, pretrained: bool) -> nn.Module:
    """A model of timm or ``mctf_compile.models``; raises ``ConfigError`` with the names nearest to an unknown one."""
    if name in own.MODELS:
        if pretrained:
            raise ConfigError(f"no weights of {name} can be fetched; give a file of them with --weights")
        return own.made(name, img_size)
    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(name):
        near = difflib.get_close_matches(name, [*own.MODELS, *timm.list_models()], 3, 0.4)
        hint = f"; the nearest are {', '.join(near)}" if near else ""
        raise ConfigError(f"timm has no model {name!r}{hint}")
    sized: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **sized)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        # A model that takes no image size takes any.
        model = timm.create_model(name, pretrained=pretrained)
    except (RuntimeError, OSError) as error:
        raise ConfigError(f"timm cannot make {name!r}: {str(error).splitlines()[0]}") from error
    return model


def read_weights(file: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint's state dict, without and with the modules that ``mctf_compile.attach`` adds.

    Raises ``ConfigError`` for a file that is none.
    """
    found = state_dict_in(file)
    learned = {name: value for name, value in found.items() if name.startswith("mctf_")}
    return {name: value for name, value in found.items() if name not in learned}, learned


def input_size(model: nn.Module, img_size: int | None) -> tuple[int, int, int]:
    """Channels, height and width of a timm model's images."""
    config: Any = model.pretrained_cfg
    channels, height, width = config.get("input_size", (3, 224, 224))
    return channels, img_size or height, img_size or width


def evaluation_transform(model: nn.Module, img_size: int | None) -> Callable[[Any], Tensor]:
    """What makes of a PIL image the [C, H, W] that a timm model is evaluated on."""
    config = data.resolve_model_data_config(model, {"input_size": input_size(model, img_size)})
    transform: Callable[[Any], Tensor] = data.create_transform(**config, is_training=False)
    return transform


def training_transform(model: nn.Module, img_size: int | None, augmentation: dict[str, Any]) -> Callable[[Any], Tensor]:
    """What makes of a PIL image, by chance, the [C, H, W] that a timm model is trained on.

    ``augmentation``: arguments of ``timm.data.create_transform``; raises ``ConfigError`` for others.
    """
    config = data.resolve_model_data_config(model, {"input_size": input_size(model, img_size)})
    try:
        transform: Callable[[Any], Tensor] = data.create_transform(**{**config, **augmentation}, is_training=True)
    except (TypeError, ValueError, AssertionError, KeyError) as error:
        said = ", ".join(f"{name}={value!r}" for name, value in augmentation.items())
        raise ConfigError(f"timm has no augmentation by {said}: {error}") from error
    return transform


def corrupted(
    transform: Any, corrupt: Callable[[Tensor, int], Tensor]
) -> tuple[Callable[[Any], Tensor], Callable[[Tensor, int], Tensor]]:
    """An ``evaluation_transform`` in two: up to an image of values from 0 to 1; ``corrupt``, and on to the end."""
    from torchvision.transforms import Compose, Normalize

    steps = transform.transforms
    at = next(i for i, step in enumerate(steps) if isinstance(step, Normalize))
    before, after = Compose(steps[:at]), Compose(steps[at:])

    def altered(image: Tensor, number: int) -> Tensor:
        normalized: Tensor = after(corrupt(image.to(torch.float32), number))
        return normalized

    return before, altered
