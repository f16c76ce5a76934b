"""``mctf export``: a fused model as a file."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mctf_compile.cli.arguments import Subcommands, drawn_model
from mctf_compile.cli.console import CheckFailed, stages
from mctf_compile.cli.models import chosen_options, prepare

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mctf_compile.exporting.targets import Run

# The batches that a file is checked with.
BATCHES = (1, 3, 8)


def add(commands: Subcommands) -> None:
    """Add the command to the parser of all."""
    parser = commands.add_parser(
        "export", parents=[drawn_model("fused")], help="write the fused model to a file that other programs run"
    )
    parser.add_argument(
        "--to",
        choices=("pt2", "onnx", "onnx-int8", "aoti", "openvino"),
        default="pt2",
        help=(
            "torch.export, ONNX (in float or with products of 8-bit integers), a package of AOTInductor's or OpenVINO "
            "(default: pt2); adds the ending to FILE"
        ),
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="load the file, run it on noise at batch 1, 3 and 8, and compare it with the compiled model",
    )
    # What torch.export takes for a batch of any size.
    parser.set_defaults(run=run, batch=2)


def run(args: argparse.Namespace) -> None:
    """Export, write, and compare where asked; what is missing or not possible is said before the model is made."""
    with stages() as progress:
        progress("load torch and timm", 0, 1)
        from mctf_compile.exporting.program import export_with, exporting_config
        from mctf_compile.exporting.targets import TARGETS

        target = TARGETS[args.to]
        path = args.output if args.output.suffix else args.output.with_suffix(target.ending)
        target.check(path)
        config = exporting_config(chosen_options(args))
        model, images, options = prepare(args, progress)
        progress("export", 0, 1)
        program, report = export_with(model, (images,), {}, config)
        progress(f"write {path}", 0, 1)
        target.save(program, path)
        if args.check:
            progress("check", 0, 1)
        found = _differences(model, options, target.load(path), images) if args.check else None
    for remark in report.remarks:
        print(remark)
    fewer = report.macs_before / max(report.macs_after, 1)
    print(
        f"{report.removed} tokens removed, {fewer:.2f}x fewer multiply-accumulates" if report.fused else report.summary
    )
    for file in target.files(path):
        print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")
    if args.check:
        _judge(path, found, target.rounding)


def _differences(
    model: nn.Module, options: Mapping[str, Any], file: Run, images: Tensor
) -> dict[int, tuple[float, float]] | None:
    """By batch: the largest difference of a file from the compiled model, and the model's largest number.

    None where two runs of the model are not the same.
    """
    import torch

    from mctf_compile.exporting.targets import tensors

    compiled = torch.compile(
        model, backend="mctf", options={**options, "kernels": "aten", "inner": "eager"}, dynamic=False
    )
    found = {}
    for batch in BATCHES:
        noise = torch.randn(batch, *images.shape[1:])
        with torch.no_grad():
            expected, repeated = tensors(compiled(noise)), tensors(compiled(noise))
        if not all(map(torch.equal, expected, repeated)):
            return None
        # With outputs="fused" more follows: what the tokens stand for.
        pairs = list(zip(file(noise)[: len(expected)], expected, strict=True))
        found[batch] = (
            max((a - b).abs().max().item() for a, b in pairs),
            max(b.abs().max().item() for _, b in pairs),
        )
    return found


def _judge(path: Path, found: Mapping[int, tuple[float, float]] | None, rounding: float) -> None:
    """Print the differences; raises ``CheckFailed`` for one that is not rounding."""
    if found is None:
        print("not checked: the model draws random numbers, and other ones in every runtime")
        return
    shown = ", ".join(f"{difference:.1e} at batch {batch}" for batch, (difference, _) in found.items())
    print(f"checked against the compiled model: differs by {shown}")
    worst = max(difference / largest for difference, largest in found.values())
    # NaN is no number that is close.
    if not worst <= rounding:
        raise CheckFailed(
            f"{path} differs from the compiled model by {worst:.1e} of the largest output, where {rounding:g} is "
            "rounding"
        )
