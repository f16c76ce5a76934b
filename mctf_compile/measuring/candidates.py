"""The ways to run a model that are compared: dense, and with its tokens fused."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mctf_compile.config import FusionConfig
from mctf_compile.errors import ConfigError
from mctf_compile.exporting.program import export_with, exporting_config
from mctf_compile.exporting.targets import TARGETS, Run, Target
from mctf_compile.options.fields import nearest

EAGER, INDUCTOR, MCTF = "eager", "inductor", "mctf"


@dataclass(frozen=True)
class Candidate:
    """One way to run a model.

    Attributes:
        inductor: what Inductor is told; None where it compiles nothing.
        dynamic: whether it is compiled for any sizes.
        target: the kind of file that another runtime runs it from; see ``exporting.targets``.
        dense: the name of the dense candidate that is compiled alike; None for one that is dense itself.
    """

    inductor: Mapping[str, Any] | None = None
    dynamic: bool = False
    target: str | None = None
    dense: str | None = None

    @property
    def fused(self) -> bool:
        return self.dense is not None

    def tolerance(self, of_dtypes: float) -> float:
        """The relative error that rounding may cause, where it is ``of_dtypes`` in the dtypes of model and inputs."""
        return of_dtypes if self.target is None else max(of_dtypes, TARGETS[self.target].rounding)


# On a CPU, max-autotune has matrix products to choose from where the weights are frozen, and float32 weights are packed
# for oneDNN where the batch may change too.
CANDIDATES: dict[str, Candidate] = {
    EAGER: Candidate(),
    INDUCTOR: Candidate({}),
    "max-autotune": Candidate({"mode": "max-autotune"}),
    "freezing": Candidate({"freezing": True}),
    "freezing-dynamic": Candidate({"freezing": True}, dynamic=True),
    "max-autotune-freezing": Candidate({"mode": "max-autotune", "freezing": True}),
    "onnxruntime": Candidate(target="onnx"),
    "onnxruntime-int8": Candidate(target="onnx-int8"),
    "openvino": Candidate(target="openvino"),
    MCTF: Candidate({}, dense=INDUCTOR),
    "mctf-freezing": Candidate({"freezing": True}, dense="freezing"),
    "mctf-onnxruntime": Candidate(target="onnx", dense="onnxruntime"),
    "mctf-onnxruntime-int8": Candidate(target="onnx-int8", dense="onnxruntime-int8"),
    "mctf-openvino": Candidate(target="openvino", dense="openvino"),
}
DENSE = tuple(name for name, candidate in CANDIDATES.items() if not candidate.fused)
FUSED = tuple(name for name, candidate in CANDIDATES.items() if candidate.fused)
USUAL = (EAGER, INDUCTOR, MCTF)

# Of the options, what says how a compiled model is compiled and means nothing to a file.
COMPILED_ALONE = ("inner", "inductor", "kernels")


def label(name: str) -> str:
    """A candidate's name in tables."""
    return name if name in FUSED else {INDUCTOR: "dense Inductor"}.get(name, f"dense {name}")


def check_candidates(names: Sequence[str]) -> list[str]:
    """The names in the order of ``CANDIDATES``; raises ``ConfigError`` where they are no comparison."""
    for name in names:
        if name not in CANDIDATES:
            raise ConfigError(
                f"there is no candidate {name!r}; {nearest(name, list(CANDIDATES))}"
                f"The candidates are: {', '.join(CANDIDATES)}."
            )
    chosen = [name for name in CANDIDATES if name in names]
    if not set(FUSED) & set(chosen) or not set(DENSE) & set(chosen):
        raise ConfigError(f"candidates={','.join(names)} compares nothing; name {MCTF} and a dense one.")
    return chosen


def check_files(
    names: Sequence[str],
    model: nn.Module,
    options: Mapping[str, Any],
    device: str = "cpu",
    autocast: torch.dtype | None = None,
) -> None:
    """Whether those of the candidates that other runtimes run from files can run a model so.

    Raises:
        ConfigError: a file takes no such option, or its runtime not this device, this mode or autocast.
        MctfError: a runtime is not installed.
    """
    for name in names:
        target = CANDIDATES[name].target
        if target is None:
            continue
        if device != "cpu":
            raise ConfigError(f"{name} is measured on a CPU, and the inputs are on {device!r}.")
        if autocast is not None:
            raise ConfigError(f"{name} computes in the dtype of the weights, and not under autocast.")
        if model.training:
            raise ConfigError(f"{name} runs a file, which keeps the mode of the model: call model.eval() before.")
        _config(name, options)
        TARGETS[target].check(Path("model" + TARGETS[target].ending))


def candidate(name: str, model: nn.Module, inputs: Sequence[Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """The model as a candidate runs it: compiled by its first call, which belongs into ``compiling(name)``."""
    if name == EAGER:
        return model
    how = CANDIDATES[name]
    if how.target is not None:
        return _File(model, inputs, _config(name, options), TARGETS[how.target])
    if how.fused:
        patches = {**options.get("inductor", {}), **(how.inductor or {})}
        options = {**options, **({"inductor": patches} if patches else {})}
        return torch.compile(copy.deepcopy(model), backend="mctf", options=options)
    given = FusionConfig.from_options(options).lowering.inductor
    patches = FusionConfig(inductor={**given, **(how.inductor or {})}).lowering.patches()
    return torch.compile(copy.deepcopy(model), options=patches or None, dynamic=how.dynamic or None)


def compiling(name: str) -> AbstractContextManager[Any]:
    """What a candidate's first call runs in: Inductor freezes the weights that Dynamo made constants of the graph."""
    freezing = bool((CANDIDATES[name].inductor or {}).get("freezing"))
    patched: AbstractContextManager[Any] = torch._dynamo.config.patch(prepare_freezing=freezing)
    return patched


def interpreted(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options for the same rewrite, run operator by operator."""
    return {**{k: v for k, v in options.items() if k != "inductor"}, "inner": "eager"}


def _config(name: str, options: Mapping[str, Any]) -> FusionConfig:
    """The config of a candidate that is run from a file; raises ``ConfigError`` for options that no file takes."""
    if not CANDIDATES[name].fused:
        return exporting_config({"method": "none"})
    return exporting_config({k: v for k, v in options.items() if k not in COMPILED_ALONE})


class _File:
    """A model that its first call writes to a file, for inputs of these shapes, and that is run from there."""

    def __init__(self, model: nn.Module, inputs: Sequence[Any], config: FusionConfig, target: Target) -> None:
        self.model, self.inputs, self.config, self.target = model, inputs, config, target
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._run: Run | None = None

    def __call__(self, *inputs: Any) -> Any:
        if self._run is None:
            self._run = self._written()
        return self._run(*inputs)

    def _written(self) -> Run:
        program, _ = export_with(self.model, self.inputs, {}, self.config, dynamic_batch=False)
        # Its weights may be read as they are needed.
        self._folder = tempfile.TemporaryDirectory(prefix="mctf-")
        path = Path(self._folder.name, "model" + self.target.ending)
        self.target.save(program, path)
        return self.target.load(path, torch.get_num_threads())
