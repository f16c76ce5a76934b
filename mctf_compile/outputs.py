"""``outputs="fused"``: tensors that a model returns with its fused tokens, and what is known of these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mctf_compile.errors import MctfError
from mctf_compile.passes.rewriting.rewriter import FusedOutput


class FusedTokens(NamedTuple):
    """What the M tokens of an output stand for.

    Attributes:
        size: float [B, M], how many original tokens each is made of.
        source: int64 [B, N], the place among the M of each original token; of one that was dropped, that of the token
            which is given back in its place.
    """

    size: Tensor
    source: Tensor


# What the outputs that are still alive stand for. A tensor is itself alone: its views are others.
_KNOWN = WeakTensorKeyDictionary()


def fused_tokens(output: Tensor) -> FusedTokens:
    """What the tokens of a tensor stand for that a model compiled with ``outputs="fused"`` has returned.

    ``output.gather(1, tokens.source[..., None].expand(-1, -1, C))`` has all N tokens again, for an output [B, M, C].

    Args:
        output: the tensor itself, as the model returned it.

    Raises:
        MctfError: it is no such tensor: a view or a copy, or one of a model in which nothing fused.
    """
    found: FusedTokens | None = _KNOWN.get(output)
    if found is None:
        raise MctfError(
            'this is no tensor that a model compiled with outputs="fused" returned with fused tokens. Give the very '
            "tensor that it returned, not a view or a copy; where nothing fused, or an output has no dimension of "
            "tokens alone, it has all its tokens."
        )
    return found


class Noted:
    """A compiled graph some of whose outputs keep their fused tokens: what these are is noted, not returned.

    Args:
        run: takes the graph's inputs; returns its outputs, with sizes and sources behind them or, where all tokens were
            computed, without.
        kept_fused: which outputs, and where their sizes and sources are.
    """

    def __init__(self, run: Callable[..., Sequence[Any]], kept_fused: Sequence[FusedOutput]) -> None:
        self.run, self.kept_fused = run, kept_fused
        self.outputs = min(fused.size for fused in kept_fused)

    def __call__(self, *inputs: Any) -> list[Any]:
        returned = list(self.run(*inputs))
        outputs = returned[: self.outputs]
        for fused in self.kept_fused:
            x = outputs[fused.output]
            if len(returned) > self.outputs:
                known = FusedTokens(returned[fused.size], returned[fused.source])
            else:
                shape = 1 if fused.batch is None else x.shape[fused.batch], x.shape[fused.dim]
                all_of_them = torch.arange(shape[1], device=x.device).expand(shape)
                known = FusedTokens(torch.ones(shape, device=x.device), all_of_them)
            _KNOWN[x] = known
        return outputs
