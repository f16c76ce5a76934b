"""The options of ``torch.compile(model, backend="mctf", options={...})``, validated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mctf_compile.errors import ConfigError
from mctf_compile.methods import METHODS, Merging, Method, get_method
from mctf_compile.options.fields import Options, flag, hint, nearest, one_of, option
from mctf_compile.options.schedule import AUTO, LATENCY


def _patches(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
        raise ConfigError(f"{name}={value!r} must be a dict of Inductor config patches.")
    if value:
        _check_inductor(value)
    return dict(value)


@dataclass(frozen=True)
class Lowering(Options):
    """What becomes of the rewritten graph; the options that no method changes.

    Options:
        inner: what compiles it: ``inductor``, ``aot_eager`` or ``eager``.
        inductor: patches for the Inductor config; the key ``"mode"`` names an Inductor mode.
        kernels: what runs the fused operators: ``triton``, ``cpp``, ``aten``, or ``auto``: Triton on CUDA, C++ on a
            CPU, each where it can run.
        strict: raise where nothing could be fused.
        dynamic_r: let ``mctf_compile.set_r`` change ``r`` between calls without compiling again.
        profit: what becomes of a block where fusing takes longer than it saves: ``model`` and ``measure`` leave it
            dense, by an estimate or by running the model when it is compiled; ``off`` fuses it all the same.
    """

    inner: str = option("inductor", one_of("inductor", "aot_eager", "eager"))
    inductor: Mapping[str, Any] = field(default_factory=dict, metadata={"check": _patches})
    kernels: str = option("auto", one_of("auto", "triton", "cpp", "aten"))
    strict: bool = option(False, flag)
    dynamic_r: bool = option(False, flag)
    profit: str = option("off", one_of("off", "model", "measure"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inductor and self.inner != "inductor":
            raise ConfigError(f"inductor={dict(self.inductor)!r} has no effect with inner={self.inner!r}.")


class FusionConfig:
    """How tokens are reduced and what compiles the result: ``method`` and ``lowering``.

    Args:
        method: reduction method, by registry name.
        options: those of the method (see its class: ``mctf_compile.METHODS[name]``) and of ``Lowering``.

    Every option is an attribute too. Raises ``ConfigError`` that names a wrong option and the nearest right one.
    """

    def __init__(self, method: str = "mctf", **options: Any) -> None:
        chosen = get_method(method)
        lowering = {name: options.pop(name) for name in Lowering.option_names() if name in options}
        for name in options:
            if name not in chosen.option_names():
                raise ConfigError(_unknown(name, chosen))
        self.method: Method = chosen(**options)
        self.lowering = Lowering(**lowering)
        for name in ("dynamic_r", "profit"):
            value = getattr(self.lowering, name)
            if value not in (False, "off") and not isinstance(self.method, Merging):
                raise ConfigError(f"{name}={value!r} is about the option r, which method {method!r} does not have.")
        target = getattr(self.method, "target", None)
        if target is not None and self.lowering.dynamic_r:
            # Whatever r is now, set_r may go back to the target.
            self.method = replace(self.method, r=AUTO)
        elif target is not None and self.method.r != AUTO:
            raise ConfigError(f"target={str(target)!r} has no effect with r={self.method.r!r}; it needs r='auto'.")

    @property
    def by_running(self) -> bool:
        """Whether the graph must be run to settle what these options leave open."""
        target = getattr(self.method, "solved_for", None)
        return self.lowering.profit == "measure" or (target is not None and target.quantity == LATENCY)

    @property
    def by_counting(self) -> bool:
        """Whether multiply-accumulates settle what these options leave open."""
        return not self.by_running and (
            self.lowering.profit == "model" or getattr(self.method, "solved_for", None) is not None
        )

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None = None, mode: str | None = None) -> FusionConfig:
        """The config for ``torch.compile``'s options and mode; raises ``ConfigError``."""
        options = dict(options or {})
        if mode is not None:
            inductor = options.get("inductor", {})
            if "mode" in inductor and inductor["mode"] != mode:
                raise ConfigError(f"mode={mode!r} and options['inductor']['mode']={inductor['mode']!r} disagree.")
            options["inductor"] = {**inductor, "mode": mode}
        return cls(**options)

    def __getattr__(self, name: str) -> Any:
        for part in ("method", "lowering"):
            held = self.__dict__.get(part)
            if held is not None and name in held.option_names():
                return getattr(held, name)
        raise AttributeError(f"FusionConfig has no option {name!r}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FusionConfig) and (self.method, self.lowering) == (other.method, other.lowering)

    __hash__ = None

    def __repr__(self) -> str:
        return f"FusionConfig({self.method}, {self.lowering})"


def _unknown(name: str, method: type[Method]) -> str:
    """Why a method's option is refused: another method takes it, or none does."""
    takes = [*method.option_names(), *Lowering.option_names()]
    others = sorted(m.name for m in METHODS.values() if name in m.option_names())
    if others:
        return (f"method {method.name!r} takes no option {name!r} ({', '.join(others)} "
                f"{'does' if len(others) == 1 else 'do'}); it takes: {', '.join(takes)}.")
    known = ["method", *takes]
    return f"unknown option {name!r}; {nearest(name, known)}The options are: {', '.join(known)}."


def _check_inductor(patches: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` for a mode or a patch that Inductor does not know."""
    from torch import _inductor

    modes, known = _inductor.list_mode_options(), _inductor.config.get_config_copy()
    for name, value in patches.items():
        allowed = modes if name == "mode" else known
        asked = value if name == "mode" else name
        if asked not in allowed:
            kind = "mode" if name == "mode" else "config entry"
            raise ConfigError(f"inductor: {asked!r} is no Inductor {kind}{hint(asked, allowed)}")
