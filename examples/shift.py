"""ShiftAddViT on handwritten digits: weights that are powers of two, linear attention, and experts, with tokens fused.

``python examples/shift.py`` trains a small ViT, makes its linear layers shift layers, or all of it a ShiftAddViT,
trains on, and prints accuracy and the bytes of the blocks' weights after each step.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable

import torch
from digits import Digits, accuracy, load, make_model, train
from rich.console import Console
from rich.table import Table
from torch import nn

import mctf_compile
from mctf_compile import shiftadd
from mctf_compile.cli.console import stages

R = 4
BALANCE = 0.01
WHOLE = {"reparameterize": "shiftadd"}


def held(model: nn.Module) -> int:
    """Bytes of the weights of the linear layers of blocks, those of their experts among them."""
    layers = [m for name, m in model.named_modules() if name.startswith(("blocks.", "mctf_shiftadd."))]
    packed = [m.codes.nbytes for m in layers if isinstance(m, shiftadd.ShiftLinear)]
    return sum(packed) + sum(m.weight.nbytes for m in layers if isinstance(m, nn.Linear))


def compiled(model: nn.Module, **options: object) -> nn.Module:
    """The model as the options make it, in eager mode: accuracy needs no fast kernels."""
    torch._dynamo.reset()
    return torch.compile(model, backend="mctf", options={"inner": "eager", **options})


class Results:
    """Accuracy and size of each step, over the seeds."""

    def __init__(self, data: Digits) -> None:
        self.data, self.found, self.size = data, dict[str, list[float]](), dict[str, int]()

    def add(self, name: str, model: nn.Module, **options: object) -> None:
        fused = {} if "r" in options else {"method": "none"}
        self.found.setdefault(name, []).append(accuracy(compiled(model, **fused, **options), self.data))
        self.size[name] = held(model)


def shift_layers(model: nn.Module, results: Results, progress: Callable[[str, int, int], None]) -> None:
    """Every linear layer a shift layer."""
    shiftadd.shift(model, results.data.test[:2])
    results.add("shift layers", model)
    train(model, results.data, progress)
    results.add("trained on", model)
    shiftadd.pack(model)
    results.add("packed", model)
    results.add(f"packed, r={R}", model, r=R)


def whole(model: nn.Module, results: Results, progress: Callable[[str, int, int], None]) -> None:
    """Attention linear, its layers shift layers, and MLPs of a dense and a shift expert."""
    shiftadd.attach(model, results.data.test[:2])
    shiftadd.shift(model, results.data.test[:2], layers="attention")
    results.add("ShiftAddViT", model, **WHOLE)
    train(compiled(model, method="none", **WHOLE), results.data, progress, lambda: BALANCE * shiftadd.balance(model))
    results.add("ShiftAddViT, trained on", model, **WHOLE)
    shiftadd.pack(model)
    results.add("ShiftAddViT, packed", model, **WHOLE)
    results.add(f"ShiftAddViT, packed, r={R}", model, r=R, **WHOLE)


def run(data: Digits, seeds: int) -> Table:
    """Train and shift with every seed."""
    results = Results(data)
    with stages() as progress, warnings.catch_warnings():
        # Untrained modules are what one step is about.
        warnings.filterwarnings("ignore", "mctf: the modules of ShiftAddViT are untrained")
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = make_model()
            train(model, data, progress)
            results.add("dense", model)
            shift_layers(copy.deepcopy(model), results, progress)
            whole(model, results, progress)
    given, options = data.test[:1], {"inner": "eager", **WHOLE}
    dense, linear = (mctf_compile.explain(model, given, method="none", **more).macs_before for more in ({}, WHOLE))
    fused = mctf_compile.explain(model, given, r=R, **options).macs_after
    title = f"MMACs: {dense / 1e6:.2f} dense, {linear / 1e6:.2f} with linear attention, {fused / 1e6:.2f} at r={R}"
    table = Table("", "kB of weights", "accuracy", "of each seed", title=title)
    for name, each in results.found.items():
        of_each = " ".join(f"{100 * a:.1f}" for a in each)
        table.add_row(name, f"{results.size[name] / 1000:.0f}", f"{100 * sum(each) / len(each):.1f} %", of_each)
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
