"""``mctf evaluate``: what settings cost in accuracy, and save in work, time and memory."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mctf_compile.cli.arguments import (
    Subcommands,
    count,
    named_model,
    parse_names,
    parse_pair,
    positive,
    readable,
    writable,
)
from mctf_compile.cli.console import CommandError, stages, wide_console
from mctf_compile.cli.models import load

if TYPE_CHECKING:
    from torch import nn

    from mctf_compile.evaluating.images import Folder
    from mctf_compile.evaluating.run import Evaluation

ALL = "all"


def add(commands: Subcommands) -> None:
    """Add the command to the parser of all."""
    parser = commands.add_parser(
        "evaluate", parents=[named_model()], help="accuracy, work, time and memory of options or methods on your images"
    )
    parser.add_argument("images", type=Path, metavar="IMAGES", help="folder of images, in one subfolder for each class")
    parser.add_argument(
        "--class-map",
        type=readable,
        metavar="FILE",
        help=(
            "the subfolders' names in the order of the model's classes, one in a line (default: names that are numbers "
            "are classes; others are the first classes, as they are sorted)"
        ),
    )
    parser.add_argument(
        "--options",
        type=parse_options,
        nargs="+",
        action="extend",
        default=[],
        metavar="'KEY=VALUE ...'",
        help="options of the backend to evaluate, each set in quotes, as 'r=16' 'method=tome r=13'",
    )
    parser.add_argument(
        "--methods",
        type=parse_names,
        default=[],
        metavar="A,B",
        help=f"methods to evaluate at several reductions each; {ALL}: all that need no training",
    )
    parser.add_argument(
        "--corruptions",
        type=parse_names,
        default=[],
        metavar="A,B-4",
        help=f"evaluate under these corruptions too, at severity 3 or the one named; {ALL}: each at severity 3",
    )
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="take N images, spread evenly over the folder (default: all)"
    )
    parser.add_argument(
        "--resume", type=Path, metavar="FOLDER", help="keep outcomes here, and go on from those that are there"
    )
    parser.add_argument("--batch", type=positive, default=8, metavar="N", help="batch size (default: 8)")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="CPU threads (default: 1)")
    parser.add_argument("--workers", type=count, default=0, metavar="N", help="processes that read images (default: 0)")
    parser.add_argument("--rounds", type=count, default=5, metavar="N", help="timed rounds; 0: no times (default: 5)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument(
        "--inner",
        choices=("eager", "inductor"),
        default="eager",
        help="what compiles the graphs; Inductor takes far longer for it (default: eager)",
    )
    parser.add_argument("--plot", type=writable, metavar="FILE", help="draw the result here; needs matplotlib")
    parser.add_argument("--json", type=writable, metavar="FILE", help="write the result here too")
    parser.set_defaults(run=run)


def parse_options(text: str) -> dict[str, Any]:
    """``KEY=VALUE`` between spaces, as options."""
    return dict(parse_pair(part) for part in shlex.split(text))


def run(args: argparse.Namespace) -> None:
    """Evaluate on the folder's images; print the tables, and write JSON and a plot where asked."""
    if not args.options and not args.methods:
        raise CommandError("nothing to evaluate: name options, as --options r=16 'method=tome r=13', or --methods all")
    from mctf_compile.evaluating.images import subfolders

    subfolders(args.images)
    with stages() as progress:
        progress("load torch and timm", 0, 1)
        import torch

        from mctf_compile.config import FusionConfig
        from mctf_compile.evaluating.corruptions import CORRUPTIONS, Corruption
        from mctf_compile.evaluating.images import Files, Folder
        from mctf_compile.evaluating.outcomes import Kept
        from mctf_compile.evaluating.result import draw, robustness, table, to_dict
        from mctf_compile.evaluating.run import CLEAN, evaluate
        from mctf_compile.evaluating.settings import Setting, chosen_methods, sweeps
        from mctf_compile.evaluating.sharding import world
        from mctf_compile.measuring.timm_models import corrupted, evaluation_transform

        for options in args.options:
            FusionConfig.from_options(options)
        methods = chosen_methods(None if args.methods == [ALL] else args.methods)
        kinds = list(CORRUPTIONS) if args.corruptions == [ALL] else args.corruptions
        corruptions = [Corruption.parse(text) for text in kinds]
        if args.plot is not None:
            check_plot(args.plot)
        if args.device == "cuda" and not torch.cuda.is_available():
            raise CommandError("--device cuda: no CUDA device is available")
        progress(f"list the images of {args.images}", 0, 1)
        with world() as processes:
            device = f"cuda:{processes.rank % torch.cuda.device_count()}" if args.device == "cuda" else "cpu"
            model = load(args, progress).to(device)
            folder = Folder(args.images, cast(int, model.num_classes), args.limit, args.class_map)
            transform = evaluation_transform(model, args.img_size)
            images = Files(folder.paths, transform)
            conditions = {CLEAN: images}
            for corruption in corruptions:
                conditions[str(corruption)] = Files(folder.paths, *corrupted(transform, corruption))
            torch.set_num_threads(args.threads)
            settings = [Setting.of(options) for options in args.options]
            if args.methods:
                progress("find the blocks", 0, 1)
                known = [setting.label for setting in settings]
                settings += [s for s in sweeps(model, images, methods) if s.label not in known]
            keep = args.resume and Kept(args.resume, facts(args, model, folder, transform), processes.rank)
            found = evaluate(
                model,
                conditions,
                folder.labels,
                settings,
                inner=args.inner,
                batch=args.batch,
                rounds=args.rounds,
                workers=args.workers,
                device=device,
                keep=keep,
                world=processes,
                progress=progress if processes.first else None,
            )
            first = processes.first
    if not first:
        return
    title = f"{args.model}, {weights_of(args)} weights"
    console = wide_console()
    console.print(table(found, title, caption_of(args, folder, found)))
    under = robustness(found)
    if under is not None:
        console.print(under)
    if args.json is not None:
        keys = ("model", "img_size", "threads", "rounds", "inner", "device")
        setting = {**{key: getattr(args, key) for key in keys}, "weights": weights_of(args)}
        about = {"classes": len(folder.classes), "of": folder.total, "numbering": folder.numbering}
        args.json.write_text(json.dumps({**setting, **about, **to_dict(found)}, indent=2) + "\n")
    if args.plot is not None:
        draw(found, args.plot, title)


def weights_of(args: argparse.Namespace) -> str:
    """Which weights the model has."""
    return "pretrained" if args.pretrained else args.weights.name if args.weights else "random"


def caption_of(args: argparse.Namespace, folder: Folder, found: Evaluation) -> str:
    """What the table's columns are."""
    parts = [
        f"{len(folder)} of {folder.total} images, {found.parameters / 1e6:.1f} M parameters. {folder.numbering} "
        f"change: of top-1 in percent points, with {found.confidence:.0%} confidence; lost/won: images that the dense "
        "model gets right and this not, and the other way round; agree: the dense model's class; ECE: expected "
        "calibration error."
    ]
    if args.rounds:
        parts.append(
            f"ms: of a batch of {found.batch} (inner={args.inner}, threads={args.threads}), median of {args.rounds} "
            "interleaved rounds; MiB: at the highest, beyond weights and images."
        )
    return " ".join(parts)


def facts(args: argparse.Namespace, model: nn.Module, folder: Folder, transform: Any) -> dict[str, Any]:
    """What outcomes depend on beside the setting, for ``Kept``."""
    from mctf_compile import __version__
    from mctf_compile.evaluating.outcomes import weights_digest
    from mctf_compile.measuring.machine import version

    return {
        "model": args.model,
        "weights": weights_digest(model),
        "images": folder.digest,
        "transform": str(transform),
        "batch": min(args.batch, len(folder)),
        "inner": args.inner,
        "device": args.device,
        "versions": {"mctf_compile": __version__, "torch": version("torch"), "timm": version("timm")},
    }


def check_plot(path: Path) -> None:
    """Raise ``CommandError`` where no plot can be written to ``path``, before minutes of measuring."""
    from mctf_compile.packages import figure_class

    kinds = figure_class()().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise CommandError(f"--plot {path}: its ending must be one of {', '.join(sorted(kinds))}")
