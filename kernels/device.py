"""What is known of each kind of device, and what a launch depends on beside its shapes. Imports torch alone."""

from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class Device:
    """A kind of device, as far as a graph is compiled in another way for it.

    Attributes:
        kernels: the families of kernels that are written for it, first the one to take; ATen runs everywhere.
        macs, bytes, calls: orders of magnitude of what it does in a second: multiply-accumulates, bytes of memory
            read or written, calls of operators.
        by_thread: whether ``macs`` and ``bytes`` are those of one CPU thread.
        copies_biases: whether a float32 product copies its bias over the whole result before.
        packs_weights: whether it is the one that oneDNN has products for, of weights laid out once.
        recorder: the Inductor option under which its launches are recorded, with the addresses that they have then.
    """

    kernels: tuple[str, ...] = ()
    macs: float = 4e10
    bytes: float = 1e10
    calls: float = 2e5
    by_thread: bool = False
    copies_biases: bool = False
    packs_weights: bool = False
    recorder: str | None = None

    @property
    def threads(self) -> int:
        """How many times ``macs`` and ``bytes`` it does in a second."""
        return torch.get_num_threads() if self.by_thread else 1


# A CPU thread with AVX2 or AVX-512 in float32; data-centre GPUs in bfloat16.
DEVICES = {
    "cpu": Device(("cpp",), by_thread=True, copies_biases=True, packs_weights=True),
    "cuda": Device(("triton",), 2e14, 2e12, recorder="triton.cudagraphs"),
    "xpu": Device(("triton",), 1e14, 1e12),
}
_OTHER = Device()


def device_of(device: torch.device) -> Device:
    """The record of a device's kind; one without kernels for a kind that has none."""
    return DEVICES.get(device.type, _OTHER)


class Launch(NamedTuple):
    """Rows and columns of the tile that one program works on, its warps and the stages of its loop."""

    rows: int
    columns: int
    warps: int
    stages: int


def architecture(device: torch.device) -> str:
    """``"sm_80"``, ``"sm_90"``, ``"gfx942"``, ``"xpu"``, ...; ``"sm_80"`` for a device that is not there."""
    if device.type == "xpu":
        return "xpu"
    if device.type != "cuda" or not torch.cuda.is_available():
        return "sm_80"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def dot_precision(arch: str) -> str:
    """How products of float32 tiles are computed; like ``torch.matmul``, in TF32 only where the user allows it.

    That is ``torch.set_float32_matmul_precision`` or ``torch.backends.cuda.matmul``. Else in float32 on AMD and
    Intel, and on NVIDIA, whose matrix units have none, as three TF32 products of the upper and lower halves, which
    leave out 2**-22 of each product.
    """
    if not arch.startswith("sm"):
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"
