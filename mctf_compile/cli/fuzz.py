"""``mctf fuzz``: models, programs and options whose rewrite is unsound, if any."""

from __future__ import annotations

import argparse

from mctf_compile.cli.arguments import Subcommands, positive
from mctf_compile.cli.console import CheckFailed, stages
from mctf_compile.packages import required


def add(commands: Subcommands) -> None:
    """Add the command to the parser of all."""
    parser = commands.add_parser("fuzz", help="look for a model, a program or options whose rewrite is unsound")
    parser.add_argument("--model", metavar="MODEL", help="a timm model to try options on (default: generated models)")
    parser.add_argument(
        "--what",
        choices=("models", "graphs", "both"),
        default="both",
        help="what is generated: models of known parts, programs grown from the rule table, or both (default)",
    )
    parser.add_argument("--examples", type=positive, default=500, metavar="N", help="how many to try (default: 500)")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="makes a run repeatable: with one PyTorch and one Hypothesis, the same options try the "
        "same examples (default: 0)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Try examples until one is unsound; prints the smallest such case as a program and fails, else what was seen."""
    with stages() as progress:
        progress("load torch", 0, 1)
        required("hypothesis", "mctf fuzz", "hypothesis")
        from mctf_compile.testing.fuzz import cases, fuzz, model_cases

        strategy = cases(args.what)
        if args.model is not None:
            import torch

            from mctf_compile.measuring.timm_models import input_size, make_model

            torch.manual_seed(0)
            model = make_model(args.model, None, False).eval()
            strategy = model_cases(args.model, model, (torch.randn(2, *input_size(model, None)),))
        outcome = fuzz(strategy, args.examples, args.seed, lambda done: progress("fuzz", done, args.examples))
    counts = outcome.counts
    print(
        f"{counts['examples']} examples: tokens fused in {counts['fused']}, exact duplicates alone in "
        f"{counts['duplicates']}; {'1 unsound' if outcome.failure else '0 unsound'}"
    )
    if outcome.failure is not None:
        case, problem = outcome.failure
        print(f"\n{problem}\n\n{case.program()}")
        raise CheckFailed("an unsound rewrite was found; the program above shows it")
