"""Draw which patches of an image became one token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from torch import Tensor

from mctf_compile import BlockTrace

matplotlib.use("Agg")  # a file, with or without a display
from matplotlib import pyplot as plt


def groups_of(block: BlockTrace) -> Tensor:
    """int64 [rows, columns], the token that each patch of the first image is part of after a block."""
    return block.source[0, block.first :][: block.grid[0] * block.grid[1]].reshape(block.grid)


def mean_colours(photo: Tensor, groups: Tensor) -> Tensor:
    """The photo [S, S, 3] with each group's patches (int64 [G, G], G divides S) in their mean colour."""
    patch = len(photo) // len(groups)
    pixels = groups.repeat_interleave(patch, 0).repeat_interleave(patch, 1)
    painted = torch.empty_like(photo)
    for token in groups.unique():
        painted[pixels == token] = photo[pixels == token].mean(0)
    return painted


def borders(groups: Tensor, patch: int) -> list[list[tuple[float, float]]]:
    """The edges, in pixels, between neighbouring patches (int64 [G, G]) of different groups."""
    lines = []
    for y, x in (groups[:, 1:] != groups[:, :-1]).nonzero().tolist():
        lines.append([((x + 1) * patch, y * patch), ((x + 1) * patch, (y + 1) * patch)])
    for y, x in (groups[1:] != groups[:-1]).nonzero().tolist():
        lines.append([(x * patch, (y + 1) * patch), ((x + 1) * patch, (y + 1) * patch)])
    return [[(a - 0.5, b - 0.5) for a, b in line] for line in lines]


def draw(photo: Tensor, blocks: Sequence[BlockTrace], path: Path) -> None:
    """Write a figure: the photo [S, S, 3] in 0..1 beside its tokens after each of ``blocks``.

    Only the first image of the batch is drawn. ``mctf_compile.visualize`` draws all there is, without matplotlib.
    """
    figure, panels = plt.subplots(1, len(blocks) + 1, figsize=(4 * len(blocks) + 4, 4.3), layout="constrained")
    show(panels[0], photo, f"photo: {groups_of(blocks[0]).numel()} patches")
    for panel, block in zip(panels[1:], blocks):
        groups = groups_of(block)
        show(panel, mean_colours(photo, groups), f"after block {block.index}: {len(groups.unique())} tokens")
        panel.add_collection(LineCollection(borders(groups, len(photo) // len(groups)), colors="white", linewidths=1.2))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def show(panel: Axes, picture: Tensor, title: str) -> None:
    panel.imshow(picture.numpy())
    panel.set_title(title, fontsize=13)
    panel.set_axis_off()
