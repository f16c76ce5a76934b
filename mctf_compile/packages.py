"""The packages that pictures need, which are not installed with this one."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What installs them all.
EXTRA = "pip install 'mctf-compile[pictures]'"


def figure_class() -> type[Figure]:
    """Matplotlib's figure that needs no display; raises ``ImportError``, naming what installs it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"a plot needs the package matplotlib; {EXTRA}") from error
    return Figure


def pillow(module: str = "Image") -> ModuleType:
    """A module of Pillow; raises ``ImportError``, naming what installs it."""
    try:
        return importlib.import_module(f"PIL.{module}")
    except ImportError as error:
        raise ImportError(f"a picture needs the package pillow; {EXTRA}") from error
