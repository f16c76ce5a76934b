"""Calls that tensor subclasses answer: where axes go is read off the operators that such a call consists of."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import transform_subclass
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from mctf_compile.errors import Declined, PassError, UnsupportedGraph
from mctf_compile.narrowing import function_of
from mctf_compile.passes.axes import FEATURES, AxisTable, Dim, Dims, atoms, product
from mctf_compile.passes.rules.base import Rule, find_rule
from mctf_compile.passes.rules.call import Call, Flow, Fused, V
from mctf_compile.passes.subclasses import described, is_wrapper, wrappers
from mctf_compile.passes.tracing import mode_of


def rule_of(node: fx.Node) -> Rule | None:
    """The rule of a call: that of its operator, unless a tensor subclass answers it."""
    return ANSWERED if wrappers(node) else find_rule(node.target)


def flow_of(node: fx.Node, table: AxisTable, dims: Mapping[fx.Node, Dims | list[Dims]]) -> Flow | None:
    """Where the axes of a node's operands go; None for one that has no tensors among its results."""
    value = node.meta.get("val")
    if node.target is operator.getitem:
        source, index = cast(tuple[Any, Any], node.args)
        results = dims.get(source)
        if isinstance(results, list):
            return Flow(results[index])
    if not any(isinstance(v, Tensor) for v in tree_leaves(value)):
        return None
    operands = [of for of in map(dims.get, node.all_input_nodes) if isinstance(of, tuple)]
    rule = rule_of(node)
    # Of values without dimensions, whose first and last may be named all the same, there is nothing to say.
    if rule is not None and any(operands):
        flow = rule.axes(_call(node, table, dims))
        _check_sizes(node, flow)
        return flow
    return unknown(value, table, tuple(dim for of in operands for dim in of))


def _check_sizes(node: fx.Node, flow: Flow) -> None:
    """Raises ``PassError`` where a rule gives a result axes of other sizes than it has; symbols are not compared."""
    value = node.meta["val"]
    several = isinstance(flow.out, list)
    for dims, result in zip(flow.out, value) if several else [(flow.out, value)]:
        if not isinstance(result, Tensor) or dims is None:
            continue
        sizes = [product(cast(Dim, dim)) for dim in dims]
        known = all(isinstance(size, int) for size in (*sizes, *result.shape))
        if len(sizes) != result.dim() or (known and sizes != list(result.shape)):
            raise PassError(f"the rule of {node.target} gives sizes {sizes} to {node.name} of {list(result.shape)}")


def _call(node: fx.Node, table: AxisTable, dims: Mapping[fx.Node, Dims | list[Dims]]) -> Call:
    """A node as a rule sees it, whose operands are single tensors."""
    return Call(node, table, lambda n: table.canonical_dims(cast(Dims, dims[n])))


def unknown(value: Any, table: AxisTable, mixed: Dims) -> Flow:
    """Results with axes of their own, in which all of ``mixed`` meet."""
    if isinstance(value, Tensor):
        return Flow(table.fresh_dims(value.shape), mixed)
    return Flow([table.fresh_dims(v.shape) if isinstance(v, Tensor) else () for v in value], mixed)


@dataclass(frozen=True)
class Body:
    """What a call consists of: a graph whose inputs are plain tensors and numbers.

    ``operands``: for each input the operand of the call that it is; None for a tensor that a wrapper holds.
    """

    graph: fx.Graph
    operands: list[fx.Node | None]


def body_of(node: fx.Node) -> Body | None:
    """The operators below autograd that wrappers make of a call; None where they cannot be traced, or make wrappers."""
    nodes, spec = tree_flatten((node.args, node.kwargs))
    inputs: list[Any] = []
    operands: list[fx.Node | None] = []

    def take(value: Any, operand: fx.Node | None) -> Callable[[Iterator[Any]], Any]:
        """Note what is to be an input; returns what makes the value of inputs."""
        if is_wrapper(value):
            parts = {name: take(getattr(value, name), None) for name in value.__tensor_flatten__()[0]}
            return lambda given: transform_subclass(value, lambda name, _: parts[name](given))
        if not isinstance(value, (Tensor, torch.SymInt)):
            return lambda given: value
        inputs.append(value)
        operands.append(operand)
        return next

    made = [
        take(n.meta.get("val") if isinstance(n, fx.Node) else n, n if isinstance(n, fx.Node) else None) for n in nodes
    ]

    def run(*given: Any) -> Any:
        feed = iter(given)
        args, kwargs = tree_unflatten([make(feed) for make in made], spec)
        return function_of(node)(*args, **kwargs)

    if any(map(is_wrapper, tree_leaves(node.meta["val"]))):
        return None
    try:
        with mode_of(inputs) as mode:
            return None if mode is None else Body(make_fx(run)(*inputs).graph, operands)
    except Exception:
        # It is the subclass's code, and may do anything.
        return None


def flow_of_body(call: Call) -> Flow:
    """The axes of a call's results, and what meets anywhere within it.

    Positions also meet where a token is told from another: by a tensor that is made within, or held by a wrapper, and
    has an axis of the tokens. Raises ``UnsupportedGraph`` where an operand is written to.
    """
    table, value = call.table, call.node.meta["val"]
    everything = tuple(dim for n in call.tensors() for dim in call.dims_of(n))
    body = body_of(call.node)
    if body is None:
        return unknown(value, table, everything)
    dims: dict[fx.Node, Dims | list[Dims]] = {}
    placeholders = body.graph.find_nodes(op="placeholder")
    given: dict[fx.Node, fx.Node | None] = dict(zip(placeholders, body.operands, strict=True))
    memory = {v.untyped_storage()._cdata for v in (n.meta.get("val") for n in given) if isinstance(v, Tensor)}
    own: list[Dim] = []
    mixed: list[Dim] = []
    for node in body.graph.nodes:
        held = node.meta.get("val")
        if node.op == "output":
            break
        if node.op in ("placeholder", "get_attr"):
            operand = given.get(node)
            if operand is not None and isinstance(held, Tensor):
                dims[node] = call.dims_of(operand)
            elif isinstance(held, Tensor):
                made = table.fresh_dims(held.shape)
                dims[node] = made
                own.extend(made)
            elif node.op == "get_attr":
                return unknown(value, table, everything)
            continue
        flow = _flow_within(node, table, dims, memory, call.node)
        if flow is None:
            continue
        dims[node] = flow.out
        mixed.extend(flow.mixed)
        if not any(n in dims for n in node.all_input_nodes):
            mixed.extend(_flat(flow.out))
    (results,) = body.graph.find_nodes(op="output")
    outs: list[Dims] = []
    for n in tree_leaves(results.args[0]):
        out = dims.get(n) if isinstance(n, fx.Node) else ()
        if not isinstance(out, tuple):
            return unknown(value, table, everything)
        outs.append(out)
    named = [_with_features(out, own, [call.dims_of(n) for n in call.tensors()], table) for out in outs]
    return Flow(named[0] if isinstance(value, Tensor) else named, (*mixed, *own))


def _flow_within(
    node: fx.Node, table: AxisTable, dims: Mapping[fx.Node, Dims | list[Dims]], memory: set[int], whole: fx.Node
) -> Flow | None:
    """``flow_of`` of a node of a body. One that writes does to axes what the operator does that it is a form of."""
    target = node.target
    if not isinstance(target, OpOverload) or not target._schema.is_mutable:
        return flow_of(node, table, dims)
    written = node.args[0].meta.get("val") if node.args and isinstance(node.args[0], fx.Node) else None
    if not isinstance(written, Tensor) or written.untyped_storage()._cdata in memory:
        raise UnsupportedGraph(f"{described(whole.target, wrappers(whole))} writes into its operands")
    pure = getattr(torch.ops.aten, target._schema.name.partition("::")[2].removesuffix("_"), None)
    rule = find_rule(getattr(pure, target._overloadname, None))
    if rule is None:
        operands = [dims[n] for n in node.all_input_nodes if n in dims]
        return unknown(node.meta["val"], table, tuple(dim for of in operands for dim in _flat(of)))
    return rule.axes(_call(node, table, dims))


def _flat(out: Dims | list[Dims]) -> Dims:
    """The dims of one result, or of several side by side."""
    return out if isinstance(out, tuple) else tuple(dim for of in out for dim in of)


def _with_features(out: Dims, own: list[Dim], operands: list[Dims], table: AxisTable) -> Dims:
    """The dims of a result, where those that a wrapper brings in number the features of a layer."""
    shared = {atom for dims in operands for dim in table.canonical_dims(dims) for atom in atoms(dim)}
    held = {atom for dim in table.canonical_dims(tuple(own)) for atom in atoms(dim)} - shared
    named = []
    for dim in table.canonical_dims(out):
        features = bool(dim) and held.issuperset(atoms(dim))
        named.append(sum((table.fresh(axis.size, FEATURES) for axis in dim), ()) if features else dim)
    return tuple(named)


def not_by_itself(call: Fused[V]) -> Any:
    """Decline a call within which tokens meet, or may meet for all that is known."""
    raise Declined(f"{described(call.target, wrappers(call.node))} is not known to treat each token by itself")


ANSWERED = Rule(flow_of_body, fused=not_by_itself)
