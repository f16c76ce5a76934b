"""Train a small Vision Transformer on real digits, then compare every method on it without retraining."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from digits import load, make_model, train

from mctf_compile.cli.arguments import positive
from mctf_compile.cli.console import stages, wide_console
from mctf_compile.evaluating.result import draw, table
from mctf_compile.evaluating.run import evaluate
from mctf_compile.evaluating.settings import Setting, chosen_methods, sweep

TITLE = "A small ViT on digits, reduced without retraining"


def settings() -> list[Setting]:
    """Every other setting of each method, for the 50 tokens and four blocks of the model."""
    return [setting for method in chosen_methods() for setting in sweep(method, tokens=50, depth=4)[::2]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=positive, default=36, help="batch size (default: 36)")
    parser.add_argument("--rounds", type=positive, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for the plot")
    args = parser.parse_args()
    torch.manual_seed(0)
    # So small a model gains little from more, and loses much where another program wants a core.
    torch.set_num_threads(1)
    # EViT and IdleViT read the class token.
    data, model = load(), make_model(class_token=True)
    with stages() as progress:
        train(model, data, progress)
        found = evaluate(
            model, data.test, data.test_labels, settings(), batch=args.batch, rounds=args.rounds, progress=progress
        )
    caption = (
        f"{len(data.test)} test images; change: of top-1 in percent points, with {found.confidence:.0%} confidence. "
        f"ms: of a batch of {args.batch} (inner=eager, threads=1), median of {args.rounds} interleaved rounds."
    )
    console = wide_console()
    console.print(table(found, TITLE, caption))
    draw(found, args.output / "compare.png", TITLE)
    console.print(f"Accuracy against multiply-accumulates: {args.output / 'compare.png'}")


if __name__ == "__main__":
    main()
