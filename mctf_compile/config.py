"""The options of ``torch.compile(model, backend="mctf", options={...})``, validated."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from mctf_compile.errors import ConfigError
from mctf_compile.methods import get_method
from mctf_compile.schedule import Schedule, parse_r

CHOICES = {
    "attention": ("approx", "exact", "current"),
    "matching": ("bidirectional", "one_way"),
    "pooling": ("attention", "size", "mean", "max"),
    "inner": ("inductor", "aot_eager", "eager"),
    "kernels": ("auto", "triton", "aten"),
}


@dataclass(frozen=True)
class FusionConfig:
    """How tokens are fused and what compiles the result.

    Attributes:
        method: reduction method, by registry name.
        r: tokens removed per block: int, ratio < 1 of the unprotected tokens, list with one entry per
            block, ``(r, inflection)`` or a preset name (``"fast"``).
        layers: blocks (0-based) that fuse; None for the method's default (MCTF: all but block 0).
        attention: MCTF's use of attention: ``approx`` (one step ahead, pooled map), ``exact``
            (one step ahead, recomputed on the fused tokens), ``current`` (the block's own map).
        matching: ``bidirectional`` or ``one_way``.
        pooling: weights of the tokens that are fused: ``attention`` (informativeness times size),
            ``size``, ``mean``; or ``max``.
        tau_sim, tau_info, tau_size: temperatures of the criteria; 0 turns a criterion off.
        proportional: add log size to the logits of attention over fused tokens.
        protected: number of prefix tokens never removed; ``"auto"`` reads it off the graph.
        min_tokens: no block leaves fewer tokens than this (protected ones included).
        inner: what compiles the rewritten graph.
        inductor: patches for the Inductor config; the key ``"mode"`` names an Inductor mode.
        kernels: ``auto``, ``triton`` or ``aten``.
        strict: raise where nothing could be fused.
    """

    method: str = "mctf"
    r: int | float | list | tuple | str = 16
    layers: tuple[int, ...] | None = None
    attention: str = "approx"
    matching: str = "bidirectional"
    pooling: str = "attention"
    tau_sim: float = 1.0
    tau_info: float = 20.0
    tau_size: float = 40.0
    proportional: bool = True
    protected: int | str = "auto"
    min_tokens: int = 10
    inner: str = "inductor"
    inductor: Mapping[str, Any] = field(default_factory=dict)
    kernels: str = "auto"
    strict: bool = False
    schedule: Schedule = field(init=False, repr=False)

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None = None, mode: str | None = None) -> FusionConfig:
        """The config for ``torch.compile``'s options and mode; raises ``ConfigError``."""
        options = dict(options or {})
        known = [f.name for f in fields(cls) if f.init]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, 1, 0.5)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ConfigError(f"unknown option {name!r}; {hint}The options are: {', '.join(known)}.")
        if mode is not None:
            inductor = options.get("inductor", {})
            if "mode" in inductor and inductor["mode"] != mode:
                raise ConfigError(f"mode={mode!r} and options['inductor']['mode']={inductor['mode']!r} disagree.")
            options["inductor"] = {**inductor, "mode": mode}
        return cls(**options)

    def __post_init__(self) -> None:
        get_method(self.method)
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                near = difflib.get_close_matches(str(value), allowed, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ConfigError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}{hint}")
        for name in ("tau_sim", "tau_info", "tau_size"):
            self._number(name, "a number >= 0; 0 turns the criterion off")
        for name in ("proportional", "strict"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be True or False.")
        self._whole("min_tokens", 1)
        if self.protected != "auto":
            self._whole("protected", 0)
        self._set("layers", self._layers())
        self._set("inductor", self._inductor())
        if self.kernels == "triton":
            raise ConfigError("kernels='triton' is not available in this version; use 'auto' or 'aten'.")
        self._set("schedule", parse_r(self.r))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _number(self, name: str, expected: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise ConfigError(f"{name}={value!r} must be {expected}.")

    def _whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            auto = " or 'auto'" if name == "protected" else ""
            raise ConfigError(f"{name}={value!r} must be a whole number >= {least}{auto}.")

    def _layers(self) -> tuple[int, ...] | None:
        if self.layers is None:
            return None
        layers = self.layers
        whole = isinstance(layers, (list, tuple, range, set)) and all(
            isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in layers
        )
        if not whole:
            raise ConfigError(f"layers={layers!r} must be a list of block numbers >= 0, or None.")
        return tuple(sorted(set(layers)))

    def _inductor(self) -> dict[str, Any]:
        if not isinstance(self.inductor, Mapping) or not all(isinstance(k, str) for k in self.inductor):
            raise ConfigError(f"inductor={self.inductor!r} must be a dict of Inductor config patches.")
        if self.inductor and self.inner != "inductor":
            raise ConfigError(f"inductor={dict(self.inductor)!r} has no effect with inner={self.inner!r}.")
        if self.inductor:
            _check_inductor(self.inductor)
        return dict(self.inductor)


def _check_inductor(patches: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` for a mode or a patch that Inductor does not know."""
    from torch import _inductor

    modes, known = _inductor.list_mode_options(), _inductor.config.get_config_copy()
    for name, value in patches.items():
        allowed = modes if name == "mode" else known
        asked = value if name == "mode" else name
        if asked not in allowed:
            near = difflib.get_close_matches(str(asked), allowed, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            kind = "mode" if name == "mode" else "config entry"
            raise ConfigError(f"inductor: {asked!r} is no Inductor {kind}{hint}")

