"""What the analysis finds in a graph: data alone."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from torch import fx

from mctf_compile.passes.axes import Dim, Tokens


class Mask(enum.IntEnum):
    """How an operand of the logits depends on tokens, from the least to the most restricting."""

    NONE = 0
    BIAS = 1  # a soft bias: fused tokens have the mean of their members'
    TOKENS = 2  # says of single tokens whether they take part (padding): others never fuse with them
    PACKED = 3  # lets the tokens of each of several images in one sequence see those of their own image alone
    GIVEN = 4  # has a number for every pair of tokens, and comes from outside the graph, where nobody can read it
    PAIRS = 5  # says which token may see which: no two tokens can stand for one another


@dataclass(frozen=True)
class Masks:
    """The masks over single tokens of a graph.

    ``padding``: by mask the values each of which alone tells which tokens it masks out; ``marks``: those that together
    tell all of it, where they are known. ``assumed``: the inputs with a
    number for every pair of tokens that were taken for padding.
    """

    padding: dict[fx.Node, frozenset[fx.Node]]
    marks: dict[fx.Node, frozenset[fx.Node]]
    assumed: frozenset[fx.Node] = frozenset()


@dataclass(frozen=True)
class Attention:
    """A softmax over a token axis contracted with values over that axis.

    ``node`` contracts. ``query``, ``key``, ``value`` are the operands of the two products. Where the
    attention is spelled out, ``product`` is q kᵀ and ``weights`` the softmax; else both are None.
    """

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    product: fx.Node | None
    weights: fx.Node | None
    key_axis: Dim
    query_axis: Dim


@dataclass(frozen=True)
class Block:
    """An attention, the residual stream around it, and the MLP that follows.

    ``entry``: the residual stream that attention reads; ``middle``: the residual add after attention;
    ``exit``: the residual stream after the MLP (``middle`` where no MLP follows). ``problem`` says why
    no token can be fused here, else None. ``mask``: what the logits allow (see ``masks``), and
    ``padding`` the values each of which alone tells which tokens they leave out.
    ``pack``: the mask that keeps several images in one sequence apart, if any, and ``packed`` the lengths of the runs
    of positions within which tokens may be fused then, in order.
    ``queries``: whether its tokens are a decoder's, which read another sequence (see ``queries``).
    ``learned``: what a module attached to it says of its tokens (see ``observations``). ``module``: the path of the
    module that attention runs in, where the graph tells; for people to read.
    """

    attention: Attention
    tokens: Tokens | None
    entry: fx.Node | None = None
    middle: fx.Node | None = None
    exit: fx.Node | None = None
    problem: str | None = None
    mask: Mask = Mask.NONE
    padding: frozenset[fx.Node] = frozenset()
    pack: fx.Node | None = None
    packed: tuple[int, ...] = ()
    queries: bool = False
    learned: fx.Node | None = None
    module: str | None = None


@dataclass(frozen=True)
class Tower:
    """The blocks along one residual stream, by their place among all, and the module around them, where known.

    Numbers of blocks, schedules and targets are those of a tower. ``streams``: for each block the number of its
    residual stream, of which a tower has several where layers lead from one to the next.
    """

    blocks: tuple[int, ...]
    streams: tuple[int, ...]
    module: str = ""
