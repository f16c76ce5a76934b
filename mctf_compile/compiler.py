"""From a captured graph to a fused graph and its report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import fx
from torch._dynamo.convert_frame import compile_lock

import mctf_compile.kernels  # noqa: F401  registers torch.ops.mctf
from mctf_compile.capture import Captured, capture
from mctf_compile.config import FusionConfig
from mctf_compile.errors import NothingFusedError, PassError, UnsupportedGraph
from mctf_compile.inner.clock import Clock
from mctf_compile.logs import tell
from mctf_compile.narrowing import present
from mctf_compile.options.schedule import NOT_CHOSEN
from mctf_compile.passes import ANALYSIS, LOWERING, REWRITING, State, run_passes
from mctf_compile.passes.analysis.normalize import constants, fake_inputs
from mctf_compile.passes.analysis.reasons import why_no_attention
from mctf_compile.passes.lowering.autocast import devices_of, keep_autocast_out
from mctf_compile.passes.lowering.choose_kernels import choose_kernels, has_own_operators
from mctf_compile.passes.planning.macs import count_macs, macs_by_block, macs_by_counts, work_by_counts
from mctf_compile.passes.planning.plan import make_plan, tokens_remaining
from mctf_compile.passes.reparameterizing import shiftadd
from mctf_compile.report import Report
from mctf_compile.tradeoff import block_reports, tradeoff

# Graph breaks that a report names.
SHOWN = 3


def rewrite(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: FusionConfig | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
) -> tuple[fx.GraphModule, Report]:
    """Insert token fusion into a captured graph, for any compiler that takes FX graphs.

    Args:
        gm: a graph of torch functions or ATen operators, as Dynamo or ``make_fx`` gives it; not changed.
        example_inputs: its inputs, real or fake.
        config: the options; defaults where None.
        kwargs: inputs that follow, by the names that they have in the graph.

    Returns:
        The rewritten graph in one piece (the given one where nothing fuses) and the report. Outputs have the
        shapes, dtypes and devices of the original's; with ``outputs="fused"``, those that the report names have fewer
        tokens, and behind all follow the sizes [B, M] and the sources [B, N] of these (see ``FusedTokens``).

    Raises:
        ConfigError: an option does not fit the model.
        NothingFusedError: ``strict`` is set and nothing could be fused.
        PassError: a pass fails, which is a fault of this package.
        TypeError: ``kwargs`` are not the graph's other inputs.
    """
    config = config or FusionConfig()
    inputs = [*example_inputs, *_by_name(gm, len(example_inputs), kwargs or {})]
    gm = reparameterized(gm, inputs, config)
    state, report = run_pipeline(gm, inputs, config, one_piece=True)
    return (in_one_piece(state) if report.fused else gm), report


def reparameterized(gm: fx.GraphModule, example_inputs: Sequence[Any], config: FusionConfig) -> fx.GraphModule:
    """The graph that is to be fused: ``gm``, or one with other parts, where the option ``reparameterize`` says so.

    Whatever is not fused in it then is compiled as it is there.

    Raises ``ConfigError`` where its modules are not attached to the model, or do not fit it.
    """
    if config.lowering.reparameterize is None:
        return gm
    with compile_lock:
        return shiftadd.reparameterize(gm, fake_inputs(gm, example_inputs), example_inputs)


def in_one_piece(state: State) -> fx.GraphModule:
    """The graph that was lowered as a whole, to run under any autocast."""
    lowered = present(state.lowered)
    keep_autocast_out(lowered, devices_of(lowered.graph.nodes))
    return lowered


def dense(gm: fx.GraphModule, state: State | None) -> fx.GraphModule:
    """What is compiled where nothing fuses: ``gm``, with kernels for operators of this package where it has such.

    ``state``: what the passes found of ``gm``, or None.
    """
    if state is None or state.normal is None or not has_own_operators(state.normal):
        return gm
    lowered, _ = choose_kernels(state.normal, state.config.lowering.kernels, state.inputs)
    keep_autocast_out(lowered, devices_of(lowered.graph.nodes))
    return lowered


def _by_name(gm: fx.GraphModule, given: int, kwargs: Mapping[str, Any]) -> list[Any]:
    """Inputs of a graph that are given by name, in the order of those that follow the first ``given``."""
    rest = [str(n.target) for n in gm.graph.find_nodes(op="placeholder")][given:]
    if kwargs and kwargs.keys() != set(rest):
        raise TypeError(f"kwargs has {list(kwargs)}, where the graph has the inputs {rest}.")
    return [kwargs[name] for name in rest] if kwargs else []


def fuse_or_decline(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: FusionConfig,
    adjustable: bool = False,
    one_piece: bool = False,
) -> tuple[State | None, Report]:
    """``run_pipeline``, where a pass that fails is a reason to leave the graph dense.

    It raises all the same with ``strict``, or where the environment says ``MCTF_FAULTS=raise``.
    """
    try:
        return run_pipeline(gm, example_inputs, config, adjustable, one_piece)
    except PassError as error:
        if config.lowering.strict or os.environ.get("MCTF_FAULTS") == "raise":
            raise
        return None, _dense(config, str(error))


def run_pipeline(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: FusionConfig,
    adjustable: bool = False,
    one_piece: bool = False,
) -> tuple[State, Report]:
    """All that the passes found, and the report. ``adjustable`` and ``one_piece``: see ``State``.

    Graphs are traced one at a time, and while Dynamo compiles none: tracing changes modules and the metadata of nodes
    for the whole process.
    """
    with compile_lock:
        inputs = fake_inputs(gm, example_inputs)
        state = State(gm, inputs, config, example_inputs, adjustable, one_piece, config.undecided, Clock)
        try:
            report = make_report(run_passes((*ANALYSIS, *REWRITING, *LOWERING), state))
        except UnsupportedGraph as error:
            report = _dense(config, str(error), state.seconds)
    tell(state, report)
    if config.lowering.strict and not report.fused:
        reasons = "\n".join(f"  block {b.index}: {b.reason}" for b in report.blocks)
        raise NothingFusedError(f"no block fuses tokens ({report.reason}).\n{reasons}".rstrip())
    return state, report


def _dense(config: FusionConfig, reason: str, seconds: Mapping[str, float] = MappingProxyType({})) -> Report:
    """The report of a graph that the passes could not follow."""
    return Report([], lambda: (0, 0), reason=reason, method=config.method.name, seconds=dict(seconds))


def make_report(state: State) -> Report:
    """The report of a finished run of the passes."""
    plan, normal = present(state.plan), present(state.normal)
    planned, fused = plan.blocks, bool(plan.fusing)
    if state.adjustable or state.varies:
        # The graph was made at other numbers than those of the options and the example.
        planned = make_plan(state, state.config.method, state.findings.r, adjustable=True).blocks
    reason = None
    # What a report keeps for later needs no tensors.
    bare = replace(state, examples=())
    if not fused:
        reasons = {b.reason for b in planned} - {NOT_CHOSEN} or {NOT_CHOSEN}
        reason = (
            why_no_attention(normal.graph, present(state.axes), constants(state.gm, normal, state.examples))
            if not planned
            else (reasons.pop() if len(reasons) == 1 else "no block can fuse")
        )
    return Report(
        blocks=block_reports(planned, state.branch_macs),
        towers=_tower_names(state),
        count=partial(_count, bare),
        unmerged=list(dict.fromkeys(f"{u.node.name}: {u.reason}" for u in state.unmerges)),
        kept_fused=[fused.output for fused in state.kept_fused] if fused else [],
        reason=reason,
        method=plan.method.name,
        target=state.findings.met,
        remarks=_remarks(state) if fused else [],
        seconds=state.seconds,
        count_blocks=partial(_count_blocks, bare),
        count_tradeoff=partial(tradeoff, bare),
    )


def _tower_names(state: State) -> list[str]:
    """What to call the towers: the module around their blocks, and of one that runs several times, which run."""
    blocks, towers = present(state.blocks), present(state.towers)
    made_of = [tuple(blocks[i].module for i in tower.blocks) for tower in towers]
    names = []
    for i, tower in enumerate(towers):
        runs = [j for j, other in enumerate(made_of) if other == made_of[i] and tower.module]
        run = f", run {runs.index(i) + 1} of {len(runs)}" if len(runs) > 1 else ""
        names.append((f"tower {i}: {tower.module}" if tower.module else f"tower {i}") + run)
    return names


def _remarks(state: State) -> list[str]:
    name = present(state.plan).method.name
    if not any(o.state == "untrained" for o in present(state.observations)):
        return state.remarks
    return [
        f"the modules of method {name!r} are untrained: train them, or load their weights (mctf_{name})",
        *state.remarks,
    ]


def _count(state: State) -> tuple[int, int]:
    """Multiply-accumulates before and after."""
    dense = count_macs(present(state.normal))
    if not present(state.plan).fusing:
        return dense, dense
    result, counts = present(state.result), state.counts
    fused = count_macs(result) if counts is None else macs_by_counts(result, counts)(_remaining(state))
    return dense, fused


def _count_blocks(state: State) -> list[tuple[int, int] | None]:
    """The same of each block; None where that is not known."""
    normal, plan = present(state.normal), present(state.plan)
    blocks = [b.block for b in plan.blocks]
    if not plan.fusing or state.counts is None:
        return macs_by_block(normal, state.result if plan.fusing else None, blocks)
    fused = work_by_counts(normal, present(state.result), blocks, state.counts)(_remaining(state))[1]
    dense = macs_by_block(normal, None, blocks)
    return [None if a is None or b is None else (a[0], b) for a, b in zip(dense, fused, strict=True)]


def _remaining(state: State) -> list[int]:
    """What each fusing block leaves of an adjustable result, for the example and the options."""
    return tokens_remaining(state, requests=state.findings.r)


def explain(model: torch.nn.Module, *inputs: Any, kwargs: Mapping[str, Any] | None = None, **options: Any) -> Report:
    """Report what ``torch.compile(model, backend="mctf", options=options)`` would do; compiles nothing.

    The model is captured in its present mode and not run: it, the random state and what Dynamo has compiled stay as
    they are. One with graph breaks is run on tensors without data; where it asks for their values, a copy of it is run.
    With ``target="latency_ms=..."`` or ``profit="measure"`` its graph is compiled and timed, on copies of the inputs.

    Args:
        model: any module or function.
        inputs: example inputs.
        kwargs: those that are given by name.
        options: as for the backend.

    Returns:
        The report; with graph breaks, that of the graph of those with attention which has the most
        multiply-accumulates. Its ``remarks`` say how many graphs there are, and where they break.

    Raises:
        ConfigError: an option is wrong, or does not fit the model.
        NothingFusedError: with ``strict=True``.
        MctfError: Dynamo captures nothing of the model.
    """
    config = FusionConfig.from_options(options)

    def reported(gm: fx.GraphModule, given: Sequence[Any]) -> Report:
        return fuse_or_decline(reparameterized(gm, given, config), given, config)[1]

    captured = capture(model, inputs, kwargs or {}, reported)
    report = captured.largest(lambda report: (bool(report.blocks), report.macs_before))
    return replace(report, remarks=[*report.remarks, *_in_pieces(captured)])


def _in_pieces(captured: Captured[Report]) -> list[str]:
    """What is to be said of a model that is several graphs."""
    graphs, with_attention = len(captured.found), sum(bool(report.blocks) for report in captured.found)
    remarks = []
    if graphs > 1:
        named, more = "; ".join(map(str, captured.breaks[:SHOWN])), len(captured.breaks) - SHOWN
        breaks = f", with a graph break at {named}" + (f" and {more} more" if more > 0 else "") if named else ""
        remarks.append(
            f"Dynamo makes {graphs} graphs of the model, {with_attention} of them with attention{breaks}; "
            "this is one of them, and each gives its tokens back at its end"
        )
    if captured.stopped is not None:
        remarks.append(f"looked at up to a graph break alone: {captured.stopped}")
    return remarks
