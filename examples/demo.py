"""``make demo``: token fusion on a real photograph and on real digits, in a few minutes on a CPU."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import timm
import torch
from digits import run as run_digits
from digits import table as digits_table
from fusion_map import draw
from rich.console import Console
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torch.nn import functional as F

import mctf_compile
from mctf_compile.cli.console import stages
from mctf_compile.measuring.bench import EAGER, MCTF, USUAL, bench

MODEL, R = "deit_small_patch16_224", 16


def photo(name: str, size: int) -> Tensor:
    """The middle square of a photograph that scikit-learn brings along: [3, size, size] in 0..1."""
    pixels = torch.tensor(load_sample_image(name)).permute(2, 0, 1)[None] / 255
    side = min(pixels.shape[2:])
    top, left = ((n - side) // 2 for n in pixels.shape[2:])
    square = pixels[:, :, top : top + side, left : left + side]
    return F.interpolate(square, size=(size, size), mode="bilinear", antialias=True)[0]


def batch_of(model: nn.Module) -> Tensor:
    """[4, 3, 224, 224]: two photographs and their mirror images, normalised as the model wants them."""
    images = torch.stack([photo(name, 224) for name in ("china.jpg", "flower.jpg")])
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    return torch.cat([images, images.flip(-1)]).sub(mean).div(std)


def inductor_works() -> bool:
    """Whether Inductor can build code for this CPU: it needs a C++ compiler and Python's headers."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(64))
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        print(
            f"Inductor cannot compile on this machine ({first});\n"
            "install g++ and python3-dev for timings of compiled graphs. Eager graphs are timed instead.",
            file=sys.stderr,
        )
        return False
    return True


def run_photo(console: Console, pretrained: bool, rounds: int, output: Path) -> None:
    """What is fused in DeiT-S, what that gains, and a picture of it."""
    options = {"r": R}
    with stages() as progress:
        progress(f"make {MODEL}", 0, 1)
        model = timm.create_model(MODEL, pretrained=pretrained).eval()
        images = batch_of(model)
        progress("fuse and follow the patches", 0, 1)
        traced = mctf_compile.trace(model, images, **options)
    console.print(traced.report.table())
    draw(photo("china.jpg", 448).permute(1, 2, 0), [traced.blocks[4], traced.blocks[-1]], output / "fusion.png")
    console.print(f"Which patches became one token: {output / 'fusion.png'}\n")

    with stages() as progress:
        progress("try the C++ compiler", 0, 1)
        compiled = inductor_works()
        options["inner"] = "inductor" if compiled else "eager"
        candidates = USUAL if compiled else (EAGER, MCTF)
        result = bench(model, [images], options, rounds, progress, candidates=candidates, report=traced.report)
    console.print(result.table())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pretrained", action="store_true", help="download trained weights (default: random ones)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default: 7)")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for the picture")
    args = parser.parse_args()
    start, console = time.monotonic(), Console()
    torch.manual_seed(0)
    # Several threads wait for one another, so another program on one of the cores would distort every time.
    torch.set_num_threads(1)

    weights = "trained" if args.pretrained else "random"
    console.rule(f"Photographs through {MODEL}: {weights} weights, batch of 4, one CPU thread")
    run_photo(console, args.pretrained, args.rounds, args.output)
    console.rule("A small ViT trained here and now, fused without retraining")
    console.print(digits_table(run_digits()))
    console.print(f"Total time: {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
