"""Tensor subclasses that hold other tensors, as quantised weights and ``DTensor`` do: their operators are their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, track_tensor_tree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map


def is_wrapper(value: Any) -> bool:
    """Whether a value is a tensor subclass that holds tensors."""
    return isinstance(value, Tensor) and is_traceable_wrapper_subclass(value)


def wrappers(node: fx.Node) -> list[Tensor]:
    """Those among the operands of a node, and then among its results."""
    values = [n.meta.get("val") for n in (*node.all_input_nodes, node)]
    return [v for v in tree_leaves(values) if is_wrapper(v)]


def make_up(value: Tensor) -> tuple:
    """What tells a wrapper from others of its shape; nothing of any other tensor."""
    if not is_wrapper(value):
        return ()
    names, context = value.__tensor_flatten__()
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
    the call stands in the graph as the model makes it, and whatever runs the graph gives it to the wrappers.
    """
    if not any(map(is_wrapper, tree_leaves((args, kwargs)))):
        result = target(*args, **kwargs)
        if not any(map(is_wrapper, tree_leaves(result))):
            return result
    # An operator of ATen that wrappers have taken over is none that rules know.
    target = target.overloadpacket if isinstance(target, OpOverload) else target
    tracer = get_proxy_mode().tracer
    proxies = tree_map(tracer.unwrap_proxy, (tuple(args), dict(kwargs)))
    with disable_proxy_modes_tracing():
        result = target(*args, **kwargs)
    return track_tensor_tree(
        result, tracer.create_proxy("call_function", target, *proxies), constant=None, tracer=tracer
    )
