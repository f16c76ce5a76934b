"""Part of normalize: what autocast casts, as operators."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.utils._python_dispatch import TorchDispatchMode

from mctf_compile.errors import UnsupportedGraph
from mctf_compile.narrowing import function_of, operator_of
from mctf_compile.passes.subclasses import under_autocast, wrappers
from mctf_compile.passes.tracing import mode_of

aten = torch.ops.aten

# Kernels that call for products themselves: autocast has those cast, and nothing above the kernel sees it.
WITHIN = {aten._trilinear.default}

# By device, where autocast is on: the dtype of its products.
Autocast = dict[str, torch.dtype]


def autocast_of(devices: Iterable[str]) -> Autocast:
    """The present state of autocast on these devices."""
    available = filter(torch.amp.is_autocast_available, devices)
    return {d: torch.get_autocast_dtype(d) for d in available if torch.is_autocast_enabled(d)}


def make_casts_explicit(gm: fx.GraphModule) -> None:
    """Put the casts of autocast into a graph, which then means the same with autocast off.

    What is emitted anew, moved, cut off, computed beforehand or given to another kernel would else have to run in the
    region that its original was in; so the regions end here.

    Before::  with autocast("cpu", bfloat16):  y = aten.linear(x, weight)
    After::   y = aten.linear(aten.to(x, bfloat16), aten.to(weight, bfloat16))

    1. Which operands an operator has cast is seen by running it on fake tensors, with autocast and without: PyTorch
       keeps the lists to itself, and they differ by device.
    2. One that has other operators cast within it (``einsum``), or sums up in another dtype, gets its operands in the
       dtype that its result is to have.
    3. A call that a tensor subclass answers enters the region by itself.

    Raises ``UnsupportedGraph`` for operators of which neither gives the dtypes that autocast gives.
    """
    state = autocast_of({v.device.type for n in gm.graph.nodes for v in _tensors(n.meta.get("val"))})
    before: dict[fx.Node, Autocast] = {}
    probe = _Probe()
    for node in list(gm.graph.nodes):
        if node.target is _enter_autocast:
            before[node] = state
            device, dtype, enabled = node.args[:3]
            state = {d: t for d, t in state.items() if d != device} | ({device: dtype} if enabled else {})
        elif node.target is _exit_autocast:
            state = before[node.args[0]]
            gm.graph.erase_node(node)
        elif isinstance(node.target, HigherOrderOperator) and (state or before):
            raise UnsupportedGraph(f"{node.target} is called in a model with autocast")
        elif state and node.op == "call_function" and wrappers(node):
            node.target = under_autocast(node.target, tuple(state.items()))
        elif isinstance(node.target, OpOverload) and not node.target._schema.is_mutable:
            _insert(node, probe.casts(node, state))
    for node in before:
        gm.graph.erase_node(node)
    gm.recompile()


def _insert(node: fx.Node, casts: Mapping[fx.Node, torch.dtype]) -> None:
    """Cast operands of a node. Autocast casts for each reader anew, so that gradients meet in the wider dtype."""

    def cast(operand: fx.Node) -> fx.Node:
        if operand not in casts:
            return operand
        new = node.graph.call_function(aten.to.dtype, (operand, casts[operand]))
        new.meta = {**node.meta, "val": operand.meta["val"].to(casts[operand]), "original_aten": aten.to.dtype}
        return new

    if casts:
        node.meta.pop("eager_input_vals", None)
        with node.graph.inserting_before(node):
            node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), cast)


class _Probe:
    """Finds what autocast does to an operator; the same call is run once."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], list[torch.dtype | None]] = {}

    def casts(self, node: fx.Node, state: Autocast) -> dict[fx.Node, torch.dtype]:
        """The operands of a node that are cast, each with the dtype that it gets."""
        operands = [n for n in node.all_input_nodes if _may_be_cast(n.meta.get("val"), state)]
        # Run again, such would say of another size that nobody knows it.
        if not operands or torch.Tag.dynamic_output_shape in operator_of(node).tags:
            return {}
        key = (node.target, *state.items(), repr(fx.node.map_arg((node.args, node.kwargs), _kind)))
        if key not in self._known:
            self._known[key] = _find_casts(node, operands, state)
        return {n: dtype for n, dtype in zip(operands, self._known[key]) if dtype is not None}


def _may_be_cast(value: Any, state: Autocast) -> bool:
    floats = isinstance(value, Tensor) and value.is_floating_point() and value.dtype is not torch.float64
    return floats and value.device.type in state


def _kind(node: fx.Node) -> str:
    """What an operand is to an operator, in so far as it casts it."""
    value = node.meta.get("val")
    return f"{value.device.type} {value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _find_casts(node: fx.Node, operands: Sequence[fx.Node], state: Autocast) -> list[torch.dtype | None]:
    values = [n.meta["val"] for n in operands]
    seen, wanted = _run(node, values, state)
    own, _ = _run(node, values, {})
    results = {t.to_real() for t in wanted or () if t.is_floating_point or t.is_complex}
    changed = [new if new != old else None for new, old in zip(seen, own)]
    alike: list[list[torch.dtype | None]] = [[t] * len(values) for t in results]
    for found in (changed, *alike):
        given = dict(zip(operands, (v if t is None else v.to(t) for v, t in zip(values, found))))
        if wanted is not None and _run(node, list(given.values()), {}, given)[1] == wanted:
            return [t if t is not v.dtype else None for v, t in zip(values, found)]
    raise UnsupportedGraph(f"{node.target} runs under autocast in a way that cannot be followed")


def _run(
    node: fx.Node, watched: Sequence[Tensor], state: Autocast, given: Mapping[fx.Node, Tensor] | None = None
) -> tuple[list[torch.dtype | None], list[torch.dtype] | None]:
    """The dtype that each watched operand is cast to while a node runs on fake tensors, and the dtypes of its results.

    None for those of a call that fails. ``given``: the operands, where they are not those of the graph.
    """
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: (given or {}).get(n, n.meta.get("val")))
    watch = _Watch(watched)
    with ExitStack() as stack:
        stack.enter_context(mode_of(watched))
        stack.enter_context(torch._C._DisableAutocast())
        for device, dtype in state.items():
            stack.enter_context(torch.autocast(device, dtype))
        stack.enter_context(watch)
        try:
            result = function_of(node)(*args, **kwargs)
        except Exception:
            return watch.casts, None
    return watch.casts, [v.dtype for v in _tensors(result)]


class _Watch(TorchDispatchMode):
    """Notes the dtype that each of some tensors is cast to first."""

    def __init__(self, watched: Sequence[Tensor]) -> None:
        TorchDispatchMode.__init__(self)
        self.watched = watched
        self.casts: list[torch.dtype | None] = [None] * len(watched)

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in WITHIN:
            raise NotImplementedError(f"what is cast within {func} is not to be seen")
        if func is aten._to_copy.default:
            for i, value in enumerate(self.watched):
                if value is args[0] and self.casts[i] is None:
                    self.casts[i] = kwargs.get("dtype")
        return func(*args, **kwargs)


def _tensors(value: Any) -> list[Tensor]:
    values = value if isinstance(value, (tuple, list)) else [value]
    return [v for v in values if isinstance(v, Tensor)]
