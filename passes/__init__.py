"""Graph in, graph out: the passes, in the order in which they run.

Data flows one way, with one exception: what is learned of the rewritten graph (a planned fusion is undone before it
could pay; so much must be removed to meet a target) goes into ``State.findings``, and the plan is made again.
"""

from mctf_compile.passes.analysis import (
    blocks,
    branches,
    masks,
    normalize,
    observations,
    projections,
    queries,
    token_axes,
    towers,
)
from mctf_compile.passes.lowering import biases, choose_kernels, freezing, regions
from mctf_compile.passes.pipeline import Findings, Pass, State, graph_pass, run_passes
from mctf_compile.passes.planning import budget, plan
from mctf_compile.passes.rewriting import rewriter, verify

# What only looks at the graph, and what makes another of it.
ANALYSIS: tuple[Pass, ...] = (
    normalize.run,
    observations.run,
    token_axes.run,
    blocks.run,
    masks.run,
    queries.run,
    towers.run,
    branches.run,
)
REWRITING: tuple[Pass, ...] = (plan.run, choose_kernels.prepare, projections.run, rewriter.run, budget.run, verify.run)
# What makes it fit a device and the inner compiler.
LOWERING: tuple[Pass, ...] = (choose_kernels.run, biases.run, freezing.run, verify.run, regions.run)

__all__ = ["ANALYSIS", "LOWERING", "REWRITING", "Findings", "Pass", "State", "graph_pass", "run_passes"]
