"""``padding="assume"``: what was taken for granted of masks is looked at when they first come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mctf_compile.errors import ConfigError
from mctf_compile.passes.analysis.packs import MASKED


class Checked:
    """A compiled graph whose first call looks at the masks among its inputs.

    Args:
        run: takes the graph's inputs.
        masks: the positions of those that were taken for padding.
    """

    def __init__(self, run: Callable[..., Any], masks: Sequence[int]) -> None:
        self.run, self._due = run, tuple(masks)

    def __call__(self, *inputs: Any) -> Any:
        if self._due:
            given = [inputs[i] for i in self._due]
            if any(isinstance(mask, FakeTensor) for mask in given):
                return self.run(*inputs)
            for mask in given:
                require_padding(mask)
            self._due = ()
        return self.run(*inputs)


def require_padding(mask: Tensor) -> None:
    """Raise ``ConfigError`` for a mask [B, H, N, N], [B, N, N] or [N, N] that is none of padding.

    In one of padding each key is masked for all queries, in all heads, or for none but those that are masked as keys
    too and, as queries, see nothing.
    """
    with torch.no_grad():
        masked = ~mask if mask.dtype is torch.bool else mask <= MASKED
        keys = masked.all(-2, keepdim=True)
        queries = masked.all(-1, keepdim=True)
        of_pairs = masked != (keys | queries)
        unlike = queries & ~keys.mT
        by_head = masked != masked[:, :1] if masked.dim() == 4 else torch.zeros_like(masked)
        wrong = bool(of_pairs.any() | unlike.any() | by_head.any())
    if wrong:
        raise ConfigError(
            f"padding='assume' was given, and the attention mask {list(mask.shape)} of the first call is none of "
            "padding: it masks pairs of tokens, or queries that it does not mask as keys. Leave the option out, or "
            "give a mask that masks each key for all queries."
        )
