"""What a kernel's launch depends on, apart from its shapes. Imports torch alone."""

from typing import NamedTuple

import torch


class Launch(NamedTuple):
    """Rows and columns of the tile that one program works on, its warps and the stages of its loop."""

    rows: int
    columns: int
    warps: int
    stages: int


def architecture(device: torch.device) -> str:
    """``"sm_80"``, ``"sm_90"``, ``"gfx942"``, ...; ``"sm_80"`` for a device that is not there."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "sm_80"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def dot_precision(arch: str) -> str:
    """How products of float32 tiles are computed; like ``torch.matmul``, in TF32 only where the user allows it.

    That is ``torch.set_float32_matmul_precision`` or ``torch.backends.cuda.matmul``. Else in float32 on AMD,
    and on NVIDIA, whose matrix units have none, as three TF32 products of the upper and lower halves, which
    leave out 2**-22 of each product.
    """
    if arch.startswith("gfx"):
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"
