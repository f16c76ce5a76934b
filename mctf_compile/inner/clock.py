"""Times what the passes made, for options that only running a model settles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._subclasses.fake_tensor import FakeTensor

from mctf_compile.errors import ConfigError
from mctf_compile.inner.lowering import compile_lowered
from mctf_compile.narrowing import present
from mctf_compile.passes import LOWERING, State, run_passes
from mctf_compile.passes.rewriting.rewriter import rewrite_graph

# Timed runs of each variant.
ROUNDS = 7


class Clock:
    """Seconds of a run: of the dense graph, and of the fused one as a function of the tokens that its blocks leave.

    Both are compiled, and run without gradients on copies of all inputs that are not parameters; the random state is
    set back afterwards.

    Args:
        state: has an adjustable result, and inputs with data among its examples.

    Raises ``ConfigError`` for inputs without data.
    """

    def __init__(self, state: State) -> None:
        try:
            self._inputs = copies(state.examples)
        except ConfigError as error:
            raise ConfigError(
                "target='latency_ms=...' and profit='measure' run the model when it is compiled: give it "
                "real inputs, or use target='speedup=...' and profit='model'."
            ) from error
        self._fused = compile_lowered(run_passes(LOWERING, replace(state, one_piece=False)))
        dense = dense_graph(state)
        with tracing(TracingContext(detect_fake_mode(state.inputs))):
            self._dense = compile_lowered(
                run_passes(LOWERING, replace(state, result=dense, counts=None, one_piece=False))
            )

    def seconds(self, *variants: Sequence[int] | None) -> list[float]:
        """Medians of interleaved runs; None is the dense graph."""
        runs = [self._run(remaining) for remaining in variants]
        times: list[list[float]] = [[] for _ in runs]
        devices = {x.device for x in self._inputs if isinstance(x, Tensor) and x.device.type != "cpu"}
        kind = next((device.type for device in devices), "cuda")
        wait = synchronized(self._inputs)
        with torch.no_grad(), torch.random.fork_rng(devices, device_type=kind):
            for i in range(-1, ROUNDS):
                for run, seconds in zip(runs, times):
                    start = time.perf_counter()
                    run()
                    wait()
                    if i >= 0:
                        seconds.append(time.perf_counter() - start)
        return [statistics.median(seconds) for seconds in times]

    def _run(self, remaining: Sequence[int] | None) -> Callable[[], Any]:
        if remaining is None:
            return lambda: self._dense(*self._inputs)
        return lambda: self._fused(*self._inputs, *remaining)


def copies(inputs: Sequence[Any]) -> list[Any]:
    """The inputs of a graph for runs of one's own: it may write into buffers. ``ConfigError`` for ones without data."""
    if any(isinstance(x, Tensor) and (x.is_meta or isinstance(x, FakeTensor)) for x in inputs):
        raise ConfigError("measuring runs the model: give it real inputs.")
    return [x.detach().clone() if isinstance(x, Tensor) and not isinstance(x, nn.Parameter) else x for x in inputs]


def dense_graph(state: State) -> fx.GraphModule:
    """The graph without fusions, made as the fused one is."""
    plan = present(state.plan)
    nothing = replace(plan, blocks=[replace(b, reason="dense") for b in plan.blocks], projections={})
    return rewrite_graph(present(state.normal), state.inputs, present(state.axes), nothing).graph


def synchronized(inputs: Sequence[Any]) -> Callable[[], None]:
    """Waits for the devices that inputs are on, other than the CPU."""
    devices = {x.device for x in inputs if isinstance(x, Tensor) and x.device.type != "cpu"}

    def wait() -> None:
        for device in devices:
            torch.accelerator.synchronize(device)

    return wait
