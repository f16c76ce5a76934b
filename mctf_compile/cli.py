"""The command ``mctf``: what fusion would do to a model, what it gains, and whether it is sound.

torch and timm are imported where they are used, so that ``mctf --help`` does not wait for them.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from torch import Tensor, nn

USAGE_ERROR, FAILURE, INTERRUPTED = 2, 1, 130


class CommandError(Exception):
    """A mistake in the command line; the message is one line."""


class CheckFailed(Exception):
    """A check that the command made did not hold; the message is one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = parser().parse_args(arguments)
    try:
        args.run(args)
    except KeyboardInterrupt:
        print("mctf: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        return report_error(error)
    return 0


def report_error(error: Exception) -> int:
    """One line on stderr for an error that is the user's to mend, and its exit status; raises others again."""
    from mctf_compile.errors import ConfigError, MctfError, cause_of

    cause = cause_of(error)
    if not isinstance(cause, (CommandError, CheckFailed, MctfError)):
        raise error
    print(f"mctf: {cause}", file=sys.stderr)
    return USAGE_ERROR if isinstance(cause, (CommandError, ConfigError)) else FAILURE


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="mctf", description="Token fusion for Vision Transformers.")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    named = argparse.ArgumentParser(add_help=False)
    named.add_argument("model", metavar="MODEL", help="name of a timm model")
    named.add_argument("--img-size", type=positive, metavar="N", help="image size (default: the model's)")
    named.add_argument("--pretrained", action="store_true", help="load pretrained weights (default: random ones)")

    common = argparse.ArgumentParser(add_help=False, parents=[named])
    common.add_argument("--method", metavar="NAME", help="reduction method (default: mctf)")
    common.add_argument("--r", type=parse_value, metavar="R", help=(
        'tokens removed per block: a count, a ratio below 1, a list as "0,8,8", "(count, inflection)" '
        'a preset as "fast", or "auto" with -o target=speedup=1.5 (default: 16)')
    )
    common.add_argument("-o", "--option", type=parse_pair, action="append", default=[], dest="options",
                        metavar="KEY=VALUE", help="another option of the backend; may be repeated")

    show = commands.add_parser("explain", parents=[common], help="show what would be fused; compiles nothing")
    show.add_argument("--batch", type=positive, default=1, metavar="N", help="batch size (default: 1)")
    show.set_defaults(run=run_explain)

    measure = commands.add_parser("bench", parents=[common], help="time mctf against the dense model")
    measure.add_argument("--batch", type=positive, default=8, metavar="N", help="batch size (default: 8)")
    measure.add_argument("--threads", type=positive, default=1, metavar="N", help="CPU threads (default: 1)")
    measure.add_argument("--rounds", type=positive, default=10, metavar="N", help="timed rounds (default: 10)")
    measure.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                         help="bfloat16: under autocast (default: float32)")
    measure.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    measure.add_argument("--candidates", type=parse_names, default=["eager", "inductor", "mctf"], metavar="A,B", help=(
        "what to time: eager, inductor, max-autotune, freezing, freezing-dynamic, max-autotune-freezing, all dense, "
        "and mctf and mctf-freezing (default: eager,inductor,mctf)")
    )
    measure.add_argument("--json", type=writable, metavar="FILE", help="write the result here too")
    measure.set_defaults(run=run_bench)

    contrast = commands.add_parser("compare", parents=[named],
                                   help="accuracy, work and time of several methods on your images")
    contrast.add_argument("--data", type=Path, required=True, metavar="FOLDER",
                          help="images in one subfolder for each class; sorted, these are the classes 0, 1, ...")
    contrast.add_argument("--methods", type=parse_names, metavar="A,B",
                          help="methods to compare (default: all that need no training)")
    contrast.add_argument("--limit", type=positive, metavar="N",
                          help="take N images, spread evenly over the folder (default: all)")
    contrast.add_argument("--batch", type=positive, default=8, metavar="N", help="batch size (default: 8)")
    contrast.add_argument("--threads", type=positive, default=1, metavar="N", help="CPU threads (default: 1)")
    contrast.add_argument("--rounds", type=positive, default=5, metavar="N", help="timed rounds (default: 5)")
    contrast.add_argument("--inner", choices=("eager", "inductor"), default="eager",
                          help="what compiles the graphs; Inductor takes far longer for it (default: eager)")
    contrast.add_argument("--plot", type=writable, metavar="FILE", help="draw the result here; needs matplotlib")
    contrast.add_argument("--json", type=writable, metavar="FILE", help="write the result here too")
    contrast.set_defaults(run=run_compare)

    linear = commands.add_parser("linearity", parents=[named],
                                 help="measure in which blocks ToFu should prune, and in which merge")
    linear.add_argument("--batch", type=positive, default=8, metavar="N", help="batch size, at least 2 (default: 8)")
    linear.add_argument("--steps", type=positive, default=10, metavar="N",
                        help="parts that the way from one image to another is cut into (default: 10)")
    linear.add_argument("--part", choices=("block", "mlp"), default="block",
                        help="mlp: what comes after attention alone (default: block)")
    linear.add_argument("--images", type=Path, metavar="FOLDER",
                        help="take the first images of this folder, up to the batch size (default: noise)")
    linear.set_defaults(run=run_linearity)

    try_out = commands.add_parser("fuzz", help="look for a model and options whose rewrite is unsound")
    try_out.add_argument("--model", metavar="MODEL", help="a timm model to try options on (default: generated models)")
    try_out.add_argument("--examples", type=positive, default=500, metavar="N", help="how many to try (default: 500)")
    try_out.add_argument("--seed", type=int, default=0, metavar="N", help="makes a run repeatable (default: 0)")
    try_out.set_defaults(run=run_fuzz)

    survey = commands.add_parser("coverage", help="rewrite and check a zoo of models; needs transformers, torchvision")
    survey.add_argument("pattern", nargs="?", default="", metavar="PATTERN",
                        help='regular expression for "KIND LIBRARY NAME", as "^A" or "timm swin" (default: all)')
    survey.add_argument("-o", "--output", type=writable, metavar="FILE", help="write the table here, as Markdown")
    survey.set_defaults(run=run_coverage)
    return top


def parse_value(text: str) -> Any:
    """A Python literal, a bare ``0,8,8`` as a list, or else the text itself."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    bare = isinstance(value, tuple) and not text.lstrip().startswith("(")
    return list(value) if bare else value


def parse_pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form KEY=VALUE")
    return name, parse_value(value)


def parse_names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME,NAME")
    return names


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def writable(text: str) -> Path:
    """A path for a file; refused before minutes of measuring where its folder is missing."""
    path = Path(text)
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f"cannot write {text!r}: no such folder, or a folder itself")
    return path


def run_explain(args: argparse.Namespace) -> None:
    with stages() as progress:
        model, images, options = prepare(args, progress)
        import torch

        import mctf_compile

        progress("explain", 0, 1)
        with torch.no_grad():
            report = mctf_compile.explain(model, images, **options)
    report.print()


def run_bench(args: argparse.Namespace) -> None:
    with stages() as progress:
        model, images, options = prepare(args, progress)
        import torch

        from mctf_compile.bench import bench
        from mctf_compile.machine import machine

        if args.device == "cuda" and not torch.cuda.is_available():
            raise CommandError("--device cuda: no CUDA device is available")
        torch.set_num_threads(args.threads)
        measured_on = machine(args.device)
        result = bench(
            model.to(args.device), [images.to(args.device)], options, args.rounds, progress,
            autocast=torch.bfloat16 if args.dtype == "bfloat16" else None, candidates=args.candidates,
        )
    Console().print(result.table())
    if args.json is not None:
        setting = {key: getattr(args, key) for key in ("model", "batch", "threads", "rounds", "dtype", "device")}
        found = {**setting, "options": options, **result.to_dict(), "machine": measured_on}
        args.json.write_text(json.dumps(found, indent=2) + "\n")


def run_compare(args: argparse.Namespace) -> None:
    check_folder(args.data)
    with stages() as progress:
        progress("load torch and timm", 0, 1)
        import torch

        from mctf_compile.compare import Folder, chosen_methods, compare, draw, sweeps, table, to_dict

        methods = chosen_methods(args.methods)
        if args.plot is not None:
            check_plot(args.plot)
        progress(f"list the images of {args.data}", 0, 1)
        folder = Folder(args.data, args.limit)
        model = load(args, progress)
        classes = len(folder.classes)
        if classes > model.num_classes:
            raise CommandError(f"--data {args.data} has {classes} subfolders, one for each class, but {args.model} "
                               f"has {model.num_classes} classes")
        folder.transform = evaluation_transform(model, args.img_size)
        torch.set_num_threads(args.threads)
        progress("find the blocks", 0, 1)
        settings = sweeps(model, folder, methods)
        rows = compare(model, folder, folder.labels, settings, inner=args.inner, batch=args.batch,
                       rounds=args.rounds, progress=progress)
    title = f"{args.model}, {'pretrained' if args.pretrained else 'random'} weights"
    caption = (f"Top-1 over {len(folder)} of {folder.total} images; change in percent points. "
               f"ms: of a batch of {min(args.batch, len(folder))} (inner={args.inner}, threads={args.threads}), "
               f"median of {args.rounds} interleaved rounds.")
    if classes < model.num_classes:
        caption += f" The {classes} subfolders are taken as the first of the model's {model.num_classes} classes."
    Console().print(table(rows, title, caption))
    if args.json is not None:
        keys = ("model", "pretrained", "img_size", "batch", "threads", "rounds", "inner")
        setting = {**{key: getattr(args, key) for key in keys}, "images": len(folder), "classes": classes}
        args.json.write_text(json.dumps({**setting, **to_dict(rows)}, indent=2) + "\n")
    if args.plot is not None:
        draw(rows, args.plot, title)


def run_linearity(args: argparse.Namespace) -> None:
    with stages() as progress:
        progress("load torch and timm", 0, 1)
        import torch

        from mctf_compile.linearity import linearity, proposal, table

        files = None if args.images is None else image_files(args.images, args.batch)
        model = load(args, progress)
        if files is None:
            images = torch.randn(args.batch, *input_size(model, args.img_size))
        else:
            images = read_images(files, evaluation_transform(model, args.img_size))
        progress("measure", 0, 1)
        found = linearity(model, images, steps=args.steps, part=args.part)
    weights = "pretrained" if args.pretrained else "random"
    print(f"functional linearity (FL) of {args.model}, {weights} weights, {len(images)} images"
          f"{' of noise' if files is None else ''}")
    if found:
        Console().print(table(found))
    values = [block.value for block in found]
    if any(value is not None for value in values):
        print(f'proposed: options={{"method": "tofu", "prune_layers": {proposal(values)}}}')
    else:
        print("nothing to propose: no block could be measured")


def run_fuzz(args: argparse.Namespace) -> None:
    with stages() as progress:
        progress("load torch", 0, 1)
        try:
            from mctf_compile.testing.fuzz import cases, fuzz, model_cases
        except ImportError as error:
            raise CommandError(f"mctf fuzz needs the package {error.name}; pip install {error.name}") from error
        strategy = cases()
        if args.model is not None:
            import torch

            torch.manual_seed(0)
            model = make_model(args.model, None, False).eval()
            strategy = model_cases(args.model, model, (torch.randn(2, *input_size(model, None)),))
        outcome = fuzz(strategy, args.examples, args.seed, lambda done: progress("fuzz", done, args.examples))
    counts = outcome.counts
    print(f"{counts['examples']} examples: tokens fused in {counts['fused']}, exact duplicates alone in "
          f"{counts['duplicates']}; {'1 unsound' if outcome.failure else '0 unsound'}")
    if outcome.failure is not None:
        case, problem = outcome.failure
        print(f"\n{problem}\n\n{case.program()}")
        raise CheckFailed("an unsound rewrite was found; the program above shows it")


def run_coverage(args: argparse.Namespace) -> None:
    try:
        chosen = re.compile(args.pattern)
    except re.error as error:
        raise CommandError(f"{args.pattern!r} is no regular expression: {error}") from error
    with stages() as progress:
        progress("load torch", 0, 1)
        from mctf_compile.coverage import markdown, survey, table
        from mctf_compile.testing.zoo import ZOO

        entries = [e for e in ZOO if chosen.search(f"{e.kind} {e.library} {e.name}")]
        if not entries:
            raise CommandError(f"no model of the zoo matches {args.pattern!r}")
        rows = []
        for row in survey(entries):
            rows.append(row)
            progress("survey", len(rows), len(entries))
    Console().print(table(rows))
    if args.output is not None:
        args.output.write_text(markdown(rows))
    wrong = [row.entry.name for row in rows if not row.sound]
    if wrong:
        raise CheckFailed(f"not sound: {', '.join(wrong)}")


def prepare(args: argparse.Namespace, progress: Callable[[str, int, int], None]) -> tuple[nn.Module, Tensor, dict]:
    """The model in eval mode, a batch of noise for it [B, C, H, W], and the validated options.

    A learned method gets untrained modules: what it costs does not depend on what they have learned.
    """
    progress("load torch and timm", 0, 1)
    import torch

    from mctf_compile import FusionConfig, attach

    given = {name: getattr(args, name) for name in ("method", "r") if getattr(args, name) is not None}
    options = {**given, **dict(args.options)}
    config = FusionConfig.from_options(options)
    model = load(args, progress)
    images = torch.randn(args.batch, *input_size(model, args.img_size))
    if config.method.reads is not None:
        attach(model, images, method=config.method.name, **{k: v for k, v in options.items() if k != "method"})
    return model, images, options


def load(args: argparse.Namespace, progress: Callable[[str, int, int], None]) -> nn.Module:
    """The model in eval mode; random weights are the same each time."""
    import torch

    torch.manual_seed(0)
    progress(f"make {args.model}", 0, 1)
    return make_model(args.model, args.img_size, args.pretrained).eval()


def check_folder(path: Path) -> None:
    """Raise ``CommandError`` unless ``path`` has subfolders, before torch is loaded."""
    if not path.is_dir():
        raise CommandError(f"--data {path}: {'not a folder' if path.exists() else 'no such folder'}")
    if not any(entry.is_dir() for entry in path.iterdir()):
        raise CommandError(f"--data {path} has no subfolders; it needs one for each class, with its images")


def check_plot(path: Path) -> None:
    """Raise ``CommandError`` where no plot could be written to ``path``, before minutes of measuring."""
    from mctf_compile.compare import figure_class

    try:
        kinds = figure_class()().canvas.get_supported_filetypes()
    except ImportError as error:
        raise CommandError(str(error)) from error
    if path.suffix[1:].lower() not in kinds:
        raise CommandError(f"--plot {path}: its ending must be one of {', '.join(sorted(kinds))}")


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


def evaluation_transform(model: nn.Module, img_size: int | None) -> Callable[[Any], Tensor]:
    """What makes of a PIL image the [C, H, W] that a timm model is evaluated on."""
    from timm.data import create_transform, resolve_model_data_config

    config = resolve_model_data_config(model, {"input_size": input_size(model, img_size)})
    return create_transform(**config, is_training=False)


def input_size(model: nn.Module, img_size: int | None) -> tuple[int, int, int]:
    """Channels, height and width of a timm model's images."""
    channels, height, width = model.pretrained_cfg.get("input_size", (3, 224, 224))
    return channels, img_size or height, img_size or width


def make_model(name: str, img_size: int | None, pretrained: bool) -> nn.Module:
    """A timm model; raises ``CommandError`` with the nearest names for an unknown one."""
    import timm

    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 3, 0.4)
        hint = f"; the nearest are {', '.join(near)}" if near else ""
        raise CommandError(f"timm has no model {name!r}{hint}")
    sized = {} if img_size is None else {"img_size": img_size}
    try:
        return timm.create_model(name, pretrained=pretrained, **sized)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        # A model that takes no image size takes any.
        return timm.create_model(name, pretrained=pretrained)
    except (RuntimeError, OSError) as error:
        raise CommandError(f"timm cannot make {name!r}: {str(error).splitlines()[0]}") from error


@contextmanager
def stages() -> Iterator[Callable[[str, int, int], None]]:
    """Show what is under way, and for how long, on stderr; a line stays for each finished stage.

    Yields ``progress(what, done, total)``: another ``what`` begins another stage.
    """
    console = Console(stderr=True)
    columns = (SpinnerColumn(finished_text="[green]✓"), TextColumn("{task.description}{task.fields[steps]}"),
               BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as display:
        current: list[str] = []

        def progress(what: str, done: int, total: int) -> None:
            if current[-1:] != [what]:
                finish()
                current.append(what)
                display.add_task(what, total=total, steps="")
                if not console.is_terminal:
                    console.print(f"{what} …", markup=False, highlight=False)
            display.update(len(current) - 1, completed=done, steps=f" {done}/{total}" if total > 1 else "")

        def finish() -> None:
            if current:
                display.update(len(current) - 1, completed=display.tasks[len(current) - 1].total)

        yield progress
        finish()
