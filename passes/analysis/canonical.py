"""Part of normalize: attention that is written in other words is put into those that the analyses know."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from mctf_compile.narrowing import node_of, operator_of, present
from mctf_compile.passes.rules import schema_arguments
from mctf_compile.passes.rules.base import wrap

aten = torch.ops.aten


def canonicalize(gm: fx.GraphModule) -> None:
    """Write a softmax that is spelled out as one, and give the queries of grouped heads keys and values of their own.

    Before::  e = aten.exp(aten.sub(x, aten.amax(x, [-1], True)));  w = aten.div(e, aten.sum(e, [-1], True))
    After::   w = aten.softmax(x, -1)

    Before::  aten.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    After::   aten.scaled_dot_product_attention(q, aten.repeat_interleave(k, 4, -3), aten.repeat_interleave(v, 4, -3))
    """
    for node in list(gm.graph.nodes):
        if node.target is aten.div.Tensor:
            _write_softmax(node)
        elif node.target is aten.exp.default:
            _write_shifted(node)
        elif node.target is aten.scaled_dot_product_attention.default and _heads(node, "query") is not None:
            _repeat_heads(node)
    gm.graph.lint()
    gm.recompile()


def _write_softmax(quotient: fx.Node) -> None:
    """Replace exponentials over their sum."""
    numerator, denominator = quotient.args[:2]
    if not isinstance(numerator, fx.Node) or not isinstance(denominator, fx.Node):
        return
    powers = _uncast(numerator)
    dim = _reduced(_uncast(denominator), (aten.sum.dim_IntList,), powers)
    if powers.target is not aten.exp.default or dim is None:
        return
    _replace(quotient, _without_maximum(_uncast(node_of(powers.args[0])), dim), dim)


def _write_shifted(powers: fx.Node) -> None:
    """Replace exponentials of what the logarithm of their sum was subtracted from."""
    shifted = _uncast(node_of(powers.args[0]))
    if shifted.target is not aten.sub.Tensor or schema_arguments(shifted)["alpha"] != 1:
        return
    logits, shift = shifted.args[:2]
    if not isinstance(logits, fx.Node) or not isinstance(shift, fx.Node):
        return
    dim = _reduced(_uncast(shift), (aten.logsumexp.default,), _uncast(logits))
    if dim is not None:
        _replace(powers, _uncast(logits), dim)


def _replace(weights: fx.Node, logits: fx.Node, dim: int) -> None:
    """Let readers of weights read a softmax."""
    if not weights.meta["val"].is_floating_point():
        return
    with weights.graph.inserting_before(weights):
        made = weights.graph.call_function(aten.softmax.int, (logits, dim, weights.meta["val"].dtype))
    made.meta = dict(weights.meta)
    weights.replace_all_uses_with(made)
    _erase_unread(weights)


def _uncast(node: fx.Node) -> fx.Node:
    """What a value was before it was cast to another floating dtype, as autocast does on the way to a softmax."""
    while node.target is aten.to.dtype and node_of(node.args[0]).meta["val"].is_floating_point():
        node = node_of(node.args[0])
    return node


def _reduced(node: fx.Node, by: tuple[Any, ...], operand: fx.Node) -> int | None:
    """The one dimension over which ``node`` reduces ``operand``, and keeps it with one position; None for others."""
    unsqueezed: int | None = None
    if node.target is aten.unsqueeze.default and isinstance(node.args[1], int):
        unsqueezed, node = wrap(node.args[1], node.meta["val"].dim()), node_of(node.args[0])
    if node.target not in by or _uncast(node_of(node.args[0])) is not operand:
        return None
    args, rank = schema_arguments(node), operand.meta["val"].dim()
    dims = args["dim"] if isinstance(args["dim"], (list, tuple)) else [args["dim"]]
    if dims is None or len(dims) != 1 or args["keepdim"] is (unsqueezed is not None):
        return None
    dim = wrap(dims[0], rank)
    return dim if unsqueezed in (None, dim) else None


def _without_maximum(shifted: fx.Node, dim: int) -> fx.Node:
    """The logits that their maximum along ``dim`` was subtracted from; without that, what is given."""
    while shifted.target is aten.sub.Tensor and schema_arguments(shifted)["alpha"] == 1:
        logits, shift = shifted.args[:2]
        if not isinstance(logits, fx.Node) or not isinstance(shift, fx.Node):
            break
        value, whole = shift.meta["val"], logits.meta["val"]
        offset = whole.dim() - value.dim()
        alike = isinstance(value, Tensor) and (dim < offset or value.shape[dim - offset] == 1)
        if not alike or whole.shape != shifted.meta["val"].shape or not _is_of(shift, logits, dim):
            break
        shifted = _uncast(logits)
    return shifted


def _is_of(shift: fx.Node, logits: fx.Node, dim: int) -> bool:
    """Whether a number is the maximum of logits."""
    while shift.target in (aten.detach.default, aten.to.dtype) or (
        shift.target is operator.getitem and shift.args[1] == 0
    ):
        shift = node_of(shift.args[0])
    return _reduced(shift, (aten.amax.default, aten.max.dim), _uncast(logits)) == dim


def _erase_unread(node: fx.Node) -> None:
    """Erase a node that nothing reads, and what was computed for it alone."""
    stack = [node]
    while stack:
        n = stack.pop()
        if not n.users and n.op == "call_function" and not n.is_impure() and not n._erased:
            operands = n.all_input_nodes
            n.graph.erase_node(n)
            stack.extend(operands)


def _heads(attention: fx.Node, name: str) -> int | None:
    """The heads of an operand of attention, where it has a dimension for them and their number is known."""
    value = schema_arguments(attention)[name].meta["val"]
    return value.shape[1] if value.dim() == 4 and isinstance(value.shape[1], int) else None


def _repeat_heads(attention: fx.Node) -> None:
    """Repeat the heads of keys and values that several of the queries share."""
    args, heads = schema_arguments(attention), present(_heads(attention, "query"))
    repeated = {}
    with attention.graph.inserting_before(attention):
        for name in ("key", "value"):
            source, own = args[name], _heads(attention, name)
            if own is None or own == heads or (own != 1 and not args["enable_gqa"]):
                continue
            value = source.meta["val"]
            made = attention.graph.call_function(aten.repeat_interleave.self_int, (source, heads // own, -3))
            made.meta = {**attention.meta, "val": value.repeat_interleave(heads // own, -3)}
            repeated[name] = made
    given = args | repeated | {"enable_gqa": False}
    names = [a.name for a in operator_of(attention)._schema.arguments]
    positional = names[: len(attention.args)]
    attention.args = tuple(given[name] for name in positional)
    attention.kwargs = {
        k: given[k] for k in {**attention.kwargs, **repeated} if k not in positional and k != "enable_gqa"
    }
