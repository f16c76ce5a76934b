"""``mctf bench``: mctf against the dense model, timed."""

from __future__ import annotations

import argparse
import json

from rich.console import Console

from mctf_compile.cli.arguments import Subcommands, fused_model, parse_names, positive, writable
from mctf_compile.cli.console import CommandError, stages
from mctf_compile.cli.models import prepare


def add(commands: Subcommands) -> None:
    """Add the command to the parser of all."""
    parser = commands.add_parser("bench", parents=[fused_model()], help="time mctf against the dense model")
    parser.add_argument("--batch", type=positive, default=8, metavar="N", help="batch size (default: 8)")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="CPU threads (default: 1)")
    parser.add_argument("--rounds", type=positive, default=10, metavar="N", help="timed rounds (default: 10)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="bfloat16: under autocast (default: float32)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument(
        "--candidates",
        type=parse_names,
        default=["eager", "inductor", "mctf"],
        metavar="A,B",
        help=(
            "what to time: eager, inductor, max-autotune, freezing, freezing-dynamic, max-autotune-freezing, "
            "onnxruntime, onnxruntime-int8, openvino, all dense, and mctf, mctf-freezing, mctf-onnxruntime, "
            "mctf-onnxruntime-int8, mctf-openvino (default: eager,inductor,mctf)"
        ),
    )
    parser.add_argument("--json", type=writable, metavar="FILE", help="write the result here too")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Time the candidates on noise; print the table, and write JSON where asked."""
    with stages() as progress:
        model, images, options = prepare(args, progress)
        import torch

        from mctf_compile.measuring.bench import bench
        from mctf_compile.measuring.machine import machine

        if args.device == "cuda" and not torch.cuda.is_available():
            raise CommandError("--device cuda: no CUDA device is available")
        torch.set_num_threads(args.threads)
        measured_on = machine(args.device)
        result = bench(
            model.to(args.device),
            [images.to(args.device)],
            options,
            args.rounds,
            progress,
            autocast=torch.bfloat16 if args.dtype == "bfloat16" else None,
            candidates=args.candidates,
        )
    Console().print(result.table())
    if args.json is not None:
        setting = {key: getattr(args, key) for key in ("model", "batch", "threads", "rounds", "dtype", "device")}
        found = {**setting, "options": options, **result.to_dict(), "machine": measured_on}
        args.json.write_text(json.dumps(found, indent=2) + "\n")
