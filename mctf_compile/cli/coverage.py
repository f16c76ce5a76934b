"""``mctf coverage``: a zoo of models, rewritten and checked."""

from __future__ import annotations

import argparse
import re

from rich.console import Console

from mctf_compile.cli.arguments import Subcommands, writable
from mctf_compile.cli.console import CheckFailed, CommandError, stages
from mctf_compile.packages import MissingPackage, required


def add(commands: Subcommands) -> None:
    """Add the command to the parser of all."""
    parser = commands.add_parser(
        "coverage", help="rewrite and check a zoo of models, of timm, transformers, diffusers and torchvision"
    )
    parser.add_argument(
        "pattern",
        nargs="?",
        default="",
        metavar="PATTERN",
        help='regular expression for "KIND LIBRARY NAME", as "^A" or "timm swin" (default: all)',
    )
    parser.add_argument("-o", "--output", type=writable, metavar="FILE", help="write the table here, as Markdown")
    parser.add_argument(
        "--operators",
        type=writable,
        metavar="FILE",
        help="write the operators here that have no rule, with the models they are in, as Markdown",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Check the models of the zoo that match; print the table, or write the pages; fails where one is unsound.

    Models of libraries that are not installed are left out, and named.
    """
    try:
        chosen = re.compile(args.pattern)
    except re.error as error:
        raise CommandError(f"{args.pattern!r} is no regular expression: {error}") from error
    with stages() as progress:
        progress("load torch", 0, 1)
        from mctf_compile.testing.coverage import markdown, operators_page, survey, table
        from mctf_compile.testing.zoo import ZOO

        entries = [e for e in ZOO if chosen.search(f"{e.kind} {e.library} {e.name}")]
        if not entries:
            raise CommandError(f"no model of the zoo matches {args.pattern!r}")
        missing = _missing(sorted({entry.library for entry in entries}))
        entries = [entry for entry in entries if entry.library not in missing]
        rows = []
        for row in survey(entries, operators=args.operators is not None):
            rows.append(row)
            progress("survey", len(rows), len(entries))
    Console().print(table(rows))
    for reason in missing.values():
        print(f"left out: {reason}")
    if args.output is not None:
        args.output.write_text(markdown(rows))
    if args.operators is not None:
        args.operators.write_text(operators_page(rows))
    wrong = [row.entry.name for row in rows if not row.sound]
    if wrong:
        raise CheckFailed(f"not sound: {', '.join(wrong)}")


def _missing(libraries: list[str]) -> dict[str, MissingPackage]:
    """The libraries that are not installed, with what says so. Raises that where there is no other."""
    missing = {}
    for library in libraries:
        try:
            required(library, f"the part of the zoo with its models ({library})", library)
        except MissingPackage as error:
            missing[library] = error
    if len(missing) == len(libraries):
        raise next(iter(missing.values()))
    return missing
