"""What is evaluated: the dense model, options of your own, and a sweep over each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mctf_compile.compiler import explain
from mctf_compile.config import FusionConfig
from mctf_compile.errors import ConfigError, MctfError
from mctf_compile.evaluating.images import Images
from mctf_compile.methods import METHODS, get_method

DENSE, NONE = "dense", "none"

# Of the tokens that enter the model, the part that a method which removes r per block is asked to remove in all.
BY_COUNT = [{"removed": part} for part in (0.2, 0.4, 0.6, 0.8, 1.0)]
PARTS_KEPT = (0.9, 0.8, 0.7, 0.6, 0.5)

# What is tried of each method; none of them needs training. The key "removed" becomes an r, see `sweep`.
SWEEPS: dict[str, list[dict[str, Any]]] = {
    "mctf": BY_COUNT,
    "tome": BY_COUNT,
    "tofu": BY_COUNT,
    "pitome": BY_COUNT,
    "random": BY_COUNT,
    "evit": [{"keep_rate": part} for part in PARTS_KEPT],
    "idlevit": [{"keep_ratio": part} for part in PARTS_KEPT],
    NONE: [{}],
}


@dataclass(frozen=True)
class Setting:
    """A method with options of its own; ``label`` names it in tables and is unlike any other's."""

    method: str
    options: dict[str, Any]
    label: str

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Setting:
        """The setting of some options of the backend, valid ones; their method comes first in the label."""
        method = str(options.get("method", FusionConfig.from_options(options).method.name))
        rest = {name: value for name, value in options.items() if name != "method"}
        return cls(method, rest, " ".join([method, *(f"{name}={value}" for name, value in rest.items())]))

    @property
    def every_option(self) -> dict[str, Any]:
        return {**self.options, "method": self.method}


def chosen_methods(names: Sequence[str] | None = None) -> list[str]:
    """The methods to sweep over: those named, else all of ``SWEEPS`` that are registered.

    Raises ``ConfigError`` for an unknown method and for one without a sweep.
    """
    if names is None:
        return [name for name in SWEEPS if name in METHODS]
    for name in names:
        get_method(name)
        if name not in SWEEPS:
            raise ConfigError(f"no settings of {name!r} are known to compare; there are for: {', '.join(SWEEPS)}.")
    return list(dict.fromkeys(names))


def sweep(method: str, tokens: int, depth: int) -> list[Setting]:
    """The settings of a method of ``SWEEPS`` that suit a model of ``depth`` blocks over ``tokens`` tokens."""
    settings: list[Setting] = []
    for entry in SWEEPS[method]:
        options = dict(entry)
        if "removed" in options:
            options["r"] = max(round(options.pop("removed") * tokens / depth), 1)
        setting = Setting.of({**options, "method": method})
        # In a small model two parts may round to the same r.
        if setting not in settings:
            settings.append(setting)
    return settings


def sweeps(model: nn.Module, images: Images, methods: Sequence[str] | None = None) -> list[Setting]:
    """The settings of several methods for a model.

    Args:
        model: in eval mode.
        images: [N, C, H, W]; the first one is used.
        methods: as for ``chosen_methods``.

    Raises:
        ConfigError: a method is unknown, or has no sweep.
        MctfError: the model has no tokens to reduce.
    """
    names = chosen_methods(methods)
    with torch.no_grad():
        report = explain(model, images[:1], r=0)
    tokens = [block.tokens_in for block in report.blocks if block.tokens_in is not None]
    if not tokens:
        raise MctfError(f"there is nothing to compare: {report.reason}")
    return [setting for name in names for setting in sweep(name, max(tokens), len(tokens))]
