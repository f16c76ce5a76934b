"""From a captured graph to a fused graph and its report."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import fx
from torch._dynamo.convert_frame import compile_lock

import mctf_compile.kernels  # noqa: F401  registers torch.ops.mctf
from mctf_compile.config import FusionConfig
from mctf_compile.errors import MctfError, NothingFusedError, UnsupportedGraph
from mctf_compile.options.schedule import NOT_CHOSEN
from mctf_compile.passes import PIPELINE, Findings, State, run_passes
from mctf_compile.passes.analysis.normalize import fake_inputs
from mctf_compile.passes.lowering.autocast import devices_of, keep_autocast_out
from mctf_compile.passes.planning.macs import count_macs, macs_by_block
from mctf_compile.report import BlockReport, Report
from mctf_compile.settle import settle_by_running


def rewrite(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: FusionConfig | None = None
) -> tuple[fx.GraphModule, Report]:
    """Insert token fusion into a captured graph, for any compiler that takes FX graphs.

    Args:
        gm: a graph of torch functions or ATen operators, as Dynamo or ``make_fx`` gives it; not changed.
        example_inputs: its inputs, real or fake.
        config: the options; defaults where None.

    Returns:
        The rewritten graph (``gm`` itself where nothing fuses) and the report. Outputs have the shapes,
        dtypes and devices of the original's.

    Raises:
        ConfigError: an option does not fit the model.
        NothingFusedError: ``strict`` is set and nothing could be fused.
    """
    state, report = run_pipeline(gm, example_inputs, config or FusionConfig())
    if not report.fused:
        return gm, report
    keep_autocast_out(state.result, devices_of(state.result.graph.nodes))
    return state.result, report


def run_pipeline(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: FusionConfig, adjustable: bool = False
) -> tuple[State, Report]:
    """``rewrite``, with all that the passes found. ``adjustable``: see ``State``.

    Graphs are traced one at a time, and while Dynamo compiles none: tracing changes modules and the metadata of nodes
    for the whole process.
    """
    with compile_lock:
        try:
            found = settle_by_running(gm, example_inputs, config) if config.by_running else Findings()
            state = State(gm, fake_inputs(gm, example_inputs), config, example_inputs, adjustable, config.by_counting,
                          findings=found)
            report = make_report(run_passes(PIPELINE, state))
        except UnsupportedGraph as error:
            report = Report([], lambda: (0, 0), reason=str(error), method=config.method.name, seconds=state.seconds)
    if config.lowering.strict and not report.fused:
        reasons = "\n".join(f"  block {b.index}: {b.reason}" for b in report.blocks)
        raise NothingFusedError(f"no block fuses tokens ({report.reason}).\n{reasons}".rstrip())
    return state, report


def make_report(state: State) -> Report:
    """The report of a finished run of the passes."""
    planned = state.plan.blocks
    fused = bool(state.plan.fusing)
    reason = None
    if not fused:
        reasons = {b.reason for b in planned} - {NOT_CHOSEN} or {NOT_CHOSEN}
        reason = "the graph has no self-attention over tokens" if not planned else (
            reasons.pop() if len(reasons) == 1 else "no block can fuse"
        )
    return Report(
        blocks=[
            BlockReport(b.number, b.tokens_in, b.tokens_out, b.reason, b.note, b.tower, b.block.module) for b in planned
        ],
        towers=_tower_names(state),
        count=partial(_count, state.normal, state.portable if fused else None),
        unmerged=list(dict.fromkeys(f"{u.node.name}: {u.reason}" for u in state.unmerges)),
        reason=reason,
        method=state.plan.method.name,
        target=state.findings.met,
        remarks=_remarks(state) if fused else [],
        seconds=state.seconds,
        count_blocks=partial(
            macs_by_block, state.normal, state.portable if fused else None, [b.block for b in planned]
        ),
    )


def _tower_names(state: State) -> list[str]:
    """What to call the towers: the module around their blocks, and of one that runs several times, which run."""
    made_of = [tuple(state.blocks[i].module for i in tower.blocks) for tower in state.towers]
    names = []
    for i, tower in enumerate(state.towers):
        runs = [j for j, other in enumerate(made_of) if other == made_of[i] and tower.module]
        run = f", run {runs.index(i) + 1} of {len(runs)}" if len(runs) > 1 else ""
        names.append((f"tower {i}: {tower.module}" if tower.module else f"tower {i}") + run)
    return names


def _remarks(state: State) -> list[str]:
    name = state.plan.method.name
    if not any(o.state == "untrained" for o in state.observations):
        return state.remarks
    return [f"the modules of method {name!r} are untrained: train them, or load their weights (mctf_{name})",
            *state.remarks]


def _count(before: fx.GraphModule, after: fx.GraphModule | None) -> tuple[int, int]:
    dense = count_macs(before)
    return dense, dense if after is None else count_macs(after)


def explain(model: torch.nn.Module, *inputs: Any, **options: Any) -> Report:
    """Report what ``torch.compile(model, backend="mctf", options=options)`` would do; compiles nothing.

    With ``target="latency_ms=..."`` or ``profit="measure"`` the model is compiled and timed, without gradients.

    Args:
        model: any module; it is captured with Dynamo in its present mode and not run otherwise.
        inputs: example inputs.
        options: as for the backend.

    Returns:
        The report; with graph breaks, that of the graph with the most multiply-accumulates.
    """
    config = FusionConfig.from_options(options)
    reports: list[Report] = []

    def capture(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        reports.append(rewrite(gm, example_inputs, config)[1])
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=capture, dynamic=False)(*inputs)
    torch._dynamo.reset()
    if not reports:
        raise MctfError("Dynamo captured no graph of this model: it runs no tensor operation that can be compiled.")
    return max(reports, key=lambda r: r.macs_before)
