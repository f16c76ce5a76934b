"""Vectors of official implementations, and how a rewritten graph is compared with them; see golden/README.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import layer_norm

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}
NORMS = (layer_norm, torch.ops.aten.layer_norm.default)


@cache
def load(name: str) -> dict[str, Any]:
    return torch.load(GOLDEN / f"{name}.pt", weights_only=True)


@dataclass
class Recorder(fx.Interpreter):
    """Runs a graph and keeps what ``match``, ``group`` and ``select`` returned and what the last norm read."""

    module: fx.GraphModule
    matches: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    groups: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    selections: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    normed: Tensor | None = None

    def __post_init__(self) -> None:
        super().__init__(self.module)

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        result = super().call_function(target, args, kwargs)
        if getattr(target, "_opname", None) in ("match", "match_cpp"):
            self.matches.append(result)
        if getattr(target, "_opname", None) in ("group", "group_cpp"):
            self.groups.append(result)
        if target is torch.ops.mctf.select.default:
            self.selections.append(result)
        if target in NORMS:
            self.normed = args[0]
        return result


def capture(model: nn.Module, images: Tensor) -> tuple[fx.GraphModule, list[Tensor]]:
    """The graph that Dynamo hands to a backend, and its inputs: the images and the model's parameters."""
    graphs: list[tuple[fx.GraphModule, list[Tensor]]] = []

    def keep(gm: fx.GraphModule, _: Sequence[Tensor]) -> Callable[..., Any]:
        def first(*inputs: Tensor) -> Any:
            graphs.append((gm, list(inputs)))
            return gm(*inputs)

        return first

    torch._dynamo.reset()
    torch.compile(model, backend=keep, dynamic=False)(images)
    (graph,) = graphs
    return graph


def official_match(match: dict[str, Tensor], n: int) -> tuple[Tensor, Tensor, Tensor]:
    """keep, gone and into in positions of the token axis; row i stands at 2i, column j at 2j + 1."""
    rows, columns = match["unm_idx"], torch.arange(n // 2).expand(len(match["unm_idx"]), -1)
    if "src_idx2" not in match:
        into = rows.shape[1] + match["dst_idx"]
        return torch.cat([2 * rows, 2 * columns + 1], 1), 2 * match["src_idx"], into
    columns = match["unm_idx2"]
    place = torch.empty(len(rows), n // 2, dtype=torch.long)
    place.scatter_(1, columns, (rows.shape[1] + torch.arange(columns.shape[1])).expand_as(columns))
    # What had gone into a column goes on with it; dst_idx2 counts the rows that stay.
    place.scatter_(1, match["src_idx2"], match["dst_idx2"])
    keep = torch.cat([2 * rows, 2 * columns + 1], 1)
    gone = torch.cat([2 * match["src_idx"], 2 * match["src_idx2"] + 1], 1)
    return keep, gone, torch.cat([place.gather(1, match["dst_idx"]), match["dst_idx2"]], 1)


def near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE[expected.dtype])
