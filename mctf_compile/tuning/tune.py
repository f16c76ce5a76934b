"""Find a schedule and certify it: one half of the images for the one, the other half for the other."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mctf_compile.compiler import explain
from mctf_compile.config import FusionConfig
from mctf_compile.errors import ConfigError
from mctf_compile.evaluating.images import Chosen, Images
from mctf_compile.evaluating.run import many_graphs
from mctf_compile.measuring.bench import Progress
from mctf_compile.methods import Merging
from mctf_compile.narrowing import present
from mctf_compile.options.fields import Frozen
from mctf_compile.options.schedule import GMACS, LATENCY, SPEEDUP, Target
from mctf_compile.options.tuned import TunedSchedule
from mctf_compile.tuning.contract import AGREEMENT, Contract, NotCertified, Verdict
from mctf_compile.tuning.search import Divergence, Found, search
from mctf_compile.tuning.trials import Removals, Trials, Work

# Of the multiply-accumulates that the search's own half could spare: what the schedules of the chain save, gentlest
# first. They are certified in this order until one fails, so that each may make the whole error that is allowed.
CHAIN = (0.4, 0.6, 0.75, 0.9, 1, 1.1, 1.25, 1.4)
# Refinements of a latency, and how close to it is good enough.
ATTEMPTS, CLOSE = 4, 0.97
# Images of the search's half that schedules are tried on.
MOST = 512
# Of what can be saved, the part at which choices are compared where no budget says another.
USUAL = 0.5


@dataclass(frozen=True)
class Tuned:
    """A schedule and what the held-out images bear out of it.

    ``options``: of the backend: method, r and what was chosen. ``verdict``: of the images held out. ``gmacs`` and
    ``dense_gmacs``: 1e9 multiply-accumulates per image. ``milliseconds``: of a batch, where the budget was one of time.
    ``tried``: the schedules that were looked at. ``chain``: the verdicts of the schedules that were certified on the
    way, in their order, with their GMACs.
    """

    options: dict[str, Any]
    contract: Contract
    verdict: Verdict
    gmacs: float
    dense_gmacs: float
    blocks: int
    tokens: int
    tried: int
    search_images: int
    seed: int
    milliseconds: float | None
    chain: list[tuple[float, Verdict]]

    def schedule(self, file: str, **about: Any) -> TunedSchedule:
        """What the option ``schedule`` takes, to be written to ``file``, with what else is known ``about`` it."""
        promise = {
            "measure": self.contract.measure,
            "lost_at_most": self.verdict.bound,
            "confidence": self.contract.confidence,
            **{name: value for name, value in asdict(self.verdict).items() if name in ("lost", "won", "images")},
        }
        values = {
            "gmacs": self.gmacs,
            "dense_gmacs": self.dense_gmacs,
            **({} if self.milliseconds is None else {"milliseconds": self.milliseconds}),
            "promise": promise,
            "search": {"images": self.search_images, "schedules": self.tried, "seed": self.seed},
            **about,
        }
        return TunedSchedule(file, Frozen(self.options), self.blocks, self.tokens, Frozen(values))


def tune(
    model: nn.Module,
    images: Images,
    labels: Tensor | None = None,
    *,
    contract: Contract,
    budget: Target | None = None,
    options: Mapping[str, Any] | None = None,
    choices: Mapping[str, Sequence[Any]] | None = None,
    batch: int = 8,
    attempts: int = 60,
    seed: int = 0,
    progress: Progress | None = None,
) -> Tuned:
    """Find a schedule, and certify on images that had no part in finding it what it loses at most.

    Args:
        model: a classifier in eval mode: images [B, C, H, W] -> logits [B, classes].
        images: [N, C, H, W]. A random half of them is for the search.
        labels: int64 [N], where there are some.
        contract: what is to be promised. With a tolerance and no budget, the schedule that saves the most is found.
        budget: what the schedule may cost, as the option ``target``. Needed where the contract has no tolerance.
        options: of the backend, but for ``r`` and what else says it; their method is one that removes r tokens a block.
        choices: values of options, of which those are taken that are nearest to the dense model.
        batch: images per call.
        attempts: schedules to try in the search.
        seed: of the halves and of the search.
        progress: called as ``progress(what, done, total)``.

    Raises:
        ConfigError: an option is wrong, there are too few images for the tolerance, or the budget is out of reach.
        NotCertified: the images held out do not bear the tolerance out.
        MctfError: the model has nothing to tune.
    """
    told = progress or (lambda what, done, total: None)
    given = dict(options or {})
    candidates = _candidates(given, choices or {})
    searched, kept = _halves(len(images), seed)
    _check(contract, budget, labels, len(kept))
    held = Chosen(images, searched[:MOST])[:]
    out, out_labels = Chosen(images, kept), None if labels is None else labels[kept]
    in_labels = None if labels is None else labels[searched[: len(held)]]
    with torch.no_grad(), many_graphs(2 * len(candidates)):
        chosen, work, divergence = _choose(model, held, candidates, batch, budget, told)
        trials = divergence.trials
        if budget is None:
            goal = _affordable(work, divergence, contract, in_labels, told)
        else:
            goal = _goal(budget, work, trials, held[:1])
        found = search(work, divergence, goal, attempts, seed, lambda n: told("search", n, attempts))
        chain = [found.r] if budget is not None else _chain(work, found, goal)
        told("certify", 0, len(chain))
        dense = trials.outcomes(out, None)
        verdicts: list[tuple[Removals, Verdict]] = []
        for i, r in enumerate(chain):
            verdicts.append((r, contract.verdict(trials.outcomes(out, r), dense, out_labels)))
            told("certify", i + 1, len(chain))
            if not verdicts[-1][1].kept:
                break
        borne_out = [(r, verdict) for r, verdict in verdicts if verdict.kept]
        if not borne_out:
            raise NotCertified(_why_not(contract, verdicts[0][1], work.macs(chain[0]) / work.dense))
        r, verdict = borne_out[-1]
        timed = budget is not None and budget.quantity == LATENCY
        milliseconds = trials.milliseconds(held[:1], r) if timed else None
        macs = explain(model, held[:1], **chosen, r=list(r)).macs_after
    method = FusionConfig.from_options(chosen).method
    reducing = {name: value for name, value in chosen.items() if name in method.option_names()}
    return Tuned(
        {"method": method.name, **reducing, "r": list(r)},
        contract,
        verdict,
        macs / 1e9,
        work.dense / 1e9,
        work.depth,
        work.tokens,
        found.tried,
        len(held),
        seed,
        milliseconds,
        [(work.macs(tried) / 1e9, judged) for tried, judged in verdicts],
    )


def _candidates(options: Mapping[str, Any], choices: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """The options with each combination of the choices."""
    for name in ("r", "schedule", "target", "dynamic_r", "profit"):
        if name in options or name in choices:
            raise ConfigError(f"{name} is not for tune, which finds r; leave it out")
    found = []
    for values in itertools.product(*choices.values()):
        candidate = {**options, **dict(zip(choices, values))}
        if not isinstance(FusionConfig.from_options(candidate).method, Merging):
            raise ConfigError(f"method={candidate['method']!r} has no option r to tune")
        found.append(candidate)
    return found


def _halves(count: int, seed: int) -> tuple[list[int], list[int]]:
    """The numbers of the images for the search, and of those held out."""
    numbers = list(range(count))
    random.Random(seed).shuffle(numbers)
    return numbers[: count // 2], numbers[count // 2 :]


def _check(contract: Contract, budget: Target | None, labels: Tensor | None, held_out: int) -> None:
    if contract.tolerance is None and budget is None:
        raise ConfigError("nothing to tune for: give a tolerance, as '1%', or a budget, as 'gmacs=2.6'")
    if contract.measure != AGREEMENT and labels is None:
        raise ConfigError(f"measure={contract.measure!r} needs labels; images without have measure='agreement'")
    if held_out < 2:
        raise ConfigError("there are too few images to tune on: one half is for the search, the other to certify")
    if contract.tolerance is not None and held_out < contract.least_images():
        raise ConfigError(
            f"{held_out} images to certify on bear out no tolerance of {contract.tolerance:.2%} with "
            f"{contract.confidence:.0%} confidence, not even where none is lost; it takes {contract.least_images()}, "
            "and as many for the search"
        )


def _choose(
    model: nn.Module,
    held: Tensor,
    candidates: Sequence[dict[str, Any]],
    batch: int,
    budget: Target | None,
    told: Progress,
) -> tuple[dict[str, Any], Work, Divergence]:
    """The candidate that is nearest to the dense model at the same cost, all blocks alike."""
    best: tuple[float, dict[str, Any], Work, Divergence] | None = None
    dense = Trials(model, candidates[0], batch).logits(held, None)
    for i, candidate in enumerate(candidates):
        told("choose options", i, len(candidates))
        work = Work(model, held[:1], candidate)
        divergence = Divergence(Trials(model, candidate, batch), held, dense)
        mean = 0.0
        if len(candidates) > 1:
            goal = work.dense - USUAL * (work.dense - work.least)
            if budget is not None:
                goal = _goal(budget, work, divergence.trials, held[:1])
            mean = divergence.mean(work.even(goal))
        if best is None or mean < best[0]:
            best = (mean, candidate, work, divergence)
    assert best is not None
    return best[1:]


def _goal(budget: Target, work: Work, trials: Trials, image: Tensor) -> float:
    """The multiply-accumulates per image that a budget allows."""
    if budget.quantity == GMACS:
        return budget.value * 1e9
    if budget.quantity == SPEEDUP:
        return work.dense / budget.value
    # A latency is about linear in multiply-accumulates.
    none, most = (tuple(n if i in work.fusing else 0 for i in range(work.depth)) for n in (1, work.tokens))
    slow, fast = (trials.milliseconds(image, r) for r in (none, most))
    if fast > budget.value:
        raise ConfigError(f"a budget of {budget} is out of reach: with the most tokens removed it is {fast:.2f} ms")
    per_mac = max(slow - fast, 0.0) / max(work.macs(none) - work.macs(most), 1)
    offset, reached = fast - per_mac * work.macs(most), float(work.macs(most))
    for _ in range(ATTEMPTS):
        r = work.even(max((budget.value - offset) / per_mac if per_mac else reached, work.macs(most)))
        taken = trials.milliseconds(image, r)
        if taken <= budget.value:
            reached = max(reached, work.macs(r))
        if CLOSE * budget.value <= taken <= budget.value:
            break
        offset = taken - per_mac * work.macs(r)
    return reached


def _affordable(work: Work, divergence: Divergence, contract: Contract, labels: Tensor | None, told: Progress) -> float:
    """The fewest MACs at which the images of the search would bear the tolerance out, all blocks alike."""
    trials, images = divergence.trials, divergence.images
    dense = trials.outcomes(images, None)
    low, high = float(work.least), float(work.dense)
    for i in range(7):
        told("find what can be saved", i, 7)
        middle = (low + high) / 2
        found = trials.outcomes(images, work.even(middle))
        lost, won = contract.changed(found, dense, labels)
        # What is seen, not what is sure: the chain has gentler schedules, and others that save more.
        kept = (lost - won) / len(images) <= present(contract.tolerance) / 2
        low, high = (low, middle) if kept else (middle, high)
    return high


def _chain(work: Work, found: Found, goal: float) -> list[Removals]:
    """Schedules like the one found that save less and more, the gentlest first.

    None of them depends on the images held out.
    """
    chain: list[Removals] = []
    for part in CHAIN:
        r = found.r if part == 1 else work.scaled(found.r, work.dense - part * (work.dense - goal))
        if r is not None and (not chain or work.macs(r) < work.macs(chain[-1])):
            chain.append(r)
    return chain


def _why_not(contract: Contract, verdict: Verdict, part: float) -> str:
    return (
        f"not certified: {verdict} in {contract.measure}, where {contract.tolerance or 0:.2%} with "
        f"{contract.confidence:.0%} confidence was to be kept, by a schedule with {part:.0%} of the "
        "multiply-accumulates. More images, a larger tolerance or a larger budget may do."
    )
