"""Pass: take what attached modules say of the tokens out of the program, and keep it as evidence."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from mctf_compile.narrowing import present
from mctf_compile.passes.analysis.dataflow import Dataflow
from mctf_compile.passes.analysis.structure import Block
from mctf_compile.passes.pipeline import State, graph_pass


@graph_pass("observations", requires=("normal",), ensures=("observations",))
def run(state: State) -> None:
    state.observations = take_observations(present(state.normal), [state.config.method.name])


@dataclass(frozen=True)
class Observation:
    """``learned`` is what an attached module says of the value ``read``: of a method, [B, N, K] of its tokens.

    ``method``: what the module belongs to; ``state``: "untrained", "training" or "trained". ``readers``: what reads the
    value in the program behind the module.
    """

    method: str
    state: str
    read: fx.Node
    learned: fx.Node
    readers: tuple[fx.Node, ...]


def take_observations(gm: fx.GraphModule, methods: Collection[str]) -> list[Observation]:
    """Remove every ``mctf.observe`` from a graph; those of other methods than these leave nothing behind.

    Before::  y = mctf.observe(x, z, "dtem", "trained");  q = aten.linear(y, ...)
    After::   q = aten.linear(x, ...)
    """
    found = []
    for node in list(gm.graph.nodes):
        if node.target is torch.ops.mctf.observe.default:
            (read, learned, of, state), readers = node.args, tuple(node.users)
            node.replace_all_uses_with(read)
            gm.graph.erase_node(node)
            if of in methods:
                found.append(Observation(of, state, read, learned, readers))
    kept = {o.learned for o in found}
    gm.graph.eliminate_dead_code(lambda node: node in kept or node.is_impure())
    gm.recompile()
    return found


def assign(observations: Sequence[Observation], blocks: list[Block], graph: fx.Graph) -> list[Block]:
    """The blocks, each with the observation of what lies between its residual stream and its query."""
    if not observations:
        return blocks
    flow = Dataflow(graph)
    found = []
    for block in blocks:
        own = next((o for o in observations if is_of(o, block, flow)), None)
        found.append(block if own is None else replace(block, learned=own.learned))
    return found


def is_of(o: Observation, block: Block, flow: Dataflow) -> bool:
    """Whether what is read lies between the residual stream of a block that can be followed and its query."""
    if block.tokens is None:
        return False
    before = o.read is block.entry or flow.leads(present(block.entry), o.read)
    return before and (o.read is block.attention.query or flow.leads(o.read, block.attention.query))
