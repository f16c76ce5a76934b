"""``mctf coverage``: a zoo of models, rewritten and checked."""

from __future__ import annotations

import argparse
import re

from rich.console import Console

from mctf_compile.cli.arguments import Subcommands, writable
from mctf_compile.cli.console import CheckFailed, CommandError, stages
from mctf_compile.packages import required


def add(commands: Subcommands) -> None:
    """Add the command to the parser of all."""
    parser = commands.add_parser("coverage", help="rewrite and check a zoo of models; needs transformers, torchvision")
    parser.add_argument(
        "pattern",
        nargs="?",
        default="",
        metavar="PATTERN",
        help='regular expression for "KIND LIBRARY NAME", as "^A" or "timm swin" (default: all)',
    )
    parser.add_argument("-o", "--output", type=writable, metavar="FILE", help="write the table here, as Markdown")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Check the models of the zoo that match; print the table, or write the page; fails where one is unsound."""
    try:
        chosen = re.compile(args.pattern)
    except re.error as error:
        raise CommandError(f"{args.pattern!r} is no regular expression: {error}") from error
    with stages() as progress:
        progress("load torch", 0, 1)
        from mctf_compile.testing.coverage import markdown, survey, table
        from mctf_compile.testing.zoo import ZOO

        entries = [e for e in ZOO if chosen.search(f"{e.kind} {e.library} {e.name}")]
        if not entries:
            raise CommandError(f"no model of the zoo matches {args.pattern!r}")
        for library in sorted({entry.library for entry in entries}):
            required(library, "this part of the zoo", library)
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
