"""Draw which patches of an image became one token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from torch import Tensor, fx, nn

import mctf_compile

matplotlib.use("Agg")  # a file, with or without a display
from matplotlib import pyplot as plt


@dataclass(frozen=True)
class Groups:
    """Where the original tokens are after a fusion.

    Attributes:
        block: the block that fused.
        position: int64 [B, N], the token that each original token is part of.
    """

    block: int
    position: Tensor


class Recorder(fx.Interpreter):
    """Runs a rewritten graph and keeps the index [B, N_old] that each of its fusions gives."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.indices: list[Tensor] = []

    def call_function(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        result = super().call_function(target, args, kwargs)
        if target is torch.ops.mctf.group.default:
            self.indices.append(result[0])
        return result


def follow(model: nn.Module, images: Tensor, options: Mapping[str, Any]) -> tuple[list[Groups], mctf_compile.Report]:
    """Run a model fused in eager mode: where every original token is after each fusion, and the report."""
    # The recorder knows the operators, not the kernels that may stand for them.
    config = mctf_compile.FusionConfig.from_options({**options, "kernels": "aten"})
    found: list[Groups] = []
    reports: list[mctf_compile.Report] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        fused, report = mctf_compile.rewrite(gm, example_inputs, config)
        reports.append(report)
        blocks = [block.index for block in report.blocks if block.reason is None]

        def call(*args: Any) -> Any:
            recorder = Recorder(fused)
            result = recorder.run(*args)
            found.extend(Groups(b, p) for b, p in zip(blocks, composed(recorder.indices)))
            return result

        return call

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(images)
    torch._dynamo.reset()
    return found, reports[0]


def composed(indices: Sequence[Tensor]) -> list[Tensor]:
    """From the map of each fusion [B, N_old] to those of the original tokens [B, N]."""
    maps: list[Tensor] = []
    for index in indices:
        maps.append(index.gather(1, maps[-1]) if maps else index)
    return maps


def mean_colours(photo: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The photo [S, S, 3] with each group's patches (int [G, G], G divides S) in their mean colour."""
    patch = photo.shape[0] // groups.shape[0]
    pixels = groups.repeat(patch, 0).repeat(patch, 1)
    painted = np.empty_like(photo)
    for token in np.unique(groups):
        painted[pixels == token] = photo[pixels == token].mean(0)
    return painted


def borders(groups: np.ndarray, patch: int) -> list[list[tuple[float, float]]]:
    """The edges, in pixels, between neighbouring patches (int [G, G]) of different groups."""
    lines = []
    for y, x in zip(*np.nonzero(groups[:, 1:] != groups[:, :-1])):
        lines.append([((x + 1) * patch, y * patch), ((x + 1) * patch, (y + 1) * patch)])
    for y, x in zip(*np.nonzero(groups[1:] != groups[:-1])):
        lines.append([(x * patch, (y + 1) * patch), ((x + 1) * patch, (y + 1) * patch)])
    return [[(a - 0.5, b - 0.5) for a, b in line] for line in lines]


def draw(photo: np.ndarray, stages: Sequence[Groups], path: Path) -> None:
    """Write a figure: the photo [S, S, 3] in 0..1 beside its tokens after each of ``stages``.

    Only the first image of the batch is drawn; its first token is the class token.
    """
    side = int(stages[0].position.shape[1] ** 0.5)
    figure, panels = plt.subplots(1, len(stages) + 1, figsize=(4 * len(stages) + 4, 4.3), layout="constrained")
    show(panels[0], photo, f"photo: {side * side} patches")
    for panel, stage in zip(panels[1:], stages):
        groups = stage.position[0, 1:].reshape(side, side).numpy()
        show(panel, mean_colours(photo, groups), f"after block {stage.block}: {len(np.unique(groups))} tokens")
        panel.add_collection(LineCollection(borders(groups, photo.shape[0] // side), colors="white", linewidths=1.2))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def show(panel: Axes, picture: np.ndarray, title: str) -> None:
    panel.imshow(picture)
    panel.set_title(title, fontsize=13)
    panel.set_axis_off()
