"""What the tables of kernels are made of: one call of a graph in the place of another."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import fx
from torch._ops import OpOverload

from mctf_compile.narrowing import node_of
from mctf_compile.passes.rules import schema_arguments

aten = torch.ops.aten

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


# That have all the numbers which ``mctf::powers`` gives.
EXACT = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def shift_layers(weight: fx.Node, slices: tuple[fx.Node, ...] = ()) -> Iterator[tuple[fx.Node, tuple[fx.Node, ...]]]:
    """The linear layers whose weight are the powers of ``mctf::powers``, and the slices of it on the way there."""
    for user in weight.users:
        if user.target is aten.linear.default and user.args[1] is weight:
            yield user, slices
        elif user.target is aten.to.dtype and user.meta["val"].dtype in EXACT:
            yield from shift_layers(user, slices)
        elif user.target is aten.slice.Tensor and not user.kwargs and user.all_input_nodes == [weight]:
            yield from shift_layers(user, (*slices, user))


def codes_of(weight: fx.Node) -> fx.Node | None:
    """The codes that ``mctf::powers`` has made a weight of, cast or not; None of another one."""
    while weight.target is aten.to.dtype and weight.meta["val"].dtype in EXACT:
        weight = node_of(weight.args[0])
    return node_of(weight.args[0]) if weight.target is torch.ops.mctf.powers.default else None


def by_their_codes(target: OpOverload, supported: Callable[[Any, Any, Any], bool]) -> Replacement:
    """Shift layers by products with the codes themselves; ``supported`` is asked of x, codes and bias.

    Before::  weight = mctf.powers(codes, float32)
              y = linear(x, slice(weight, 0, 0, O), bias)
    After::   y = mctf.shift_linear_cpp(x, slice(codes, 0, 0, O), bias)
    """

    def put(node: fx.Node) -> str | None:
        taken = False
        for layer, slices in list(shift_layers(node)):
            args, codes = schema_arguments(layer), node_of(node.args[0])
            with layer.graph.inserting_before(layer):
                for part in slices:
                    where = part.args[1:]
                    codes = call(part, aten.slice.Tensor, (codes, *where), aten.slice(codes.meta["val"], *where))
                operands = args["input"], codes, args["bias"]
                if supported(*values(*operands)):
                    replace(layer, call(layer, target, operands, layer.meta["val"]))
                    taken = True
        return None if taken else NOT_TAKEN

    return put


def replaced_with(node: fx.Node) -> list[fx.Node]:
    """The nodes that are replaced together with one."""
    if node.target is torch.ops.mctf.importance.default:
        return readers_of_map(node) or []
    return [layer for layer, _ in shift_layers(node)] if node.target is torch.ops.mctf.powers.default else []


def readers_of_map(importance: fx.Node) -> list[fx.Node] | None:
    """The attentions one step ahead that read the map of ``mctf::importance``; None where something else does."""
    results = items(importance)
    readers = list(dict.fromkeys(reader for i in (1, 2) if i in results for reader in results[i].users))
    whole = [results.get(1), results.get(2)]
    if all(r.target is torch.ops.mctf.ahead.default and [*r.args[:2]] == whole for r in readers):
        return readers
    return None
