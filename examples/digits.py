"""Train a small Vision Transformer on real handwritten digits, then fuse its tokens without retraining."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import mctf_compile
from mctf_compile.cli.console import stages

SIZE, EPOCHS, BATCH = 28, 20, 32


@dataclass(frozen=True)
class Digits:
    """Images [N, 1, 28, 28] and labels int64 [N] of the two parts of the data set."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Row:
    """Test accuracy (0 to 1) and multiply-accumulates per image with ``r`` tokens removed per block."""

    r: int
    tokens: list[int]
    macs: int
    accuracy: float


def load() -> Digits:
    """scikit-learn's 1797 digits of 8x8 pixels, enlarged to 28x28 and standardised; a fifth is for the test."""
    data = load_digits()
    train, test, train_labels, test_labels = train_test_split(
        data.images.astype("float32"), data.target, test_size=0.2, random_state=0, stratify=data.target
    )
    train, test = (
        F.interpolate(torch.from_numpy(x)[:, None], size=(SIZE, SIZE), mode="bilinear") for x in (train, test)
    )
    mean, std = train.mean(), train.std()
    return Digits(
        (train - mean) / std, torch.from_numpy(train_labels), (test - mean) / std, torch.from_numpy(test_labels)
    )


def make_model(class_token: bool = False) -> VisionTransformer:
    """A plain ViT: 49 patch tokens, four blocks; average pooling, or a class token."""
    model = VisionTransformer(
        img_size=SIZE,
        patch_size=4,
        in_chans=1,
        num_classes=10,
        embed_dim=64,
        depth=4,
        num_heads=4,
        mlp_ratio=2,
        global_pool="token" if class_token else "avg",
        class_token=class_token,
    )
    # From timm's 0.02, so short a training would hardly learn where a patch is.
    nn.init.normal_(model.pos_embed, std=0.5)
    return model


def shifted(images: Tensor) -> Tensor:
    """Each image moved by up to two of its 28 pixels in either direction."""
    theta = torch.eye(2, 3).repeat(len(images), 1, 1)
    theta[:, :, 2] = (torch.rand(len(images), 2) - 0.5) * 0.15
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def train(
    model: nn.Module,
    data: Digits,
    progress: Callable[[str, int, int], None],
    beside: Callable[[], Tensor | float] = lambda: 0.0,
) -> None:
    """Train a model, compiled or not; ``beside``: what is added to the loss after each forward pass."""
    model.train()
    steps = len(data.train) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=EPOCHS * steps)
    for epoch in range(EPOCHS):
        for batch in torch.randperm(len(data.train))[: steps * BATCH].split(BATCH):
            loss = F.cross_entropy(model(shifted(data.train[batch])), data.train_labels[batch]) + beside()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        progress("train a small ViT on digits", epoch + 1, EPOCHS)
    model.eval()


def accuracy(model: Callable[[Tensor], Tensor], data: Digits) -> float:
    with torch.no_grad():
        return (model(data.test).argmax(1) == data.test_labels).float().mean().item()


def fused_row(model: nn.Module, data: Digits, r: int) -> Row:
    """The trained model with ``r`` tokens removed per block; its weights stay as they are."""
    report = mctf_compile.explain(model, data.test[:1], r=r)
    # The rewritten graph in eager mode: accuracy needs no fast kernels, and this compiles in seconds.
    fused = torch.compile(model, backend="mctf", options={"r": r, "inner": "eager"})
    tokens = [report.blocks[0].tokens_in, *(block.tokens_out for block in report.blocks)]
    return Row(r, tokens, report.macs_after, accuracy(fused, data))


def table(rows: Sequence[Row]) -> Table:
    """One line for each ``r``; the first row is the dense model."""
    result = Table(title="Digits: test accuracy without retraining", title_justify="left")
    for name, justify in (
        ("r", "right"),
        ("tokens after each block", "left"),
        ("MMACs", "right"),
        ("fewer", "right"),
        ("test accuracy", "right"),
    ):
        result.add_column(name, justify=justify)
    for row in rows:
        result.add_row(
            str(row.r) if row.r else "dense",
            " ".join(map(str, row.tokens[1:])),
            f"{row.macs / 1e6:.1f}",
            f"{rows[0].macs / row.macs:.2f}x",
            f"{row.accuracy:.1%}",
        )
    return result


def run(removals: Sequence[int] = (4, 8, 12, 16)) -> list[Row]:
    """Train, then test the dense model and the fused ones."""
    torch.manual_seed(0)
    # So small a model gains little from more, and loses much where another program wants a core.
    torch.set_num_threads(1)
    data, model = load(), make_model()
    with stages() as progress:
        train(model, data, progress)
        progress("test it dense and fused", 0, len(removals) + 1)
        rows = []
        for i, r in enumerate((0, *removals)):
            rows.append(fused_row(model, data, r))
            progress("test it dense and fused", i + 1, len(removals) + 1)
    return rows


if __name__ == "__main__":
    Console().print(table(run()))
