"""C++ kernels: built once on each machine with the compiler that Inductor uses, and kept in Inductor's cache."""

from __future__ import annotations

import functools
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path

HERE = Path(__file__).parent
# One translation unit: most of the time goes into PyTorch's headers.
SOURCES = ("cpp.h", "attention/attention.cpp", "matching/match.cpp", "pooling/pooling.cpp", "shift/shift.cpp")
# The kernels are written for multiply-adds, which Inductor's flags leave out.
FLAGS = ("-ffp-contract=fast",)


@functools.cache
def building() -> Future[str | None]:
    """What ``problem`` will say; the compiler runs beside the caller."""
    # Imported here: two threads that import one package may each see half of it.
    import torch._inductor.codecache  # noqa: F401

    import mctf_compile.kernels.on_cpu  # noqa: F401  declares the operators

    executor = ThreadPoolExecutor(1, "mctf-build")
    try:
        # Inductor's configuration, the compiler among it, is each thread's own.
        return executor.submit(copy_context().run, _build)
    finally:
        executor.shutdown(wait=False)


def problem() -> str | None:
    """Why C++ kernels cannot run here, or None: then they have been built, and ``torch.ops.mctf.*_cpp`` run."""
    return building().result()


def _build() -> str | None:
    from torch._inductor.codecache import CppCodeCache

    try:
        CppCodeCache.load("\n".join((HERE / name).read_text() for name in SOURCES), extra_flags=FLAGS)
    except Exception as error:
        # An error without a message is told by its name.
        return f"the C++ kernels do not build: {(str(error).strip() or repr(error)).splitlines()[0]}"
    return None
