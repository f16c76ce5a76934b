"""The operator namespace ``torch.ops.mctf`` and the ways to put an operator in it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

F = TypeVar("F", bound=Callable[..., Any])

LIBRARY = torch.library.Library("mctf", "DEF")

# Operators of the same names and arguments whose results are empty, and what each of them stands for.
_SHAPES = torch.library.Library("mctf_shapes", "DEF")
_stand_ins: dict[Callable[..., Any], OpOverload] = {}
_originals: dict[OpOverload, OpOverload] = {}

# Multiply-accumulates, of the operators that say how many theirs are.
_macs: dict[OpOverload, Callable[..., int]] = {}


def composite(
    schema: str, shapes: Callable[..., Any] | None = None, macs: Callable[..., int] | None = None
) -> Callable[[F], F]:
    """Register the decorated function as a composite operator with ``schema``.

    A composite operator (CompositeImplicitAutograd) is one node in a graph traced before dispatch, and
    opens up into ATen under AOTAutograd, so that Inductor fuses its parts with their neighbours. Its
    autograd and its fake kernel are those of the ATen operators that it calls.

    ``shapes``: what programs are traced with, in a tenth of the time: see ``stand_in``. ``macs``: the
    multiply-accumulates of the products that it calls, from the same arguments; with ``shapes`` alone it calls none.
    """

    def register(function: F) -> F:
        name = LIBRARY.define(schema)
        LIBRARY.impl(name, function, "CompositeImplicitAutograd")
        operator = getattr(torch.ops.mctf, name).default
        if shapes is not None:
            stand_in(operator)(shapes)
            _macs[operator] = macs or _no_macs
        return function

    return register


def _no_macs(*_: object) -> int:
    return 0


def opaque(schema: str, shapes: Callable[..., Any], macs: Callable[..., int] | None = None) -> Callable[[F], F]:
    """Register the decorated function as an operator that stays one call whatever compiles the graph.

    It has no gradient. ``shapes``: from the same arguments, empty tensors of the shapes and dtypes of the results;
    ``macs``: its multiply-accumulates, where it has any.
    """

    def register(function: F) -> F:
        name = LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"mctf::{name}", shapes, lib=LIBRARY)
        _macs[getattr(torch.ops.mctf, name).default] = macs or _no_macs
        return function

    return register


def declare(schema: str) -> Callable[[F], F]:
    """Declare an operator that is implemented elsewhere; the decorated function gives the shapes of its results.

    It takes operands of any strides, which a compiler would else copy to have those that they were traced with.
    """

    def register(shapes: F) -> F:
        name = LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
        torch.library.register_fake(f"mctf::{name}", shapes, lib=LIBRARY)
        return shapes

    return register


def stand_in(operator: OpOverload, *functions: Callable[..., Any]) -> Callable[[F], F]:
    """Within ``ShapesAlone`` the decorated function answers for ``operator``, and for ``functions`` that call it.

    It gives, from the same arguments, empty tensors of the shapes and dtypes of the results, under autocast too.
    """

    def register(shapes: F) -> F:
        name = _SHAPES.define(str(operator._schema).partition("::")[2])
        _SHAPES.impl(name, shapes, "CompositeImplicitAutograd")
        standing = getattr(torch.ops.mctf_shapes, name).default
        _stand_ins.update(dict.fromkeys((operator, operator.overloadpacket, *functions), standing))
        _originals[standing] = operator
        return shapes

    return register


class ShapesAlone(TorchFunctionMode):
    """Within it operators that have a stand-in compute no results, only their shapes and dtypes: in this thread alone.

    What is traced then calls the stand-ins: ``original`` says for which operators. Subclasses that hold tensors have
    operators of their own.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _stand_ins and not any(map(is_traceable_wrapper_subclass, args)):
            func = _stand_ins[func]
        return func(*args, **(kwargs or {}))


def original(target: Any) -> OpOverload | None:
    """The operator that ``target`` stands for, where it is a stand-in."""
    return _originals.get(target)


def says_macs(target: Any) -> bool:
    """Whether ``macs_of`` knows an operator: what it multiplies is then not to be found by running it."""
    return target in _macs


def macs_of(operator: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """The multiply-accumulates of a call of an operator that says how many; of symbolic sizes an expression."""
    rest = operator._schema.arguments[len(args) :]
    return _macs[operator](*args, *(kwargs.get(argument.name, argument.default_value) for argument in rest))


def shapes_of(operator: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Empty results of a call of an operator, computing as little as can be."""
    return _stand_ins.get(operator, operator)(*args, **kwargs)


@cache
def sources_digest() -> str:
    """A digest of the operators' sources: what was compiled of others is not of use."""
    files = sorted(path for path in Path(__file__).parent.rglob("*") if path.suffix in (".py", ".cpp", ".h"))
    return sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def resized(x: Tensor, dim: int, size: int) -> Tensor:
    """An empty tensor like ``x`` with another size at ``dim``."""
    return x.new_empty([*x.shape[:dim], size, *x.shape[dim + 1 :]])


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast gives ``x`` as an operand of a product; its own where autocast is off."""
    device = x.device.type
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    cast = enabled and x.is_floating_point() and x.dtype is not torch.float64
    return torch.get_autocast_dtype(device) if cast else x.dtype


def without_autocast() -> AbstractContextManager[Any]:
    """Autocast off, on every device; a graph that is traced says nothing of it."""
    return torch._C._DisableAutocast()


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sizes, scores and pooling weights beside tokens of ``dtype``: float32 or wider."""
    return torch.promote_types(dtype, torch.float32)
