"""The command ``mctf``: what fusion would do to a timm model, and what it gains.

torch and timm are imported where they are used, so that ``mctf --help`` does not wait for them.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from torch import Tensor, nn

USAGE_ERROR, FAILURE, INTERRUPTED = 2, 1, 130


class CommandError(Exception):
    """A mistake in the command line; the message is one line."""


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
    from mctf_compile.errors import ConfigError, MctfError

    # torch.compile wraps what a backend raises.
    cause = getattr(error, "inner_exception", error)
    if not isinstance(cause, (CommandError, MctfError)):
        raise error
    print(f"mctf: {cause}", file=sys.stderr)
    return USAGE_ERROR if isinstance(cause, (CommandError, ConfigError)) else FAILURE


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="mctf", description="Token fusion for Vision Transformers.")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("model", metavar="MODEL", help="name of a timm model")
    common.add_argument("--r", type=parse_value, default=16, metavar="R", help=(
        'tokens removed per block: a count, a ratio below 1, a list as "0,8,8", "(count, inflection)" '
        'or a preset as "fast" (default: 16)'))
    common.add_argument("-o", "--option", type=parse_pair, action="append", default=[], dest="options",
                        metavar="KEY=VALUE", help="another option of the backend; may be repeated")
    common.add_argument("--img-size", type=positive, metavar="N", help="image size (default: the model's)")
    common.add_argument("--pretrained", action="store_true", help="load pretrained weights (default: random ones)")

    show = commands.add_parser("explain", parents=[common], help="show what would be fused; compiles nothing")
    show.add_argument("--batch", type=positive, default=1, metavar="N", help="batch size (default: 1)")
    show.set_defaults(run=run_explain)

    measure = commands.add_parser("bench", parents=[common], help="time dense eager, dense Inductor and mctf")
    measure.add_argument("--batch", type=positive, default=8, metavar="N", help="batch size (default: 8)")
    measure.add_argument("--threads", type=positive, default=1, metavar="N", help="CPU threads (default: 1)")
    measure.add_argument("--rounds", type=positive, default=10, metavar="N", help="timed rounds (default: 10)")
    measure.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                         help="bfloat16: under autocast (default: float32)")
    measure.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    measure.add_argument("--no-inductor", action="store_true", help="leave dense Inductor out")
    measure.add_argument("--json", type=writable, metavar="FILE", help="write the result here too")
    measure.set_defaults(run=run_bench)
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

        if args.device == "cuda" and not torch.cuda.is_available():
            raise CommandError("--device cuda: no CUDA device is available")
        torch.set_num_threads(args.threads)
        result = bench(
            model.to(args.device), [images.to(args.device)], options, args.rounds, progress,
            autocast=torch.bfloat16 if args.dtype == "bfloat16" else None, with_inductor=not args.no_inductor,
        )
    Console().print(result.table())
    if args.json is not None:
        setting = {key: getattr(args, key) for key in ("model", "batch", "threads", "rounds", "dtype", "device")}
        args.json.write_text(json.dumps({**setting, "options": options, **result.to_dict()}, indent=2) + "\n")


def prepare(args: argparse.Namespace, progress: Callable[[str, int, int], None]) -> tuple[nn.Module, Tensor, dict]:
    """The model in eval mode, a batch of noise for it [B, C, H, W], and the validated options."""
    progress("load torch and timm", 0, 1)
    import torch

    from mctf_compile import FusionConfig

    options = {"r": args.r, **dict(args.options)}
    FusionConfig.from_options(options)
    torch.manual_seed(0)
    progress(f"make {args.model}", 0, 1)
    model = make_model(args.model, args.img_size, args.pretrained).eval()
    channels, height, width = model.pretrained_cfg.get("input_size", (3, 224, 224))
    if args.img_size:
        height = width = args.img_size
    return model, torch.randn(args.batch, channels, height, width), options


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
               TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as display:
        current: list[str] = []

        def progress(what: str, done: int, total: int) -> None:
            if current[-1:] != [what]:
                finish()
                current.append(what)
                display.add_task(what, total=1, steps="")
                if not console.is_terminal:
                    console.print(f"{what} …", markup=False, highlight=False)
            display.update(len(current) - 1, steps=f" {done}/{total}" if total > 1 else "")

        def finish() -> None:
            if current:
                display.update(len(current) - 1, completed=1)

        yield progress
        finish()
