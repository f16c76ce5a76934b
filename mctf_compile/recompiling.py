"""Models that Dynamo compiles anew for every size of their inputs, until it compiles them no more."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

from torch import Tensor, fx

from mctf_compile.compat import compilation, fixed_size

Shapes = tuple[tuple[int | None, ...], ...]

# By frame, the shapes that each of its compilations so far was for; None is a size of any value.
_seen: dict[int, list[Shapes]] = {}


def last_size(gm: fx.GraphModule, inputs: Sequence[Any]) -> str | None:
    """What to say of a graph if it is the last that Dynamo compiles of a function whose inputs' sizes vary.

    Dynamo runs what it compiles no more as it was written, and asks no backend. Call it once for each graph.
    """
    number, limit, frame = compilation()
    if frame is None:
        return None
    shapes = [tuple(s if isinstance(s, int) else None for s in x.shape) for x in inputs if isinstance(x, Tensor)]
    seen = _seen.setdefault(frame, [])
    if number == 0:
        seen.clear()
    seen.append(tuple(shapes))
    if number + 1 < limit or len(set(seen)) < limit:
        return None
    where = next(filter(None, (fixed_size(gm, *place) for place in _varying(seen))), None)
    remedy = MARK if where is None else f"{FIXED}: {where}"
    return (
        f"the model has been compiled for {limit} shapes of its inputs, and Dynamo compiles no more "
        f"(torch._dynamo.config.recompile_limit): at another it runs as it was written, and fuses no tokens. {remedy}"
    )


MARK = (
    "Compile one graph for all sizes: torch.compile(..., dynamic=True), or torch._dynamo.mark_dynamic(images, dim) "
    "before the first call."
)
FIXED = "Dynamo left a size open that varies, and the model asks for its value; where it does not, one graph serves all"


def _varying(seen: Sequence[Shapes]) -> list[tuple[int, int]]:
    """The tensors, and dimensions of them, whose sizes were not the same in all compilations."""
    ranks = [{len(shapes[i]) for shapes in seen} for i in range(min(map(len, seen)))]
    places = [place for i, rank in enumerate(ranks) if len(rank) == 1 for place in product([i], range(*rank))]
    return [(i, d) for i, d in places if len({shapes[i][d] for shapes in seen}) > 1]
