"""``mctf visualize``: which patches of an image became one token."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mctf_compile.cli.arguments import Subcommands, drawn_model, parse_numbers, positive
from mctf_compile.cli.console import stages
from mctf_compile.cli.models import attach_learned, chosen_options, load


def add(commands: Subcommands) -> None:
    """Add the command to the parser of all."""
    parser = commands.add_parser(
        "visualize", parents=[drawn_model("fusion.png")], help="draw which patches of an image became one token"
    )
    parser.add_argument(
        "image",
        type=Path,
        metavar="IMAGE",
        help=(
            "an image, or a video: a file of several frames (.gif, .webp, .tiff) or a folder of images. A model of "
            "images sees each frame by itself; models with a time axis are drawn from Python, with "
            "mctf_compile.visualize"
        ),
    )
    parser.add_argument(
        "--blocks",
        type=parse_numbers,
        metavar="N,N",
        help="blocks to draw (default: all that reduce tokens; of a video the last of them)",
    )
    parser.add_argument(
        "--frames", type=positive, default=8, metavar="N", help="take N frames of a video, spread evenly (default: 8)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Trace the model on the image, and write the picture."""
    frames = prepared(args)
    with stages() as progress:
        progress("load torch and timm", 0, 1)
        import torch

        from mctf_compile.measuring.timm_models import evaluation_transform
        from mctf_compile.pictures.drawing import as_videos, draw
        from mctf_compile.provenance import trace

        options = chosen_options(args)
        model = load(args, progress)
        transform = evaluation_transform(model, args.img_size)
        images = torch.stack([transform(frame) for frame in frames])
        attach_learned(model, images, options, args)
        progress("follow the tokens", 0, 1)
        found = trace(model, images, **options)
        progress("draw", 0, 1)
        drawing = draw(found, as_videos([images], model), args.blocks)
        drawing.save(args.output)
    for report in found.reports:
        for remark in report.remarks:
            print(remark)
    several = f", {len(frames)} frames, each by itself" if len(frames) > 1 else ""
    print(f"{args.output}: {found.report.summary}{several}")


def prepared(args: argparse.Namespace) -> list[Any]:
    """The frames to draw on, before torch is loaded: a mistake in a name shows at once."""
    from mctf_compile.pictures.files import check_ending, read

    check_ending(args.output)
    return read(args.image, args.frames)
