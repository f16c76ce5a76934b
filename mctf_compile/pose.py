"""Scores of patches from the joints of a body, for ``method="select"``.

Source: Kinfu & Vidal, "Efficient Vision Transformer for Human Pose Estimation via Patch Selection", BMVC 2023
(arXiv 2306.04225).
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from mctf_compile.errors import ConfigError


def near_joints(joints: Tensor, grid: tuple[int, int], visible: Tensor | None = None) -> Tensor:
    """Scores of patches that are the higher the nearer they are to a joint.

    Args:
        joints: [B, J, 2], x and y of each joint, as shares of the width and height of the image: from 0 to 1.
        grid: rows and columns of patches.
        visible: bool [B, J], the joints that count; None for all.

    Returns:
        [B, rows · columns], the negative squared distance in patches from the nearest joint.

    Raises ``ConfigError`` for joints outside the image, and for an image that shows none.
    """
    cells = _cells(joints, grid, visible)
    return -_distance(cells, grid, _all(cells) if visible is None else visible)


def on_limbs(
    joints: Tensor, limbs: Collection[tuple[int, int]], grid: tuple[int, int], visible: Tensor | None = None
) -> Tensor:
    """Scores of patches that are the higher the nearer they are to a line between two joints.

    The patches on a line are those of Bresenham's algorithm (IBM Systems Journal, 1965).

    Args:
        joints: as for ``near_joints``.
        limbs: pairs of joints that are connected, by their numbers.
        grid: rows and columns of patches.
        visible: bool [B, J]; a limb counts where both of its joints do. None for all.

    Returns:
        [B, rows · columns], the negative squared distance in patches from the nearest patch on a line.

    Raises ``ConfigError`` as ``near_joints``, and for limbs of joints that are not there.
    """
    count, pairs = joints.shape[1], torch.tensor(list(limbs), device=joints.device)
    if pairs.numel() == 0 or not 0 <= min(map(min, limbs)) <= max(map(max, limbs)) < count:
        raise ConfigError(f"limbs={list(limbs)!r} must be pairs of joints from 0 to {count - 1}.")
    cells = _cells(joints, grid, visible)
    seen = _all(cells) if visible is None else visible
    first, last = cells[:, pairs[:, 0]], cells[:, pairs[:, 1]]
    steps = torch.arange(max(grid), device=joints.device)
    longest = (last - first).abs().amax(-1, keepdim=True)[:, :, None].clamp(min=1)
    # The nearest whole number at each step along the longer side.
    at = steps[:, None].minimum(longest)
    line = first[:, :, None] + (2 * at * (last - first)[:, :, None] + longest).div(2 * longest, rounding_mode="floor")
    shown = (seen[:, pairs[:, 0]] & seen[:, pairs[:, 1]])[:, :, None].expand(line.shape[:3])
    if not torch.compiler.is_compiling():
        _refuse_nothing(shown.flatten(1), "limb")
    return -_distance(line.flatten(1, 2), grid, shown.flatten(1))


def _cells(joints: Tensor, grid: tuple[int, int], visible: Tensor | None) -> Tensor:
    """The column and row of the patch that each joint is in, int64 [B, J, 2]."""
    if joints.dim() != 3 or joints.shape[2] != 2:
        raise ConfigError(f"joints of shape {list(joints.shape)} must be [B, J, 2].")
    # What is compiled cannot look at values.
    if not torch.compiler.is_compiling():
        inside = ((joints >= 0) & (joints <= 1)).all(-1)
        outside = ~(inside if visible is None else inside | ~visible)
        if outside.any():
            image, joint = outside.nonzero()[0].tolist()
            at = ", ".join(f"{value:.4g}" for value in joints[image, joint].tolist())
            raise ConfigError(
                f"joint {joint} of image {image} is at ({at}), outside the image: x and y are shares of its width and "
                "height, from 0 to 1; leave it out by visible."
            )
        if visible is not None:
            _refuse_nothing(visible, "joint")
    size = torch.tensor([grid[1], grid[0]], device=joints.device)
    return (joints * size).long().clamp(torch.zeros_like(size), size - 1)


def _refuse_nothing(seen: Tensor, what: str) -> None:
    empty = (~seen.any(1)).nonzero()
    if len(empty):
        raise ConfigError(f"image {empty[0].item()} shows no {what}: nothing says which of its patches matter.")


def _all(cells: Tensor) -> Tensor:
    return cells.new_ones(cells.shape[:2], dtype=torch.bool)


def _distance(cells: Tensor, grid: tuple[int, int], counts: Tensor) -> Tensor:
    """[B, rows · columns], the squared distance of a patch from the nearest of ``cells`` [B, K, 2] that ``counts``."""
    rows, columns = grid
    position = torch.arange(rows * columns, device=cells.device)
    patches = torch.stack([position % columns, position // columns], -1)
    squared = (patches[:, None] - cells[:, None]).square().sum(-1)
    return squared.masked_fill(~counts[:, None], rows**2 + columns**2).amin(-1).to(torch.float32)
