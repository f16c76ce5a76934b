"""Compare the reduction methods on labelled images: what each setting costs in accuracy and saves in work and time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from mctf_compile.compiler import explain
from mctf_compile.errors import ConfigError, MctfError, cause_of
from mctf_compile.measuring.bench import Progress, check_output, interleave
from mctf_compile.methods import METHODS, get_method
from mctf_compile.narrowing import present
from mctf_compile.packages import figure_class
from mctf_compile.report import Report

DENSE, NONE = "dense", "none"

# Of the tokens that enter the model, the part that a method which removes r per block is asked to remove in all.
BY_COUNT = [{"removed": part} for part in (0.2, 0.4, 0.6, 0.8, 1.0)]
PARTS_KEPT = (0.9, 0.8, 0.7, 0.6, 0.5)

# What is tried of each method; none of them needs training. The key "removed" becomes an r, see `sweep`.
SWEEPS: dict[str, list[dict[str, Any]]] = {
    "mctf": BY_COUNT,
    "tome": BY_COUNT,
    "tofu": BY_COUNT,
    "pitome": BY_COUNT,
    "random": BY_COUNT,
    "evit": [{"keep_rate": part} for part in PARTS_KEPT],
    "idlevit": [{"keep_ratio": part} for part in PARTS_KEPT],
    NONE: [{}],
}


class Images(Protocol):
    """A tensor [N, C, H, W], or what stands for one that would not fit into memory."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice) -> Tensor: ...


@dataclass(frozen=True)
class Setting:
    """A method with options of its own; ``label`` names it in tables and is unlike any other's."""

    method: str
    options: dict[str, Any]
    label: str


@dataclass(frozen=True)
class Measured:
    """What one setting does.

    Attributes:
        setting: the setting; the dense model's has the method ``"dense"``.
        accuracy: top-1, from 0 to 1.
        gmacs: 1e9 multiply-accumulates per image.
        milliseconds: median time of a batch.
        reason: why the setting was not measured, or None; the three numbers are None where it was not.
    """

    setting: Setting
    accuracy: float | None = None
    gmacs: float | None = None
    milliseconds: float | None = None
    reason: str | None = None


class Folder:
    """The images of a folder whose subfolders are the classes, read when they are asked for.

    ``labels``: int64 [N], the classes numbered in sorted order. ``total``: the images there are, of which N are taken.
    ``transform`` makes a tensor [C, H, W] of a PIL image; to be set before the first slice.

    Args:
        path: the folder.
        limit: take this many images at most, spread evenly over the classes' images.

    Raises:
        ConfigError: the folder has no images.
    """

    def __init__(self, path: Path, limit: int | None = None) -> None:
        from torchvision.datasets import ImageFolder

        self.files = ImageFolder(str(path), allow_empty=True)
        self.classes, self.total = self.files.classes, len(self.files)
        if not self.total:
            raise ConfigError(f"{path}: there are no images in its {len(self.classes)} subfolders, one for each class.")
        count = min(limit or self.total, self.total)
        self.chosen = [i * self.total // count for i in range(count)]
        self.labels = torch.tensor(self.files.targets)[self.chosen]
        self.transform: Callable[[Any], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, part: slice) -> Tensor:
        return torch.stack([self._read(i) for i in self.chosen[part]])

    def _read(self, index: int) -> Tensor:
        path = self.files.samples[index][0]
        try:
            return present(self.transform)(self.files.loader(path))
        except OSError as error:
            raise MctfError(f"{path} cannot be read: {error}") from error


def chosen_methods(names: Sequence[str] | None = None) -> list[str]:
    """The methods to compare: those named, else all of ``SWEEPS`` that are registered.

    Raises ``ConfigError`` for an unknown method and for one without a sweep.
    """
    if names is None:
        return [name for name in SWEEPS if name in METHODS]
    for name in names:
        get_method(name)
        if name not in SWEEPS:
            raise ConfigError(f"no settings of {name!r} are known to compare; there are for: {', '.join(SWEEPS)}.")
    return list(dict.fromkeys(names))


def sweep(method: str, tokens: int, depth: int) -> list[Setting]:
    """The settings of a method of ``SWEEPS`` that suit a model of ``depth`` blocks over ``tokens`` tokens."""
    settings: list[Setting] = []
    for entry in SWEEPS[method]:
        options = dict(entry)
        if "removed" in options:
            options["r"] = max(round(options.pop("removed") * tokens / depth), 1)
        label = " ".join([method, *(f"{name}={value}" for name, value in options.items())])
        # In a small model two parts may round to the same r.
        if label not in [s.label for s in settings]:
            settings.append(Setting(method, options, label))
    return settings


def sweeps(model: nn.Module, images: Images, methods: Sequence[str] | None = None) -> list[Setting]:
    """The settings of several methods for a model.

    Args:
        model: in eval mode.
        images: [N, C, H, W]; the first one is used.
        methods: as for ``chosen_methods``.

    Raises:
        ConfigError: a method is unknown, or has no sweep.
        MctfError: the model has no tokens to reduce.
    """
    names = chosen_methods(methods)
    with torch.no_grad():
        report = explain(model, images[:1], r=0)
    tokens = [block.tokens_in for block in report.blocks if block.tokens_in is not None]
    if not tokens:
        raise MctfError(f"there is nothing to compare: {report.reason}")
    return [setting for name in names for setting in sweep(name, max(tokens), len(tokens))]


def compare(
    model: nn.Module,
    images: Images,
    labels: Tensor,
    settings: Sequence[Setting],
    *,
    inner: str = "eager",
    batch: int = 8,
    rounds: int = 5,
    progress: Progress | None = None,
) -> list[Measured]:
    """Measure the dense model, and then every setting, on the same images.

    Args:
        model: a classifier in eval mode: images [B, C, H, W] -> logits [B, classes], on the images' device.
        images: [N, C, H, W].
        labels: int64 [N].
        settings: with labels that differ; see ``sweeps``.
        inner: what compiles the graphs, the dense one too.
        batch: images per call.
        rounds: timed calls of each setting, interleaved.
        progress: called as ``progress(what, done, total)``.

    Returns:
        A row for the dense model and one for each setting, in order. A setting that does not fit the model, or
        with which nothing fuses, has the reason in its row.

    Raises:
        ConfigError: there are no images, not as many labels, or two settings with the same label.
    """
    progress = progress or (lambda what, done, total: None)
    if not 0 < len(images) == len(labels):
        raise ConfigError(f"{len(images)} images and {len(labels)} labels were given; give a label for every image.")
    dense = Setting(DENSE, {}, DENSE)
    every = [dense, *settings]
    if len({setting.label for setting in every}) < len(every):
        raise ConfigError(f"two settings have the same label: {', '.join(setting.label for setting in every)}.")
    first = images[: min(batch, len(images))]
    with torch.no_grad():
        macs, reasons = _explained(model, first[:1], settings, progress)
        torch._dynamo.reset()
        # Each setting compiles the same forward anew. Past a limit of 8 Dynamo would run it dense instead of saying so.
        limits: dict[str, Any] = dict.fromkeys(("recompile_limit", "accumulated_recompile_limit"), 100 * len(every))
        with torch._dynamo.config.patch(**limits, fail_on_recompile_limit_hit=True):
            modules = {DENSE: torch.compile(model, backend=inner)}
            for setting in settings:
                if setting.label not in reasons:
                    options = {"inner": inner, **setting.options, "method": setting.method}
                    modules[setting.label] = torch.compile(model, backend="mctf", options=options)
            reasons |= _compiled(modules, first, progress)
            accuracy = _accuracy(modules, images, labels, len(first), progress)
            calls = {label: lambda module=module: module(first) for label, module in modules.items()}
            timings = interleave(calls, rounds, 1, first.device.type, progress)
        torch._dynamo.reset()
    return [
        Measured(s, reason=reasons[s.label])
        if s.label in reasons
        else Measured(s, accuracy[s.label], macs[s.label] / 1e9, timings[s.label].median)
        for s in every
    ]


def _explained(
    model: nn.Module, image: Tensor, settings: Sequence[Setting], progress: Progress
) -> tuple[dict[str, int], dict[str, str]]:
    """By label, the multiply-accumulates for an image [1, C, H, W], or the reason why a setting does not apply."""
    macs = {DENSE: explain(model, image, r=0).macs_before}
    reasons: dict[str, str] = {}
    for i, setting in enumerate(settings):
        progress("explain", i, len(settings))
        report = _attempt(explain, model, image, **{**setting.options, "method": setting.method})
        if isinstance(report, str):
            reasons[setting.label] = report
        elif report.fused or setting.method == NONE:
            macs[setting.label] = report.macs_after
        else:
            reasons[setting.label] = _why_dense(report)
    return macs, reasons


def _compiled(modules: dict[str, Callable[[Tensor], Tensor]], images: Tensor, progress: Progress) -> dict[str, str]:
    """Run each module once, which compiles it; takes those that fail out of ``modules`` and gives the reasons."""
    reasons: dict[str, str] = {}
    expected = modules[DENSE](images)
    check_output(DENSE, [expected], [expected])
    for i, (label, module) in enumerate(list(modules.items())):
        progress("compile", i, len(modules))
        output = _attempt(module, images)
        failed = output if isinstance(output, str) else _attempt(check_output, label, [output], [expected])
        if failed is not None:
            reasons[label] = failed
            del modules[label]
    return reasons


def _accuracy(
    modules: Mapping[str, Callable[[Tensor], Tensor]], images: Images, labels: Tensor, batch: int, progress: Progress
) -> dict[str, float]:
    """The part of the images whose highest logit is that of their label, of each module."""
    right = dict.fromkeys(modules, 0)
    for start in range(0, len(images), batch):
        part, truth = images[start : start + batch], labels[start : start + batch]
        # A shorter last batch would be compiled once more.
        full = torch.cat([part, part[:1].expand(batch - len(part), *part.shape[1:])])
        for label, module in modules.items():
            right[label] += int((module(full)[: len(part)].argmax(-1) == truth.to(part.device)).sum())
        progress("test", start + len(part), len(images))
    return {label: count / len(images) for label, count in right.items()}


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


def to_dict(rows: Sequence[Measured]) -> dict[str, Any]:
    """Plain values for JSON."""
    return {
        "rows": [
            {
                "label": row.setting.label,
                "method": row.setting.method,
                "options": row.setting.options,
                "accuracy": row.accuracy,
                "gmacs": row.gmacs,
                "median_ms": row.milliseconds,
                "reason": row.reason,
            }
            for row in rows
        ]
    }


def table(rows: Sequence[Measured], title: str | None = None, caption: str = "") -> Table:
    """The rows of ``compare`` as a rich table; its caption ends with the reasons of those not measured."""
    dense, (unit, scale) = rows[0], _unit(rows[0])
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.reason is not None:
            reasons.setdefault(row.reason, []).append(row.setting.label)
    notes = [caption, *(f"{', '.join(labels)}: {reason}" for reason, labels in reasons.items())]
    # As Text, in which brackets are no markup.
    below = Text("\n".join(filter(None, notes)))
    result = Table(title=title, title_justify="left", caption=below, caption_justify="left")
    for name in ("", "accuracy", "change", unit, "fewer", "ms", "faster"):
        result.add_column(name, justify="right" if name else "left", no_wrap=True)
    for before, row in zip([dense, *rows], rows):
        if row.setting.method != before.setting.method:
            result.add_section()
        result.add_row(Text(row.setting.label), *_cells(row, dense, scale))
    return result


def _cells(row: Measured, dense: Measured, scale: float) -> list[str]:
    """The cells after the label, as text; dashes where nothing was measured."""
    if row.reason is not None:
        return ["-"] * 6
    accuracy, gmacs, milliseconds = present(row.accuracy), present(row.gmacs), present(row.milliseconds)
    change, fewer, faster = "", "", ""
    if row is not dense:
        change = f"{100 * (accuracy - present(dense.accuracy)):+.1f}"
        fewer, faster = f"{present(dense.gmacs) / gmacs:.2f}x", f"{present(dense.milliseconds) / milliseconds:.2f}x"
    return [f"{accuracy:.1%}", change, f"{gmacs * scale:.3f}", fewer, f"{milliseconds:.1f}", faster]


def draw(rows: Sequence[Measured], path: Path, title: str | None = None) -> None:
    """Write a figure of accuracy against multiply-accumulates: a line for each method, a dashed one for dense.

    Raises ``ImportError`` where matplotlib is missing, naming what installs it.
    """
    figure = figure_class()(figsize=(7.5, 5), layout="constrained")
    axes = figure.add_subplot()
    dense, (unit, scale) = rows[0], _unit(rows[0])
    accuracy, gmacs = present(dense.accuracy), present(dense.gmacs)
    axes.axhline(100 * accuracy, color="black", linestyle="--", linewidth=1, zorder=1)
    axes.plot([gmacs * scale], [100 * accuracy], "k*--", linewidth=1, markersize=12, label="dense")
    lines: dict[str, list[Measured]] = {}
    for row in rows[1:]:
        # Without a reduction the point would lie on that of the dense model.
        if row.reason is None and row.setting.method != NONE:
            lines.setdefault(row.setting.method, []).append(row)
    for marker, (method, line) in zip("osD^vPX<>" * len(rows), lines.items()):
        line = sorted(line, key=lambda row: present(row.gmacs))
        axes.plot(
            [present(row.gmacs) * scale for row in line],
            [100 * present(row.accuracy) for row in line],
            marker + "-",
            label=method,
            markersize=6,
            alpha=0.9,
        )
    axes.set_xlabel(f"{unit} per image")
    axes.set_ylabel("top-1 accuracy (%)")
    if title is not None:
        axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _unit(dense: Measured) -> tuple[str, float]:
    """What to count multiply-accumulates in, and how many of it a GMAC is; a small model's would be all zeros."""
    return ("GMACs", 1.0) if present(dense.gmacs) >= 0.1 else ("MMACs", 1e3)
