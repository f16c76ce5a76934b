"""Compiling what a launcher launches, for a device that is not there."""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

# Shared memory that one program may have, in bytes: CUDA C++ programming guide, table of compute
# capabilities; CDNA 3 instruction set architecture, section on local data share.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
OPTIONS = ("num_warps", "num_stages")
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Launched:
    """One launch: a kernel, its arguments by name, and its options."""

    kernel: triton.JITFunction
    arguments: dict[str, Any]
    options: dict[str, int]

    def __str__(self) -> str:
        tile = {name: self.arguments[name] for name in self.arguments if name.startswith("B") and name.isupper()}
        return f"{self.kernel.fn.__name__} {tile} {self.options}"

    @property
    def key(self) -> str:
        """Two launches with one key compile to the same code."""
        signature, constants, attributes = self.source()
        return repr((self.kernel.fn.__name__, signature, constants, attributes, self.options))

    def source(self) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list]]:
        """Types, constants, and what is known of the values, as the just-in-time compiler takes them."""
        signature, constants, attributes = {}, {}, {}
        for position, parameter in enumerate(self.kernel.params):
            value, name = self.arguments[parameter.name], parameter.name
            known = not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (known and isinstance(value, int) and value == 1):
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, Tensor):
                signature[name] = TYPES[value.dtype]
                attributes[(position,)] = [["tt.divisibility", 16]]
            elif isinstance(value, int):
                signature[name] = "i32" if abs(value) < 2**31 else "i64"
                if known and value % 16 == 0:
                    attributes[(position,)] = [["tt.divisibility", 16]]
            else:
                signature[name] = "fp32"
        return signature, constants, attributes

    def compile(self, target: GPUTarget) -> CompiledKernel:
        return triton.compile(ASTSource(self.kernel, *self.source()), target=target, options=self.options)


@contextmanager
def recorded(*modules: ModuleType, arch: str) -> Iterator[list[Launched]]:
    """Within it the launchers of ``modules`` launch nothing, for ``arch``; what they would have is in the list."""
    launches: list[Launched] = []

    def note(kernel: triton.JITFunction, *args: Any, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        bound = inspect.signature(kernel.fn).bind(*args, **kwargs)
        bound.apply_defaults()
        launches.append(Launched(kernel, dict(bound.arguments), options))

    class Wrapped(NamedTuple):
        kernel: triton.JITFunction

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return partial(note, self.kernel)

    with mock.patch.multiple("torch.cuda", is_available=lambda: False):
        patches = [mock.patch.object(m, "wrap_triton", Wrapped) for m in modules if hasattr(m, "wrap_triton")]
        patches += [mock.patch.object(m, "architecture", lambda _: arch) for m in modules if hasattr(m, "architecture")]
        for patch in patches:
            patch.start()
        try:
            yield launches
        finally:
            for patch in patches:
                patch.stop()


def spilled(compiled: CompiledKernel) -> int:
    """Bytes of local memory per thread, or on AMD spilled registers: what does not fit the registers goes there."""
    if "cubin" in compiled.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, check=True, text=True)
        (counts,) = re.findall(r"STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage.stdout)
    else:
        counts = re.findall(r"\.vgpr_spill_count: +(\d+)", compiled.asm["amdgcn"])
    return sum(map(int, counts))
