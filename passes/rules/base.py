"""What a rule is: how an operator moves axes, and how it runs on fused tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._ops import OpOverload, OpOverloadPacket

from mctf_compile.passes.axes import AxisTable, Dim, Dims

if TYPE_CHECKING:
    from mctf_compile.passes.rewriting.fused_call import FusedCall
    from mctf_compile.passes.rewriting.stream import Value


@dataclass(frozen=True)
class Flow:
    """Where the axes of an operator's operands go.

    ``out``: the dims of the result, or a list of them for several results. ``mixed``: the dims whose
    positions meet in the operator, so that it is not position by position along them.
    """

    out: Dims | list[Dims]
    mixed: tuple[Dim, ...] = ()


@dataclass
class Call:
    """One node of a graph, with its arguments by the names of the operator's schema."""

    node: fx.Node
    table: AxisTable
    dims_of: Callable[[fx.Node], Dims]
    args: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.args = schema_arguments(self.node)

    def dims(self, name: str) -> Dims:
        """The dims of a tensor argument."""
        return self.dims_of(self.args[name])

    @property
    def shape(self) -> Sequence[int | torch.SymInt]:
        """The shape of the (first) result."""
        value = self.node.meta["val"]
        return (value[0] if isinstance(value, (tuple, list)) else value).shape

    def tensors(self) -> list[fx.Node]:
        return [n for n in self.node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]


def schema_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by name, with the schema's defaults filled in."""
    arguments = node.target._schema.arguments
    named = {a.name: a.default_value for a in arguments if a.has_default_value()}
    named.update(zip((a.name for a in arguments), node.args))
    return named | dict(node.kwargs)


@dataclass(frozen=True)
class Rule:
    """How one operator treats token axes.

    ``axes`` says where axes go. ``fused`` runs the operator where it mixes fused tokens (weighted by
    their sizes); without it the tokens are unmerged first. ``resized`` names the arguments that hold
    sizes of the result, which shrink with the tokens.
    """

    axes: Callable[[Call], Flow]
    fused: Callable[[FusedCall], Value] | None = None
    resized: str | None = None
    # Arguments that lend only their dtype or shape, never their tokens.
    ignores: tuple[str, ...] = ()


RULES: dict[OpOverloadPacket, Rule] = {}


def rule(
    *packets: OpOverloadPacket,
    fused: Callable[[FusedCall], Value] | None = None,
    resized: str | None = None,
    ignores: tuple[str, ...] = (),
) -> Callable[[Callable[[Call], Flow]], Callable[[Call], Flow]]:
    """Enter the decorated axes function in ``RULES`` for the operators given."""

    def register(axes: Callable[[Call], Flow]) -> Callable[[Call], Flow]:
        for packet in packets:
            RULES[packet] = Rule(axes, fused, resized, ignores)
        return axes

    return register


def find_rule(target: Any) -> Rule | None:
    """The rule of an operator: its own, else that of the pointwise family, else None (default-deny)."""
    if not isinstance(target, OpOverload) or target._schema.is_mutable:
        return None
    if target.overloadpacket in RULES:
        return RULES[target.overloadpacket]
    if torch.Tag.pointwise in target.tags:
        return RULES[torch.ops.aten.add]
    return None


def sources(node: fx.Node) -> list[fx.Node]:
    """The inputs whose values an operator reads; not those that lend only their dtype or shape."""
    rule = find_rule(node.target)
    if rule is None or not rule.ignores:
        return node.all_input_nodes
    args = schema_arguments(node)
    lent = [args.get(name) for name in rule.ignores]
    return [n for n in node.all_input_nodes if n not in lent]


def wrap(dim: int, rank: int) -> int:
    """A non-negative dimension number."""
    return dim + rank if dim < 0 else dim
