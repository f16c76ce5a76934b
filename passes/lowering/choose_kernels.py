"""Pass: the kernel that runs each ``mctf`` operator, where it is not the operator's own ATen."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from mctf_compile.errors import ConfigError
from mctf_compile.kernels.device import device_of
from mctf_compile.narrowing import present
from mctf_compile.passes.lowering import cpp, triton
from mctf_compile.passes.lowering.replacing import replaced_with
from mctf_compile.passes.pipeline import State, graph_pass

aten = torch.ops.aten

FAMILIES = {"triton": triton, "cpp": cpp}


@graph_pass("prepare", requires=("plan",))
def prepare(state: State) -> None:
    if present(state.plan).fusing:
        prepare_kernels(state.config.lowering.kernels, state.inputs)


@graph_pass("kernels", requires=("result",), ensures=("lowered",))
def run(state: State) -> None:
    state.lowered, state.remarks = choose_kernels(present(state.result), state.config.lowering.kernels, state.inputs)


def recorded(gm: fx.GraphModule, inputs: Sequence[Any]) -> set[fx.Node]:
    """The nodes whose gradients are recorded when a graph runs, in the present mode, on such inputs."""
    found: set[fx.Node] = set()
    if not torch.is_grad_enabled():
        return found
    given = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs))
    for node in gm.graph.nodes:
        value = operator.attrgetter(node.target)(gm) if node.op == "get_attr" else given.get(node)
        starts = isinstance(value, Tensor) and value.requires_grad
        if starts or (node.target is not aten.detach.default and not found.isdisjoint(node.all_input_nodes)):
            found.add(node)
    return found


def prepare_kernels(wanted: str, inputs: Sequence[Any]) -> None:
    """Start what the kernels of a graph on such inputs need, beside the passes that come before their choice."""
    device = next((x.device for x in inputs if isinstance(x, Tensor)), torch.device("cpu"))
    name = kernel_family(wanted, device)
    if name != "aten":
        FAMILIES[name].prepare(device)


def kernel_family(wanted: str, device: torch.device) -> str:
    """The family of kernels to take; ``auto`` takes the first that is written for the device, or else ATen."""
    return next(iter(device_of(device).kernels), "aten") if wanted == "auto" else wanted


def choose_kernels(gm: fx.GraphModule, wanted: str, inputs: Sequence[Any]) -> tuple[fx.GraphModule, list[str]]:
    """A copy of a rewritten graph with other kernels for its ``mctf`` operators, and remarks on what stays ATen.

    Args:
        gm: the graph; it is not changed.
        wanted: the option ``kernels``. ``auto`` takes what is written for the device, where that can run.
        inputs: those of the graph. What records gradients on such is not for the C++ kernels, which have none.

    Raises ``ConfigError`` where the kernels that are asked for cannot run.
    """
    gm = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    first = next((n for n in gm.graph.nodes if _is_ours(n)), None)
    if first is None:
        return gm, []
    device = next(n.meta["val"].device for n in first.all_input_nodes if isinstance(n.meta.get("val"), Tensor))
    name = kernel_family(wanted, device)
    if name == "aten":
        return gm, []
    family = FAMILIES[name]
    problem = family.problem(device)
    if problem is not None:
        if wanted != "auto":
            raise ConfigError(f"kernels={wanted!r}: {problem}; use 'auto' or 'aten'.")
        return gm, [f"kernels are ATen: {problem}"]

    replacements = {gradients: family.replacements(gradients) for gradients in (False, True)}
    kept, recording = dict[fx.Node, str](), recorded(gm, inputs)
    for node in [n for n in gm.graph.nodes if n.target in replacements[True]]:
        gradients = not recording.isdisjoint((node, *replaced_with(node)))
        with gm.graph.inserting_before(node):
            reason = replacements[gradients][node.target](node)
        if reason is not None:
            kept[node] = f"{node.name} stays ATen: {reason}"
    gm.graph.eliminate_dead_code()
    gm.recompile()
    # What only replaced nodes have read is not there any more.
    remarks = [kept[node] for node in gm.graph.nodes if node in kept]
    return gm, remarks if wanted != "auto" else []


def has_own_operators(gm: fx.GraphModule) -> bool:
    """Whether a graph calls operators of this package."""
    return any(map(_is_ours, gm.graph.nodes))


def _is_ours(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target.namespace == "mctf"
