"""What samples of images say of all images: shares, paired differences and calibration, each with what it leaves open.

Everything is computed here, in float64: the package needs no other for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist

import torch
from torch import Tensor

# Halvings of an interval: enough for every bit of a float64.
HALVINGS = 60
# Parts that confidence is cut into for the calibration error.
BINS = 15


def mcnemar(lost: int, won: int) -> float:
    """The exact p-value of McNemar's test, two-sided: were images lost as easily as won, how often it were as uneven.

    Source: McNemar 1947, by the binomial distribution of the images that changed.
    """
    few, changed = min(lost, won), lost + won
    return min(1.0, 2 * float(_binomial(changed, 0.5, few).sum()))


def paired_interval(lost: int, won: int, images: int, confidence: float = 0.95) -> tuple[float, float]:
    """An interval for the change of a share between two ways to treat the same images, (won - lost) / images.

    All differences that a score test does not reject, by Tango, *Statistics in Medicine* 17 (1998), 891-908: it keeps
    its confidence where few images change, where an interval of standard errors has a width of 0.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    middle = (won - lost) / images

    def score(change: float) -> float:
        return float(_score(torch.tensor(float(won)), torch.tensor(float(lost)), images, change))

    low = _crossing(lambda change: score(change) >= z, -1.0, middle)
    return low, _crossing(lambda change: score(change) > -z, middle, 1.0)


def _score(gained: Tensor, given: Tensor, images: int, change: float) -> Tensor:
    """Tango's score statistic of the difference (gained - given) / images against ``change``.

    The shares of images that change are those most likely where their difference is ``change``.
    """
    gained, given = gained.double(), given.double()
    a = 2 * images
    b = -gained - given + (2 * images - gained + given) * change
    c = -given * change * (1 - change)
    share = ((b * b - 4 * a * c).clamp_min(0).sqrt() - b) / (2 * a)
    variance = (images * (2 * share + change * (1 - change))).clamp_min(0)
    distance = gained - given - images * change
    # Where nothing can change, any difference is infinitely unlikely.
    return torch.where(distance == 0, distance, distance / variance.sqrt())


def upper_bound(events: int, images: int, confidence: float = 0.95) -> float:
    """What the probability of an event is at most, one-sided and exact: Clopper and Pearson, 1934."""
    if events >= images:
        return 1.0
    return _crossing(lambda share: float(_binomial(images, share, events).sum()) > 1 - confidence, events / images, 1.0)


def lower_bound(events: int, images: int, confidence: float = 0.95) -> float:
    """What the probability of an event is at least; as ``upper_bound``."""
    return 1 - upper_bound(images - events, images, confidence)


# Of the error that a test may make, the part for shares of won images outside those it looks at; how many it looks at.
UNSEEN, SHARES = 0.02, 200
# What a sum of probabilities may leave out.
TINY = 1e-9
# Probabilities that are added up at once.
AT_ONCE = 1 << 22
# Parts of a whole that a tolerance is told in.
STEPS = 10_000


def loses_less(lost: int, won: int, images: int, tolerance: float, confidence: float = 0.95) -> bool:
    """Whether the images rule out, with this confidence, that ``tolerance`` or more of all are lost beyond those won.

    An exact test: of samples of this size it says so wrongly of a part of at most ``1 - confidence``, whatever the
    probability of winning an image. Samples are ordered by Tango's statistic; the shares of won images that are looked
    at, on a grid of ``SHARES``, are those of an interval that has the true one all but surely (Berger and Boos,
    *JASA* 89 (1994), 1012-1016).
    """
    error = 1 - confidence
    if (lost - won) / images >= tolerance:
        return False
    spare = UNSEEN * error
    most = (1 - tolerance) / 2
    low = min(lower_bound(won, images, 1 - spare / 2), most)
    high = min(upper_bound(won, images, 1 - spare / 2), most)
    return _as_good(lost, won, images, tolerance, low, high) + spare + 2 * TINY <= error


def _as_good(lost: int, won: int, images: int, tolerance: float, low: float, high: float) -> float:
    """The probability of a sample at least as good as this, the largest over shares of won images in an interval.

    The share of lost images is larger by ``tolerance``.
    """
    reached = float(_score(torch.tensor(float(lost)), torch.tensor(float(won)), images, tolerance))
    losses = torch.arange(_nearly_all(images, high + tolerance) + 1, dtype=torch.float64)[:, None]
    gains = torch.arange(_nearly_all(images, high) + 1, dtype=torch.float64)
    good = (_score(losses, gains, images, tolerance) <= reached + 1e-9) & (losses + gains <= images)
    b, c = (values[good] for values in torch.broadcast_tensors(losses, gains))
    counts = torch.stack([b, c, images - b - c])
    ways = torch.lgamma(torch.tensor(images + 1.0, dtype=torch.float64)) - torch.lgamma(counts + 1).sum(0)
    shares = torch.sin(torch.linspace(math.asin(low**0.5), math.asin(high**0.5), SHARES, dtype=torch.float64)) ** 2
    worst = 0.0
    for share in shares.split(max(AT_ONCE // max(len(b), 1), 1)):
        logs = torch.stack([share + tolerance, share, (1 - tolerance - 2 * share).clamp_min(0)], 1).clamp_min(1e-300)
        worst = max(worst, float((ways + logs.log() @ counts).exp().sum(1).max()))
    return worst


def _nearly_all(images: int, share: float) -> int:
    """A count that a binomial variable exceeds with a probability below ``TINY``."""
    return min(images, math.ceil(images * share + 7 * math.sqrt(images * share * (1 - share)) + 30))


def most_lost(lost: int, won: int, images: int, confidence: float = 0.95) -> float:
    """The least tolerance, to a ten-thousandth, that ``loses_less`` certifies; 1 where none is."""
    low, step = max(lost - won, 0) * STEPS // images, max(STEPS // images, 1)

    def certified(tolerance: int) -> bool:
        return loses_less(lost, won, images, tolerance / STEPS, confidence)

    # From below: at a large tolerance there are many more samples to look at.
    while (high := low + step) < STEPS and not certified(high):
        low, step = high, 2 * step
    high = min(high, STEPS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if certified(middle) else (middle, high)
    return high / STEPS


def calibration_error(confidence: Tensor, right: Tensor) -> float:
    """The expected calibration error: how far confidence [N] is from the share that is ``right`` [N].

    The mean over ``BINS`` parts of [0, 1], weighted by their images. Source: Guo et al., ICML 2017, arXiv 1706.04599.
    """
    part = (confidence.double() * BINS).long().clamp(0, BINS - 1)
    gap = right.double() - confidence.double()
    sums = torch.zeros(BINS, dtype=torch.float64).index_add_(0, part, gap)
    return float(sums.abs().sum() / len(confidence))


@lru_cache(maxsize=64)
def _log_ways(trials: int, most: int) -> Tensor:
    counts = torch.arange(most + 1, dtype=torch.float64)
    whole = torch.tensor(float(trials), dtype=torch.float64)
    return torch.lgamma(whole + 1) - torch.lgamma(counts + 1) - torch.lgamma(whole - counts + 1)


def _binomial(trials: int, share: float, most: int) -> Tensor:
    """The probabilities [most + 1] of 0, 1, ..., ``most`` events."""
    counts = torch.arange(most + 1, dtype=torch.float64)
    each = torch.tensor(share, dtype=torch.float64)
    logs = torch.special.xlogy(counts, each) + torch.special.xlog1py(trials - counts, -each)
    found: Tensor = (_log_ways(trials, most) + logs).exp()
    return found


def _crossing(true_below: Callable[[float], bool], low: float, high: float) -> float:
    """Where a condition that holds from ``low`` on ceases to, up to ``high``."""
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if true_below(middle) else (low, middle)
    return high
