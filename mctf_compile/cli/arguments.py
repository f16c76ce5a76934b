"""How arguments of the command line are read, and those that commands share."""

from __future__ import annotations

import argparse
import ast
from pathlib import Path
from typing import Any, TypeAlias

Subcommands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def named_model() -> argparse.ArgumentParser:
    """The arguments of a command on one timm model."""
    named = argparse.ArgumentParser(add_help=False)
    named.add_argument("model", metavar="MODEL", help="name of a timm model")
    named.add_argument("--img-size", type=positive, metavar="N", help="image size (default: the model's)")
    weights = named.add_mutually_exclusive_group()
    weights.add_argument("--pretrained", action="store_true", help="load pretrained weights (default: random ones)")
    weights.add_argument("--weights", type=readable, metavar="FILE", help="load this state dict (.safetensors, .pth)")
    return named


def fused_model() -> argparse.ArgumentParser:
    """The arguments of a command on one timm model with one choice of options."""
    common = argparse.ArgumentParser(add_help=False, parents=[named_model()])
    common.add_argument("--method", metavar="NAME", help="reduction method (default: mctf)")
    common.add_argument(
        "--r",
        type=parse_value,
        metavar="R",
        help=(
            'tokens removed per block: a count, a ratio below 1, a list as "0,8,8", "(count, inflection)" '
            'a preset as "fast", or "auto" with -o target=speedup=1.5 (default: 16)'
        ),
    )
    common.add_argument(
        "-o",
        "--option",
        type=parse_pair,
        action="append",
        default=[],
        dest="options",
        metavar="KEY=VALUE",
        help="another option of the backend; may be repeated",
    )
    return common


def drawn_model(output: str) -> argparse.ArgumentParser:
    """The arguments of a command on one model that writes a file, ``output`` where ``-o`` names none.

    Both a file and options of the backend are given with ``-o``: only an option has the form KEY=VALUE.
    """
    drawn = argparse.ArgumentParser(add_help=False, parents=[fused_model()], conflict_handler="resolve")
    drawn.set_defaults(output=Path(output))
    drawn.add_argument(
        "-o",
        "--option",
        "--output",
        action=_FileOrOption,
        default=[],
        dest="options",
        metavar="FILE|KEY=VALUE",
        help=(f"the file to write (default: {output}), or another option of the backend; may be repeated"),
    )
    return drawn


class _FileOrOption(argparse.Action):
    """Puts KEY=VALUE among the options, and anything else in the place of the output."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        try:
            if values.partition("=")[0].isidentifier() and "=" in values:
                namespace.options = [*namespace.options, parse_pair(values)]
            else:
                namespace.output = writable(values)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentError(self, str(error)) from error


def parse_value(text: str) -> Any:
    """A Python literal, a bare ``0,8,8`` as a list, or else the text itself."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    bare = isinstance(value, tuple) and not text.lstrip().startswith("(")
    return list(value) if bare else value


def parse_pair(text: str) -> tuple[str, Any]:
    """``KEY=VALUE`` as a name and a value, see ``parse_value``; raises ``ArgumentTypeError`` for another form."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form KEY=VALUE")
    return name, parse_value(value)


def parse_names(text: str) -> list[str]:
    """Names between commas; raises ``ArgumentTypeError`` where one is empty."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME,NAME")
    return names


def parse_numbers(text: str) -> list[int]:
    """Whole numbers between commas; raises ``ArgumentTypeError`` for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form N,N")
    return [int(part) for part in parts]


def positive(text: str) -> int:
    """A whole number above 0; raises ``ArgumentTypeError`` for anything else."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def count(text: str) -> int:
    """A whole number from 0 on; raises ``ArgumentTypeError`` for anything else."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def readable(text: str) -> Path:
    """A path of a file that is there."""
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is {'a folder' if path.is_dir() else 'not there'}")
    return path


def writable(text: str) -> Path:
    """A path for a file; refused before minutes of measuring where its folder is missing."""
    path = Path(text)
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f"cannot write {text!r}: no such folder, or a folder itself")
    return path
