"""Pass: rewrite a captured graph into ATen before autograd, one closed set of operators."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from mctf_compile.errors import UnsupportedGraph
from mctf_compile.passes.analysis.canonical import canonicalize
from mctf_compile.passes.analysis.casts import make_casts_explicit
from mctf_compile.passes.analysis.mutations import functionalize
from mctf_compile.passes.analysis.opening import Opener
from mctf_compile.passes.analysis.reasons import name_of
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
    return [mode.from_tensor(v, static_shapes=True) if isinstance(v, torch.Tensor) else v for v in example_inputs]


@graph_pass("normalize", requires=("gm", "inputs"), ensures=("normal",))
def run(state: State) -> None:
    state.normal = normalize(state.gm, state.inputs)


def normalize(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """The same program as ATen operators before autograd.

    Before::  x.view(B, N, C), torch.nn.functional.linear(x, w), x + y, operator.add(x, y)
    After::   aten.view(x, [B, N, C]), aten.linear(x, w, None), aten.add.Tensor(x, y)

    linear, layer_norm, scaled_dot_product_attention, reshape, gelu and dropout stay single nodes. The
    inference fast path of ``nn.TransformerEncoderLayer``, one opaque node, is opened, and so are activation
    checkpoints, whose nodes then say that they are to be recomputed. In-place operators are replaced, and attention
    in other words is put into those that the analyses know (see ``canonicalize``).

    The result means the same whatever surrounds its operators: what autocast casts is cast, and what enters a region
    of ``no_grad`` or ``inference_mode`` is detached.

    Raises ``UnsupportedGraph`` for what has no such form.
    """
    for node in gm.graph.nodes:
        if str(getattr(node.target, "__module__", "")).startswith(("torch._functorch", "torch._C._functorch")):
            raise UnsupportedGraph("a function transform (torch.func: vmap, grad, jvp) is part of the graph")
    normal = trace(Opener(gm).run, inputs)
    for old, new in zip(_placeholders(gm), _placeholders(normal)):
        new.meta.update({k: v for k, v in old.meta.items() if k in ("stack_trace", "nn_module_stack")})
        new.name = old.name
    _read_once(normal.graph)
    for node in normal.graph.find_nodes(op="get_attr"):
        if isinstance(operator.attrgetter(str(node.target))(normal), FakeTensor):
            reader = name_of(next(iter(node.users)))
            raise UnsupportedGraph(f"{reader} reads a tensor in a way that PyTorch does not trace")
    # Before the writes are gone: autocast leaves those alone.
    make_casts_explicit(normal)
    functionalize(normal)
    canonicalize(normal)
    return normal


def _read_once(graph: fx.Graph) -> None:
    """Let all that read an attribute of a graph read one node, as they do an input: it has one token axis and grid."""
    first: dict[str, fx.Node] = {}
    for node in graph.find_nodes(op="get_attr"):
        one = first.setdefault(str(node.target), node)
        if one is not node:
            node.replace_all_uses_with(one)
            graph.erase_node(node)


def constants(gm: fx.GraphModule, normal: fx.GraphModule, examples: Sequence[Any]) -> dict[fx.Node, Tensor]:
    """The tensors behind the parameters and buffers among the inputs and attributes of a graph, where they are known.

    A tensor that the user passes to the model is none: it may be another at the next call.
    """
    held = ((n, operator.attrgetter(n.target)(normal)) for n in normal.graph.find_nodes(op="get_attr"))
    found = {n: value for n, value in held if isinstance(value, Tensor)}
    for old, new, value in zip(_placeholders(gm), _placeholders(normal), examples):
        if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
            source = getattr(old.meta.get("grapharg"), "source", None)
            own = source is not None and source.guard_source.is_unspecialized_nn_module()
            if own or isinstance(value, torch.nn.Parameter):
                found[new] = value
    return found


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.op == "placeholder"]
