"""Modules that belong to the user's model and tell a method of its tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Attached(nn.Module):
    """Base of the modules that ``mctf_compile.attach`` adds, one per block.

    ``forward`` takes the tokens that it reads, [B, N, C], and says something of each: [B, N, K]. It is run
    from a hook before the module that reads the same tokens; without the compiler that changes nothing.
    """

    method: str

    def __init__(self) -> None:
        super().__init__()
        self.untrained = True
        nn.Module.register_load_state_dict_post_hook(self, _loaded)

    def train(self, mode: bool = True) -> Attached:
        self.untrained &= not mode
        return super().train(mode)

    def added_to(self, model: nn.Module) -> None:
        """Called with the model that this is part of now; what it needs of a call beside tokens is hooked up here."""

    @property
    def state(self) -> str:
        return "training" if self.training else "untrained" if self.untrained else "trained"

    def observe(self, reader: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The hook: hands on what the reader is given, with what this module says of it beside it."""
        x: Tensor = args[0]
        return (torch.ops.mctf.observe(x, self(x), self.method, self.state), *args[1:])


def _loaded(module: Attached, keys: object) -> None:
    module.untrained = False
