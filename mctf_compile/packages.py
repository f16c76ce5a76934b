"""The packages that some of what is here needs, which are not installed with this one."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class MissingPackage(ImportError):
    """A package is not installed; the message is one line, and names what installs it."""


def required(module: str, what: str, install: str, package: str | None = None) -> ModuleType:
    """A module of another package; raises ``MissingPackage`` where it is missing.

    Args:
        module: its name.
        what: what needs it.
        install: what pip is to install.
        package: the name of the package, where it is not that of the module.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = package or module.partition(".")[0]
        raise MissingPackage(f"{what} needs the package {name}; pip install {install}") from error


def figure_class() -> type[Figure]:
    """Matplotlib's figure that needs no display; raises ``MissingPackage``."""
    figure: type[Figure] = required("matplotlib.figure", "a plot", "'mctf-compile[pictures]'").Figure
    return figure


def pillow(module: str = "Image") -> ModuleType:
    """A module of Pillow; raises ``MissingPackage``."""
    return required(f"PIL.{module}", "a picture", "'mctf-compile[pictures]'", "pillow")


def timm(module: str = "timm") -> ModuleType:
    """A module of timm; raises ``MissingPackage``."""
    return required(module, "a model that is given by its name", "'mctf-compile[models]'")
