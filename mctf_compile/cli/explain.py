"""``mctf explain``: what would be fused."""

from __future__ import annotations

import argparse

from mctf_compile.cli.arguments import Subcommands, fused_model, positive, writable
from mctf_compile.cli.console import stages
from mctf_compile.cli.models import given_options, prepare
from mctf_compile.cli.repro import program


def add(commands: Subcommands) -> None:
    """Add the command to the parser of all."""
    parser = commands.add_parser("explain", parents=[fused_model()], help="show what would be fused; compiles nothing")
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="batch size (default: 1)")
    parser.add_argument(
        "--repro",
        type=writable,
        metavar="FILE",
        help="write a program here that prints the same report, or fails in the same way",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the report of the model at the options, having written the program that repeats it where asked."""
    if args.repro is not None:
        # Before anything can fail.
        args.repro.write_text(program(args, given_options(args), args.arguments), encoding="utf-8")
    with stages() as progress:
        model, images, options = prepare(args, progress)
        import torch

        import mctf_compile

        progress("explain", 0, 1)
        with torch.no_grad():
            report = mctf_compile.explain(model, images, **options)
    report.print()
