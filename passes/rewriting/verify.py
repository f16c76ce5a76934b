"""Pass: the rewritten graph keeps the contract of the original one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from mctf_compile.errors import PassError
from mctf_compile.narrowing import present
from mctf_compile.passes.axes import size_of
from mctf_compile.passes.pipeline import State, graph_pass
from mctf_compile.passes.planning.counts import Counts
from mctf_compile.passes.rewriting.rewriter import FusedOutput


@graph_pass("verify", requires=("result",))
def run(state: State) -> None:
    verify(present(state.normal), state.current, state.counts, state.kept_fused)


def verify(
    before: fx.GraphModule,
    after: fx.GraphModule,
    counts: Counts | None = None,
    kept_fused: Sequence[FusedOutput] = (),
) -> None:
    """Outputs have the shapes, dtypes and devices they had; the graph is well formed.

    ``counts``: whose symbols the shapes of ``after`` are in, where it is not those of ``before``. ``kept_fused``: those
    that may have another number of tokens; what says which follows the others.

    Raises ``PassError`` otherwise: never a wrong graph to the inner compiler.
    """
    after.graph.lint()
    old, new = (_outputs(gm) for gm in (before, after))
    tokens = {fused.output: fused.dim for fused in kept_fused}
    expected = len(old) + len({number for fused in kept_fused for number in (fused.size, fused.source)})
    if len(new) != expected:
        raise PassError(f"the rewritten graph has {len(new)} outputs instead of {expected}")
    for i, (a, b) in enumerate(zip(old, new)):
        if isinstance(a, torch.Tensor):
            shapes = [list(_shape(a)), list(_shape(b, counts))]
            if i in tokens and len(shapes[0]) == len(shapes[1]):
                for shape in shapes:
                    del shape[tokens[i]]
            same = shapes[0] == shapes[1] and a.dtype == b.dtype and a.device == b.device
            if not same:
                raise PassError(
                    f"output {i} of the rewritten graph is {b.dtype}{_shape(b)} on {b.device} "
                    f"instead of {a.dtype}{_shape(a)} on {a.device}"
                )


def _outputs(gm: fx.GraphModule) -> list[Any]:
    node = next(n for n in gm.graph.nodes if n.op == "output")
    values: list[Any] = []
    fx.node.map_arg(node.args[0], lambda n: values.append(n.meta.get("val")))
    return values


def _shape(value: torch.Tensor, counts: Counts | None = None) -> tuple[str, ...]:
    """The shape as expressions; comparing SymInts themselves would install guards."""
    sizes = map(size_of, value.shape)
    return tuple(str(s if counts is None or isinstance(s, int) else counts.original(s)) for s in sizes)
