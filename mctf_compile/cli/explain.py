"""``mctf explain``: what would be fused."""

from __future__ import annotations

import argparse

from mctf_compile.cli.arguments import Subcommands, fused_model, positive
from mctf_compile.cli.console import stages
from mctf_compile.cli.models import prepare


def add(commands: Subcommands) -> None:
    """Add the command to the parser of all."""
    parser = commands.add_parser("explain", parents=[fused_model()], help="show what would be fused; compiles nothing")
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="batch size (default: 1)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the report of the model at the options."""
    with stages() as progress:
        model, images, options = prepare(args, progress)
        import torch

        import mctf_compile

        progress("explain", 0, 1)
        with torch.no_grad():
            report = mctf_compile.explain(model, images, **options)
    report.print()
