"""What a rule sees of an operator: its call in the original program, and the same on fused tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, fx

from mctf_compile.narrowing import operator_of
from mctf_compile.passes.axes import AxisTable, Dim, Dims, Place, Tokens

# The arguments of a call, by the names of the operator's schema.
Arguments = dict[str, Any]


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


class Operand(Protocol):
    """A tensor of the rewritten program, with its axes.

    ``generation``: how many times its tokens were fused. ``weights_dim``: the dimension along which it holds attention
    weights, each that of all copies of a token together.
    """

    @property
    def tensor(self) -> Tensor: ...
    @property
    def dims(self) -> Dims: ...
    @property
    def generation(self) -> int: ...
    @property
    def weights_dim(self) -> int | None: ...


V = TypeVar("V", bound=Operand)


class Fused(Protocol[V]):
    """One operator on fused tokens; its operands are in the youngest generation among them."""

    node: fx.Node
    call: Call
    args: dict[str, Any]
    target: Any
    packet: Any

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the (first) result."""

    @property
    def tokens(self) -> Tokens:
        """The token axis that is fused."""

    @property
    def relaxed(self) -> bool:
        """Whether all tokens stay, and count by fractions, as in training."""

    @property
    def conserves(self) -> bool:
        """Whether the sizes add up to the number of original tokens."""

    @property
    def operand(self) -> str:
        """The name of the first tensor argument."""

    # Operands.

    def operand_value(self, node: fx.Node, summed: int | None = None) -> V:
        """The value of a node on the tokens of this call.

        Along ``summed``, over which it is contracted, tokens that were fused since it was made have their sum.
        """

    def value(self, name: str) -> V:
        """A tensor argument on the tokens of this call."""

    def intensive(self, name: str) -> V:
        """A tensor argument, attention weights turned into those of one copy of each token."""

    def dims(self, name: str) -> Dims:
        """The dims of an argument."""

    def wrapped(self, name: str) -> int:
        """A dimension argument as a non-negative number."""

    def dense_count(self, name: str, dims: set[int]) -> Any:
        """The number of original positions in some dimensions of an argument."""

    # Where tokens and images are.

    def places_of(self, node: fx.Node) -> list[Place]:
        """Every place of the token axis in a node."""

    def place(self, name: str, dim: int) -> Place:
        """The place of the token axis at one dimension of an argument, where it is whole."""

    def place_in(self, value: V, dim: int) -> Place:
        """The place of the token axis at one dimension of a value, where it is whole."""

    def places_in(self, value: V) -> list[Place]:
        """Every place of the token axis in a value."""

    def only_place(self, value: V) -> Place:
        """The one place of the token axis in a value."""

    def image_dims(self, value: V) -> list[int]:
        """The dimensions of a value that number the images, alone or with other axes."""

    # Sizes.

    def size(self, place: Place) -> Tensor:
        """[B, M] sizes of the tokens at a place."""

    def log_sizes(self, place: Place, dtype: torch.dtype = ...) -> Tensor | None:
        """[B, M] log sizes of the tokens at a place, in ``dtype`` or wider; None where sizes count for nothing."""

    def factor(self, per_token: Tensor, value: V, place: Place) -> Tensor:
        """[B, M] numbers of the tokens at a place of a value, as a factor for it."""

    def sizes(self, value: V, place: Place) -> Tensor:
        """The sizes of the tokens at a place of a value, as a factor for it."""

    def weighted(self, value: V, place: Place) -> V:
        """A value times the sizes of its tokens."""

    def as_integers(self, size: Tensor) -> Tensor:
        """Sizes as whole numbers."""

    def to_itself(self, place: Place) -> bool:
        """Whether a token at a place counts for itself alone, as dropped ones do in training."""

    # Results.

    def out_dims(self) -> list[Dims]:
        """The dims of each result."""

    def emit(self) -> Any:
        """Run the operator as it is, with the sizes among its arguments shrunk."""

    def original(self) -> V:
        """What the original program computes, where no value of the operands is read."""

    def by_place(self, name: str, function: Callable[[Tensor], Tensor]) -> V:
        """What ``function`` makes of the original tokens of an argument, fused as those are."""

    def result(self, tensor: Tensor, weights_dim: int | None = None, index: int = 0) -> V:
        """A tensor as the value of this call; ``index``: which of several results it is."""
