"""Evaluate settings on labelled images: one pass over the images for all of them, shared among processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mctf_compile.compiler import explain
from mctf_compile.config import FusionConfig
from mctf_compile.errors import ConfigError, MctfError, cause_of
from mctf_compile.evaluating.images import Images, padded
from mctf_compile.evaluating.outcomes import Batches, Kept, Outcomes, missing
from mctf_compile.evaluating.quality import Quality, quality
from mctf_compile.evaluating.settings import DENSE, NONE, Setting
from mctf_compile.evaluating.sharding import ALONE, World
from mctf_compile.measuring.bench import Progress, check_output, interleave
from mctf_compile.measuring.fresh_process import peak_bytes
from mctf_compile.report import Report

# The name of the images as they are.
CLEAN = "clean"

Module = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Evaluated:
    """What one setting does.

    Attributes:
        setting: the setting; the dense model's has the method ``"dense"``.
        gmacs: 1e9 multiply-accumulates per image.
        qualities: by the name of the condition; the first is that of the images as they are.
        milliseconds: median time of a batch; None where no time was asked for, as for ``peak_bytes``.
        peak_bytes: what a call holds at its highest beyond weights and images.
        reason: why the setting was not measured, or None; there are no numbers where it was not.
    """

    setting: Setting
    gmacs: float | None = None
    qualities: dict[str, Quality] = field(default_factory=dict)
    milliseconds: float | None = None
    peak_bytes: int | None = None
    reason: str | None = None

    @property
    def clean(self) -> Quality:
        """The quality on the images as they are; the first condition, whatever its name."""
        return next(iter(self.qualities.values()))


@dataclass(frozen=True)
class Evaluation:
    """What ``evaluate`` found: a row for the dense model, and one for each setting, in order.

    ``parameters``: of the model. ``images`` and ``batch``: how many there are, and how many of them in a call.
    ``confidence``: of the intervals.
    """

    rows: list[Evaluated]
    parameters: int
    images: int
    batch: int
    confidence: float

    @property
    def dense(self) -> Evaluated:
        return self.rows[0]


def evaluate(
    model: nn.Module,
    images: Images | Mapping[str, Images],
    labels: Tensor,
    settings: Sequence[Setting],
    *,
    inner: str = "eager",
    batch: int = 8,
    rounds: int = 5,
    workers: int = 0,
    confidence: float = 0.95,
    device: str = "cpu",
    keep: Kept | None = None,
    world: World = ALONE,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure the dense model and every setting on the same images.

    Every image is in the same batch, with the same others, however many processes there are and whatever was kept: so
    the outcomes are the same to the last bit.

    Args:
        model: a classifier in eval mode on ``device``: images [B, C, H, W] -> logits [B, classes].
        images: [N, C, H, W]; or several such by the names of their conditions, the images as they are first.
        labels: int64 [N].
        settings: with labels that differ; see ``settings.sweeps``.
        inner: what compiles the graphs, the dense one too.
        batch: images per call.
        rounds: timed calls of each setting, interleaved; 0 for none.
        workers: processes that read images beside this one.
        confidence: of the intervals.
        device: where the model is.
        keep: where outcomes are kept, and found again.
        world: the processes that share the images. The first one takes the times.
        progress: called as ``progress(what, done, total)``.

    Returns:
        The same on every process. A setting that does not fit the model, or with which nothing fuses, has the reason
        in its row.

    Raises:
        ConfigError: there are no images, not as many labels, or two settings with the same label.
        MctfError: an image cannot be read, or an outcome not kept.
    """
    progress = progress or (lambda what, done, total: None)
    conditions = dict(images) if isinstance(images, Mapping) else {CLEAN: images}
    for name, given in conditions.items():
        if not 0 < len(given) == len(labels):
            raise ConfigError(f"{len(given)} images ({name}) and {len(labels)} labels were given; give one for each.")
    every = [Setting(DENSE, {}, DENSE), *settings]
    if len({setting.label for setting in every}) < len(every):
        raise ConfigError(f"two settings have the same label: {', '.join(setting.label for setting in every)}.")
    first = next(iter(conditions.values()))[: min(batch, len(labels))].to(device)
    with torch.no_grad(), many_graphs(len(every)):
        macs, reasons = _explained(model, first[:1], settings, progress)
        fitting = [setting for setting in every if setting.label not in reasons]
        run = _Run(conditions, len(first), device, workers, keep, world, progress)
        found = {setting.label: run.kept(setting) for setting in fitting}
        # Where all is there and no time is asked for, nothing is compiled.
        needed = {s.label for s in fitting if rounds or any(run.lacks(found[s.label], name) for name in conditions)}
        modules = _modules(model, [s for s in fitting if s.label in needed], inner)
        failed = _compiled(modules, first, progress, model)
        reasons |= failed
        run.fill(modules, {s.label: key_of(s) for s in fitting}, found)
        costs = _costs(modules, first, rounds, world, progress)
        torch._dynamo.reset()
    dense = {name: run.whole(found[DENSE][name]) for name in conditions}
    rows = []
    for setting in every:
        label = setting.label
        if label in reasons:
            rows.append(Evaluated(setting, reason=reasons[label]))
            continue
        qualities = {
            name: quality(run.whole(found[label][name]), dense[name], labels, confidence) for name in conditions
        }
        rows.append(Evaluated(setting, macs[label] / 1e9, qualities, *costs.get(label, (None, None))))
    return Evaluation(rows, sum(p.numel() for p in model.parameters()), len(labels), len(first), confidence)


def many_graphs(count: int) -> AbstractContextManager[Any]:
    """Lets ``count`` modules compile one forward anew each; past a limit of 8 Dynamo would run it dense."""
    torch._dynamo.reset()
    limits: dict[str, Any] = dict.fromkeys(("recompile_limit", "accumulated_recompile_limit"), 100 * (count + 1))
    patched: AbstractContextManager[Any] = torch._dynamo.config.patch(**limits, fail_on_recompile_limit_hit=True)
    return patched


def key_of(setting: Setting) -> str:
    """What tells the outcomes of a setting from those of others: every option, what a file says among them."""
    if setting.method == DENSE:
        return DENSE
    return f"{setting.label} {FusionConfig.from_options(setting.every_option)!r}"


class _Run:
    """The pass over the images: what is there already, what this process does, and all of it together."""

    def __init__(
        self,
        conditions: Mapping[str, Images],
        batch: int,
        device: str,
        workers: int,
        keep: Kept | None,
        world: World,
        progress: Progress,
    ) -> None:
        self.conditions, self.batch, self.device, self.workers = conditions, batch, device, workers
        self.keep, self.world, self.progress = keep, world, progress
        self.images = len(next(iter(conditions.values())))
        self.batches = range(-(-self.images // batch))

    def kept(self, setting: Setting) -> dict[str, Batches]:
        """By condition, what was kept of a setting by any process."""
        if self.keep is None:
            return {name: {} for name in self.conditions}
        own = {name: self.keep.read(f"{key_of(setting)} {name}") for name in self.conditions}
        merged: dict[str, Batches] = {name: {} for name in self.conditions}
        for others in self.world.gather(own):
            for name, batches in others.items():
                merged[name].update(batches)
        return merged

    def lacks(self, found: Mapping[str, Batches], condition: str) -> bool:
        return bool(missing(self.batches, [found[condition]]))

    def fill(
        self, modules: Mapping[str, Module], keys: Mapping[str, str], found: Mapping[str, dict[str, Batches]]
    ) -> None:
        """Put into ``found`` what is missing; the batches are dealt out among the processes."""
        for condition, images in self.conditions.items():
            lacking = {
                label: set(missing(self.batches, [found[label][condition]])) for label in found if label in modules
            }
            to_do = sorted(set().union(*lacking.values()))
            own = to_do[self.world.rank :: self.world.size]
            done: dict[str, Batches] = {label: {} for label in lacking}
            for count, (number, part) in enumerate(self._read(images, own)):
                full = padded(part, self.batch).to(self.device)
                for label, module in modules.items():
                    if number in lacking[label]:
                        outcomes = Outcomes.of(module(full)[: len(part)])
                        done[label][number] = outcomes
                        if self.keep is not None:
                            self.keep.add(f"{keys[label]} {condition}", number, outcomes)
                self.progress(f"images, {condition}", count + 1, len(own))
            for others in self.world.gather(done):
                for label, batches in others.items():
                    found[label][condition].update(batches)

    def _read(self, images: Images, numbers: Sequence[int]) -> Any:
        loader: DataLoader[Any] = DataLoader(
            _Batches(images, self.batch), batch_size=None, sampler=numbers, num_workers=self.workers
        )
        for number, part in zip(numbers, loader):
            if isinstance(part, MctfError):
                raise part
            yield number, part

    def whole(self, batches: Batches) -> Outcomes:
        """The outcomes of all images, in their order."""
        return Outcomes.together(batches[number] for number in self.batches)


class _Batches(Dataset[Any]):
    """The images by batches; one that cannot be read is the error, which a worker could not raise as it is."""

    def __init__(self, images: Images, batch: int) -> None:
        self.images, self.batch = images, batch

    def __getitem__(self, number: int) -> Tensor | MctfError:
        try:
            return self.images[number * self.batch : (number + 1) * self.batch]
        except MctfError as error:
            return error


def _explained(
    model: nn.Module, image: Tensor, settings: Sequence[Setting], progress: Progress
) -> tuple[dict[str, int], dict[str, str]]:
    """By label, the multiply-accumulates for an image [1, C, H, W], or the reason why a setting does not apply."""
    macs = {DENSE: explain(model, image, r=0).macs_before}
    reasons: dict[str, str] = {}
    for i, setting in enumerate(settings):
        progress("explain", i, len(settings))
        report = _attempt(explain, model, image, **setting.every_option)
        if isinstance(report, str):
            reasons[setting.label] = report
        elif report.fused or setting.method == NONE:
            macs[setting.label] = report.macs_after
        else:
            reasons[setting.label] = _why_dense(report)
    return macs, reasons


def _modules(model: nn.Module, settings: Sequence[Setting], inner: str) -> dict[str, Module]:
    """By label, what runs each setting; compiled when it is called."""
    return {
        s.label: torch.compile(model, backend=inner)
        if s.method == DENSE
        else torch.compile(model, backend="mctf", options={"inner": inner, **s.every_option})
        for s in settings
    }


def _compiled(modules: dict[str, Module], images: Tensor, progress: Progress, model: nn.Module) -> dict[str, str]:
    """Run each module once, which compiles it; takes those that fail out of ``modules`` and gives the reasons."""
    reasons: dict[str, str] = {}
    if not modules:
        return reasons
    expected = modules.get(DENSE, model)(images)
    check_output(DENSE, [expected], [expected])
    for i, (label, module) in enumerate(list(modules.items())):
        progress("compile", i, len(modules))
        output = _attempt(module, images)
        failed = output if isinstance(output, str) else _attempt(check_output, label, [output], [expected])
        if failed is not None:
            reasons[label] = failed
            del modules[label]
    return reasons


def _costs(
    modules: Mapping[str, Module], images: Tensor, rounds: int, world: World, progress: Progress
) -> dict[str, tuple[float, int]]:
    """By label, the milliseconds of a batch and the bytes that a call holds, as the first process finds them."""
    if not rounds or not modules:
        return {}
    found: dict[str, tuple[float, int]] = {}
    if world.first:
        calls = {label: lambda module=module: module(images) for label, module in modules.items()}
        device = images.device.type
        peaks = {}
        for i, (label, call) in enumerate(calls.items()):
            progress("memory", i, len(calls))
            peaks[label] = peak_bytes(call, device)
        timings = interleave(calls, rounds, 1, device, progress)
        found = {label: (timings[label].median, peaks[label]) for label in calls}
    return world.gather(found)[0]


def _attempt(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The result of a call, or the first line of the error of this package that it raises."""
    try:
        return call(*args, **kwargs)
    except Exception as error:
        cause = cause_of(error)
        if not isinstance(cause, MctfError):
            raise
        return str(cause).splitlines()[0]


def _why_dense(report: Report) -> str:
    """What most blocks say, where there are any; of two equally frequent reasons, that of the later blocks."""
    reasons = Counter(block.reason for block in reversed(report.blocks)).most_common(1)
    return f"stays dense: {reasons[0][0] if reasons else report.reason}"
