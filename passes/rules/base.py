"""What a rule is: all that is known of an operator."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from mctf_compile.passes.axes import Place
from mctf_compile.passes.rules.call import Arguments, Call, Flow, Fused, schema_arguments


class Elements(enum.Enum):
    """What the elements of an operator's results are, where they are those of its first operand."""

    REGROUPED = enum.auto()  # all of them in their order, in dimensions that are joined, split or as they were
    REORDERED = enum.auto()  # all of them, the dimensions in another order
    TAKEN = enum.auto()  # some of them, by their positions
    REPEATED = enum.auto()  # all of them, each as often as any other
    CONVERTED = enum.auto()  # each in its place, maybe in another dtype, or without a gradient
    THINNED = enum.auto()  # each in its place, some of them 0, and the others larger for it
    SHIFTED = enum.auto()  # in other places of their dimension, maybe with others between

    @property
    def moved(self) -> bool:
        """Whether that is a change of layout alone: each is one of the operand's, at most once."""
        return self in (Elements.REGROUPED, Elements.REORDERED, Elements.TAKEN)

    @property
    def kept(self) -> bool:
        """Whether each is one of the operand's, whatever its dtype."""
        return self not in (Elements.THINNED, Elements.SHIFTED)


# Of attention on fused tokens, with its query [B, H, Nq, D], its key [B, H, N, D], the place of the keys, and a bias of
# four dimensions or None: the mean attention [B, N] that each key receives; and, where the values are multiplied by a
# map, its weights [B, H, Nq, N] and the reciprocals [B, H, Nq, 1] of their row sums.
Received = Callable[
    [Fused[Any], Tensor, Tensor, Place, "Tensor | None"], tuple[Tensor, "Tensor | None", "Tensor | None"]
]


@dataclass(frozen=True)
class Rule:
    """All that is known of one operator.

    ``axes`` says where axes go. ``fused`` runs the operator where it mixes fused tokens (weighted by
    their sizes); without it the tokens are unmerged first. ``resized`` names the arguments that hold
    sizes of the result, which shrink with the tokens. ``ignores`` names those that lend only their dtype or
    shape, never their tokens. ``broadcasts``: operands of fewer dimensions are aligned from the right.

    ``elements``: what the elements of its results are, where they are its first operand's. ``passing``: whether it
    stands before other operators to serve them, as norms and activations do. ``called``: what its users call it, where
    that is not its name. ``layer``: whether it multiplies tokens by weights or by one another, so that what it gives
    is no longer the residual stream that it reads; ``channels`` is the dimension of its input that weights are
    multiplied by, and ``factors`` gives the two operands of a product, by its arguments. ``uniform`` gives the number
    that the result holds everywhere, or None where nobody knows it. ``prevails``: whether the result is a sum or a
    choice of the operands, so that a number which masks still does with others that do not. ``beside``:
    whether ``fused`` may also be given operands with the fused tokens of another stream, which it does not mix.
    ``received``: of attention in one operator, with operands ``query``, ``key`` and ``value``: see ``Received``.
    ``by_place``: whether equal tokens at other places get other results, of which a fused token has the mean.
    """

    axes: Callable[[Call], Flow]
    fused: Callable[[Fused[Any]], Any] | None = None
    resized: str | None = None
    ignores: tuple[str, ...] = ()
    broadcasts: bool = False
    elements: Elements | None = None
    passing: bool = False
    called: str | Callable[[Arguments], str] | None = None
    layer: bool = False
    channels: int | None = None
    factors: Callable[[Arguments], Sequence[fx.Node]] | None = None
    uniform: Callable[[Arguments], Any] | None = None
    prevails: bool = False
    beside: bool = False
    received: Received | None = None
    by_place: bool = False


RULES: dict[OpOverload, Rule] = {}


def rule(*names: str, reads: str, **properties: Any) -> Callable[[Callable[[Call], Flow]], Callable[[Call], Flow]]:
    """Enter the decorated axes function in ``RULES`` for overloads of operators, ATen's where nothing else is said.

    Args:
        names: the overloads, as in ``"sum"`` (the default one), ``"sum.dim_IntList"`` and ``"mctf::powers"``.
        reads: the arguments that the rule knows, separated by spaces. An overload that has another one, in a later
            release of PyTorch, gets no rule; nor does one that is not there.
        properties: the other fields of ``Rule``.
    """

    def register(axes: Callable[[Call], Flow]) -> Callable[[Call], Flow]:
        for overload in filter(None, map(overload_of, names)):
            if {argument.name for argument in overload._schema.arguments} <= set(reads.split()):
                RULES[overload] = Rule(axes, **properties)
        return axes

    return register


def overload_of(name: str) -> OpOverload | None:
    """``"sum.dim_IntList"`` or ``"sum"`` of ATen, or ``"mctf::powers"``, where there is one."""
    space, _, name = name.rpartition("::")
    name, _, overload = name.partition(".")
    return getattr(getattr(getattr(torch.ops, space or "aten"), name, None), overload or "default", None)


def find_rule(target: Any) -> Rule | None:
    """The rule of an operator: its own, else that of the pointwise family, else None (default-deny)."""
    if not isinstance(target, OpOverload):
        return None
    if target in RULES:
        return RULES[target]
    return RULES[torch.ops.aten.mul.Tensor] if _is_pointwise(target) else None


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
