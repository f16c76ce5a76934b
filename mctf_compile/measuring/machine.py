"""What a measurement ran on. No names of hosts, users or folders: results are published."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "timm", "numpy", "onnxruntime", "openvino", "mctf-compile")


def machine(device: str = "cpu") -> dict[str, Any]:
    """The machine and what is installed on it, as plain values for JSON.

    ``threads``: of this process. ``load``: the mean number of processes that wanted to run over the last minute, before
    this measurement; more than this process's threads beside it make times worthless. What cannot be found
    out is None.
    """
    found = {
        "cpu": cpu_model(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": memory_gib(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "compiler": compiler(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }
    if device == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two descriptions are of the same hardware and software, whatever else was going on."""
    passing = {"load", "threads"}
    return {k: v for k, v in one.items() if k not in passing} == {k: v for k, v in other.items() if k not in passing}


def cpu_model() -> str | None:
    """The CPU's name, as the system gives it."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.exists() else None
    return named[1].strip() if named else platform.processor() or None


def memory_gib() -> float | None:
    """The machine's memory in GiB, or None where the system does not tell."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def compiler() -> str | None:
    """Name and version of the C++ compiler that Inductor uses, as "g++ 12.2.0"."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        path = get_cpp_compiler()
        number = subprocess.run([path, "-dumpfullversion"], capture_output=True, text=True, timeout=60, check=True)
    except Exception:
        return None
    return f"{Path(path).name} {number.stdout.strip()}"


def version(package: str) -> str | None:
    """The version of an installed package, or None for one that is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
