"""The operator namespace ``torch.ops.mctf`` and the ways to put an operator in it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("mctf", "DEF")

# Whether composite operators answer with empty results of the right shape: see ``shapes_alone``.
_shapes_alone = False


def composite(schema: str, shapes: Callable | None = None) -> Callable[[Callable], Callable]:
    """Register the decorated function as a composite operator with ``schema``.

    A composite operator (CompositeImplicitAutograd) is one node in a graph traced before dispatch, and
    opens up into ATen under AOTAutograd, so that Inductor fuses its parts with their neighbours. Its
    autograd and its fake kernel are those of the ATen operators that it calls.

    ``shapes``: from the same arguments, empty tensors of the shapes and dtypes of the results, under autocast too. A
    rewrite is traced with those, in a tenth of the time.
    """

    def register(function: Callable) -> Callable:
        def run(*args: Any) -> Any:
            return shapes(*args) if _shapes_alone else function(*args)

        name = LIBRARY.define(schema)
        LIBRARY.impl(name, run if shapes else function, "CompositeImplicitAutograd")
        return function

    return register


def opaque(schema: str, shapes: Callable) -> Callable[[Callable], Callable]:
    """Register the decorated function as an operator that stays one call whatever compiles the graph.

    It has no gradient. ``shapes``: as for ``composite``.
    """

    def register(function: Callable) -> Callable:
        name = LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"mctf::{name}", shapes, lib=LIBRARY)
        return function

    return register


def declare(schema: str) -> Callable[[Callable], Callable]:
    """Declare an operator that is implemented elsewhere; the decorated function gives the shapes of its results.

    It takes operands of any strides, which a compiler would else copy to have those that they were traced with.
    """

    def register(shapes: Callable) -> Callable:
        name = LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
        torch.library.register_fake(f"mctf::{name}", shapes, lib=LIBRARY)
        return shapes

    return register


@cache
def sources_digest() -> str:
    """A digest of the operators' sources: what was compiled of others is not of use."""
    files = sorted(path for path in Path(__file__).parent.rglob("*") if path.suffix in (".py", ".cpp", ".h"))
    return sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Within it composite operators compute no results, only their shapes and dtypes."""
    global _shapes_alone
    before, _shapes_alone = _shapes_alone, True
    try:
        yield
    finally:
        _shapes_alone = before


def resized(x: Tensor, dim: int, size: int) -> Tensor:
    """An empty tensor like ``x`` with another size at ``dim``."""
    return x.new_empty([*x.shape[:dim], size, *x.shape[dim + 1 :]])


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast gives ``x`` as an operand of a product; its own where autocast is off."""
    device = x.device.type
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if enabled and x.dtype is not torch.float64 else x.dtype


def without_autocast(device: str) -> AbstractContextManager:
    """Autocast off, on a device that has it (``meta`` has none)."""
    available = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else nullcontext()


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sizes, scores and pooling weights beside tokens of ``dtype``: float32 or wider."""
    return torch.promote_types(dtype, torch.float32)
