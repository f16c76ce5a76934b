"""The reduction methods, by name. A method is one small description: see ``base.Method``."""

from mctf_compile.methods.base import METHODS, Choice, Evidence, Method, Site, get_method, register_method
from mctf_compile.methods import mctf  # registers itself

__all__ = ["METHODS", "Choice", "Evidence", "Method", "Site", "get_method", "mctf", "register_method"]
