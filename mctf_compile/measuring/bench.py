"""Measure what fusion gains: the dense model, as fast as its user can have it, and mctf, side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from mctf_compile.compiler import explain
from mctf_compile.config import FusionConfig
from mctf_compile.errors import MctfError
from mctf_compile.measuring.candidates import (
    CANDIDATES,
    DENSE,
    EAGER,
    FUSED,
    INDUCTOR,
    MCTF,
    USUAL,
    candidate,
    check_candidates,
    check_files,
    compiling,
    interpreted,
    label,
)
from mctf_compile.report import Report

Call = Callable[[], object]
# Told of what begins, of how many steps are done and of how many there are.
Progress = Callable[[str, int, int], None]

# The largest relative error that rounding may cause. Measured on ViTs of 12 blocks: 1e-6 in float32, 1e-2 in bfloat16.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
# Batches that are looked at for an image whose choice of tokens rounding did not tip.
ATTEMPTS = 4


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
        low, high = quartiles(self.milliseconds)
        return high - low


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third quartile; of a single value, that value twice."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


@dataclass(frozen=True)
class BenchResult:
    """One comparison.

    Attributes:
        timings: by candidate, in the order in which they ran.
        first_call: seconds of each candidate's first call, compilation included.
        report: what mctf did to the model.
        errors: of each candidate, the median over images of the relative error that the check found: a dense one's
            against dense eager, a fused one's against the same rewrite run by the eager inner compiler.
    """

    timings: dict[str, Timing]
    first_call: dict[str, float]
    report: Report
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def best_dense(self) -> str:
        """The fastest of the dense candidates."""
        return self._fastest(DENSE)

    @property
    def best_fused(self) -> str:
        """The fastest of the candidates that fuse tokens."""
        return self._fastest(FUSED)

    def _fastest(self, names: Iterable[str]) -> str:
        return min((n for n in names if n in self.timings), key=lambda n: self.timings[n].median)

    @property
    def macs_ratio(self) -> float:
        """Multiply-accumulates of the dense graph over those of the fused one."""
        return self.report.macs_before / self.report.macs_after

    def speedup(self, over: str, fused: str | None = None) -> float:
        """How many times faster a fused candidate, by default the fastest, is than a dense one."""
        return self.timings[over].median / self.timings[fused or self.best_fused].median

    def speedup_quartiles(self, over: str) -> tuple[float, float]:
        """The quartiles of the speed-up, round by round: a slow spell that meets both leaves it alone."""
        pairs = zip(self.timings[over].milliseconds, self.timings[self.best_fused].milliseconds)
        return quartiles([dense / fused for dense, fused in pairs])

    def realized(self, over: str) -> float:
        """Realized efficiency: the part of the saving in multiply-accumulates that is one in time."""
        return self.speedup(over) / self.macs_ratio

    def alike(self, name: str) -> str | None:
        """The dense candidate that was timed and is compiled as a fused one is."""
        dense = CANDIDATES[name].dense
        return dense if dense in self.timings else None

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
                    "error": self.errors.get(name),
                    "speedup_over_alike": self.speedup(dense, name) if (dense := self.alike(name)) else None,
                }
                for name, timing in self.timings.items()
            },
            "macs_before": self.report.macs_before,
            "macs_after": self.report.macs_after,
            "macs_ratio": self.macs_ratio,
            "best_dense": self.best_dense,
            "best_fused": self.best_fused,
            "speedup_over_best_dense": self.speedup(self.best_dense),
            "speedup_quartiles": self.speedup_quartiles(self.best_dense),
            "speedup_over_inductor": compiled and self.speedup(compiled),
            "realized_over_best_dense": self.realized(self.best_dense),
            "realized_over_inductor": compiled and self.realized(compiled),
        }

    def table(self) -> Table:
        """The comparison as a rich table."""
        table = Table(title=self.report.summary, title_justify="left", caption=self._caption(), caption_justify="left")
        for name in ("", "median ms", "spread ms", "speed-up", "realized", "over its dense", "first call s"):
            table.add_column(name, justify="right" if name else "left", no_wrap=not name)
        for name, timing in self.timings.items():
            dense = self.alike(name)
            if name in FUSED:
                compared = ("", "", f"{self.speedup(dense, name):.2f}x" if dense else "")
            else:
                compared = (f"{self.speedup(name):.2f}x", f"{self.realized(name):.0%}", "")
            table.add_row(
                label(name) + (" *" if name in (self.best_dense, self.best_fused) else ""),
                f"{timing.median:.1f}",
                f"{timing.spread:.1f}",
                *compared,
                f"{self.first_call[name]:.1f}",
            )
        return table

    def _caption(self) -> str:
        rounds = len(self.timings[self.best_fused].milliseconds)
        return (
            f"Medians and interquartile ranges of {rounds} interleaved rounds. Speed-up: of {self.best_fused} over "
            f"this one. Realized: speed-up / ratio of MACs ({self.macs_ratio:.2f}). Over its dense: speed-up of this "
            "one over the dense one that is compiled alike. *: the fastest of its kind."
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
    candidates: Sequence[str] = USUAL,
    report: Report | None = None,
) -> BenchResult:
    """Compare mctf with ways to run the model dense, after checking the outputs of all.

    Args:
        model: in the mode in which it is to be measured; each candidate compiles a copy of its own.
        inputs: the positional arguments of a call; their first tensor tells the device.
        options: as for the backend; the Inductor patches among them are the dense candidates' too.
        rounds: timed calls of each candidate.
        progress: called as ``progress(what, done, total)``.
        warmup: calls of each candidate before the timed ones, its first call not counted.
        autocast: the dtype of a surrounding ``torch.autocast``, or None.
        candidates: of ``CANDIDATES``, at least one of ``DENSE`` and one of ``FUSED``; they run in that order.
        report: what ``explain`` gave for the same inputs and options, where known.

    Raises:
        ConfigError: before anything is compiled.
        MctfError: likewise, where another runtime is not installed.
        WrongOutputError: an output is not right (see ``first_calls`` and ``check_fused``); nothing is timed.
    """
    options = dict(options or {})
    FusionConfig.from_options(options)
    device = next((x.device.type for x in tree_leaves(inputs) if isinstance(x, Tensor)), "cpu")
    chosen = check_candidates(candidates)
    check_files(chosen, model, options, device, autocast)
    progress = progress or (lambda what, done, total: None)
    tolerance = tolerance_of(model, inputs, autocast)
    # Each candidate compiles the same forward anew; past a limit of 8 Dynamo would run it as it is.
    limits: dict[str, Any] = dict.fromkeys(("recompile_limit", "accumulated_recompile_limit"), 100 * len(CANDIDATES))
    with inference(device, autocast), torch._dynamo.config.patch(**limits, fail_on_recompile_limit_hit=True):
        if report is None:
            progress("explain", 0, 1)
            report = explain(model, *inputs, **options)
        torch._dynamo.reset()
        # What is not timed is run too: all are compared with it.
        modules = {name: candidate(name, model, inputs, options) for name in dict.fromkeys((EAGER, *chosen))}
        calls = {name: lambda module=module: module(*inputs) for name, module in modules.items()}
        first_call, errors = first_calls(calls, device, progress, tolerance)
        if options.get("inner") != "eager":
            reference = candidate(MCTF, model, inputs, interpreted(options))
            for name in (n for n in FUSED if n in chosen):
                progress(f"check {name}", 0, 1)
                allowed = CANDIDATES[name].tolerance(tolerance)
                errors[name] = check_fused(name, modules[name], reference, model, inputs, allowed)
        timings = interleave({name: calls[name] for name in chosen}, rounds, warmup, device, progress)
        torch._dynamo.reset()
    return BenchResult(timings, {name: first_call[name] for name in chosen}, report, errors)


def first_calls(
    calls: Mapping[str, Call],
    device: str = "cpu",
    progress: Progress | None = None,
    tolerance: float = TOLERANCES[torch.float32],
) -> tuple[dict[str, float], dict[str, float]]:
    """Run each candidate once and check its output against that of the first, which is dense.

    Returns the seconds that each took, and the median relative errors of the dense ones. Raises ``WrongOutputError``
    for an output that is not finite, has other shapes, or, of a dense candidate, differs by more than ``tolerance`` in
    any image.
    """
    seconds: dict[str, float] = {}
    errors: dict[str, float] = {}
    expected: list[Tensor] | None = None
    for name, call in calls.items():
        if progress is not None:
            progress(f"first call of {label(name)}", 0, 1)
        with compiling(name):
            output, seconds[name] = timed(call, device)
        tensors = tensors_of(output)
        expected = tensors if expected is None else expected
        check_output(name, tensors, expected)
        if name in DENSE:
            found, allowed = relative_errors(tensors, expected), CANDIDATES[name].tolerance(tolerance)
            if max(found) > allowed:
                raise WrongOutputError(
                    f"the output of {name} is {max(found):.1e} away from dense eager's, by the norm "
                    f"of an image's; {allowed:g} is allowed. No time is reported."
                )
            errors[name] = statistics.median(found)
    return seconds, errors


def check_fused(
    name: str,
    fused: Callable[..., Any],
    reference: Callable[..., Any],
    dense: Callable[..., Any],
    inputs: Sequence[Any],
    tolerance: float,
) -> float:
    """Check a compiled rewrite against the same rewrite run operator by operator; the median relative error.

    Rounding may tip the choice between two tokens that are nearly as alike. Such an image differs by what fusing
    another token changes, which no tolerance for rounding covers. So every image must be within twice the distance
    of the reference from the dense output, which two ways of fusing may lie apart; and one at least must be
    within ``tolerance``, of the inputs or of up to ``ATTEMPTS - 1`` batches made of them by rolling. In half
    precision, and where the reference itself fuses at random, choices tip in every image: there the first alone is
    asked for.

    Raises:
        WrongOutputError: what is asked for does not hold.
    """
    found: list[float] = []
    for i in range(ATTEMPTS):
        batch = tree_map_only(Tensor, partial(_rolled, steps=i), list(inputs))
        wanted, repeated, plain = (tensors_of(call(*batch)) for call in (reference, reference, dense))
        errors, moved = relative_errors(tensors_of(fused(*batch)), wanted), relative_errors(plain, wanted)
        for error, distance in zip(errors, moved):
            if not error <= 2 * distance + tolerance:
                raise WrongOutputError(
                    f"the output of {name} is {error:.1e} away from that of its own rewrite run by "
                    f"inner='eager', by the norm of an image's; fusion itself moves it by "
                    f"{distance:.1e}. No time is reported."
                )
        found += errors
        repeats = max(relative_errors(repeated, wanted)) <= tolerance < TOLERANCES[torch.float16]
        if min(found) <= tolerance or not repeats:
            return statistics.median(found)
    raise WrongOutputError(
        f"of {len(found)} images none comes out of {name} as its own rewrite run by inner='eager' "
        f"says (relative error {min(found):.1e} or more, {tolerance:g} is rounding). "
        f"No time is reported."
    )


def _rolled(x: Tensor, steps: int) -> Tensor:
    return x.roll(steps, -1) if steps and x.is_floating_point() and x.dim() else x


def tolerance_of(model: nn.Module, inputs: Sequence[Any], autocast: torch.dtype | None = None) -> float:
    """The relative error that rounding may cause in the coarsest dtype of the weights, the inputs and autocast."""
    tensors = [*model.parameters(), *(x for x in tree_leaves(inputs) if isinstance(x, Tensor))]
    dtypes = {x.dtype for x in tensors} | {autocast}
    # TF32 has the mantissa of float16.
    if torch.get_float32_matmul_precision() != "highest" and any(x.is_cuda for x in tensors):
        dtypes.add(torch.float16)
    return max((TOLERANCES[dtype] for dtype in dtypes if dtype in TOLERANCES), default=TOLERANCES[torch.float32])


def relative_errors(output: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """||output - expected|| / ||expected|| of each image, the largest over the tensors of an output.

    An image is an entry of the first dimension; where the tensors don't have one in common, all is one image.
    """
    pairs = [(x.double(), y.double()) for x, y in zip(output, expected) if y.is_floating_point()]
    if not pairs:
        return [0.0]
    counts = {y.shape[0] if y.dim() else None for _, y in pairs}
    images = counts.pop() if len(counts) == 1 else None
    pairs = [(x.reshape(images or 1, -1), y.reshape(images or 1, -1)) for x, y in pairs]
    tiny = torch.finfo(torch.float64).tiny
    errors = [(x - y).norm(dim=1) / y.norm(dim=1).clamp_min(tiny) for x, y in pairs]
    return torch.stack(errors).amax(0).tolist()


def tensors_of(output: object) -> list[Tensor]:
    """Copies of the tensors of an output: a CUDA graph writes its results where it wrote the last ones."""
    return [x.clone() for x in tree_leaves(output) if isinstance(x, Tensor)]


def check_output(name: str, output: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Raise ``WrongOutputError`` unless ``output`` has the shapes of ``expected`` and finite values."""
    shapes, wanted = ([tuple(x.shape) for x in tensors] for tensors in (output, expected))
    if shapes != wanted:
        raise WrongOutputError(f"{name} returns the shapes {shapes} instead of {wanted}. No time is reported.")
    for i, x in enumerate(output):
        if x.is_floating_point() and not x.isfinite().all():
            raise WrongOutputError(f"output {i} of {name} has values that are not finite. No time is reported.")


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
            elapsed = timed(call, device)[1]
            if i >= 0:
                milliseconds[name].append(1000 * elapsed)
        if progress is not None:
            progress("rounds", i + 1 + warmup, rounds + warmup)
    return {name: Timing(name, times) for name, times in milliseconds.items()}


def timed(call: Call, device: str) -> tuple[object, float]:
    """The result of a call and the seconds until the device was done with it."""
    if device == "cuda":
        torch.compiler.cudagraph_mark_step_begin()
    _synchronize(device)
    start = time.perf_counter()
    result = call()
    _synchronize(device)
    return result, time.perf_counter() - start


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def inference(device: str, autocast: torch.dtype | None) -> AbstractContextManager[Any]:
    """What a measurement runs in: no gradients, and autocast where it is asked for."""
    stack = ExitStack()
    stack.enter_context(torch.no_grad())
    if autocast is not None:
        stack.enter_context(torch.autocast(device, autocast))
    return stack
