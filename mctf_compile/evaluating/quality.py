"""What outcomes say of a setting: accuracy, and what changed against the dense model, image by image."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mctf_compile.evaluating.outcomes import TOP, Outcomes
from mctf_compile.evaluating.statistics import calibration_error, mcnemar, paired_interval


@dataclass(frozen=True)
class Quality:
    """A setting on the images of one condition; shares are from 0 to 1.

    Attributes:
        top1: the images whose likeliest class is their label.
        top5: those with it among the five likeliest.
        agreement: those with the likeliest class of the dense model.
        lost: images that the dense model gets right and this setting wrong.
        won: the other way round.
        interval: for top1 minus that of the dense model, by the images lost and won; see
            ``statistics.paired_interval``.
        p_value: of McNemar's exact test that no more are lost than won.
        calibration: the expected calibration error.
    """

    top1: float
    top5: float
    agreement: float
    lost: int
    won: int
    interval: tuple[float, float]
    p_value: float
    calibration: float


def quality(found: Outcomes, dense: Outcomes, labels: Tensor, confidence: float) -> Quality:
    """Of the outcomes of a setting and of the dense model, on the same images."""
    right, before = found.right(labels), dense.right(labels)
    lost, won = int((before & ~right).sum()), int((right & ~before).sum())
    return Quality(
        top1=share(right),
        top5=share(found.right(labels, TOP)),
        agreement=share(found.right(dense.top[:, 0])),
        lost=lost,
        won=won,
        interval=paired_interval(lost, won, len(labels), confidence),
        p_value=mcnemar(lost, won),
        calibration=calibration_error(found.confidence, right),
    )


def share(flags: Tensor) -> float:
    """The share of the images that are true."""
    return int(flags.sum()) / len(flags)
