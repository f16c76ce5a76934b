"""The operators of models that have no rule: tokens that were fused are given back before each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from mctf_compile.capture import capture
from mctf_compile.config import FusionConfig
from mctf_compile.errors import UnsupportedGraph
from mctf_compile.narrowing import present
from mctf_compile.passes import ANALYSIS, State, run_passes
from mctf_compile.passes.analysis.normalize import fake_inputs
from mctf_compile.passes.axes import Atom, atoms
from mctf_compile.passes.rules import rule_of


def unruled_operators(
    model: Callable[..., Any], *inputs: Any, kwargs: Mapping[str, Any] | None = None
) -> dict[str, bool]:
    """The operators of a model without a rule, by their names, and whether each reads tokens somewhere.

    One reads tokens whose operands have a token axis of attention, or are made of what another operator without a rule
    has made of such. Operators that take no tensor (``arange``) or give none are left out: nothing happens to tokens
    there. The model is captured as by ``explain``, with static shapes, and not run.

    Args:
        model: any module or function.
        inputs: example inputs.
        kwargs: those that are given by name.

    Raises what ``torch.compile`` raises of the model, and ``PassError``.
    """
    met: dict[str, bool] = {}
    for found in capture(model, inputs, kwargs or {}, _of_graph).found:
        for name, on_tokens in found.items():
            met[name] = met.get(name, False) or on_tokens
    return met


def _of_graph(gm: fx.GraphModule, inputs: Sequence[Any]) -> dict[str, bool]:
    state = State(gm, fake_inputs(gm, inputs), FusionConfig(), inputs)
    try:
        run_passes(ANALYSIS, state)
    except UnsupportedGraph:
        # It cannot be written in operators.
        return {}
    met: dict[str, bool] = {}
    tokens, lost = _token_axes(state), set[fx.Node]()
    for node in present(state.normal).graph.nodes:
        reads_lost = any(n in lost for n in node.all_input_nodes)
        on_tokens = reads_lost or any(_has(n, tokens, state) for n in node.all_input_nodes)
        if _is_unruled(node):
            met[str(node.target)] = met.get(str(node.target), False) or on_tokens
            reads_lost |= on_tokens
        if reads_lost:
            lost.add(node)
    return met


def _token_axes(state: State) -> set[Atom]:
    """The axes over which there is attention."""
    table = present(state.axes).table
    return {
        atom
        for block in present(state.blocks)
        for dim in (block.attention.key_axis, block.attention.query_axis)
        for atom in atoms(table.canonical(dim))
    }


def _has(node: fx.Node, tokens: set[Atom], state: State) -> bool:
    """Whether a value has a token axis."""
    axes = present(state.axes)
    if not isinstance(axes.dims.get(node), tuple):
        return False
    return any(atom in tokens for dim in axes.of(node) for atom in atoms(dim))


def _is_unruled(node: fx.Node) -> bool:
    """Whether a node is an operator without a rule, from tensors to tensors."""
    if node.op != "call_function" or rule_of(node) is not None or not hasattr(node.target, "_schema"):
        return False
    made = any(isinstance(value, Tensor) for value in tree_leaves(node.meta.get("val")))
    return made and any(isinstance(n.meta.get("val"), Tensor) for n in node.all_input_nodes)
