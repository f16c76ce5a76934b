"""Measure what fusion gains: dense eager, dense Inductor and mctf, side by side on the same inputs."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mctf_compile.compiler import explain
from mctf_compile.config import FusionConfig
from mctf_compile.errors import MctfError
from mctf_compile.report import Report

Call = Callable[[], object]
# Told of what begins, of how many steps are done and of how many there are.
Progress = Callable[[str, int, int], None]

EAGER, INDUCTOR, MCTF = "eager", "inductor", "mctf"
LABELS = {EAGER: "dense eager", INDUCTOR: "dense Inductor", MCTF: "mctf"}


class WrongOutputError(MctfError, RuntimeError):
    """A candidate's output is not what a speed may be reported of; the message names the candidate."""


@dataclass(frozen=True)
class Timing:
    """The wall times of one candidate, one per round."""

    name: str
    milliseconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)

    @property
    def spread(self) -> float:
        """Interquartile range in milliseconds; 0 of a single round."""
        if len(self.milliseconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.milliseconds, n=4, method="inclusive")
        return high - low


@dataclass(frozen=True)
class BenchResult:
    """One comparison.

    Attributes:
        timings: by candidate, in the order in which they ran.
        first_call: seconds of each candidate's first call, compilation included.
        report: what mctf did to the model.
    """

    timings: dict[str, Timing]
    first_call: dict[str, float]
    report: Report

    @property
    def best_dense(self) -> str:
        """The faster of the dense candidates."""
        return min((n for n in self.timings if n != MCTF), key=lambda n: self.timings[n].median)

    @property
    def macs_ratio(self) -> float:
        """Multiply-accumulates of the dense graph over those of the fused one."""
        return self.report.macs_before / self.report.macs_after

    def speedup(self, over: str) -> float:
        """How many times faster mctf is than a dense candidate, by the medians."""
        return self.timings[over].median / self.timings[MCTF].median

    def realized(self, over: str) -> float:
        """Realized efficiency: the part of the saving in multiply-accumulates that is one in time."""
        return self.speedup(over) / self.macs_ratio

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what compares with dense Inductor is None where it did not run."""
        compiled = INDUCTOR if INDUCTOR in self.timings else None
        return {
            "candidates": {
                name: {
                    "median_ms": timing.median,
                    "spread_ms": timing.spread,
                    "milliseconds": timing.milliseconds,
                    "first_call_s": self.first_call[name],
                }
                for name, timing in self.timings.items()
            },
            "macs_before": self.report.macs_before,
            "macs_after": self.report.macs_after,
            "macs_ratio": self.macs_ratio,
            "best_dense": self.best_dense,
            "speedup_over_best_dense": self.speedup(self.best_dense),
            "speedup_over_inductor": compiled and self.speedup(compiled),
            "realized_over_best_dense": self.realized(self.best_dense),
            "realized_over_inductor": compiled and self.realized(compiled),
        }

    def table(self) -> Table:
        """The comparison as a rich table."""
        table = Table(title=self.report.summary, title_justify="left", caption=self._caption(), caption_justify="left")
        for name in ("", "median ms", "spread ms", "speed-up", "realized", "first call s"):
            table.add_column(name, justify="right" if name else "left", no_wrap=not name)
        for name, timing in self.timings.items():
            compared = ("", "") if name == MCTF else (f"{self.speedup(name):.2f}x", f"{self.realized(name):.0%}")
            table.add_row(
                LABELS[name] + (" *" if name == self.best_dense else ""),
                f"{timing.median:.1f}", f"{timing.spread:.1f}", *compared, f"{self.first_call[name]:.1f}",
            )
        return table

    def _caption(self) -> str:
        rounds = len(self.timings[MCTF].milliseconds)
        return (
            f"Medians and interquartile ranges of {rounds} interleaved rounds. Speed-up: of mctf over this one. "
            f"Realized: speed-up / ratio of MACs ({self.macs_ratio:.2f}). *: the better dense one."
        )


def bench(
    model: nn.Module,
    inputs: Sequence[Any],
    options: Mapping[str, Any] | None = None,
    rounds: int = 10,
    progress: Progress | None = None,
    *,
    warmup: int = 2,
    autocast: torch.dtype | None = None,
    with_inductor: bool = True,
    report: Report | None = None,
) -> BenchResult:
    """Compare a model run dense in eager mode, dense under Inductor and under mctf.

    Args:
        model: in the mode in which it is to be measured; each candidate compiles a copy of its own.
        inputs: the positional arguments of a call; their first tensor tells the device.
        options: as for the backend; the Inductor patches among them are dense Inductor's too.
        rounds: timed calls of each candidate.
        progress: called as ``progress(what, done, total)``.
        warmup: calls of each candidate before the timed ones, its first call not counted.
        autocast: the dtype of a surrounding ``torch.autocast``, or None.
        with_inductor: measure dense Inductor too.
        report: what ``explain`` gave for the same inputs and options, where known.

    Raises:
        ConfigError: before anything is compiled.
        WrongOutputError: an output is not finite or not of the dense output's shape; nothing is timed.
    """
    options = dict(options or {})
    config = FusionConfig.from_options(options)
    progress = progress or (lambda what, done, total: None)
    device = next((x.device.type for x in tree_leaves(inputs) if isinstance(x, Tensor)), "cpu")
    with _inference(device, autocast):
        if report is None:
            progress("explain", 0, 1)
            report = explain(model, *inputs, **options)
        torch._dynamo.reset()
        modules = {EAGER: model}
        if with_inductor:
            modules[INDUCTOR] = torch.compile(copy.deepcopy(model), options=_inductor_patches(config))
        modules[MCTF] = torch.compile(copy.deepcopy(model), backend="mctf", options=options)
        candidates = {name: lambda module=module: module(*inputs) for name, module in modules.items()}
        first_call = first_calls(candidates, device, progress)
        return BenchResult(interleave(candidates, rounds, warmup, device, progress), first_call, report)


def first_calls(
    candidates: Mapping[str, Call], device: str = "cpu", progress: Progress | None = None
) -> dict[str, float]:
    """Run each candidate once and check its output against the first one's: the seconds that it took.

    Raises ``WrongOutputError`` for an output that is not finite or has other shapes.
    """
    seconds: dict[str, float] = {}
    expected: list[Tensor] | None = None
    for name, call in candidates.items():
        if progress is not None:
            progress(f"first call of {LABELS.get(name, name)}", 0, 1)
        output, elapsed = _timed(call, device)
        tensors = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        check_output(name, tensors, tensors if expected is None else expected)
        expected = tensors if expected is None else expected
        seconds[name] = elapsed
    return seconds


def check_output(name: str, output: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Raise ``WrongOutputError`` unless ``output`` has the shapes of ``expected`` and finite values."""
    shapes, wanted = ([tuple(x.shape) for x in tensors] for tensors in (output, expected))
    if shapes != wanted:
        raise WrongOutputError(f"{name} returns the shapes {shapes} instead of {wanted}; no time is reported.")
    for i, x in enumerate(output):
        if x.is_floating_point() and not x.isfinite().all():
            raise WrongOutputError(f"output {i} of {name} has values that are not finite; no time is reported.")


def interleave(
    candidates: Mapping[str, Call],
    rounds: int,
    warmup: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Timing]:
    """Time the candidates in turn, A B C A B C, so that a slower spell of the machine meets all of them."""
    milliseconds: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(-warmup, rounds):
        for name, call in candidates.items():
            elapsed = _timed(call, device)[1]
            if i >= 0:
                milliseconds[name].append(1000 * elapsed)
        if progress is not None:
            progress("rounds", i + 1 + warmup, rounds + warmup)
    return {name: Timing(name, times) for name, times in milliseconds.items()}


def _timed(call: Call, device: str) -> tuple[object, float]:
    """The result of a call and the seconds until the device was done with it."""
    _synchronize(device)
    start = time.perf_counter()
    result = call()
    _synchronize(device)
    return result, time.perf_counter() - start


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _inference(device: str, autocast: torch.dtype | None) -> AbstractContextManager[Any]:
    stack = ExitStack()
    stack.enter_context(torch.no_grad())
    if autocast is not None:
        stack.enter_context(torch.autocast(device, autocast))
    return stack


def _inductor_patches(config: FusionConfig) -> dict[str, Any] | None:
    """The Inductor options of the fused graph, for the dense one."""
    patches = dict(config.lowering.inductor)
    mode = patches.pop("mode", None)
    if mode is not None:
        from torch._inductor import list_mode_options

        patches = {**list_mode_options(mode), **patches}
    return patches or None
