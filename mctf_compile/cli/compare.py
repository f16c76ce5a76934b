"""``mctf compare``: accuracy, work and time of several methods."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import cast

from rich.console import Console

from mctf_compile.cli.arguments import Subcommands, named_model, parse_names, positive, writable
from mctf_compile.cli.console import CommandError, stages
from mctf_compile.cli.models import load


def add(commands: Subcommands) -> None:
    """Add the command to the parser of all."""
    parser = commands.add_parser(
        "compare", parents=[named_model()], help="accuracy, work and time of several methods on your images"
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="images in one subfolder for each class; sorted, these are the classes 0, 1, ...",
    )
    parser.add_argument(
        "--methods", type=parse_names, metavar="A,B", help="methods to compare (default: all that need no training)"
    )
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="take N images, spread evenly over the folder (default: all)"
    )
    parser.add_argument("--batch", type=positive, default=8, metavar="N", help="batch size (default: 8)")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="CPU threads (default: 1)")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="timed rounds (default: 5)")
    parser.add_argument(
        "--inner",
        choices=("eager", "inductor"),
        default="eager",
        help="what compiles the graphs; Inductor takes far longer for it (default: eager)",
    )
    parser.add_argument("--plot", type=writable, metavar="FILE", help="draw the result here; needs matplotlib")
    parser.add_argument("--json", type=writable, metavar="FILE", help="write the result here too")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure every setting on the folder's images; print the table, and write JSON and a plot where asked."""
    check_folder(args.data)
    with stages() as progress:
        progress("load torch and timm", 0, 1)
        import torch

        from mctf_compile.measuring.compare import Folder, chosen_methods, compare, draw, sweeps, table, to_dict
        from mctf_compile.measuring.timm_models import evaluation_transform

        methods = chosen_methods(args.methods)
        if args.plot is not None:
            check_plot(args.plot)
        progress(f"list the images of {args.data}", 0, 1)
        folder = Folder(args.data, args.limit)
        model = load(args, progress)
        classes, outputs = len(folder.classes), cast(int, model.num_classes)
        if classes > outputs:
            raise CommandError(
                f"--data {args.data} has {classes} subfolders, one for each class, but {args.model} "
                f"has {outputs} classes"
            )
        folder.transform = evaluation_transform(model, args.img_size)
        torch.set_num_threads(args.threads)
        progress("find the blocks", 0, 1)
        settings = sweeps(model, folder, methods)
        rows = compare(
            model,
            folder,
            folder.labels,
            settings,
            inner=args.inner,
            batch=args.batch,
            rounds=args.rounds,
            progress=progress,
        )
    title = f"{args.model}, {'pretrained' if args.pretrained else 'random'} weights"
    caption = (
        f"Top-1 over {len(folder)} of {folder.total} images; change in percent points. "
        f"ms: of a batch of {min(args.batch, len(folder))} (inner={args.inner}, threads={args.threads}), "
        f"median of {args.rounds} interleaved rounds."
    )
    if classes < outputs:
        caption += f" The {classes} subfolders are taken as the first of the model's {outputs} classes."
    Console().print(table(rows, title, caption))
    if args.json is not None:
        keys = ("model", "pretrained", "img_size", "batch", "threads", "rounds", "inner")
        setting = {**{key: getattr(args, key) for key in keys}, "images": len(folder), "classes": classes}
        args.json.write_text(json.dumps({**setting, **to_dict(rows)}, indent=2) + "\n")
    if args.plot is not None:
        draw(rows, args.plot, title)


def check_folder(path: Path) -> None:
    """Raise ``CommandError`` unless ``path`` has subfolders, before torch is loaded."""
    if not path.is_dir():
        raise CommandError(f"--data {path}: {'not a folder' if path.exists() else 'no such folder'}")
    if not any(entry.is_dir() for entry in path.iterdir()):
        raise CommandError(f"--data {path} has no subfolders; it needs one for each class, with its images")


def check_plot(path: Path) -> None:
    """Raise ``CommandError`` where no plot can be written to ``path``, before minutes of measuring."""
    from mctf_compile.packages import figure_class

    kinds = figure_class()().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise CommandError(f"--plot {path}: its ending must be one of {', '.join(sorted(kinds))}")
