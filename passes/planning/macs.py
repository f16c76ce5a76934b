"""Multiply-accumulates of a graph, counted on what it executes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import SymInt, fx
from torch._dynamo.convert_frame import compile_lock
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from mctf_compile.passes.axes import hint_of
from mctf_compile.passes.planning.counts import Counts


def _attention_flops(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


# The counter of older releases does not know attention on the CPU.
COUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


def count_macs(gm: fx.GraphModule) -> int:
    """MACs of one run of ``gm`` on the shapes it was traced with (a symbolic size counts with its hint).

    Counts matrix products, convolutions and attention, as papers do; pointwise work is left out, and so is what
    no output depends on.
    """
    # The counter hooks the modules of the whole process, which Dynamo would trace in another thread.
    with compile_lock, FakeTensorMode(allow_non_fake_inputs=True):
        inputs = [_concrete(n.meta.get("val")) for n in gm.graph.nodes if n.op == "placeholder"]
        with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter, torch.no_grad():
            _Numbers(gm).run(*inputs)
    return counter.get_total_flops() // 2


def macs_by_counts(gm: fx.GraphModule, counts: Counts) -> Callable[[Sequence[int]], int]:
    """``count_macs`` of a graph as a function of the tokens that its fusing blocks leave, which are its last inputs.

    It is run once, on symbolic sizes.
    """
    inputs = [n.meta.get("val") for n in gm.graph.nodes if n.op == "placeholder"]
    given = len(inputs) - len(counts.left)
    with counts.mode:
        inputs = [*map(_concrete, inputs[:given]), *inputs[given:]]
        with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter, torch.no_grad():
            _Numbers(gm).run(*inputs)
    flops = counter.get_total_flops()
    if not isinstance(flops, SymInt):
        return lambda left: flops // 2
    symbols = [size.node.expr for size in counts.left]

    def macs(left: Sequence[int]) -> int:
        return int(flops.node.expr.xreplace(dict(zip(symbols, map(sympy.Integer, left), strict=True)))) // 2

    return macs


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
            return hint_of(n.meta.get("val", 1))
        return super().run_node(n)


def _concrete(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        shape = [hint_of(s) for s in value.shape]
        return torch.empty(shape, dtype=value.dtype, device=value.device)
    return hint_of(value)
