"""Image generation on fused tokens: a small diffusion transformer that is trained here, sampled dense and fused.

``python examples/generate.py`` trains it on scikit-learn's digits in some minutes, draws the same digits with several
options, one row each, and prints how far the images of each are from the real ones.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from branches import Block
from digits import Digits, load, make_model, train
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import mctf_compile
from mctf_compile.cli.console import stages

SIZE, PATCH, WIDTH, HEADS, DEPTH, CLASSES = 16, 2, 64, 4, 4, 10
BATCH, GUIDANCE = 64, 2.0
# The residual stream keeps its tokens, of which the image is made; attention runs on fused ones.
FUSED = {
    f"r={r}, {name}": {"method": "tome", "span": "branch", "r": r, "pooling": pooling}
    for r in (0.25, 0.5)
    for name, pooling in (("mean", "size"), ("MLERP", "mlerp"))
}


class Velocity(nn.Module):
    """A noisy image [B, 1, 16, 16], its time [B] in 0..1 and its class int64 [B] -> the velocity, shaped as the image.

    The class after the last stands for none.
    """

    def __init__(self) -> None:
        super().__init__()
        side = SIZE // PATCH
        self.embed = nn.Conv2d(1, WIDTH, PATCH, PATCH)
        self.position = nn.Parameter(0.5 * torch.randn(1, side * side, WIDTH))
        self.time = nn.Sequential(nn.Linear(2 * 16, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.label = nn.Embedding(CLASSES + 1, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH, HEADS) for _ in range(DEPTH))
        for block in self.blocks:
            # At first no block listens to the condition (adaLN-Zero has a bias of zero too).
            nn.init.zeros_(block.modulation.weight)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, PATCH * PATCH)
        self.register_buffer("frequencies", torch.logspace(0, 2, 16))

    def forward(self, images: Tensor, time: Tensor, label: Tensor) -> Tensor:
        """See the class."""
        angles = time[:, None] * self.frequencies
        condition = self.time(torch.cat([angles.sin(), angles.cos()], 1)) + self.label(label)
        x = self.embed(images).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x, condition)
        return F.fold(self.head(self.norm(x)).transpose(1, 2), SIZE, PATCH, stride=PATCH)


def fit(
    model: nn.Module, images: Tensor, labels: Tensor, steps: int, progress: Callable[[str, int, int], None]
) -> None:
    """Learn the straight paths from noise to images (Liu et al., ICLR 2023); one label in ten is left out."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    model.train()
    for step in range(steps):
        chosen = torch.randint(len(images), (BATCH,))
        image, noise, time = images[chosen], torch.randn(BATCH, 1, SIZE, SIZE), torch.randn(BATCH).sigmoid()
        label = torch.where(torch.rand(BATCH) < 0.1, CLASSES, labels[chosen])
        noisy = torch.lerp(image, noise, time[:, None, None, None])
        loss = F.mse_loss(model(noisy, time, label), noise - image)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress("train a diffusion transformer on digits", step + 1, steps)
    model.eval()


@torch.no_grad()
def sample(model: Callable[..., Tensor], count: int, steps: int, seed: int) -> Tensor:
    """Images [count, 1, 16, 16] of the classes in turn, by Euler's steps with classifier-free guidance."""
    x = torch.randn(count, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    label = torch.arange(count) % CLASSES
    both = torch.cat([label, torch.full_like(label, CLASSES)])
    for time in torch.linspace(1, 0, steps + 1)[:-1]:
        # Both halves at once: a batch of twice the images.
        told, untold = model(torch.cat([x, x]), time.expand(2 * count), both).chunk(2)
        x = x - (untold + GUIDANCE * (told - untold)) / steps
    return x


def frechet(a: Tensor, b: Tensor) -> float:
    """The Fréchet distance of the normal distributions that have the means and covariances of features [N, C]."""
    first, second = a.T.double().cov(), b.T.double().cov()
    # The trace of a root is the sum of the roots of the eigenvalues.
    root = torch.linalg.eigvals(first @ second).real.clamp(min=0).sqrt().sum()
    apart = (a.double().mean(0) - b.double().mean(0)).square().sum()
    return float(apart + first.trace() + second.trace() - 2 * root)


def enlarged(images: Tensor) -> Tensor:
    """Images as the classifier of digits takes them."""
    return F.interpolate(images, size=(28, 28), mode="bilinear")


def draw(rows: dict[str, Tensor], path: Path) -> None:
    """A picture with one row of digits for each entry, images [N, 1, H, W]."""
    from matplotlib import pyplot as plt

    first = next(iter(rows.values()))
    low, high = first.min().item(), first.max().item()
    figure, axes = plt.subplots(len(rows), 1, figsize=(8, 0.7 * len(rows)), layout="constrained")
    for axis, (name, images) in zip(axes, rows.items()):
        axis.imshow(torch.cat(list(images[:, 0]), 1), cmap="gray_r", vmin=low, vmax=high)
        axis.set_title(name, loc="left", fontsize=9)
        axis.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def run(data: Digits, steps: int, count: int, seeds: int, inner: str, output: Path) -> Table:
    """Train, sample with every setting and seed, draw the digits of the first, and compare all with the real ones."""
    torch.manual_seed(0)
    with stages() as progress:
        classifier = make_model()
        train(classifier, data, progress)
        model = Velocity()
        fit(model, F.interpolate(data.train, size=(SIZE, SIZE), mode="area"), data.train_labels, steps, progress)
        with torch.no_grad():
            features = lambda x: classifier.forward_head(classifier.forward_features(x), pre_logits=True)
            real, held_out = features(data.train), features(data.test)
        settings: dict[str, dict[str, Any]] = {"dense": {"method": "none"}, **FUSED}
        inputs = torch.randn(2, 1, SIZE, SIZE), torch.rand(2), torch.zeros(2, dtype=torch.int64)
        table = Table("", "MACs ratio", "Fréchet distance", "of each seed", title=f"{count} digits a seed")
        table.add_row("real digits that it was not trained on", "", f"{frechet(held_out, real):.2f}", "")
        drawn: dict[str, Tensor] = {}
        for i, (name, options) in enumerate(settings.items()):
            report = mctf_compile.explain(model, *inputs, **options)
            torch._dynamo.reset()
            compiled = torch.compile(model, backend="mctf", options={**options, "inner": inner})
            distances = []
            for seed in range(seeds):
                images = sample(compiled, count, 20, seed)
                drawn.setdefault(name, images[:20])
                with torch.no_grad():
                    distances.append(frechet(features(enlarged(images)), real))
                progress("draw digits, dense and fused", seeds * i + seed + 1, seeds * len(settings))
            ratio = "" if name == "dense" else f"{report.macs_before / report.macs_after:.2f}"
            each = " ".join(f"{distance:.2f}" for distance in distances)
            table.add_row(name, ratio, f"{statistics.mean(distances):.2f}", each)
        draw(drawn, output / "generated.png")
    return table


def main() -> None:
    """Train and sample as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1200, help="of training, 64 digits each (default: 1200)")
    parser.add_argument("--count", type=int, default=500, help="digits to draw for each seed (default: 500)")
    parser.add_argument("--seeds", type=int, default=3, help="of the noise that they start from (default: 3)")
    parser.add_argument("--inner", default="eager", help="what compiles the graphs (default: eager)")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for the picture")
    args = parser.parse_args()
    torch.set_num_threads(1)
    Console().print(run(load(), args.steps, args.count, args.seeds, args.inner, args.output))
    print(f"The first digits of each: {args.output / 'generated.png'}")


if __name__ == "__main__":
    main()
