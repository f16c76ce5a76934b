"""Pass: rewrite a captured graph into ATen before autograd, one closed set of operators."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy

from mctf_compile.errors import UnsupportedGraph
from mctf_compile.passes.analysis.mutations import functionalize
from mctf_compile.passes.pipeline import State, graph_pass
from mctf_compile.passes.tracing import trace


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


@graph_pass("normalize", requires=("gm", "inputs"), ensures=("normal",))
def run(state: State) -> None:
    state.normal = normalize(state.gm, state.inputs)


def normalize(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """The same program as ATen operators before autograd.

    Before::  x.view(B, N, C), torch.nn.functional.linear(x, w), x + y, operator.add(x, y)
    After::   aten.view(x, [B, N, C]), aten.linear(x, w, None), aten.add.Tensor(x, y)

    linear, layer_norm, scaled_dot_product_attention, reshape, gelu and dropout stay single nodes. The
    inference fast path of ``nn.TransformerEncoderLayer``, one opaque node, is opened, and so are activation
    checkpoints, whose nodes then say that they are to be recomputed. In-place operators are replaced.

    Raises ``UnsupportedGraph`` for what has no such form.
    """
    for node in gm.graph.nodes:
        if str(getattr(node.target, "__module__", "")).startswith(("torch._functorch", "torch._C._functorch")):
            raise UnsupportedGraph("a function transform (torch.func: vmap, grad, jvp) is part of the graph")
    normal = trace(_Opener(gm).run, inputs)
    for old, new in zip(_placeholders(gm), _placeholders(normal)):
        new.meta.update({k: v for k, v in old.meta.items() if k in ("stack_trace", "nn_module_stack")})
        new.name = old.name
    functionalize(normal)
    return normal


def constants(gm: fx.GraphModule, normal: fx.GraphModule, examples: Sequence[Any]) -> dict[fx.Node, Tensor]:
    """The tensors behind the parameters and buffers among the inputs and attributes of a graph, where they are known.

    A tensor that the user passes to the model is none: it may be another at the next call.
    """
    held = ((n, operator.attrgetter(n.target)(normal)) for n in normal.graph.find_nodes(op="get_attr"))
    found = {n: value for n, value in held if isinstance(value, Tensor)}
    for old, new, value in zip(_placeholders(gm), _placeholders(normal), examples):
        if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
            source = getattr(old.meta.get("grapharg"), "source", None)
            held = source is not None and source.guard_source.is_unspecialized_nn_module()
            if held or isinstance(value, torch.nn.Parameter):
                found[new] = value
    return found


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.op == "placeholder"]


class _Opener(fx.Interpreter):
    """Runs a graph, with opaque operators replaced by what they compute.

    ``region`` numbers the activation checkpoint that the graph is the body of, and ``numbers`` those within it. What it
    runs is marked for AOTAutograd, which recomputes it in the backward pass.
    """

    def __init__(self, gm: fx.GraphModule, region: int | None = None, numbers: Iterator[int] | None = None) -> None:
        super().__init__(gm)
        self.region = region
        self.numbers = numbers or count(1)

    def run_node(self, n: fx.Node) -> Any:
        if self.region is not None:
            n.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
            n.meta["ac_graph_id"] = self.region
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        if target is torch._transformer_encoder_layer_fwd:
            opened = _encoder_layer(*args, **kwargs)
            if opened is not None:
                return opened
        if target is torch.ops.higher_order.tag_activation_checkpoint:
            body, *operands = args
            if "_checkpoint_context_fn" in body.meta:
                raise UnsupportedGraph("an activation checkpoint has a policy of its own (context_fn)")
            return _Opener(body, next(self.numbers), self.numbers).run(*operands)
        return super().call_function(target, args, kwargs)


def _encoder_layer(
    x: Tensor, width: int, heads: int, qkv_weight: Tensor, qkv_bias: Tensor, proj_weight: Tensor,
    proj_bias: Tensor, use_gelu: bool, norm_first: bool, eps: float, norm1_weight: Tensor, norm1_bias: Tensor,
    norm2_weight: Tensor, norm2_bias: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor,
    fc2_bias: Tensor, mask: Tensor | None = None, mask_type: int | None = None,
) -> Tensor | None:
    """``aten._transformer_encoder_layer_fwd`` on [B, N, C] as plain operators; None with a mask."""
    if mask is not None:
        return None

    def attend(y: Tensor) -> Tensor:
        qkv = F.linear(y, qkv_weight, qkv_bias).unflatten(-1, (3, heads, width // heads))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return F.linear(out, proj_weight, proj_bias)

    def mlp(y: Tensor) -> Tensor:
        hidden = F.linear(y, fc1_weight, fc1_bias)
        return F.linear(F.gelu(hidden) if use_gelu else F.relu(hidden), fc2_weight, fc2_bias)

    def norm1(y: Tensor) -> Tensor:
        return F.layer_norm(y, (width,), norm1_weight, norm1_bias, eps)

    def norm2(y: Tensor) -> Tensor:
        return F.layer_norm(y, (width,), norm2_weight, norm2_bias, eps)

    if norm_first:
        x = x + attend(norm1(x))
        return x + mlp(norm2(x))
    x = norm1(x + attend(x))
    return norm2(x + mlp(x))
