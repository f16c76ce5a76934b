"""What the tables of kernels are made of: one call of a graph in the place of another."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx
from torch._ops import OpOverload

from mctf_compile.passes.rules import schema_arguments

# Puts a kernel in the place of a node; says why it does not where it does not.
Replacement = Callable[[fx.Node], "str | None"]

NOT_TAKEN = "the kernel does not take its operands"


def values(*nodes: fx.Node | None) -> list[Any]:
    """The traced tensors of operands, None for one that is not there."""
    return [None if n is None else n.meta["val"] for n in nodes]


def call(like: fx.Node, target: Callable[..., Any], args: tuple[Any, ...], value: object) -> fx.Node:
    """A new call in the place of ``like``, in the same block."""
    node = like.graph.call_function(target, args)
    node.meta = {**like.meta, "val": value}
    return node


def item(several: fx.Node, i: int) -> fx.Node:
    """The ``i``-th result of a call that has several."""
    return call(several, operator.getitem, (several, i), several.meta["val"][i])


def items(node: fx.Node) -> dict[int, fx.Node]:
    """The results of a node that has several, by their number."""
    return {cast(int, user.args[1]): user for user in node.users}


def replace(old: fx.Node, new: fx.Node) -> None:
    """``new`` is read in the place of ``old``, which goes."""
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def by_the_same_operands(target: OpOverload, supported: Callable[[dict[str, Any]], bool]) -> Replacement:
    """By an operator of the same operands and results; ``supported`` is asked by their names."""

    def put(node: fx.Node) -> str | None:
        if not supported(schema_arguments(node)):
            return NOT_TAKEN
        node.target = target
        return None

    return put


def readers_of_map(importance: fx.Node) -> list[fx.Node] | None:
    """The attentions one step ahead that read the map of ``mctf::importance``; None where something else does."""
    results = items(importance)
    readers = list(dict.fromkeys(reader for i in (1, 2) if i in results for reader in results[i].users))
    whole = [results.get(1), results.get(2)]
    if all(r.target is torch.ops.mctf.ahead.default and [*r.args[:2]] == whole for r in readers):
        return readers
    return None
