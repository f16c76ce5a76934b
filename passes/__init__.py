"""Graph in, graph out: the passes, in the order in which they run.

graph -> normalize -> observations -> token_axes -> blocks -> plan -> projections -> rewrite -> budget ->
kernels -> biases -> verify -> inner compiler

Data flows one way, with one exception: what is learned of the rewritten graph (a planned fusion is undone before it
could pay; so much must be removed to meet a target) goes into ``State.findings``, and the plan is made again.
"""

from __future__ import annotations

from dataclasses import replace

from mctf_compile.errors import ConfigError
from mctf_compile.methods import Site
from mctf_compile.passes import biases as _biases
from mctf_compile.passes import blocks as _blocks
from mctf_compile.passes import budget as _budget
from mctf_compile.passes import kernels as _kernels
from mctf_compile.passes import masks as _masks
from mctf_compile.passes import normalize as _normalize
from mctf_compile.passes import observations as _observations
from mctf_compile.passes import plan as _plan
from mctf_compile.passes import projections as _projections
from mctf_compile.passes import rewrite as _rewrite
from mctf_compile.passes import token_axes as _token_axes
from mctf_compile.passes import verify as _verify
from mctf_compile.passes.counts import Counts
from mctf_compile.passes.macs import count_macs, macs_by_counts
from mctf_compile.passes.pipeline import Findings, Pass, State, graph_pass, run_passes


@graph_pass(requires=("gm", "inputs"), ensures=("normal",))
def normalize(state: State) -> None:
    state.normal = _normalize.normalize(state.gm, state.inputs)


@graph_pass(requires=("normal",), ensures=("observations",))
def observations(state: State) -> None:
    state.observations = _observations.take_observations(state.normal, state.config.method.name)


@graph_pass(requires=("normal",), ensures=("axes",))
def token_axes(state: State) -> None:
    state.axes = _token_axes.token_axes(state.normal.graph)


@graph_pass(requires=("axes", "observations"), ensures=("blocks",))
def blocks(state: State) -> None:
    method = state.config.method
    protected = None if method.protected == "auto" else method.protected
    found = _blocks.find_blocks(state.normal.graph, state.axes, protected)
    values = _normalize.constants(state.gm, state.normal, state.examples)
    found = _masks.find_masks(found, state.axes, values)
    state.blocks = _observations.assign(state.observations, found, state.normal.graph)


@graph_pass(requires=("blocks",), ensures=("plan",))
def plan(state: State) -> None:
    findings, method = state.findings, state.method
    counted = state.adjustable or state.unsettled
    if counted:
        method = _plan.typical(method, state.blocks)
    state.plan = _plan.make_plan(state.blocks, state.axes, method, findings.declined, findings.whole,
                                 any(o.state == "training" for o in state.observations), counted)
    if state.plan.fusing:
        _kernels.prepare_kernels(state.config.lowering.kernels, state.inputs)


@graph_pass(requires=("plan",))
def projections(state: State) -> None:
    if state.plan.site is not Site.AHEAD:
        return
    found = {}
    for planned in state.plan.fusing:
        site = planned.block.attention
        found |= _projections.find_projections(
            [site.query, site.key, site.value], planned.block.entry, state.axes
        )
    state.plan = replace(state.plan, projections=found)


@graph_pass(requires=("plan",), ensures=("result",))
def rewrite(state: State) -> str | None:
    state.counts = None
    if (state.adjustable or state.unsettled) and not state.plan.relaxed:
        state.counts = Counts(state.inputs, [b.tokens_out for b in state.plan.fusing])
    outcome = _rewrite.rewrite_graph(state.normal, state.inputs, state.axes, state.plan, state.counts)
    state.result, state.unmerges = outcome.graph, outcome.unmerges
    known = state.findings
    declined = known.declined | outcome.wasted
    if outcome.unmerges and not outcome.wasted and count_macs(state.result) >= count_macs(state.normal):
        reason = "giving the original tokens back for later operators costs more than the fusion saves"
        declined = declined | {block.index: reason for block in state.plan.fusing}
    state.findings = replace(known, declined=declined, whole=known.whole | outcome.whole)
    return None if state.findings == known else "plan"


@graph_pass(requires=("result",))
def budget(state: State) -> str | None:
    if not state.unsettled:
        return None
    if state.counts is None:
        raise ConfigError("r='auto' and profit='model' need the tokens that are removed, and a model in training keeps "
                          "all; set r while it trains.")
    declined = state.findings.declined
    _budget.settle(state, macs_by_counts(state.result, state.counts), _budget.estimated(state))
    # Where blocks dropped out, what a target takes is found anew without them.
    state.unsettled = state.method.solved_for is not None
    return None if state.adjustable and state.findings.declined == declined else "plan"


@graph_pass(requires=("result",), ensures=("portable",))
def kernels(state: State) -> None:
    state.portable = state.result
    gradients = _kernels.records_gradients(state.normal, state.inputs)
    state.result, state.remarks = _kernels.choose_kernels(state.result, state.config.lowering.kernels, gradients)


@graph_pass(requires=("result",))
def biases(state: State) -> None:
    if state.config.lowering.inner == "inductor":
        _biases.loosen_biases(state.result)


@graph_pass(requires=("result",))
def verify(state: State) -> None:
    _verify.verify(state.normal, state.result, state.counts)


# What only looks at the graph.
ANALYSIS: tuple[Pass, ...] = (normalize, observations, token_axes, blocks)
PIPELINE: tuple[Pass, ...] = (*ANALYSIS, plan, projections, rewrite, budget, kernels, biases, verify)

__all__ = ["ANALYSIS", "PIPELINE", "Findings", "Pass", "State", "graph_pass", "run_passes"]
