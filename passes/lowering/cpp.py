"""C++ kernels for the ``mctf`` operators of a graph that runs on a CPU."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from mctf_compile.kernels.device import device_of
from mctf_compile.passes.axes import hint_of, size_of
from mctf_compile.passes.lowering.replacing import (
    NOT_TAKEN,
    Replacement,
    by_the_same_operands,
    by_their_codes,
    call,
    codes_of,
    item,
    items,
    readers_of_map,
    replace,
    values,
)
from mctf_compile.passes.rules import schema_arguments

mctf = torch.ops.mctf

# A map that is not stored whole has the memory of the model's largest q, so many times, and q and k stay for computing
# its other rows again. Beside what else is alive then, in float32 that is about the peak of an MLP of ratio 4.
# Maps that fit into as much are stored whole: those of few tokens, and of later blocks.
STORED = 3


def prepare(device: torch.device) -> None:
    """Start to build the kernels where they may be asked for."""
    from mctf_compile.kernels import cpp

    if "cpp" in device_of(device).kernels:
        cpp.building()


def problem(device: torch.device) -> str | None:
    """Why C++ kernels cannot run there, or None."""
    from mctf_compile.kernels import cpp

    return cpp.problem() if "cpp" in device_of(device).kernels else f"the model is on {device.type}"


def replacements(gradients: bool) -> dict[object, Replacement]:
    """What puts a C++ kernel in the place of each operator. Of those, a matching alone needs no gradient."""
    # Declares torch.ops.mctf.*_cpp.
    from mctf_compile.kernels.on_cpu import shift_supported

    return {
        mctf.attention.default: _without_gradient if gradients else _attention,
        mctf.importance.default: _without_gradient if gradients else _importance,
        mctf.match.default: _match,
        mctf.group.default: _without_gradient if gradients else by_the_same_operands(mctf.group_cpp.default, _groups),
        mctf.pool.default: _without_gradient if gradients else by_the_same_operands(mctf.pool_cpp.default, _pools),
        mctf.powers.default: (
            _without_gradient if gradients else by_their_codes(mctf.shift_linear_cpp.default, shift_supported)
        ),
        mctf.routed_linear.default: _without_gradient if gradients else _routed_linear,
    }


def _groups(args: dict[str, Any]) -> bool:
    from mctf_compile.kernels.on_cpu import group_supported

    return group_supported(*values(args["raw"], args["size"]))


def _pools(args: dict[str, Any]) -> bool:
    from mctf_compile.kernels.on_cpu import pool_supported

    x, weight = values(args["x"], args["weight"])
    return pool_supported(x, weight, args["dim"])


def _match(node: fx.Node) -> str | None:
    from mctf_compile.kernels.on_cpu import match_supported

    args = schema_arguments(node)
    remaining = _number(node.meta["val"][0].shape[1], node.graph)
    if remaining is None or not match_supported(*values(args["x"], args["kind"])):
        return NOT_TAKEN
    args = {**args, "r": remaining}
    node.target, node.args, node.kwargs = mctf.match_cpp.default, tuple(v for k, v in args.items() if k != "kind"), {}
    return None


def _number(value: int | torch.SymInt, graph: fx.Graph) -> int | fx.Node | None:
    """A number as it stands in a graph: itself, or the input that holds it."""
    if isinstance(value, int):
        return value
    inputs = (n for n in graph.find_nodes(op="placeholder") if isinstance(n.meta.get("val"), torch.SymInt))
    return next((n for n in inputs if size_of(n.meta["val"]) == size_of(value)), None)


def _without_gradient(node: fx.Node) -> str:
    return "the C++ kernel has no gradient"


def _attention(node: fx.Node) -> str | None:
    from mctf_compile.kernels.on_cpu import attention, attention_supported

    args = schema_arguments(node)
    operands = [args[name] for name in ("q", "k", "v", "log_size", "bias")]
    q, k, v, bias = values(*operands[:3], args["bias"])
    if not attention_supported(q, k, v, bias, args["dropout_p"]):
        return NOT_TAKEN
    replace(node, call(node, mctf.attention_cpp.default, (*operands, args["scale"]), attention(q, k, v, bias)))
    return None


def _routed_linear(node: fx.Node) -> str | None:
    """By a product for the tokens of each weight, in the place of two for all; of weights with codes by those."""
    args = schema_arguments(node)
    given = values(*(args[name] for name in ("input", "weight", "bias", "other", "other_bias")))
    if len({x.dtype for x in given if x is not None}) > 1:
        return NOT_TAKEN
    args["other"] = codes_of(args["other"]) or args["other"]
    node.target, node.args, node.kwargs = mctf.dispatched_linear.default, tuple(args.values()), {}
    return None


def _importance(node: fx.Node) -> str | None:
    """With the attentions one step ahead that read its map, of which no more is made than memory has room for.

    Before::  importance, weights, norm = mctf.importance(q, k, log_size, bias, scale)
              o = mctf.ahead(weights, norm, v, index, weight, keep, gone, into, 0.0)
    After::   importance, lse, map = mctf.importance_cpp(q, k, log_size, bias, scale, room)
              o = mctf.ahead_cpp(q, k, v, log_size, bias, scale, lse, map, index, weight)
    or, where all of the map is stored::
              o = mctf.ahead_cpp(None, None, v, None, None, scale, lse, map, index, weight)
    """
    from mctf_compile.kernels.on_cpu import ahead, attention_supported, importance

    args = schema_arguments(node)
    operands = [args[name] for name in ("q", "k", "log_size", "bias")]
    q, k, bias = values(*operands[:2], args["bias"])
    readers = readers_of_map(node)
    if readers is None or not attention_supported(q, k, None, bias):
        return NOT_TAKEN
    for of_reader in map(schema_arguments, readers):
        v = of_reader["v"].meta["val"]
        if of_reader["weight"] is None or not attention_supported(q, k, v, bias, of_reader["dropout_p"]):
            return NOT_TAKEN

    complete, room = _room(node, q)
    room = room if readers else 0
    arguments = (*operands, args["scale"], room)
    several = call(node, mctf.importance_cpp.default, arguments, importance(q, k, *arguments[2:]))
    received, lse, rows = (item(several, i) for i in range(3))
    if 0 in items(node):
        replace(items(node)[0], received)
    for reader in readers:
        of_reader = schema_arguments(reader)
        with reader.graph.inserting_before(reader):
            # What is not needed again need not stay in memory.
            recomputing = [None] * 4 if complete else operands
            arguments = (
                *recomputing[:2],
                of_reader["v"],
                *recomputing[2:],
                args["scale"],
                lse,
                rows,
                of_reader["index"],
                of_reader["weight"],
            )
            replace(reader, call(reader, mctf.ahead_cpp.default, arguments, ahead(q, k, of_reader["v"].meta["val"])))
    return None


def _room(node: fx.Node, q: Tensor) -> tuple[bool, int]:
    """Whether all of a map is stored, and for how many weights of each head there is room: the same in like blocks."""
    targets = mctf.importance.default, mctf.importance_cpp.default
    maps = [n for target in targets for n in node.graph.find_nodes(op="call_function", target=target)]
    # Size by size, as a product of them may have no value at tracing where its factors have; a batch may be empty.
    largest = max(_elements(n.args[0].meta["val"].shape) for n in maps) * q.element_size() // 4
    largest //= _elements(q.shape[:2])
    tokens, width = q.shape[2], q.shape[3] * q.element_size() // 4
    room = (STORED + 2) * largest
    fits = tokens * tokens <= STORED * largest + 2 * tokens * width
    if statically_known_true(fits) and statically_known_true(tokens * tokens <= room):
        return True, room
    return False, STORED * largest


def _elements(shape: Iterable[int | torch.SymInt]) -> int:
    """About how many elements such a shape has."""
    return math.prod(max(hint_of(size), 1) for size in shape)
