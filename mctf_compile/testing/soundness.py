"""What must hold for every rewrite, as one assertion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from mctf_compile.compiler import rewrite
from mctf_compile.config import FusionConfig
from mctf_compile.report import Report

# Similarity alone decides, so that exact duplicates are fused first.
ONLY_SIMILARITY = {"tau_info": 0, "tau_size": 0}


@dataclass
class Recorder:
    """A backend that runs the rewritten graph eagerly and keeps what the fusions did.

    ``groups`` holds, per graph and fusion, the tensors (index [B, N], weight [B, N], size [B, M]) of the
    last run; ``reports`` one report per graph.
    """

    options: dict[str, Any]
    reports: list[Report] = field(default_factory=list)
    graphs: list[fx.GraphModule] = field(default_factory=list)
    groups: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        fused, report = rewrite(gm, example_inputs, FusionConfig.from_options(self.options))
        self.reports.append(report)
        self.graphs.append(fused)
        return _Watch(fused, self.groups).run

    def run(self, model: nn.Module, *inputs: Any) -> Any:
        """The model's output under this backend."""
        self.groups.clear()
        torch._dynamo.reset()
        return torch.compile(model, backend=self, dynamic=False)(*inputs)

    def index(self) -> Tensor | None:
        """int64 [B, N]: the final position of every original token of one token axis; None if not fused."""
        result = None
        for index, _, _ in self.groups:
            result = index if result is None else index.gather(1, result)
        return result


class _Watch(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, groups: list) -> None:
        super().__init__(gm)
        self.groups = groups

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.target is torch.ops.mctf.group.default:
            self.groups.append(result)
        return result


def assert_rewrite_sound(
    model: nn.Module, *inputs: Any, duplicates: bool = False, tolerance: float = 1e-4, **options: Any
) -> Report:
    """Assert that fusing tokens in ``model`` keeps its contract.

    1. Outputs have the shapes, dtypes and devices of the dense model's, and are finite where those are.
    2. Every fusion conserves the total size and normalises its weights.
    3. With r=0 the output is that of the dense graph under the same inner compiler, bit for bit.
    4. With ``duplicates=True``: fusing by similarity alone gives the dense output to ``tolerance``
       (relative to its largest value). Plant duplicates in ``inputs`` and zero position information first;
       where tokens that are no duplicates would be fused as well, the property does not apply.

    Args:
        model: any module, in the mode to be tested.
        inputs: its inputs.
        options: as for the backend.

    Returns:
        The report of the graph with the most multiply-accumulates.

    Raises:
        AssertionError: names the property that fails.
    """
    dense = model(*inputs)
    recorder = Recorder({**options, **(ONLY_SIMILARITY if duplicates else {})})
    fused = recorder.run(model, *inputs)
    expected, got = tree_leaves(dense), tree_leaves(fused)
    assert len(expected) == len(got), f"{len(got)} outputs instead of {len(expected)}"
    for a, b in zip(expected, got):
        if isinstance(a, Tensor):
            _assert_same_contract(a, b)
    for index, weight, size in recorder.groups:
        _assert_conserves(index, weight, size)
    if duplicates:
        for a, b in zip(expected, got):
            if isinstance(a, Tensor):
                error = (a - b).abs().max().item() / max(a.abs().max().item(), 1.0)
                assert error <= tolerance, f"fusing duplicates changed the output by {error:.2e}"
    torch._dynamo.reset()
    plain = tree_leaves(torch.compile(model, backend="eager", dynamic=False)(*inputs))
    for a, b in zip(plain, tree_leaves(Recorder({**options, "r": 0}).run(model, *inputs))):
        if isinstance(a, Tensor):
            assert torch.equal(a, b), "r=0 changed the output"
    return max(recorder.reports, key=lambda r: r.macs_before)


def _assert_same_contract(a: Tensor, b: Tensor) -> None:
    assert b.shape == a.shape, f"output shape {tuple(b.shape)} instead of {tuple(a.shape)}"
    assert b.dtype == a.dtype, f"output dtype {b.dtype} instead of {a.dtype}"
    assert b.device == a.device, f"output device {b.device} instead of {a.device}"
    assert not a.isfinite().all() or b.isfinite().all(), "the output is not finite"


def _assert_conserves(index: Tensor, weight: Tensor, size: Tensor) -> None:
    n, m = index.shape[1], size.shape[1]
    assert m <= n, f"a fusion made {m} tokens of {n}"
    sums = torch.zeros_like(size).scatter_add(1, index, weight)
    assert torch.allclose(sums, torch.ones_like(sums), atol=1e-5), "pooling weights do not sum to 1 in a group"
    totals = size.sum(1)
    assert torch.allclose(totals, totals.round(), atol=1e-4), f"sizes are no whole numbers: {totals}"
    assert (totals == totals[0]).all(), "images have different total sizes"
