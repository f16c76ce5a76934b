"""The parts that blocks cut a graph into: what comes before the first, each block, what is between, and the rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from mctf_compile.narrowing import present
from mctf_compile.passes.analysis.structure import Block
from mctf_compile.passes.rules import Elements, find_rule

aten = torch.ops.aten

# Where a node of a rewritten graph keeps the number of its part.
SEGMENT = "mctf_segment"
# And the branch that it was made for, where branches alone run on fused tokens: the number of its block, and its kind.
BRANCH = "mctf_branch"


def ends(blocks: Sequence[Block]) -> set[fx.Node]:
    """The nodes behind which a graph is cut: the residual streams that blocks read, and those that they leave."""
    entries = {block.entry for block in blocks}
    found = entries | {block.exit for block in blocks} | {end_of(block, entries) for block in blocks}
    return {node for node in found if node is not None}


def end_of(block: Block, entries: set[fx.Node | None]) -> fx.Node | None:
    """The residual stream behind a block and its MLP; None where no residual stream leads around its attention.

    An MLP that stands beside attention, or works on the tokens in another layout, is not what ``exit`` looks for: one
    more addition to the stream belongs to the block then, if one comes before the ``entries`` of others.
    """
    if block.exit is not block.middle and block.exit is not None:
        return block.exit
    node, added = block.middle, False
    while node is not None and node not in entries:
        following = [user for user in node.users if _lays_out(user) or (_adds(user) and not added)]
        # Of a stream that is added to and laid out for something else, the sum goes on.
        following.sort(key=_adds, reverse=True)
        if not following:
            break
        added = added or _adds(following[0])
        node = following[0]
    return node if added or node in entries else block.middle


def _adds(node: fx.Node) -> bool:
    return getattr(node.target, "overloadpacket", None) is aten.add


def _lays_out(node: fx.Node) -> bool:
    rule = find_rule(node.target)
    return rule is not None and rule.elements in (Elements.REGROUPED, Elements.REORDERED)


def segments(graph: fx.Graph, blocks: Sequence[Block]) -> dict[fx.Node, int]:
    """The number of each node's part in the graph in which the blocks were found."""
    cuts, numbers, number = ends(blocks), {}, 0
    for node in graph.nodes:
        numbers[node] = number
        number += node in cuts
    return numbers


def owners(graph: fx.Graph, blocks: Sequence[Block]) -> dict[int, int]:
    """By the number of a part the index of the block that it belongs to, where it belongs to one.

    A part of two blocks (parallel ones read one stream) is the first one's.
    """
    numbers = segments(graph, blocks)
    found: dict[int, int] = {}
    entries = {block.entry for block in blocks}
    for index, block in enumerate(blocks):
        if block.entry is not None:
            for number in range(numbers[block.entry] + 1, numbers[present(end_of(block, entries))] + 1):
                found.setdefault(number, index)
    return found
