"""Tensor subclasses that hold other tensors, as quantised weights and ``DTensor`` do: their operators are their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import (
    PythonKeyTracer,
    disable_proxy_modes_tracing,
    get_proxy_mode,
    track_tensor_tree,
)
from torch.utils._python_dispatch import TensorWithFlatten, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map

from mctf_compile.errors import Declined, UnsupportedGraph
from mctf_compile.narrowing import present


def is_wrapper(value: Any) -> bool:
    """Whether a value is a tensor subclass that holds tensors."""
    return isinstance(value, Tensor) and is_traceable_wrapper_subclass(value)


def wrappers(node: fx.Node) -> list[Tensor]:
    """Those among the operands of a node, and then among its results."""
    found: list[Tensor] = []
    for n in (*node.all_input_nodes, node):
        value = n.meta.get("val")
        found.extend(filter(is_wrapper, value if isinstance(value, (tuple, list)) else (value,)))
    return found


def described(target: fx.node.Target, among: Sequence[Tensor]) -> str:
    """A call in which wrappers take part, in words: "linear of an Int8Tensor"."""
    kind = type(among[0]).__name__
    return f"{getattr(target, '__name__', str(target))} of {'an' if kind[0] in 'AEIOU' else 'a'} {kind}"


def make_up(value: Tensor) -> tuple[Any, ...]:
    """What tells a wrapper from others of its shape; nothing of any other tensor."""
    if not is_wrapper(value):
        return ()
    names, context = cast(TensorWithFlatten, value).__tensor_flatten__()
    held = [getattr(value, name) for name in names]
    inner = [(n, t.dtype, t.device, tuple(t.shape), t.stride(), make_up(t)) for n, t in zip(names, held)]
    return type(value), _Equal(context), *inner


@dataclass(frozen=True)
class _Equal:
    """A value that may have no hash, as a part of a key."""

    value: Any

    def __hash__(self) -> int:
        return hash(type(self.value))


def call(target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """``target(*args, **kwargs)`` under a tracer: one node where a wrapper takes part or is made, else as ever.

    What wrappers make of a call (``__torch_function__``, ``__torch_dispatch__``) is in none of PyTorch's operators. So
    the call stands in the graph as the model makes it, and whatever runs the graph gives it to the wrappers. Functions
    that PyTorch composes of others, which wrappers would not see as a whole, are traced as those.

    Raises ``Declined`` where they cannot run it: what the model itself has run fails for its number of tokens; and
    ``UnsupportedGraph`` where it writes into an operand.
    """
    operands = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
    among = [v for v in operands if is_wrapper(v)]
    if not among:
        result = target(*args, **kwargs)
        among = [v for v in tree_leaves(result) if is_wrapper(v)]
        if not among:
            return result
    elif _is_composed(target) and not any(map(_sees_functions, among)):
        # Of what some wrappers do below autograd the tracer cannot make anything; the call can stand as a whole then.
        with suppress(RuntimeError):
            return target(*args, **kwargs)
    tracer = present(get_proxy_mode()).tracer
    assert isinstance(tracer, PythonKeyTracer), tracer
    proxies = tree_map(tracer.unwrap_proxy, (tuple(args), dict(kwargs)))
    before = list(map(_version, operands))
    with disable_proxy_modes_tracing():
        try:
            result = target(*args, **kwargs)
        except Exception as error:
            raise Declined(f"{described(target, among)} does not run on other numbers of tokens: {error}") from error
        if list(map(_version, operands)) != before:
            raise UnsupportedGraph(f"{described(target, among)} writes into its operands")
        made = tracer.create_proxy("call_function", target, *proxies)
        return track_tensor_tree(result, made, constant=None, tracer=tracer)


def _is_composed(target: Callable[..., Any]) -> bool:
    """Whether it is Python of PyTorch's own that calls other functions and nothing else."""
    return isinstance(target, FunctionType) and target.__module__ in ("torch.nn.functional", "torch.functional")


def _sees_functions(wrapper: Tensor) -> bool:
    return type(wrapper).__torch_function__ is not torch._C._disabled_torch_function_impl


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version


@cache
def under_autocast(target: Callable[..., Any], state: tuple[tuple[str, torch.dtype], ...]) -> Callable[..., Any]:
    """A call as it is under autocast, which casts within what wrappers make of it; ``state``: dtypes by device."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for device, dtype in state:
                stack.enter_context(torch.autocast(device, dtype))
            return target(*args, **kwargs)

    # The name alone: a graph prints functions of a module of torch's by where they are, not as what they are.
    run.__name__ = target.__name__
    return run


def give_to_wrappers(graph: fx.Graph) -> None:
    """Make calls of ATen in which wrappers take part look like all others of theirs: no rule knows them.

    Before::  aten.linear.default(x, weight)
    After::   aten.linear(x, weight)
    """
    for node in graph.nodes:
        if isinstance(node.target, OpOverload) and wrappers(node):
            node.target = node.target.overloadpacket
