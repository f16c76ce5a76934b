"""Several processes that share the work, as ``torchrun`` starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from mctf_compile.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among ``size``: number ``rank``. What they tell one another are plain values and CPU tensors."""

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ConfigError(f"process {self.rank} of {self.size}: RANK counts from 0 to WORLD_SIZE - 1")

    @property
    def first(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The value of every process, in the order of their numbers; all of them must call it."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


ALONE = World()


@contextmanager
def world(backend: str = "gloo") -> Iterator[World]:
    """The processes that ``torchrun`` started, where it did; else this one alone.

    ``backend``: what they exchange tensors by, as ``torch.distributed`` names it.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else ALONE
        return
    dist.init_process_group(backend)
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
