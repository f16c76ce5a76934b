"""The options of ``torch.compile(model, backend="mctf", options={...})``, validated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mctf_compile.errors import ConfigError
from mctf_compile.methods import METHODS, Merging, Method, get_method
from mctf_compile.options.fields import Frozen, Options, flag, hint, nearest, one_of, option
from mctf_compile.options.schedule import AUTO, LATENCY
from mctf_compile.options.tuned import read_schedule


def _patches(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
        raise ConfigError(f"{name}={value!r} must be a dict of Inductor config patches.")
    if value:
        _check_inductor(value)
    return Frozen(value)


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
        padding: what becomes of a mask [B, 1, N, N] that the model is given, which does not show how it was made:
            ``read`` fuses no tokens under it; ``assume`` takes it for padding, which the first call checks.
        outputs: what becomes of tensors with a token axis that the graph returns: ``dense`` gives them all their tokens
            back; ``fused`` leaves them as they are, and ``mctf_compile.fused_tokens`` says what each token stands for.
        reparameterize: ``shiftadd`` puts linear attention and MLPs of two experts in the place of the model's own,
            with what ``mctf_compile.shiftadd.attach`` has added to it, before any token is fused; None leaves them.
    """

    inner: str = option("inductor", one_of("inductor", "aot_eager", "eager"))
    inductor: Mapping[str, Any] = field(default_factory=dict, metadata={"check": _patches})
    kernels: str = option("auto", one_of("auto", "triton", "cpp", "aten"))
    strict: bool = option(False, flag)
    dynamic_r: bool = option(False, flag)
    profit: str = option("off", one_of("off", "model", "measure"))
    padding: str = option("read", one_of("read", "assume"))
    outputs: str = option("dense", one_of("dense", "fused"))
    reparameterize: str | None = option(None, one_of(None, "shiftadd"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inductor and self.inner != "inductor":
            raise ConfigError(f"inductor={self.inductor!r} has no effect with inner={self.inner!r}.")

    def patches(self) -> dict[str, Any]:
        """The Inductor options, those of a mode among them."""
        patches = dict(self.inductor)
        mode = patches.pop("mode", None)
        if mode is None:
            return patches
        from torch._inductor import list_mode_options

        return {**list_mode_options(mode), **patches}

    def inductor_has(self, name: str) -> bool:
        """Whether Inductor is told so, by these options or by its own configuration."""
        from torch._inductor import config as inductor

        return bool(self.patches().get(name, inductor.get_config_copy().get(name)))


@dataclass(frozen=True, init=False, repr=False)
class FusionConfig:
    """How tokens are reduced and what compiles the result: ``method`` and ``lowering``.

    Args:
        method: reduction method, by registry name; None for that of the option ``schedule``, or ``mctf``.
        options: those of the method (see its class: ``mctf_compile.METHODS[name]``) and of ``Lowering``.

    Every option is an attribute too. Configs do not change; equal ones have equal hashes. Raises ``ConfigError`` that
    names a wrong option and the nearest right one.
    """

    method: Method
    lowering: Lowering

    def __init__(self, method: str | None = None, **options: Any) -> None:
        tuned = read_schedule("schedule", options.get("schedule"))
        if tuned is not None:
            options = tuned.completing(options if method is None else {**options, "method": method})
            method = options.pop("method", method)
        chosen = get_method("mctf" if method is None else method)
        given = {name: options.pop(name) for name in Lowering.option_names() if name in options}
        for name in options:
            if name not in chosen.option_names():
                raise ConfigError(_unknown(name, chosen))
        # Which options a method has, its class knows.
        reducing: Any = chosen(**options)
        lowering = Lowering(**given)
        for name in ("dynamic_r", "profit"):
            value = getattr(lowering, name)
            if value not in (False, "off") and not isinstance(reducing, Merging):
                raise ConfigError(f"{name}={value!r} is about the option r, which method {method!r} does not have.")
        target = getattr(reducing, "target", None)
        if target is not None and lowering.dynamic_r:
            # Whatever r is now, set_r may go back to the target.
            reducing = replace(reducing, r=AUTO)
        elif target is not None and reducing.r != AUTO:
            raise ConfigError(f"target={str(target)!r} has no effect with r={reducing.r!r}; it needs r='auto'.")
        object.__setattr__(self, "method", reducing)
        object.__setattr__(self, "lowering", lowering)

    @property
    def undecided(self) -> bool:
        """Whether these options leave open what each block removes, until its rewritten graph is known."""
        return self.lowering.profit != "off" or getattr(self.method, "solved_for", None) is not None

    @property
    def by_running(self) -> bool:
        """Whether the graph must be run to decide what these options leave open."""
        target = getattr(self.method, "solved_for", None)
        return self.lowering.profit == "measure" or (target is not None and target.quantity == LATENCY)

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

    def __repr__(self) -> str:
        return f"FusionConfig({self.method}, {self.lowering})"


def _unknown(name: str, method: type[Method]) -> str:
    """Why a method's option is refused: another method takes it, or none does."""
    takes = [*method.option_names(), *Lowering.option_names()]
    others = sorted(m.name for m in METHODS.values() if name in m.option_names())
    if others:
        return (
            f"method {method.name!r} takes no option {name!r} ({', '.join(others)} "
            f"{'does' if len(others) == 1 else 'do'}); it takes: {', '.join(takes)}."
        )
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
