"""What a schedule is promised to keep, and whether images bear it out."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from mctf_compile.errors import ConfigError, MctfError
from mctf_compile.evaluating.outcomes import Outcomes
from mctf_compile.evaluating.statistics import loses_less, most_lost, upper_bound

AGREEMENT, TOP1 = "agreement", "top1"
MEASURES = (AGREEMENT, TOP1)


class NotCertified(MctfError):
    """The images do not bear out what was to be promised; the message says by how much."""


@dataclass(frozen=True)
class Contract:
    """At most a share of ``tolerance`` is lost, with ``confidence``; None: the least that can be said is found.

    ``measure``: ``agreement``, images whose class is no longer that of the dense model; or ``top1``, images that it
    gets right and the schedule wrong, beyond those the other way round.
    """

    measure: str = AGREEMENT
    tolerance: float | None = None
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise ConfigError(f"measure={self.measure!r} is not one of {', '.join(map(repr, MEASURES))}")
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            raise ConfigError(f"tolerance={self.tolerance!r} must be a share above 0 and below 1, as 0.01 or '1%'")
        if not 0.5 <= self.confidence < 1:
            raise ConfigError(f"confidence={self.confidence!r} must be a share from 0.5 on and below 1, as 0.95")

    def least_images(self) -> int:
        """As many images as it takes where none of them is lost."""
        return math.ceil(math.log(1 - self.confidence) / math.log1p(-(self.tolerance or 1)))

    def verdict(self, found: Outcomes, dense: Outcomes, labels: Tensor | None) -> Verdict:
        """What the outcomes of a schedule and of the dense model say, on images that had no part in finding it."""
        lost, won = self.changed(found, dense, labels)
        images = len(found)
        if self.tolerance is not None and self._keeps(lost, won, images):
            # Of several schedules the last one to keep it is taken: of that one, no less was tested than this.
            return Verdict(True, self.tolerance, lost, won, images)
        if self.measure == AGREEMENT:
            bound = upper_bound(lost, images, self.confidence)
        else:
            bound = most_lost(lost, won, images, self.confidence)
        return Verdict(self.tolerance is None, bound, lost, won, images)

    def _keeps(self, lost: int, won: int, images: int) -> bool:
        """Whether a sample bears the tolerance out."""
        tolerance = self.tolerance or 0.0
        if self.measure == AGREEMENT:
            return upper_bound(lost, images, self.confidence) <= tolerance
        return loses_less(lost, won, images, tolerance, self.confidence)

    def changed(self, found: Outcomes, dense: Outcomes, labels: Tensor | None) -> tuple[int, int]:
        """The images lost and won by the measure; none is won in agreement."""
        if self.measure == AGREEMENT:
            return len(found) - int(found.right(dense.top[:, 0]).sum()), 0
        if labels is None:
            raise ConfigError("measure='top1' needs labels; images without have measure='agreement'")
        right, before = found.right(labels), dense.right(labels)
        return int((before & ~right).sum()), int((right & ~before).sum())


@dataclass(frozen=True)
class Verdict:
    """Whether the contract is ``kept``, and the share lost that the images bear out: at most ``bound``.

    That is the tolerance where it is kept, and else the least that could have been promised.
    """

    kept: bool
    bound: float
    lost: int
    won: int
    images: int

    def __str__(self) -> str:
        won = f" and {self.won} won" if self.won else ""
        return f"{self.lost} of {self.images} images lost{won}: at most {self.bound:.2%} of all"
