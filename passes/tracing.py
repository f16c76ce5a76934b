"""Tracing a program into ATen before autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode, maybe_get_fake_mode
from torch.fx.experimental.proxy_tensor import make_fx

from mctf_compile.kernels.library import ShapesAlone, autocast_dtype, original, stand_in
from mctf_compile.passes.subclasses import give_to_wrappers

aten = torch.ops.aten


def trace(function: Callable[..., Any], inputs: Sequence[Any]) -> fx.GraphModule:
    """``make_fx`` before dispatch under the inputs' fake mode, with the users' stack traces kept."""

    def run(*inputs: Any) -> Any:
        with ShapesAlone():
            return function(*inputs)

    with fx.traceback.preserve_node_meta(), mode_of(inputs):
        gm = make_fx(run, pre_dispatch=True)(*inputs)
    for node in gm.graph.nodes:
        operator = original(node.target)
        if operator is not None:
            node.target = node.meta["original_aten"] = operator
            # Of operators that are not ATen's alone.
            node.meta.pop("eager_input_vals", None)
    give_to_wrappers(gm.graph)
    gm.recompile()
    return gm


@contextmanager
def mode_of(values: Iterable[Any]) -> Iterator[FakeTensorMode | None]:
    """Within it what runs on ``values`` runs under their fake mode, if they have one: tensors made anew are fake too.

    Real ones may be among the operands: weights are attributes of the graph where Dynamo is to freeze them, and some
    operators make a number of their own (``feature_alpha_dropout``).
    """
    mode = next((m for m in map(maybe_get_fake_mode, values) if m is not None), None)
    if mode is None:
        yield None
        return
    with mock.patch.object(mode, "allow_non_fake_inputs", True), mode:
        yield mode


# Fake tensors find the shape of a linear from three operators that it consists of, in 5 ms; there are many.
@stand_in(aten.linear.default, torch.nn.functional.linear)
def _linear_shapes(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """An empty result of ``linear``, which has a gradient where that has one."""
    torch._check(input.shape[-1] == weight.shape[-1], lambda: f"linear of {input.shape} with {weight.shape}")
    result = input.new_empty((*input.shape[:-1], *weight.shape[:-1]), dtype=autocast_dtype(input))
    recorded = any(x is not None and x.requires_grad for x in (input, weight, bias))
    return result.requires_grad_(recorded and torch.is_grad_enabled())
