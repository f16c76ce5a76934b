"""The models and images that the command line names."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mctf_compile.cli.console import CommandError

if TYPE_CHECKING:
    from torch import Tensor, nn


def prepare(
    args: argparse.Namespace, progress: Callable[[str, int, int], None]
) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """The model in eval mode, a batch of noise for it [B, C, H, W], and the validated options.

    A learned method gets untrained modules: what it costs does not depend on what they have learned.
    """
    progress("load torch and timm", 0, 1)
    import torch

    from mctf_compile.measuring.timm_models import input_size

    options = chosen_options(args)
    model = load(args, progress)
    images = torch.randn(args.batch, *input_size(model, args.img_size))
    attach_learned(model, images, options, args)
    return model, images, options


def chosen_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the backend that the command line names, validated."""
    from mctf_compile import FusionConfig

    options = given_options(args)
    FusionConfig.from_options(options)
    return options


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the backend that the command line names, whatever they are."""
    given = {name: getattr(args, name) for name in ("method", "r") if getattr(args, name) is not None}
    return {**given, **dict(args.options)}


def attach_learned(model: nn.Module, images: Tensor, options: Mapping[str, Any], args: argparse.Namespace) -> None:
    """Add the modules of a learned method, with their weights where ``--weights`` has some."""
    from mctf_compile import FusionConfig, attach
    from mctf_compile.measuring.timm_models import read_weights

    config = FusionConfig.from_options(options)
    if config.method.reads is None:
        return
    attach(model, images, method=config.method.name, **{k: v for k, v in options.items() if k != "method"})
    learned = {} if args.weights is None else read_weights(args.weights)[1]
    if learned:
        fill(model, learned, args.weights, strict=False)


def load(args: argparse.Namespace, progress: Callable[[str, int, int], None]) -> nn.Module:
    """The model in eval mode; random weights are the same each time."""
    import torch

    from mctf_compile.measuring.timm_models import make_model, read_weights

    torch.manual_seed(0)
    progress(f"make {args.model}", 0, 1)
    model = make_model(args.model, args.img_size, args.pretrained).eval()
    if args.weights is not None:
        fill(model, read_weights(args.weights)[0], args.weights)
    return model


def fill(
    model: nn.Module, weights: Mapping[str, Tensor], file: Path, strict: bool = True, named: str = "--weights"
) -> None:
    """Load a state dict; raises ``CommandError`` where it is another model's."""
    try:
        model.load_state_dict(weights, strict=strict)
    except RuntimeError as error:
        problems = [line.strip() for line in str(error).splitlines()[1:]]
        raise CommandError(f"{named} {file} is of another model: {' '.join(problems)[:200]}") from error


def image_files(folder: Path, count: int) -> list[Path]:
    """The first ``count`` images of a folder, by name; raises ``CommandError`` where there is none."""
    from torchvision.datasets.folder import is_image_file

    if not folder.is_dir():
        raise CommandError(f"--images {folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    files = sorted(file for file in folder.iterdir() if is_image_file(file.name))
    if not files:
        raise CommandError(f"--images {folder} has no images")
    return files[:count]


def read_images(files: Sequence[Path], transform: Callable[[Any], Tensor]) -> Tensor:
    """Image files as a batch [B, C, H, W]; raises ``CommandError`` for one that cannot be read."""
    import torch
    from torchvision.datasets.folder import default_loader

    images = []
    for file in files:
        try:
            images.append(transform(default_loader(str(file))))
        except OSError as error:
            raise CommandError(f"--images: {file} cannot be read: {error}") from error
    return torch.stack(images)
