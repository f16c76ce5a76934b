"""Which images each step sees, and how they are changed by chance: all of it by the seed and their numbers alone."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mctf_compile import packages
from mctf_compile.errors import ConfigError, MctfError
from mctf_compile.evaluating.images import Images
from mctf_compile.evaluating.sharding import ALONE, World


def number_from(*parts: int | str) -> int:
    """A number of 63 bits that depends on all parts, and on nothing else."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


@contextmanager
def chance(*parts: int | str) -> Iterator[None]:
    """Within, whatever is left to chance depends on the parts alone; what was before is as it was afterwards.

    That is of Python, PyTorch on a CPU and NumPy: timm's augmentations draw from all three.
    """
    numpy = packages.required("numpy", "augmentation", "numpy").random
    seed, python, arrays = number_from(*parts), random.getstate(), numpy.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        numpy.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            numpy.set_state(arrays)


@dataclass(frozen=True)
class Part:
    """Images that are computed at once: their ``numbers`` in an ``epoch``, both from 0 on."""

    epoch: int
    numbers: list[int]


@dataclass(frozen=True)
class Plan:
    """The parts that this process computes from a step on, in their order.

    The images of a step are the same however many processes there are, and so are those of each of its ``accumulate``
    parts. An epoch has each image at most once: those that are left over when no whole step is left, another each time,
    are not seen.

    Args:
        images: how many there are.
        batch: images of a step.
        accumulate: parts of a step.
        epochs: how often the images are gone through.
        seed: of their order.
        start: the steps that are done.
        world: the processes that share each part.

    Raises ``ConfigError`` where the images of a step cannot be shared evenly, or are more than there are.
    """

    images: int
    batch: int
    accumulate: int
    epochs: int
    seed: int
    start: int = 0
    world: World = ALONE

    def __post_init__(self) -> None:
        shares = self.accumulate * self.world.size
        if self.batch % shares:
            raise ConfigError(
                f"a batch of {self.batch} images cannot be computed in {self.accumulate} equal parts by "
                f"{self.world.size} processes each; give a multiple of {shares}."
            )
        if self.images < self.batch:
            raise ConfigError(f"{self.images} images are fewer than a batch of {self.batch}; give a smaller batch.")

    @property
    def steps_per_epoch(self) -> int:
        return self.images // self.batch

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def __iter__(self) -> Iterator[Part]:
        share = self.batch // (self.accumulate * self.world.size)
        first, skipped = divmod(self.start, self.steps_per_epoch)
        for epoch in range(first, self.epochs):
            generator = torch.Generator().manual_seed(number_from("order", self.seed, epoch))
            order = torch.randperm(self.images, generator=generator).tolist()
            for step in range(skipped if epoch == first else 0, self.steps_per_epoch):
                for part in range(self.accumulate):
                    at = step * self.batch + (part * self.world.size + self.world.rank) * share
                    yield Part(epoch, order[at : at + share])


class Samples(Dataset[Any]):
    """Images by parts, each changed as its epoch and number say.

    One that cannot be read is the error, which a process of a loader could not raise as it is.
    """

    def __init__(self, images: Images, seed: int) -> None:
        self.images, self.seed = images, seed

    def __getitem__(self, part: Part) -> Tensor | MctfError:
        try:
            return torch.cat([self._one(part.epoch, number) for number in part.numbers])
        except MctfError as error:
            return error

    def _one(self, epoch: int, number: int) -> Tensor:
        with chance("image", self.seed, epoch, number):
            return self.images[number : number + 1]


def read(plan: Plan, samples: Samples, workers: int) -> Iterator[tuple[Part, Tensor]]:
    """The parts of a plan and their images [B, C, H, W]; raises ``MctfError`` for one that cannot be read."""
    loader: DataLoader[Any] = DataLoader(
        samples,
        batch_size=None,
        sampler=plan,
        num_workers=workers,
    )
    for part, images in zip(plan, loader):
        if isinstance(images, MctfError):
            raise images
        yield part, images
