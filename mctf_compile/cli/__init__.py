"""The command ``mctf``: what fusion would do to a model, what it gains, and whether it is sound.

One file a command. torch and timm are imported where they are used, so that ``mctf --help`` does not wait for them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mctf_compile.cli import (
    bench,
    coverage,
    evaluate,
    explain,
    export,
    finetune,
    fuzz,
    linearity,
    report,
    tune,
    visualize,
)
from mctf_compile.cli.console import INTERRUPTED, report_error

COMMANDS = (explain, report, export, visualize, bench, evaluate, tune, finetune, linearity, fuzz, coverage)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = parser().parse_args(arguments)
    args.arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        args.run(args)
    except KeyboardInterrupt:
        print("mctf: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        return report_error(error)
    return 0


def parser() -> argparse.ArgumentParser:
    """The parser of the command line, with one of its own for each command."""
    top = argparse.ArgumentParser(prog="mctf", description="Token fusion for Vision Transformers.")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return top
