"""Pass: the kernel that runs each ``mctf`` operator, where it is not the operator's own ATen."""

from __future__ import annotations

import copy
import importlib.util
import operator
import os
from collections.abc import Callable

import torch
from torch import Tensor, fx

from mctf_compile.errors import ConfigError
from mctf_compile.passes.rules import schema_arguments

mctf = torch.ops.mctf


def triton_problem(device: torch.device) -> str | None:
    """Why Triton kernels cannot run there, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the model is on {device.type}"
    if device.type == "cuda" and torch.cuda.is_available() and not torch.version.hip:
        major = torch.cuda.get_device_capability(device)[0]
        if major < 8:
            return "the GPU is older than compute capability 8.0"
    return None


def choose_kernels(gm: fx.GraphModule, wanted: str) -> tuple[fx.GraphModule, list[str]]:
    """A rewritten graph with Triton kernels for its ``mctf`` operators, and what stays ATen against the wish.

    ``wanted``: the option ``kernels``. ``auto`` takes Triton on CUDA. With it the attention map of N x N is not in
    memory: ``importance_triton`` passes on its log-sum-exp alone, and ``ahead_triton`` computes the rows again.

    Before::  importance, weights, norm = mctf.importance(q, k, log_size, bias, scale)
              o = mctf.ahead(weights, norm, v, index, weight, keep, gone, into, 0.0)
    After::   importance, lse = mctf.importance_triton(q, k, log_size, bias, scale)
              o, rows = mctf.ahead_triton(q, k, v, log_size, bias, scale, lse, index, weight, keep, gone, into)

    Raises ``ConfigError`` where ``kernels="triton"`` cannot run.
    """
    first = next((n for n in gm.graph.nodes if n.target in REPLACEMENTS), None)
    if wanted == "aten" or first is None:
        return gm, []
    problem = triton_problem(_device(first))
    if problem is not None and wanted == "triton":
        raise ConfigError(f"kernels='triton': {problem}; use 'auto' or 'aten'.")
    if problem is not None or (wanted == "auto" and _device(first).type != "cuda"):
        return gm, []
    import mctf_compile.kernels.on_device  # noqa: F401  registers torch.ops.mctf.*_triton

    gm = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    kept = []
    for node in [n for n in gm.graph.nodes if n.target in REPLACEMENTS]:
        with gm.graph.inserting_before(node):
            if not REPLACEMENTS[node.target](node):
                kept.append(f"{node.name} stays ATen: the Triton kernel does not take its operands")
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm, kept if wanted == "triton" else []


def _device(node: fx.Node) -> torch.device:
    return next(n.meta["val"].device for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor))


def _values(*nodes: fx.Node | None) -> list[Tensor | None]:
    return [None if n is None else n.meta["val"] for n in nodes]


def _call(like: fx.Node, target: object, args: tuple, value: object) -> fx.Node:
    """A new call in the place of ``like``, in the same block."""
    node = like.graph.call_function(target, args)
    node.meta = {**like.meta, "val": value}
    return node


def _item(call: fx.Node, i: int) -> fx.Node:
    return _call(call, operator.getitem, (call, i), call.meta["val"][i])


def _same(name: str, supported: Callable[..., bool]) -> Callable[[fx.Node], bool]:
    """The replacement of an operator by one of the same operands and results; ``supported`` is asked by their names."""

    def replace(node: fx.Node) -> bool:
        if not supported(schema_arguments(node)):
            return False
        node.target = getattr(mctf, f"{name}_triton").default
        return True

    return replace


def _attention(node: fx.Node) -> bool:
    from mctf_compile.kernels.attention.triton import supported

    args = schema_arguments(node)
    operands = [args[name] for name in ("q", "k", "v", "log_size", "bias")]
    if not supported(*_values(*operands[:3]), args["dropout_p"]):
        return False
    out, q = node.meta["val"], operands[0].meta["val"]
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    call = _call(node, mctf.attention_triton.default, (*operands, args["scale"]), (out, lse))
    _replace(node, _item(call, 0))
    return True


def _importance(node: fx.Node) -> bool:
    """With the attentions one step ahead that read its map, which then is not made."""
    from mctf_compile.kernels.ahead.triton import supported as supported_ahead
    from mctf_compile.kernels.attention.triton import supported

    args = schema_arguments(node)
    operands = [args[name] for name in ("q", "k", "log_size", "bias")]
    q, k = _values(*operands[:2])
    items = {user.args[1]: user for user in node.users}
    readers = list(dict.fromkeys(reader for i in (1, 2) if i in items for reader in items[i].users))
    if not supported(q, k, None):
        return False
    for reader in readers:
        if reader.target is not mctf.ahead.default or reader.args[:2] != (items[1], items[2]):
            return False
        of_reader = schema_arguments(reader)
        if not supported_ahead(q, k, *_values(of_reader["v"], of_reader["weight"]), of_reader["dropout_p"]):
            return False

    value = node.meta["val"][0], q.new_empty(q.shape[:3], dtype=torch.float32)
    call = _call(node, mctf.importance_triton.default, (*operands, args["scale"]), value)
    received, lse = _item(call, 0), _item(call, 1)
    if 0 in items:
        _replace(items[0], received)
    for reader in readers:
        of_reader = schema_arguments(reader)
        v = of_reader["v"]
        matching = [of_reader[name] for name in ("index", "weight", "keep", "gone", "into")]
        with reader.graph.inserting_before(reader):
            wide = v.meta["val"]
            rows = wide.new_empty(*q.shape[:3], wide.shape[3])
            ahead = _call(reader, mctf.ahead_triton.default,
                          (*operands[:2], v, *operands[2:], args["scale"], lse, *matching), (reader.meta["val"], rows))
            _replace(reader, _item(ahead, 0))
    return True


def _replace(old: fx.Node, new: fx.Node) -> None:
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def _match(args: dict) -> bool:
    from mctf_compile.kernels.matching.triton import supported

    return supported(*_values(args["x"]))


def _group(args: dict) -> bool:
    from mctf_compile.kernels.pooling.triton import supported_group

    return supported_group(*_values(args["raw"], args["size"]))


def _pool(args: dict) -> bool:
    from mctf_compile.kernels.pooling.triton import supported

    return supported(*_values(args["x"], args["weight"]))


def _unmerge(args: dict) -> bool:
    from mctf_compile.kernels.unmerge.triton import supported

    return supported(*_values(args["y"]))


REPLACEMENTS: dict[object, Callable[[fx.Node], bool]] = {
    mctf.attention.default: _attention,
    mctf.importance.default: _importance,
    mctf.match.default: _same("match", _match),
    mctf.group.default: _same("group", _group),
    mctf.pool.default: _same("pool", _pool),
    mctf.unmerge.default: _same("unmerge", _unmerge),
}
