"""``mctf tune``: a schedule that keeps a promise, found and certified on your images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, cast

from mctf_compile.cli.arguments import Subcommands, drawn_model, parse_names, parse_value, positive, readable
from mctf_compile.cli.console import CheckFailed, CommandError, stages
from mctf_compile.cli.models import given_options, load

OUTPUT = "schedule.json"


def add(commands: Subcommands) -> None:
    """Add the command to the parser of all."""
    parser = commands.add_parser(
        "tune",
        parents=[drawn_model(OUTPUT)],
        help="find what each block removes, and certify what that loses",
    )
    parser.add_argument(
        "images", type=Path, metavar="IMAGES", help="folder of images, or of one subfolder for each class"
    )
    parser.add_argument("--class-map", type=readable, metavar="FILE", help="as for mctf evaluate")
    parser.add_argument(
        "--tolerance", type=share, metavar="SHARE", help="lose at most this share of images, as 1%% or 0.01"
    )
    parser.add_argument(
        "--confidence", type=share, default=0.95, metavar="SHARE", help="with this confidence (default: 95%%)"
    )
    parser.add_argument(
        "--measure",
        choices=("agreement", "top1"),
        default="agreement",
        help="what is lost: agreement with the dense model, or top-1 accuracy (default: agreement)",
    )
    parser.add_argument(
        "--budget",
        metavar="KEY=VALUE",
        help="what it may cost: gmacs=2.6, speedup=1.5 or latency_ms=20 of a batch (default: as little as can be)",
    )
    parser.add_argument(
        "--try",
        type=parse_choices,
        action="append",
        default=[],
        dest="choices",
        metavar="KEY=A,B",
        help="values of another option, of which the best is taken, as tau_info=0,20; may be repeated",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="take N images (default: all)")
    parser.add_argument("--batch", type=positive, default=8, metavar="N", help="batch size (default: 8)")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="CPU threads (default: 1)")
    parser.add_argument("--attempts", type=positive, default=60, metavar="N", help="schedules to try (default: 60)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the halves and the search (default: 0)")
    parser.set_defaults(run=run)


def share(text: str) -> float:
    """A share of a whole, as ``1%`` or ``0.01``; raises ``ArgumentTypeError`` for anything else."""
    number, percent, rest = text.strip().partition("%")
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError:
        value = -1
    if rest or not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share above 0 and below 1, as 1% or 0.01")
    return value


def parse_choices(text: str) -> tuple[str, list[Any]]:
    """``KEY=A,B`` as a name and several values; raises ``ArgumentTypeError`` for another form."""
    name, equals, values = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form KEY=A,B")
    return name, [parse_value(value) for value in parse_names(values)]


def run(args: argparse.Namespace) -> None:
    """Tune on the images; print what was found, and write the schedule."""
    options = given_options(args)
    with stages() as progress:
        progress("load torch and timm", 0, 1)
        import torch

        from mctf_compile.evaluating.images import Files
        from mctf_compile.measuring.timm_models import evaluation_transform
        from mctf_compile.options.schedule import parse_target
        from mctf_compile.tuning.contract import Contract, NotCertified
        from mctf_compile.tuning.tune import tune

        contract = Contract(args.measure, args.tolerance, args.confidence)
        budget = parse_target("budget", args.budget)
        progress(f"list the images of {args.images}", 0, 1)
        model = load(args, progress)
        paths, labels, digest = images_of(args, cast(int, model.num_classes))
        torch.set_num_threads(args.threads)
        try:
            tuned = tune(
                model,
                Files(paths, evaluation_transform(model, args.img_size)),
                labels,
                contract=contract,
                budget=budget,
                options=options,
                choices=dict(args.choices),
                batch=args.batch,
                attempts=args.attempts,
                seed=args.seed,
                progress=progress,
            )
        except NotCertified as error:
            raise CheckFailed(f"{error} {args.output} is not written.") from error
    schedule = tuned.schedule(str(args.output), model=args.model, images=digest)
    try:
        schedule.write()
    except OSError as error:
        raise CommandError(f"{args.output} cannot be written: {error}") from error
    for gmacs, verdict in tuned.chain:
        print(f"{gmacs:.3f} GMACs: {verdict}{'' if verdict.kept else ', which is too many'}")
    time = "" if tuned.milliseconds is None else f", {tuned.milliseconds:.2f} ms"
    said = ", ".join(f"{name}={value!r}" for name, value in tuned.options.items())
    print(
        f"{args.output}: {said}\n{tuned.dense_gmacs:.3f} -> {tuned.gmacs:.3f} GMACs{time}; with "
        f"{contract.confidence:.0%} confidence at most {tuned.verdict.bound:.2%} of images lost in {contract.measure}, "
        f"by {tuned.verdict.images} images that had no part in the search"
    )


def images_of(args: argparse.Namespace, outputs: int) -> tuple[list[Path], Any, str]:
    """The image files, their labels where the folder has classes, and what tells them from others."""
    from mctf_compile.evaluating.images import Folder, digest_of, flat

    if args.images.is_dir() and not any(entry.is_dir() for entry in args.images.iterdir()):
        paths = flat(args.images)[: args.limit]
        if not paths:
            raise CommandError(f"{args.images} has no images, and no subfolders with some")
        return paths, None, digest_of(args.images, paths, [-1] * len(paths))
    # Agreement asks for no classes of the model.
    folder = Folder(args.images, outputs if args.measure == "top1" else None, args.limit, args.class_map)
    return folder.paths, folder.labels, folder.digest
