"""The operator namespace ``torch.ops.mctf`` and the one way to put an operator in it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

LIBRARY = torch.library.Library("mctf", "DEF")


def composite(schema: str) -> Callable[[Callable], Callable]:
    """Register the decorated function as a composite operator with ``schema``.

    A composite operator (CompositeImplicitAutograd) is one node in a graph traced before dispatch, and
    opens up into ATen under AOTAutograd, so that Inductor fuses its parts with their neighbours. Its
    autograd and its fake kernel are those of the ATen operators that it calls.
    """

    def register(function: Callable) -> Callable:
        name = LIBRARY.define(schema)
        LIBRARY.impl(name, function, "CompositeImplicitAutograd")
        return function

    return register


def without_autocast(device: str) -> AbstractContextManager:
    """Autocast off, on a device that has it (``meta`` has none)."""
    available = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else nullcontext()


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sizes, scores and pooling weights beside tokens of ``dtype``: float32 or wider."""
    return torch.promote_types(dtype, torch.float32)
