"""Multiply-accumulates of a graph, counted on what it executes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def _attention_flops(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


# The counter of older releases does not know attention on the CPU.
COUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


def count_macs(gm: fx.GraphModule) -> int:
    """MACs of one run of ``gm`` on the shapes it was traced with (a symbolic size counts with its hint).

    Counts matrix products, convolutions and attention, as papers do; pointwise work is left out, and so is what
    no output depends on.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = [_concrete(n.meta.get("val")) for n in gm.graph.nodes if n.op == "placeholder"]
        with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter, torch.no_grad():
            _Numbers(gm).run(*inputs)
    return counter.get_total_flops() // 2


class _Numbers(fx.Interpreter):
    """Runs a graph on tensors without data; a number that is read from one is the one it was traced with."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.live: set[fx.Node] = set()
        for node in reversed(gm.graph.nodes):
            if node in self.live or node.is_impure():
                self.live.update((node, *node.all_input_nodes))

    def run_node(self, n: fx.Node) -> Any:
        if n not in self.live:
            return None
        if n.target in (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default):
            return _hint(n.meta.get("val", 1))
        return super().run_node(n)


def _concrete(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        shape = [_hint(s) for s in value.shape]
        return torch.empty(shape, dtype=value.dtype, device=value.device)
    return _hint(value)


def _hint(value: Any) -> Any:
    """A symbol's value at tracing; 2 for one that has none."""
    if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value
    return 2 if value.node.hint is None else value.node.hint
