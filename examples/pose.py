"""Pose estimation on the patches that matter: stick figures, and a small ViT that is trained here to find their joints.

``python examples/pose.py`` trains it on all patches, together with a light network that says roughly where the joints
are, and then runs it on half of the patches, chosen in several ways: as it is, and after it was trained on with those.
It prints the share of joints that are found, for each seed, and draws which patches stay.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import mctf_compile
from mctf_compile import pose
from mctf_compile.cli.console import stages
from mctf_compile.models.vit import Block

SIZE, PATCH, WIDTH, HEADS, DEPTH = 64, 8, 96, 4, 4
GRID = (SIZE // PATCH, SIZE // PATCH)
JOINTS = ("head", "neck", "hip", "left hand", "right hand", "left foot", "right foot")
LIMBS = ((0, 1), (1, 2), (1, 3), (1, 4), (2, 5), (2, 6))
# The left side is red, the right one blue, the middle green.
COLOURS = ((0, 1, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1), (1, 0, 0), (0, 0, 1))
BATCH, NEAR = 64, 0.05
Progress = Callable[[str, int, int], None]


def figures(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images [N, 3, 64, 64] of one figure each among grey clutter, and its joints [N, 7, 2], x and y from 0 to 1."""
    rand = lambda *shape: torch.rand(*shape, generator=generator)
    height, lean = 0.35 + 0.3 * rand(count, 1), 0.5 * (rand(count, 1) - 0.5)
    neck = torch.cat([0.3 + 0.4 * rand(count, 1), 0.25 + 0.15 * rand(count, 1)], 1)
    down = torch.cat([lean.sin(), lean.cos()], 1) * height
    hip = neck + 0.45 * down
    towards = lambda angle, length: torch.cat([angle.sin(), angle.cos()], 1) * length * height
    turn = lambda: 1.8 * (rand(count, 1) - 0.2)
    ends = [neck + towards(-turn(), 0.5), neck + towards(turn(), 0.5)]
    ends += [hip + towards(-0.7 * turn(), 0.55), hip + towards(0.7 * turn(), 0.55)]
    joints = torch.stack([neck - 0.25 * down, neck, hip, *ends], 1).clamp(0.02, 0.98)
    images = 0.15 * rand(count, 3, SIZE, SIZE)
    place = (torch.arange(SIZE) + 0.5) / SIZE
    pixels = torch.stack(torch.meshgrid(place, place, indexing="xy"), -1)
    # Clutter is grey, and otherwise drawn as limbs are.
    sticks = [(rand(count, 2), rand(count, 2), 0.6 * torch.ones(3)) for _ in range(3)]
    sticks += [(joints[:, a], joints[:, b], torch.tensor(colour)) for (a, b), colour in zip(LIMBS, COLOURS)]
    for first, last, colour in sticks:
        inked = _near_line(pixels, first, last) < 0.018
        images = torch.where(inked[:, None], colour[:, None, None].float(), images)
    return images, joints


def _near_line(pixels: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Distances [N, H, W] of pixels [H, W, 2] from the lines between points [N, 2]."""
    along, given = (last - first)[:, None, None], pixels - first[:, None, None]
    share = (given * along).sum(-1) / along.square().sum(-1).clamp(min=1e-6)
    return (given - share.clamp(0, 1)[..., None] * along).norm(dim=-1)


class Pose(nn.Module):
    """Images [B, 3, 64, 64] -> joints [B, 7, 2], by a ViT and a head of heat maps [B, 7, 16, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.position = nn.Parameter(0.1 * torch.randn(1, GRID[0] * GRID[1], WIDTH))
        self.blocks = nn.ModuleList(Block(WIDTH, HEADS, 4 * WIDTH) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Sequential(
            nn.ConvTranspose2d(WIDTH, WIDTH // 2, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(WIDTH // 2, len(JOINTS), 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        x = self.embed(images).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        return where(self.head(self.norm(x).transpose(1, 2).reshape(-1, WIDTH, *GRID)))


class Light(nn.Module):
    """A light network that says roughly where the joints are: images [B, 3, 64, 64] -> joints [B, 7, 2]."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (3, 8, 16, 24)
        layers = [
            layer
            for a, b in pairwise(sizes)
            for layer in (nn.Conv2d(a, b, 3, stride=2, padding=1), nn.BatchNorm2d(b), nn.ReLU())
        ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(24, 24, 5, padding=2), nn.ReLU(), nn.Conv2d(24, len(JOINTS), 1))

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        return where(self.layers(images))


class Near(nn.Module):
    """Scores of patches [B, 64] by their distance from the joints that a light network finds."""

    def __init__(self, light: Light) -> None:
        super().__init__()
        self.light = light.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, 64, 64] -> [B, 64]."""
        return pose.near_joints(self.light(images), GRID)


class OnLimbs(Near):
    """The same by their distance from the lines between those joints."""

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, 64, 64] -> [B, 64]."""
        return pose.on_limbs(self.light(images), LIMBS, GRID)


def by_chance(images: Tensor) -> Tensor:
    """Random scores [B, 64]: a control."""
    return torch.rand(len(images), GRID[0] * GRID[1])


def where(heat: Tensor) -> Tensor:
    """The mean place under the softmax of heat maps [B, J, h, w]: x and y, [B, J, 2] (Sun et al., ECCV 2018)."""
    rows, columns = heat.shape[2:]
    share = heat.flatten(2).softmax(2).unflatten(2, (rows, columns))
    at = lambda n: (torch.arange(n) + 0.5) / n
    return torch.stack([(share.sum(2) * at(columns)).sum(2), (share.sum(3) * at(rows)).sum(2)], -1)


def fit(
    model: Callable[[Tensor], Tensor],
    weights: list[nn.Parameter],
    data: tuple[Tensor, Tensor],
    steps: int,
    rate: float,
    progress: Callable[[int], None],
) -> None:
    """Learn the joints [N, J, 2] of images [N, 3, 64, 64]."""
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    images, joints = data
    for step in range(steps):
        chosen = torch.randint(len(images), (BATCH,))
        loss = F.smooth_l1_loss(model(images[chosen]), joints[chosen], beta=0.02)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(step + 1)


@torch.no_grad()
def found(model: Callable[[Tensor], Tensor], data: tuple[Tensor, Tensor]) -> float:
    """The percentage of joints that are found within 5 % of the image from where they are (PCK)."""
    images, joints = data
    at = torch.cat([model(part) for part in images.split(100)])
    return 100 * ((at - joints).norm(dim=-1) < NEAR).float().mean().item()


def draw(images: Tensor, joints: Tensor, kept: dict[str, Tensor], path: Path) -> None:
    """A row of figures for each way to choose: what leaves is dark, and the joints are marked.

    ``kept``: bool [N, 64] of the N images [N, 3, 64, 64], whose joints are [N, J, 2].
    """
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        len(kept), len(images), figsize=(1.3 * len(images), 1.4 * len(kept)), layout="constrained"
    )
    for row, (name, stays) in zip(axes, kept.items()):
        light = stays.view(-1, 1, *GRID).float().repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
        for axis, image, at in zip(row, images * (0.2 + 0.8 * light), joints):
            axis.imshow(image.permute(1, 2, 0).clamp(0, 1))
            axis.plot(*(at.T * SIZE - 0.5), "wo", markersize=2.5)
            axis.axis("off")
        row[0].set_title(name, loc="left", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def once(seed: int, steps: int, keep_ratio: float, inner: str, output: Path, progress: Progress) -> dict[str, Any]:
    """By each way to choose: the joints that are found by the model as it is and trained on, and what it takes."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    data, test = figures(4000, generator), figures(1000, generator)
    model, light = Pose(), Light()
    fit(model, [*model.parameters()], data, steps, 2e-3, lambda n: progress("train on all patches", n, steps))
    fit(
        light, [*light.parameters()], data, steps // 2, 5e-3, lambda n: progress("train a light network", n, steps // 2)
    )
    model.eval(), light.eval()
    dense = found(model, test)
    example = test[0][:2]
    macs = mctf_compile.explain(model, example, method="none").macs_before
    results: dict[str, Any] = {"all patches": (dense, dense, macs)}
    kept: dict[str, Tensor] = {"all patches": torch.ones(8, GRID[0] * GRID[1], dtype=torch.bool)}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    ways = {"near joints": Near(light), "on limbs": OnLimbs(light), "joint tokens": "joints", "by chance": by_chance}
    for name, score in ways.items():
        own = Pose()
        own.load_state_dict(weights)
        mctf_compile.attach(own, example, method="select", score=score, joints=len(JOINTS))
        options = {"method": "select", "keep_ratio": keep_ratio, "score": score, "joints": len(JOINTS)}
        torch._dynamo.reset()
        fast = torch.compile(own, backend="mctf", options={**options, "inner": inner})
        # What ranks the patches must learn first, where it is learned with the model.
        before = found(fast, test) if score != "joints" else None
        learned = [p for p in own.parameters() if p.requires_grad]
        own.train()
        light.eval()
        fit(fast, learned, data, steps // 3, 5e-4, lambda n, name=name: progress(f"train on: {name}", n, steps // 3))
        own.eval()
        report = mctf_compile.explain(own, example, **options)
        results[name] = (before, found(fast, test), report.macs_after)
        (block,) = mctf_compile.trace(own, test[0][:8], **options).blocks
        kept[name] = ~block.dropped
    if seed == 0:
        draw(test[0][:8], test[1][:8], kept, output / "pose.png")
    return results


def run(seeds: int, steps: int, keep_ratio: float, inner: str, output: Path) -> Table:
    """All ways to choose, for every seed."""
    with stages() as progress:
        found = [once(seed, steps, keep_ratio, inner, output, progress) for seed in range(seeds)]
    table = Table("patches", "MMACs", "of dense", "joints found", "trained on", "of each seed")
    for name in found[0]:
        before, after, macs = zip(*(results[name] for results in found))
        as_it_is = "" if before[0] is None else f"{statistics.mean(before):.1f} %"
        share = macs[0] / found[0]["all patches"][2]
        each = " ".join(f"{value:.1f}" for value in after)
        table.add_row(name, f"{macs[0] / 2e6:.1f}", f"{share:.0%}", as_it_is, f"{statistics.mean(after):.1f} %", each)
    return table


def main() -> None:
    """Train and choose as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="(default: 3)")
    parser.add_argument("--steps", type=int, default=600, help="of training, 64 figures each (default: 600)")
    parser.add_argument("--keep-ratio", type=float, default=0.5, help="share of the patches that stay (default: 0.5)")
    parser.add_argument("--inner", default="aot_eager", help="what compiles the graphs (default: aot_eager)")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for the picture")
    args = parser.parse_args()
    torch.set_num_threads(1)
    Console().print(run(args.seeds, args.steps, args.keep_ratio, args.inner, args.output))
    print(f"Which patches stay: {args.output / 'pose.png'}")


if __name__ == "__main__":
    main()
