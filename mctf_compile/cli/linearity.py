"""``mctf linearity``: where ToFu should prune, and where merge."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from mctf_compile.cli.arguments import Subcommands, named_model, positive
from mctf_compile.cli.console import stages
from mctf_compile.cli.models import image_files, load, read_images


def add(commands: Subcommands) -> None:
    """Add the command to the parser of all."""
    parser = commands.add_parser(
        "linearity", parents=[named_model()], help="measure in which blocks ToFu should prune, and in which merge"
    )
    parser.add_argument("--batch", type=positive, default=8, metavar="N", help="batch size, at least 2 (default: 8)")
    parser.add_argument(
        "--steps",
        type=positive,
        default=10,
        metavar="N",
        help="parts that the way from one image to another is cut into (default: 10)",
    )
    parser.add_argument(
        "--part",
        choices=("block", "mlp"),
        default="block",
        help="mlp: what comes after attention alone (default: block)",
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="FOLDER",
        help="take the first images of this folder, up to the batch size (default: noise)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure the linearity of each block; print the table and the option that it proposes."""
    with stages() as progress:
        progress("load torch and timm", 0, 1)
        import torch

        from mctf_compile.measuring.linearity import linearity, proposal, table
        from mctf_compile.measuring.timm_models import evaluation_transform, input_size

        files = None if args.images is None else image_files(args.images, args.batch)
        model = load(args, progress)
        if files is None:
            images = torch.randn(args.batch, *input_size(model, args.img_size))
        else:
            images = read_images(files, evaluation_transform(model, args.img_size))
        progress("measure", 0, 1)
        found = linearity(model, images, steps=args.steps, part=args.part)
    weights = "pretrained" if args.pretrained else "random"
    print(
        f"functional linearity (FL) of {args.model}, {weights} weights, {len(images)} images"
        f"{' of noise' if files is None else ''}"
    )
    if found:
        Console().print(table(found))
    values = [block.value for block in found]
    if any(value is not None for value in values):
        print(f'proposed: options={{"method": "tofu", "prune_layers": {proposal(values)}}}')
    else:
        print("nothing to propose: no block could be measured")
