"""Triton kernels for the ``mctf`` operators of a graph."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import fx

from mctf_compile.kernels.device import device_of
from mctf_compile.passes.lowering.replacing import (
    NOT_TAKEN,
    Replacement,
    by_the_same_operands,
    by_their_codes,
    call,
    item,
    items,
    readers_of_map,
    replace,
    values,
)
from mctf_compile.passes.rules import schema_arguments

mctf = torch.ops.mctf


def prepare(device: torch.device) -> None:
    """Nothing: kernels are compiled when they are launched."""


def problem(device: torch.device) -> str | None:
    """Why Triton kernels cannot run there, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if "triton" not in device_of(device).kernels and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the model is on {device.type}"
    if device.type == "cuda" and torch.cuda.is_available() and not torch.version.hip:
        major = torch.cuda.get_device_capability(device)[0]
        if major < 8:
            return "the GPU is older than compute capability 8.0"
    return None


def replacements(gradients: bool) -> dict[object, Replacement]:
    """What puts a Triton kernel in the place of each operator; they have gradients."""
    import mctf_compile.kernels.on_device  # noqa: F401  registers torch.ops.mctf.*_triton
    from mctf_compile.kernels.matching import triton as matching
    from mctf_compile.kernels.pooling import triton as pooling
    from mctf_compile.kernels.shift import triton as shift
    from mctf_compile.kernels.unmerge import triton as unmerge

    def match(args: dict[str, Any]) -> bool:
        return matching.supported(*values(args["x"]))

    def group(args: dict[str, Any]) -> bool:
        return pooling.supported_group(*values(args["raw"], args["size"]))

    def pool(args: dict[str, Any]) -> bool:
        return pooling.supported(*values(args["x"], args["weight"]))

    def unmerged(args: dict[str, Any]) -> bool:
        return unmerge.supported(*values(args["y"]))

    return {
        mctf.attention.default: _attention,
        mctf.importance.default: _importance,
        mctf.match.default: by_the_same_operands(mctf.match_triton.default, match),
        mctf.group.default: by_the_same_operands(mctf.group_triton.default, group),
        mctf.pool.default: by_the_same_operands(mctf.pool_triton.default, pool),
        mctf.unmerge.default: by_the_same_operands(mctf.unmerge_triton.default, unmerged),
        mctf.powers.default: by_their_codes(
            mctf.shift_linear_triton.default, lambda x, codes, _: shift.supported(x, codes)
        ),
    }


def _attention(node: fx.Node) -> str | None:
    from mctf_compile.kernels.attention.triton import supported

    args = schema_arguments(node)
    operands = [args[name] for name in ("q", "k", "v", "log_size", "bias")]
    q, k, v = values(*operands[:3])
    if not supported(q, k, v, args["dropout_p"]):
        return NOT_TAKEN
    out = node.meta["val"]
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    both = call(node, mctf.attention_triton.default, (*operands, args["scale"]), (out, lse))
    replace(node, item(both, 0))
    return None


def _importance(node: fx.Node) -> str | None:
    """With the attentions one step ahead that read its map, which then is not made.

    Before::  importance, weights, norm = mctf.importance(q, k, log_size, bias, scale)
              o = mctf.ahead(weights, norm, v, index, weight, keep, gone, into, 0.0)
    After::   importance, lse = mctf.importance_triton(q, k, log_size, bias, scale)
              o, rows = mctf.ahead_triton(q, k, v, log_size, bias, scale, lse, index, weight, keep, gone, into)
    """
    from mctf_compile.kernels.ahead.triton import supported as supported_ahead
    from mctf_compile.kernels.attention.triton import supported

    args = schema_arguments(node)
    operands = [args[name] for name in ("q", "k", "log_size", "bias")]
    q, k = values(*operands[:2])
    readers = readers_of_map(node)
    if readers is None or not supported(q, k, None):
        return NOT_TAKEN
    for of_reader in map(schema_arguments, readers):
        v, weight = values(of_reader["v"], of_reader["weight"])
        if not supported_ahead(q, k, v, weight, of_reader["dropout_p"]):
            return NOT_TAKEN

    value = node.meta["val"][0], q.new_empty(q.shape[:3], dtype=torch.float32)
    both = call(node, mctf.importance_triton.default, (*operands, args["scale"]), value)
    received, lse = item(both, 0), item(both, 1)
    if 0 in items(node):
        replace(items(node)[0], received)
    for reader in readers:
        of_reader = schema_arguments(reader)
        v = of_reader["v"]
        matching = [of_reader[name] for name in ("index", "weight", "keep", "gone", "into")]
        with reader.graph.inserting_before(reader):
            wide = v.meta["val"]
            rows = wide.new_empty(*q.shape[:3], wide.shape[3])
            ahead = call(
                reader,
                mctf.ahead_triton.default,
                (*operands[:2], v, *operands[2:], args["scale"], lse, *matching),
                (reader.meta["val"], rows),
            )
            replace(reader, item(ahead, 0))
    return None
