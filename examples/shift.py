"""Shift layers on handwritten digits: weights that are powers of two, a byte each, with tokens fused around them.

``python examples/shift.py`` trains a small ViT, makes its linear layers shift layers, trains on, and prints accuracy
and the bytes of their weights after each step.
"""

from __future__ import annotations

import argparse
import copy

import torch
from digits import Digits, accuracy, load, make_model, train
from rich.console import Console
from rich.table import Table
from torch import nn

import mctf_compile
from mctf_compile import shiftadd
from mctf_compile.cli.console import stages

R = 4


def held(model: nn.Module) -> int:
    """Bytes of the weights that shift layers stand for: as they are held in the linear layers of blocks."""
    sizes = [m.codes.nbytes if isinstance(m, shiftadd.ShiftLinear) else m.weight.nbytes for m in _layers(model)]
    return sum(sizes)


def _layers(model: nn.Module) -> list[nn.Module]:
    kinds = (nn.Linear, shiftadd.ShiftLinear)
    return [m for name, m in model.named_modules() if name.startswith("blocks.") and isinstance(m, kinds)]


def run(data: Digits, seeds: int) -> Table:
    """Train and shift with every seed."""
    names = ("dense", "shift layers", "trained on", "packed", f"packed, r={R}")
    found: dict[str, list[float]] = {name: [] for name in names}
    size: dict[str, int] = {}
    with stages() as progress:
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = make_model()
            train(model, data, progress)
            models = {
                "dense": copy.deepcopy(model),
                "shift layers": copy.deepcopy(shiftadd.shift(model, data.test[:2])),
            }
            train(model, data, progress)
            models["trained on"] = copy.deepcopy(model)
            models["packed"] = models[f"packed, r={R}"] = shiftadd.pack(model)
            for name, each in models.items():
                options = {"inner": "eager", **({"r": R} if name == names[-1] else {"method": "none"})}
                torch._dynamo.reset()
                found[name].append(accuracy(torch.compile(each, backend="mctf", options=options), data))
                size[name] = held(each)
    macs = mctf_compile.explain(model, data.test[:1], r=R)
    table = Table(
        "",
        "kB of weights",
        "accuracy",
        "of each seed",
        title=f"{macs.macs_before / macs.macs_after:.2f}x fewer MACs at r={R}",
    )
    for name, each in found.items():
        of_each = " ".join(f"{100 * a:.1f}" for a in each)
        table.add_row(name, f"{size[name] / 1000:.0f}", f"{100 * sum(each) / len(each):.1f} %", of_each)
    return table


def main() -> None:
    """Train and shift as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="(default: 3)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    Console().print(run(load(), args.seeds))


if __name__ == "__main__":
    main()
