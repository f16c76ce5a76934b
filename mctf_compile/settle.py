"""What only running a model tells: the ``r`` that meets a latency, and what a fusion costs on this device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import TracingContext, detect_fake_mode, tracing

from mctf_compile.config import FusionConfig
from mctf_compile.errors import ConfigError
from mctf_compile.inner.lowering import lower, lower_counted
from mctf_compile.options.schedule import LATENCY, Target
from mctf_compile.passes import PIPELINE, Findings, State, run_passes
from mctf_compile.passes.analysis.normalize import fake_inputs
from mctf_compile.passes.planning.budget import Costs, Measure, estimated, everything, settle, solve
from mctf_compile.passes.planning.macs import macs_by_counts
from mctf_compile.passes.planning.plan import tokens_left
from mctf_compile.passes.rewriting.rewriter import rewrite_graph

# Timed runs of each variant, refinements of a latency, and how close to the goal is good enough.
ROUNDS, ATTEMPTS, CLOSE = 7, 4, 0.97


def settle_by_running(gm: fx.GraphModule, inputs: Sequence[Any], config: FusionConfig) -> Findings:
    """Settle ``target="latency_ms=..."`` and ``profit="measure"`` by timing the compiled graph on ``inputs``.

    The graph is compiled twice for this, dense and for any number of tokens, and run some 50 times without gradients on
    copies of all inputs that are not parameters, with the random state set back afterwards.

    Raises ``ConfigError`` for inputs without data, or a target out of reach.
    """
    if any(isinstance(x, Tensor) and (x.is_meta or isinstance(x, torch._subclasses.FakeTensor)) for x in inputs):
        raise ConfigError("target='latency_ms=...' and profit='measure' run the model when it is compiled: give it "
                          "real inputs, or use target='speedup=...' and profit='model'.")
    findings = Findings()
    while True:
        state = run_passes(PIPELINE, State(gm, fake_inputs(gm, inputs), config, inputs, True, findings=findings))
        if not state.plan.fusing:
            return state.findings
        if state.counts is None:
            raise ConfigError("target='latency_ms=...' and profit='measure' need the tokens that are removed, and a "
                              "model in training keeps all; set r while it trains.")
        clock = Clock(state, inputs, config)
        macs = macs_by_counts(state.portable, state.counts)
        target = state.unsolved
        if target is not None and target.quantity == LATENCY:
            meet_latency(state, target, clock, macs)
            if state.findings.r is None:
                return state.findings
        by_running = config.lowering.profit == "measure"
        settle(state, macs, measured(state, clock, macs) if by_running else estimated(state))
        findings = state.findings
        # Where blocks dropped out, what a target takes is found anew without them.
        if config.method.solved_for is None or findings.r is not None:
            return findings


def meet_latency(state: State, target: Target, clock: Clock, macs: Measure) -> None:
    """Put into ``state.findings`` the removal that meets a latency: time is about linear in multiply-accumulates.

    Raises ``ConfigError`` for a target out of reach.
    """
    goal = target.value / 1e3
    none, most = ([0] * len(state.blocks), everything(state))
    lefts = [tokens_left(state, requests=r) for r in (none, most)]
    dense, slow, fast = clock.seconds(None, *lefts)
    if dense <= goal:
        met = f"the dense model meets the target {target}: {1e3 * dense:.2f} ms"
        state.findings = replace(state.findings, declined=state.findings.declined
                                 | {b.index: met for b in state.plan.fusing})
        return
    if fast > goal:
        raise ConfigError(f"target={str(target)!r} is out of reach: with the most tokens that method "
                          f"{state.plan.method.name!r} can remove, a call takes {1e3 * fast:.2f} ms.")
    high, low = map(macs, lefts)
    per_mac = max(slow - fast, 0.0) / max(high - low, 1)
    best, taken, offset = most, fast, fast - per_mac * low
    for _ in range(ATTEMPTS):
        found = solve(state, lambda left, offset=offset: offset + per_mac * macs(left) <= goal) or most
        left = tokens_left(state, requests=found)
        (seconds,) = clock.seconds(left)
        if seconds <= goal and sum(found) < sum(best):
            best, taken = found, seconds
        if CLOSE * goal <= seconds <= goal:
            break
        offset = seconds - per_mac * macs(left)
    state.findings = replace(state.findings, r=tuple(best), met=f"{target}: {1e3 * taken:.2f} ms measured")


def measured(state: State, clock: Clock, macs: Measure) -> Costs:
    """What a multiply-accumulate and a fusion take, of three runs: dense, with fusions of no token, and as planned."""
    fusing = state.plan.fusing
    if state.unsolved is not None:
        settle(state, macs)
    lefts = [tokens_left(state, requests=r) for r in ([0] * len(state.blocks), state.findings.r)]
    dense, none, planned = clock.seconds(None, *lefts)
    more, fewer = map(macs, lefts)
    each = max(none - dense, 0.0) / len(fusing)
    return Costs(max(none - planned, 0.0) / max(more - fewer, 1), {b.index: each for b in fusing}, "measured")


class Clock:
    """Seconds of a run: of the dense graph, and of the fused one as a function of the tokens that its blocks leave."""

    def __init__(self, state: State, inputs: Sequence[Any], config: FusionConfig) -> None:
        # The graph may write into buffers.
        self._inputs = [x.detach().clone() if isinstance(x, Tensor) and not isinstance(x, nn.Parameter) else x
                        for x in inputs]
        self._fused = lower_counted(state.result, config)
        nothing = replace(state.plan, blocks=[replace(b, reason="dense") for b in state.plan.blocks], projections={})
        dense = rewrite_graph(state.normal, state.inputs, state.axes, nothing).graph
        with tracing(TracingContext(detect_fake_mode(state.inputs))):
            self._dense = lower(dense, inputs, config)

    def seconds(self, *variants: Sequence[int] | None) -> list[float]:
        """Medians of interleaved runs; None is the dense graph."""
        runs = [self._run(left) for left in variants]
        times: list[list[float]] = [[] for _ in runs]
        devices = [x.device for x in self._inputs if isinstance(x, Tensor) and x.is_cuda]
        with torch.no_grad(), torch.random.fork_rng(devices):
            for i in range(-1, ROUNDS):
                for run, seconds in zip(runs, times):
                    start = time.perf_counter()
                    run()
                    if devices:
                        torch.cuda.synchronize()
                    if i >= 0:
                        seconds.append(time.perf_counter() - start)
        return [statistics.median(seconds) for seconds in times]

    def _run(self, left: Sequence[int] | None) -> Callable[[], Any]:
        if left is None:
            return lambda: self._dense(*self._inputs)
        return lambda: self._fused(*self._inputs, *left)
