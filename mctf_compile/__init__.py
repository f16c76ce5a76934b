"""Token fusion for Vision Transformers, as a compiler pass.

``torch.compile(model, backend="mctf", options={"r": 16})`` needs no import of this package; what it
offers beside the backend is here.
"""

from mctf_compile.attach import attach
from mctf_compile.compiler import explain, rewrite
from mctf_compile.config import FusionConfig
from mctf_compile.dynamic import set_r
from mctf_compile.errors import ConfigError, MctfError, NothingFusedError, PassError
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
    Site,
    register_method,
)
from mctf_compile.report import BlockReport, Report

__all__ = [
    "METHODS", "Attached", "BlockReport", "Choice", "Combine", "ConfigError", "Count", "Evidence", "FusionConfig",
    "MctfError", "Merging", "Method", "Need", "NothingFusedError", "PassError", "Reads", "Report", "Site", "attach",
    "explain", "register_method", "rewrite", "set_r",
]
