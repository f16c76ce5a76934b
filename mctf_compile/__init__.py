"""Token fusion for Vision Transformers, as a compiler pass.

``torch.compile(model, backend="mctf", options={"r": 16})`` needs no import of this package; what it
offers beside the backend is here, and is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mctf_compile import models, pose, shiftadd, testing
    from mctf_compile.compiler import explain, rewrite
    from mctf_compile.config import FusionConfig
    from mctf_compile.dynamic import set_r
    from mctf_compile.errors import ConfigError, MctfError, NothingFusedError, PassError, cause_of
    from mctf_compile.exporting.graph_pass import MctfPass
    from mctf_compile.exporting.program import export
    from mctf_compile.methods import (
        METHODS,
        Attached,
        Choice,
        Combine,
        Count,
        Evidence,
        Merging,
        Method,
        Need,
        Reads,
        Relaxed,
        Removal,
        Site,
        register_method,
    )
    from mctf_compile.outputs import FusedTokens, fused_tokens
    from mctf_compile.pictures.drawing import Drawing, visualize
    from mctf_compile.provenance import BlockTrace, Trace, trace
    from mctf_compile.report import AtR, BlockReport, Report, Tradeoff
    from mctf_compile.training import losses
    from mctf_compile.training.attach import attach

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "AtR",
    "Attached",
    "BlockReport",
    "BlockTrace",
    "Choice",
    "Combine",
    "ConfigError",
    "Count",
    "Drawing",
    "Evidence",
    "FusedTokens",
    "FusionConfig",
    "MctfError",
    "MctfPass",
    "Merging",
    "Method",
    "Need",
    "NothingFusedError",
    "PassError",
    "Reads",
    "Relaxed",
    "Removal",
    "Report",
    "Site",
    "Trace",
    "Tradeoff",
    "__version__",
    "attach",
    "cause_of",
    "explain",
    "export",
    "fused_tokens",
    "losses",
    "models",
    "pose",
    "register_method",
    "rewrite",
    "set_r",
    "shiftadd",
    "testing",
    "trace",
    "visualize",
]

# The module that each name comes from, where that is not ``methods``.
_HOMES = {
    "compiler": ("explain", "rewrite"),
    "config": ("FusionConfig",),
    "dynamic": ("set_r",),
    "errors": ("ConfigError", "MctfError", "NothingFusedError", "PassError", "cause_of"),
    "exporting.graph_pass": ("MctfPass",),
    "exporting.program": ("export",),
    "outputs": ("FusedTokens", "fused_tokens"),
    "pictures.drawing": ("Drawing", "visualize"),
    "provenance": ("BlockTrace", "Trace", "trace"),
    "report": ("AtR", "BlockReport", "Report", "Tradeoff"),
    "training.attach": ("attach",),
}
# Modules that are names of their own.
_MODULES = {
    "losses": "training.losses",
    "models": "models",
    "pose": "pose",
    "shiftadd": "shiftadd",
    "testing": "testing",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{_MODULES[name]}")
    home = next((module for module, names in _HOMES.items() if name in names), "methods")
    globals()[name] = value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
