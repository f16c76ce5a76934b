"""Triton's interpreter, corrected where it differs from a device, and memory that shows what was never written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

builder = interpreter.InterpreterBuilder


@triton.jit
def nothing():
    pass


# Before the kernels are imported: torch 2.11 wraps none of the interpreter's, which later versions leave as they are.
try:
    torch.library.wrap_triton(nothing)
except RuntimeError:
    torch.library.wrap_triton = lambda kernel: kernel


def widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrowed(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16).view(torch.uint16).numpy()


def dot(self: Any, a: Any, b: Any, *rest: Any, _dot: Callable = builder.create_dot) -> Any:
    """The interpreter multiplies the bits of bfloat16 as if they were integers."""
    a, b = (
        interpreter.TensorHandle(widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)
    )
    return _dot(self, a, b, *rest)


def cast(self: Any, src: Any, to: Any, _cast: Callable = builder.cast_impl) -> Any:
    """The interpreter cuts off the bits that bfloat16 lacks, and takes integers for bits; devices round to nearest."""
    if to.scalar == tl.bfloat16 and src.dtype.scalar != tl.bfloat16:
        return interpreter.TensorHandle(narrowed(src.data.astype(np.float32)), tl.bfloat16)
    return _cast(self, src, to)


@pytest.fixture(autouse=True, scope="session")
def device_arithmetic() -> None:
    builder.create_dot = dot
    builder.create_fp_trunc = builder.cast_impl = cast


def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate_and_fill(*args: Any, **kwargs: Any) -> Tensor:
        out = allocate(*args, **kwargs)
        if out.dtype is torch.bool:
            return out.fill_(True)
        return out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).max // 2)

    return allocate_and_fill


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the launchers allocate holds NaN, or positions that no tensor has, until a kernel writes it."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty"), (torch, "empty_strided")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
