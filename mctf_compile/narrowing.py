"""What the types of graphs and of optional fields leave open, and the code that reads them knows: checked there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import fx
from torch._ops import OpOverload

T = TypeVar("T")


def present(value: T | None) -> T:
    """A value that may be missing in general, and is there where it is read: what a pass requires, say."""
    assert value is not None
    return value


def node_of(argument: Any) -> fx.Node:
    """An argument of a call that is the result of another node."""
    assert isinstance(argument, fx.Node), argument
    return argument


def operator_of(node: fx.Node) -> OpOverload:
    """The operator that a node calls, where that is one of ``torch.ops``."""
    assert isinstance(node.target, OpOverload), node.target
    return node.target


def function_of(node: fx.Node) -> Callable[..., Any]:
    """The function that a node calls: an operator, or one of Python's."""
    assert callable(node.target), node.target
    return node.target
