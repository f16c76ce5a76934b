"""C++ kernels: built once on each machine with the compiler that Inductor uses, and kept in Inductor's cache."""

from __future__ import annotations

import functools
from pathlib import Path

HERE = Path(__file__).parent
# One translation unit: most of the time goes into PyTorch's headers.
SOURCES = ("cpp.h", "attention/attention.cpp", "matching/match.cpp", "pooling/pooling.cpp")
# The kernels are written for multiply-adds, which Inductor's flags leave out.
FLAGS = ("-ffp-contract=fast",)


@functools.cache
def problem() -> str | None:
    """Why C++ kernels cannot run here, or None: then they have been built, and ``torch.ops.mctf.*_cpp`` run."""
    from torch._inductor.codecache import CppCodeCache

    import mctf_compile.kernels.on_cpu  # noqa: F401  declares the operators

    try:
        CppCodeCache.load("\n".join((HERE / name).read_text() for name in SOURCES), extra_flags=FLAGS)
    except Exception as error:
        # An error without a message is told by its name.
        return f"the C++ kernels do not build: {(str(error).strip() or repr(error)).splitlines()[0]}"
    return None
