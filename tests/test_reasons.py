"""Reasons for what stays dense are true of graphs that nobody has seen, in the words of who wrote them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mctf_compile

C = 16
NONE = "the graph has no self-attention over tokens"


class Mixing(nn.Module):
    """Two residual layers of what ``mix`` makes of queries, keys and values [B, H, N, D]."""

    def __init__(self, mix: Callable[..., Tensor]) -> None:
        super().__init__()
        self.mix = mix
        self.qkv, self.out = nn.ModuleList(nn.Linear(C, 3 * C) for _ in "ab"), nn.Linear(C, C)
        self.table = nn.Parameter(torch.randn(12, 12))

    def forward(self, x: Tensor) -> Tensor:
        for qkv in self.qkv:
            q, k, v = qkv(x).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            x = x + self.out(self.mix(self, q, k, v).transpose(1, 2).flatten(2))
        return x


def reason(mix: Callable[..., Tensor]) -> str | None:
    report = mctf_compile.explain(Mixing(mix).eval(), torch.randn(2, 12, C), r=2)
    assert not report.blocks
    return report.reason


MIXES: list[tuple[Callable[..., Tensor], str]] = [
    (lambda m, q, k, v: q.relu() @ (k.relu().mT @ v), "queries meet the product of keys and values"),
    (lambda m, q, k, v: torch.einsum("bhnd,bhde->bhne", q, torch.einsum("bhnd,bhne->bhde", k, v)), "linear attention"),
    # Keys that a softmax weighs by token leave no map either.
    (lambda m, q, k, v: q @ (k.softmax(2).mT @ v), "attention without a softmax between queries and keys"),
    # With the sum of all weights below, as EfficientViT has it.
    (
        lambda m, q, k, v: (y := q.relu() @ (k.relu().mT @ F.pad(v, (0, 1), value=1.0)))[..., :-1] / y[..., -1:],
        "linear attention",
    ),
    (lambda m, q, k, v: (q @ k.mT).relu().square() @ v, "its map over the tokens meets the values as it is"),
    (lambda m, q, k, v: v @ (q.mT @ k).softmax(-1), "attention over channels (cross-covariance)"),
    # Weights of the model's own are no keys.
    (lambda m, q, k, v: m.table @ v, NONE),
    (lambda m, q, k, v: m.table @ (q * v), NONE),
    (lambda m, q, k, v: q * k.mean(2, keepdim=True) + v, NONE),
]


@pytest.mark.parametrize(("mix", "said"), MIXES, ids=map(str, range(len(MIXES))))
def test_what_takes_the_place_of_attention(mix, said):
    found = reason(mix)
    assert found is not None and said in found
    assert (found == NONE) == (said == NONE)


class Windows(nn.Module):
    """Attention of [B, H, W, C] within windows, after padding to a multiple of their size."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.size = height, width
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        (h, w), (a, b) = x.shape[1:3], self.size
        y = F.pad(x, (0, 0, 0, -w % b, 0, -h % a))
        rows, columns = y.shape[1] // a, y.shape[2] // b
        y = y.view(-1, rows, a, columns, b, C).permute(0, 1, 3, 2, 4, 5).reshape(-1, a * b, C)
        q, k, v = self.qkv(y).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        y = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = y.view(-1, rows, columns, a, b, C).permute(0, 1, 3, 2, 4, 5).reshape(-1, rows * a, columns * b, C)
        return x + y[:, :h, :w]


@pytest.mark.parametrize(
    ("grid", "window", "said"),
    [
        ((8, 12), (4, 6), "attention runs within windows of 4×6 tokens of a grid of 8×12"),
        ((8, 10), (5, 4), "the tokens are padded to 10×12 and cut in windows of 5×4 before attention"),
        # One window, larger than the grid.
        ((6, 6), (7, 7), "the tokens are padded to 7×7 before attention"),
    ],
)
def test_windows_and_padding_are_named_with_their_sizes(grid, window, said):
    report = mctf_compile.explain(nn.Sequential(Windows(*window), Windows(*window)), torch.randn(2, *grid, C), r=2)
    assert len(report.blocks) == 2
    assert all(said in block.reason for block in report.blocks)
