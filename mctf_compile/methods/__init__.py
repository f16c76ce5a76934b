"""The reduction methods, by name. A method is one small description: see ``base.Method``."""

from mctf_compile.methods import (  # register themselves
    controls,
    dtem,
    dynamicvit,
    evit,
    idlevit,
    mctf,
    pitome,
    tofu,
    tome,
)
from mctf_compile.methods.attached import Attached
from mctf_compile.methods.base import (
    METHODS,
    Choice,
    Combine,
    Count,
    Evidence,
    Merging,
    Method,
    Need,
    Reads,
    Relaxed,
    Site,
    Tiles,
    get_method,
    register_method,
)
from mctf_compile.options.schedule import Removal

__all__ = [
    "METHODS",
    "Attached",
    "Choice",
    "Combine",
    "Count",
    "Evidence",
    "Merging",
    "Method",
    "Need",
    "Reads",
    "Relaxed",
    "Removal",
    "Site",
    "Tiles",
    "controls",
    "dtem",
    "dynamicvit",
    "evit",
    "get_method",
    "idlevit",
    "mctf",
    "pitome",
    "register_method",
    "tofu",
    "tome",
]
