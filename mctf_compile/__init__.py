"""Token fusion for Vision Transformers, as a compiler pass.

``torch.compile(model, backend="mctf", options={"r": 16})`` needs no import of this package; what it
offers beside the backend is here.
"""

from mctf_compile.compiler import explain, rewrite
from mctf_compile.config import FusionConfig
from mctf_compile.errors import ConfigError, MctfError, NothingFusedError, PassError
from mctf_compile.methods import METHODS, Choice, Evidence, Method, Site, register_method
from mctf_compile.report import BlockReport, Report

__all__ = [
    "METHODS", "BlockReport", "Choice", "ConfigError", "Evidence", "FusionConfig", "MctfError", "Method",
    "NothingFusedError", "PassError", "Report", "Site", "explain", "register_method", "rewrite",
]
