"""``mctf finetune``: train a model with fused tokens on your images."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mctf_compile.cli.arguments import Subcommands, count, fused_model, parse_pair, positive, readable
from mctf_compile.cli.console import CommandError, stages
from mctf_compile.cli.models import attach_learned, chosen_options, fill, load

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mctf_compile.finetuning.checkpoints import Checkpoints
    from mctf_compile.finetuning.finetune import Finetuned
    from mctf_compile.finetuning.recipe import Recipe


def add(commands: Subcommands) -> None:
    """Add the command to the parser of all."""
    parser = commands.add_parser(
        "finetune", parents=[fused_model()], help="train with fused tokens on your images, by labels or distillation"
    )
    parser.add_argument(
        "images", type=Path, metavar="IMAGES", help="folder of one subfolder for each class; of images, to distill"
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="keep checkpoints, metrics and weights here, and go on from those that are there",
    )
    parser.add_argument("--class-map", type=readable, metavar="FILE", help="as for mctf evaluate")
    parser.add_argument(
        "--distill", action="store_true", help="follow the dense model with the weights at the start; needs no labels"
    )
    parser.add_argument(
        "--teacher", type=readable, metavar="FILE", help="follow the dense model with this state dict instead"
    )
    parser.add_argument("--epochs", type=positive, default=30, metavar="N", help="default: 30")
    parser.add_argument(
        "--batch", type=positive, default=32, metavar="N", help="images of a step, over all processes (default: 32)"
    )
    parser.add_argument(
        "--accumulate", type=positive, default=1, metavar="N", help="compute a step in N parts (default: 1)"
    )
    parser.add_argument("--opt", default="adamw", metavar="NAME", help="timm's optimizer (default: adamw)")
    parser.add_argument("--lr", type=float, default=3e-5, metavar="X", help="learning rate (default: 3e-5)")
    parser.add_argument("--weight-decay", type=float, default=0.05, metavar="X", help="default: 0.05")
    parser.add_argument("--sched", default="cosine", metavar="NAME", help="timm's schedule of it (default: cosine)")
    parser.add_argument("--min-lr", type=float, default=1e-6, metavar="X", help="where it ends (default: 1e-6)")
    parser.add_argument("--warmup", type=count, default=0, metavar="N", help="epochs in which it rises (default: 0)")
    parser.add_argument("--smoothing", type=float, default=0.1, metavar="X", help="of labels (default: 0.1)")
    parser.add_argument(
        "--consistency",
        type=float,
        default=3.0,
        metavar="X",
        help="weight of the consistency with a second pass, in which fewer tokens fuse; 0: no such pass (default: 3)",
    )
    parser.add_argument("--ema", type=float, metavar="X", help="keep a moving average of the weights, of this decay")
    parser.add_argument(
        "--augment",
        type=parse_pair,
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="arguments of timm.data.create_transform, as auto_augment=rand-m9-mstd0.5 re_prob=0.25 or no_aug=True",
    )
    parser.add_argument("--amp", choices=("bf16",), help="compute in bfloat16 by autocast (default: float32)")
    parser.add_argument(
        "--checkpointing", action="store_true", help="save memory: compute activations anew for the gradients"
    )
    parser.add_argument("--fsdp", action="store_true", help="under torchrun: share parameters too (default: copies)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is left to chance (default: 0)")
    parser.add_argument(
        "--save-every", type=positive, metavar="N", help="steps between two checkpoints (default: an epoch)"
    )
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="take N images, spread evenly over the folder (default: all)"
    )
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="CPU threads (default: 1)")
    parser.add_argument("--workers", type=count, default=0, metavar="N", help="processes that read images (default: 0)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument(
        "--inner",
        choices=("eager", "aot_eager", "inductor"),
        default="inductor",
        help="what compiles the graphs (default: inductor)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Train on the folder's images; what comes of it is in the output folder."""
    with stages() as progress:
        progress("load torch and timm", 0, 1)
        import torch

        from mctf_compile.evaluating.images import Files
        from mctf_compile.evaluating.outcomes import claim
        from mctf_compile.evaluating.sharding import world
        from mctf_compile.finetuning.checkpoints import Checkpoints
        from mctf_compile.finetuning.finetune import finetune
        from mctf_compile.measuring.timm_models import input_size, training_transform

        recipe, options = recipe_of(args), chosen_options(args)
        if args.device == "cuda" and not torch.cuda.is_available():
            raise CommandError("--device cuda: no CUDA device is available")
        with world("cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo") as processes:
            device = "cpu"
            if args.device == "cuda":
                device = f"cuda:{processes.rank % torch.cuda.device_count()}"
                torch.cuda.set_device(device)
            torch.set_num_threads(args.threads)
            model = load(args, progress)
            progress(f"list the images of {args.images}", 0, 1)
            paths, labels, digest = images_of(args, cast(int, model.num_classes))
            transform = training_transform(model, args.img_size, dict(args.augment))
            teacher = teacher_of(args, model)
            attach_learned(model, torch.zeros(2, *input_size(model, args.img_size)), options, args)
            known = facts(args, model, teacher, recipe, options, digest, transform)
            claim(args.output, known, processes.rank, "training run", "checkpoints")
            checkpoints = Checkpoints(args.output, processes.first)
            try:
                found = finetune(
                    model.to(device),
                    Files(paths, transform),
                    labels,
                    recipe,
                    options,
                    checkpoints,
                    teacher=None if teacher is None else teacher.to(device),
                    inner=args.inner,
                    save_every=args.save_every,
                    workers=args.workers,
                    device=device,
                    world=processes,
                    sharded=args.fsdp,
                    progress=progress if processes.first else None,
                )
            except KeyboardInterrupt:
                if processes.first:
                    print(how_to_go_on(checkpoints), file=sys.stderr)
                raise
            first = processes.first
    if first:
        print(summary(found))


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe that the command line gives."""
    from mctf_compile.finetuning.recipe import Recipe

    names = [field.name for field in fields(Recipe) if field.name != "bf16"]
    return Recipe(bf16=args.amp == "bf16", **{name: getattr(args, name) for name in names})


def images_of(args: argparse.Namespace, outputs: int) -> tuple[list[Path], Tensor | None, str]:
    """The image files, their labels unless a teacher is followed, and what tells them from others."""
    from mctf_compile.evaluating.images import Folder, digest_of, flat

    distilled = args.distill or args.teacher is not None
    if distilled and args.images.is_dir() and not any(entry.is_dir() for entry in args.images.iterdir()):
        every = flat(args.images)
        chosen = min(args.limit or len(every), len(every))
        paths = [every[i * len(every) // chosen] for i in range(chosen)]
        if not paths:
            raise CommandError(f"{args.images} has no images, and no subfolders with some")
        return paths, None, digest_of(args.images, paths, [-1] * len(paths))
    folder = Folder(args.images, None if distilled else outputs, args.limit, args.class_map)
    if distilled:
        return folder.paths, None, folder.digest
    empty = sorted(set(folder.classes) - {path.parent.name for path in Folder(args.images).paths})
    if empty:
        raise CommandError(f"{args.images / empty[0]} has no images; a class is learned from some")
    named = args.class_map is not None or all(name.isdecimal() for name in folder.classes)
    if not named and len(folder.classes) != outputs:
        raise CommandError(
            f"{args.images} has {len(folder.classes)} subfolders, one for each class, and the model has {outputs} "
            "classes; name the missing ones by --class-map, or give subfolders the numbers of their classes"
        )
    return folder.paths, folder.labels, folder.digest


def teacher_of(args: argparse.Namespace, model: nn.Module) -> nn.Module | None:
    """The dense model that is followed, or None."""
    from copy import deepcopy

    from mctf_compile.measuring.timm_models import read_weights

    if args.teacher is None:
        return deepcopy(model) if args.distill else None
    teacher = deepcopy(model)
    fill(teacher, read_weights(args.teacher)[0], args.teacher, named="--teacher")
    return teacher


def facts(
    args: argparse.Namespace,
    model: nn.Module,
    teacher: nn.Module | None,
    recipe: Recipe,
    options: dict[str, Any],
    digest: str,
    transform: Any,
) -> dict[str, Any]:
    """What a run depends on beside the number of processes and threads, for ``claim``."""
    from mctf_compile import FusionConfig, __version__
    from mctf_compile.evaluating.outcomes import weights_digest
    from mctf_compile.measuring.machine import version

    return {
        "model": args.model,
        "weights": weights_digest(model),
        "teacher": None if teacher is None else weights_digest(teacher),
        "images": digest,
        "transform": str(transform),
        **asdict(recipe),
        "options": repr(FusionConfig.from_options(options)),
        "inner": args.inner,
        "device": args.device,
        "versions": {"mctf_compile": __version__, "torch": version("torch"), "timm": version("timm")},
    }


def how_to_go_on(checkpoints: Checkpoints) -> str:
    """What to say where a run was interrupted."""
    found = checkpoints.all()
    if not found:
        return f"{checkpoints.folder} has no checkpoint yet; the same command starts anew"
    return f"{found[-1]} is whole; the same command goes on from there"


def summary(found: Finetuned) -> str:
    """What a run did, in a line for each file."""
    went_on = f", {found.begun} of them before" if found.begun else ""
    loss = "" if found.loss is None else f"; loss {found.loss:.4g} in the last epoch"
    lines = [f"{found.weights}: after {found.steps} steps{went_on}{loss}"]
    if found.averaged is not None:
        lines.append(f"{found.averaged}: their moving average")
    return "\n".join(lines)
