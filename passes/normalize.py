"""Pass: rewrite a captured graph into ATen before autograd, one closed set of operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv


def fake_inputs(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[Any]:
    """Fake tensors for the graph's inputs: those that captured it where it carries them, else new ones."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    captured = [n.meta.get("example_value", n.meta.get("val")) for n in placeholders]
    if any(isinstance(v, FakeTensor) for v in captured) and all(v is not None for v in captured):
        return captured
    if any(isinstance(v, FakeTensor) for v in example_inputs):
        return list(example_inputs)
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    return [
        mode.from_tensor(v, static_shapes=True) if isinstance(v, torch.Tensor) else v for v in example_inputs
    ]


def trace(function: Callable[..., Any], inputs: Sequence[Any]) -> fx.GraphModule:
    """``make_fx`` before dispatch under the inputs' fake mode, with the users' stack traces kept."""
    # Without the mode, tensors that the program makes itself (arange, zeros) would be real ones.
    mode = next((v.fake_mode for v in inputs if isinstance(v, FakeTensor)), nullcontext())
    with fx.traceback.preserve_node_meta(), mode:
        return make_fx(function, pre_dispatch=True)(*inputs)


def normalize(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """The same program as ATen operators before autograd.

    Before::  x.view(B, N, C), torch.nn.functional.linear(x, w), x + y, operator.add(x, y)
    After::   aten.view(x, [B, N, C]), aten.linear(x, w, None), aten.add.Tensor(x, y)

    linear, layer_norm, scaled_dot_product_attention, reshape, gelu and dropout stay single nodes.
    """
    normal = trace(fx.Interpreter(gm).run, inputs)
    for old, new in zip(_placeholders(gm), _placeholders(normal)):
        new.meta.update({k: v for k, v in old.meta.items() if k in ("stack_trace", "nn_module_stack")})
        new.name = old.name
    return normal


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.op == "placeholder"]
