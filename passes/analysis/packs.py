"""Several images packed into one sequence: which positions a constant mask lets see one another. Pure analysis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from mctf_compile.narrowing import function_of, present
from mctf_compile.passes.analysis.mutations import is_write
from mctf_compile.passes.rules import is_random

# A logit below this is no attention at all, whatever a soft bias adds to a mask. Masks are written with -inf,
# finfo.min, -1e9 or -1e4.
MASKED = -5e3

# A mask over more pairs is not evaluated.
LARGEST = 1 << 24
CPU = torch.device("cpu")


class Packs:
    """What the constant masks of a graph say, each looked at once.

    ``values`` holds the tensors of the graph's constants, as far as they are known.
    """

    def __init__(self, graph: fx.Graph, values: Mapping[fx.Node, Tensor]) -> None:
        self.values = values
        self._writes = [n for n in graph.nodes if is_write(n)]
        self._found: dict[tuple[fx.Node, bool], tuple[int, ...]] = {}

    def of(self, mask: fx.Node, reader: fx.Node, hides: bool = False) -> tuple[int, ...]:
        """The numbers of tokens of the images that a mask lets see themselves alone, in order; () for any other mask.

        One that hides nothing has one image.

        The mask, boolean or added to logits, is the same for all heads and all entries of a batch, and made of
        constants before ``reader`` reads it. ``hides``: it is boolean, and true where there is no attention.
        """
        if (mask, hides) not in self._found:
            value = self._evaluated(mask, reader)
            self._found[mask, hides] = () if value is None else runs(~value if hides else value)
        return self._found[mask, hides]

    def _evaluated(self, mask: fx.Node, reader: fx.Node) -> Tensor | None:
        """What a value always is, where it is computed from constants alone; its making may write into memory."""
        needed: set[fx.Node] = set()
        stack = [mask]
        while stack:
            node = stack.pop()
            if node in needed:
                continue
            if not self._is_constant(node):
                return None
            needed.add(node)
            stack.extend(node.all_input_nodes)
            if not stack:
                stack.extend(w for w in self._writes if w < reader and needed & self._written_by(w))
                stack = [w for w in stack if w not in needed]
        known: dict[fx.Node, Any] = {}
        for node in sorted(needed):
            known[node] = number(node, self.values) if node.op == "get_attr" else computed(node, known)
        value: Tensor = known[mask]
        return value

    def _is_constant(self, node: fx.Node) -> bool:
        """Whether a node is an operator that makes one tensor and draws nothing, or a single number of the graph's."""
        value = node.meta.get("val")
        if node.op == "get_attr":
            return number(node, self.values) is not None
        if node.op != "call_function" or not isinstance(node.target, OpOverload) or is_random(node.target):
            return False
        if not isinstance(value, Tensor) or not all(isinstance(size, int) for size in value.shape):
            return False
        return value.numel() <= LARGEST

    @staticmethod
    def _written_by(write: fx.Node) -> set[fx.Node]:
        """What a write changes: its target, and whatever that is a view of."""
        found: set[fx.Node] = set()
        stack = list(write.all_input_nodes[:1])
        while stack:
            node = stack.pop()
            if node not in found and node.op == "call_function":
                found.add(node)
                stack.extend(node.all_input_nodes[:1])
        return found


def number(node: fx.Node, values: Mapping[fx.Node, Tensor]) -> Tensor | None:
    """What the model holds, where that is one number that is not trained: such alone is taken for what it will be."""
    known = values.get(node)
    fixed = known is not None and known.numel() == 1 and not isinstance(known, torch.nn.Parameter)
    return present(known).detach().cpu() if fixed else None


def computed(node: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
    """What an operator makes of the ``known`` values of its operands, on the CPU."""
    args, kwargs = fx.node.map_aggregate(
        (node.args, node.kwargs),
        lambda a: known[a] if isinstance(a, fx.Node) else CPU if isinstance(a, torch.device) else a,
    )
    return function_of(node)(*args, **kwargs)


def runs(mask: Tensor) -> tuple[int, ...]:
    """The lengths of the runs of positions that see one another and nothing else in a mask [..., N, N]; () if none do.

    A mask that hides nothing has one run.
    """
    if mask.dim() < 2 or mask.shape[-1] != mask.shape[-2] or not mask.numel():
        return ()
    seen = mask if mask.dtype is torch.bool else mask > MASKED
    flat = seen.reshape(-1, *seen.shape[-2:])
    first = flat[0].int().argmax(1)
    blocks = first[:, None] == first[None, :]
    if bool((first.diff() < 0).any()) or not bool((flat == blocks).all()):
        return ()
    return tuple(torch.unique_consecutive(first, return_counts=True)[1].tolist())
