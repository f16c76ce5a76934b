"""``mctf report``: a page of what is fused, what it saves, and what another r would."""

from __future__ import annotations

import argparse
import platform
from typing import TYPE_CHECKING, Any

from mctf_compile.cli.arguments import Subcommands, drawn_model, positive
from mctf_compile.cli.console import stages
from mctf_compile.cli.models import prepare

if TYPE_CHECKING:
    from torch import Tensor


def add(commands: Subcommands) -> None:
    """Add the command to the parser of all."""
    parser = commands.add_parser(
        "report",
        parents=[drawn_model("report.html")],
        help="write a page: blocks, reasons, work and times of each, and the trade-off over r",
    )
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="batch size (default: 1)")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="CPU threads (default: 1)")
    parser.add_argument(
        "--rounds", type=positive, default=9, metavar="N", help="timed calls of each model (default: 9)"
    )
    parser.add_argument("--no-times", action="store_true", help="measure nothing, and so compile nothing")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Explain the model, measure its blocks unless told not to, and write the page."""
    with stages() as progress:
        model, images, options = prepare(args, progress)
        import torch

        import mctf_compile
        from mctf_compile.measuring.blocks import NotTimed, block_times

        torch.set_num_threads(args.threads)
        times, untimed = None, ""
        with torch.no_grad():
            progress("explain", 0, 1)
            report = mctf_compile.explain(model, images, **options)
            if not args.no_times:
                progress("compile and time the blocks", 0, args.rounds)
                try:
                    times = block_times(
                        model,
                        images,
                        rounds=args.rounds,
                        progress=lambda done: progress("compile and time the blocks", done, args.rounds),
                        **options,
                    )
                except NotTimed as error:
                    untimed = f", without times: {error}"
        progress("count every r", 0, 1)
        page = report.html(args.model, times, facts(args, images, options))
    args.output.write_text(page, encoding="utf-8")
    print(f"{args.output}: {report.summary}{untimed}")


def facts(args: argparse.Namespace, images: Tensor, options: dict[str, Any]) -> dict[str, str]:
    """What the page says of its making."""
    import torch

    from mctf_compile import __version__

    weights = "pretrained" if args.pretrained else f"of {args.weights}" if args.weights else "random"
    given = ", ".join(f"{name}={value!r}" for name, value in options.items())
    return {
        "options": given or "defaults",
        "images": " × ".join(map(str, images.shape)),
        "weights": weights,
        "threads": str(args.threads),
        "versions": f"mctf_compile {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
    }
