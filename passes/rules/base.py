"""What a rule is: how an operator moves axes, and how it runs on fused tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._ops import OpOverload

from mctf_compile.narrowing import operator_of
from mctf_compile.passes.axes import AxisTable, Dim, Dims

if TYPE_CHECKING:
    from mctf_compile.passes.rewriting.fused_call import FusedCall


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
        shape: Sequence[int | torch.SymInt] = (value[0] if isinstance(value, (tuple, list)) else value).shape
        return shape

    @property
    def results(self) -> int:
        """How many tensors the operator returns."""
        return len(operator_of(self.node)._schema.returns)

    def tensors(self) -> list[fx.Node]:
        return [n for n in self.node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]


def schema_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by name, with the schema's defaults filled in; none of a function without one."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {}
    arguments = schema.arguments
    named = {a.name: a.default_value for a in arguments if a.has_default_value()}
    named.update(zip((a.name for a in arguments), node.args))
    return named | dict(node.kwargs)


@dataclass(frozen=True)
class Rule:
    """How one operator treats token axes.

    ``axes`` says where axes go. ``fused`` runs the operator where it mixes fused tokens (weighted by
    their sizes); without it the tokens are unmerged first. ``resized`` names the arguments that hold
    sizes of the result, which shrink with the tokens. ``ignores`` names those that lend only their dtype or
    shape, never their tokens. ``broadcasts``: operands of fewer dimensions are aligned from the right.
    """

    axes: Callable[[Call], Flow]
    fused: Callable[[FusedCall], Any] | None = None
    resized: str | None = None
    ignores: tuple[str, ...] = ()
    broadcasts: bool = False


RULES: dict[OpOverload, Rule] = {}


def rule(
    *names: str,
    reads: str,
    fused: Callable[[FusedCall], Any] | None = None,
    resized: str | None = None,
    ignores: tuple[str, ...] = (),
    broadcasts: bool = False,
) -> Callable[[Callable[[Call], Flow]], Callable[[Call], Flow]]:
    """Enter the decorated axes function in ``RULES`` for overloads of ATen operators.

    Args:
        names: the overloads, as in ``"sum"`` (the default one) and ``"sum.dim_IntList"``.
        reads: the arguments that the rule knows, separated by spaces. An overload that has another one, in a later
            release of PyTorch, gets no rule; nor does one that is not there.
        fused: see ``Rule``; so are the next three.
        resized: see there.
        ignores: see there.
        broadcasts: see there.
    """

    def register(axes: Callable[[Call], Flow]) -> Callable[[Call], Flow]:
        for overload in filter(None, map(overload_of, names)):
            if {argument.name for argument in overload._schema.arguments} <= set(reads.split()):
                RULES[overload] = Rule(axes, fused, resized, ignores, broadcasts)
        return axes

    return register


def overload_of(name: str) -> OpOverload | None:
    """``"sum.dim_IntList"`` or ``"sum"`` of ATen, where there is one."""
    name, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, name, None), overload or "default", None)


def find_rule(target: Any) -> Rule | None:
    """The rule of an operator: its own, else that of the pointwise family, else None (default-deny)."""
    if not isinstance(target, OpOverload):
        return None
    if target in RULES:
        return RULES[target]
    return RULES[torch.ops.aten.add.Tensor] if _is_pointwise(target) else None


def _is_pointwise(target: OpOverload) -> bool:
    """Whether an operator makes one tensor of others position by position, the same one at every call.

    PyTorch's tag says the first, also of comparisons of whole tensors (``equal``) and of results in several parts.
    """
    schema = target._schema
    several = len(schema.returns) != 1 or str(schema.returns[0].type) != "Tensor"
    return torch.Tag.pointwise in target.tags and not (several or is_random(target) or schema.is_mutable)


def is_random(target: OpOverload) -> bool:
    """Whether an operator draws other numbers at every call."""
    return torch.Tag.nondeterministic_seeded in target.tags


def sources(node: fx.Node) -> list[fx.Node]:
    """The inputs whose values an operator reads; not those that lend only their dtype or shape."""
    rule = find_rule(node.target)
    if rule is None or not rule.ignores:
        return node.all_input_nodes
    read: set[fx.Node] = set()
    fx.node.map_arg({name: v for name, v in schema_arguments(node).items() if name not in rule.ignores}, read.add)
    return [n for n in node.all_input_nodes if n in read]


def wrap(dim: int, rank: int) -> int:
    """A non-negative dimension number."""
    return dim + rank if dim < 0 else dim
