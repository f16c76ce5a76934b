"""Pass: which blocks form a tower, one residual stream from block to block. Pure analysis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile

import networkx as nx
from torch import fx

from mctf_compile.narrowing import present
from mctf_compile.passes.analysis.dataflow import Dataflow
from mctf_compile.passes.analysis.structure import Block, Tower
from mctf_compile.passes.analysis.token_axes import Axes
from mctf_compile.passes.axes import FEATURES, Atom, atoms, hint_of
from mctf_compile.passes.pipeline import State, graph_pass
from mctf_compile.passes.rules import find_rule, schema_arguments
from mctf_compile.passes.subclasses import wrappers


@graph_pass("towers", requires=("blocks",), ensures=("towers",))
def run(state: State) -> None:
    state.towers = find_towers(present(state.blocks), present(state.axes), present(state.normal).graph)


def find_towers(blocks: Sequence[Block], axes: Axes, graph: fx.Graph) -> list[Tower]:
    """The blocks of a graph as chains along residual streams, in the order of their first blocks.

    1. A block goes on with the last block before it from which a way around every layer leads to its entry: the
       residual stream. An attention beside the stream, which is added to it, comes after those that work on one.
    2. Where all ways lead through layers, a block at no more positions is in the same tower: layers mix the tokens or
       take them to the next stage of a pyramid. At more positions a tower begins, as a decoder does that adds tokens.
    3. A block whose residual stream was not found goes on with the last block that leads to it. One to which no block
       leads begins a tower: another image, another model, the queries of a decoder.
    """
    if not blocks:
        return []
    flow, channels = Dataflow(graph), _channels(graph, axes)
    # By block the number of its residual stream in its tower.
    chains: list[dict[int, int]] = []
    for j in range(len(blocks)):
        before, same = _predecessor(blocks, j, flow, axes, channels)
        if before is None:
            chains.append({j: 0})
        else:
            chain = next(chain for chain in chains if before in chain)
            chain[j] = chain[before] if same else max(chain.values()) + 1
    return [_tower(blocks, chain) for chain in chains]


def _start(block: Block) -> fx.Node:
    return block.attention.query if block.entry is None else block.entry


def _end(block: Block) -> fx.Node:
    return block.exit or block.middle or block.attention.node


def _predecessor(
    blocks: Sequence[Block], j: int, flow: Dataflow, axes: Axes, channels: set[Atom]
) -> tuple[int | None, bool]:
    """The block whose tower block ``j`` goes on with, and whether it works on the same residual stream."""
    start = _start(blocks[j])
    leading = [i for i in reversed(range(j)) if _end(blocks[i]) is start or flow.leads(_end(blocks[i]), start)]
    if not leading:
        # Blocks side by side read one residual stream.
        return next((i for i in reversed(range(j)) if _start(blocks[i]) is start), None), True
    if blocks[j].entry is None:
        return leading[0], False
    on_streams = sorted(leading, key=lambda i: blocks[i].entry is None)
    around = next((i for i in on_streams if leads_around_layers(_end(blocks[i]), start, flow)), None)
    if around is not None:
        return around, True
    more = _positions(start, axes, channels) > _positions(_end(blocks[leading[0]]), axes, channels)
    return None if more else leading[0], False


def leads_around_layers(source: fx.Node, node: fx.Node, flow: Dataflow) -> bool:
    """Whether a way from ``source`` to ``node`` runs through no layer."""
    if source is node:
        return True
    inside = [n for n in flow.span(source, node) if n is source or not is_layer(n)]
    return node in inside and nx.has_path(flow.graph.subgraph(inside), source, node)


def is_layer(node: fx.Node) -> bool:
    """Whether what a node gives is no longer the residual stream that it reads."""
    rule = find_rule(node.target)
    return (rule is not None and rule.layer) or bool(wrappers(node))


def _channels(graph: fx.Graph, axes: Axes) -> set[Atom]:
    """The axes that layers read or write as channels."""
    found: set[Atom] = set()
    for node in graph.nodes:
        rule = find_rule(node.target)
        if rule is not None and rule.channels is not None:
            found.update(atoms(axes.of(schema_arguments(node)["input"])[rule.channels]))
    return found


def _positions(node: fx.Node, axes: Axes, channels: set[Atom]) -> int:
    """The number of entries of a value, one for all its channels."""
    value, count = node.meta["val"], 1
    for size, dim in zip(value.shape, axes.of(node)):
        if not all(atom.name == FEATURES or atom in channels for atom in atoms(dim)):
            count *= hint_of(size)
    return count


def _tower(blocks: Sequence[Block], chain: Mapping[int, int]) -> Tower:
    """A chain with the name of the module that all its blocks are in."""
    paths = [module.split(".") for i in chain if (module := blocks[i].module)]
    shared = [names[0] for names in takewhile(lambda names: len(set(names)) == 1, zip(*paths))]
    # One block's own module is more than a tower is called by.
    return Tower(tuple(chain), tuple(chain.values()), ".".join(shared if len(paths) > 1 else shared[:1]))
