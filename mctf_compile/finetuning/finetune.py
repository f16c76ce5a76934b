"""The training loop: from the newest checkpoint to the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mctf_compile import packages
from mctf_compile.compat import compiled_apart
from mctf_compile.errors import ConfigError, MctfError
from mctf_compile.evaluating.images import Images
from mctf_compile.evaluating.run import many_graphs
from mctf_compile.evaluating.sharding import ALONE, World
from mctf_compile.finetuning.checkpoints import Checkpoints
from mctf_compile.finetuning.recipe import Recipe
from mctf_compile.finetuning.samples import Part, Plan, Samples, chance, read
from mctf_compile.finetuning.student import Student, load_state, load_weights, whole_state, whole_weights
from mctf_compile.measuring.bench import Progress
from mctf_compile.training.losses import TwoPassLoss, distillation, mctf, mean_over_processes

WEIGHTS, AVERAGED = "weights.safetensors", "weights-ema.safetensors"


@dataclass(frozen=True)
class Finetuned:
    """What came of a run.

    ``steps``: of the optimizer, in all. ``begun``: those that were done by runs before. ``loss``: mean of the last
    epoch's steps that this run did, None where it did none. ``weights``: the file; ``averaged``: that of the moving
    average, or None.
    """

    steps: int
    begun: int
    loss: float | None
    weights: Path
    averaged: Path | None


def finetune(
    model: nn.Module,
    images: Images,
    labels: Tensor | None,
    recipe: Recipe,
    options: Mapping[str, Any],
    checkpoints: Checkpoints,
    *,
    teacher: nn.Module | None = None,
    inner: str = "inductor",
    save_every: int | None = None,
    workers: int = 0,
    device: str = "cpu",
    world: World = ALONE,
    sharded: bool = False,
    progress: Progress | None = None,
) -> Finetuned:
    """Train a model with fused tokens, from the newest checkpoint of the folder on, if it has any.

    What a step does depends on the recipe and the number of the step alone. So a run that was killed ends as it would
    have without that, on a CPU to the last bit, and several processes do what one does, up to rounding and to what
    dropout leaves to chance.

    Args:
        model: a timm classifier on ``device``, with the weights that training starts from; it is trained.
        images: [N, C, H, W]. What ``images[i : i + 1]`` leaves to chance depends on the seed, the epoch and i.
        labels: int64 [N]; with a ``teacher`` they are not read, and may be None.
        recipe: how.
        options: of the backend, as for ``torch.compile``.
        checkpoints: the folder that the run is kept in.
        teacher: a dense model on ``device`` whose classes are followed in the place of labels.
        inner: what compiles the graphs.
        save_every: steps between two checkpoints; None: an epoch.
        workers: processes that read images beside this one.
        device: where the model is.
        world: the processes that share the images of each step.
        sharded: whether they share the parameters too, by FSDP2.
        progress: called as ``progress(what, done, total)``.

    Raises:
        ConfigError: an option or the recipe does not fit the model or the images.
        MctfError: nothing fuses, an image or a checkpoint cannot be read, something cannot be written, or a loss is not
            finite. The checkpoints that are there stay.
    """
    progress = progress or (lambda what, done, total: None)
    if teacher is None and labels is None:
        raise ConfigError("there are no labels to learn; name a teacher, or give labels.")
    if sharded and world.size == 1:
        raise ConfigError("parameters are shared among several processes, and this is the only one.")
    saved = checkpoints.read()
    done = 0 if saved is None else int(saved["step"])
    plan = Plan(len(images), recipe.batch, recipe.accumulate, recipe.epochs, recipe.seed, done, world)
    # Before the model changes: it may be its own teacher.
    constant = None if teacher is None else _constant(teacher, inner)
    model.train()
    if recipe.checkpointing:
        _checkpoint_activations(model)
    with many_graphs(2), torch._dynamo.config.patch(optimize_ddp=False):
        progress("find the blocks", 0, 1)
        averaged = None
        if recipe.ema is not None:
            # A model that is sharded cannot be copied.
            averaged = packages.timm("timm.utils").ModelEmaV3(model, decay=recipe.ema, foreach=not sharded)
        with chance("image", recipe.seed, 0, 0):
            image = images[:1].to(device)
        student = Student(
            model, image, options, inner=inner, gentle=recipe.consistency > 0, world=world, sharded=sharded
        )
        if averaged is not None and sharded:
            from torch.distributed.fsdp import fully_shard

            fully_shard(averaged.module)
        loop = _Loop(student, recipe, plan, device, averaged, constant, labels)
        if saved is not None:
            loop.load(saved)
        checkpoints.rewind(done)
        loss = loop.run(checkpoints, Samples(images, recipe.seed), save_every, workers, progress)
        torch._dynamo.reset()
    progress("write the weights", 0, 1)
    weights = checkpoints.write_weights(WEIGHTS, whole_weights(model))
    other = None if averaged is None else checkpoints.write_weights(AVERAGED, whole_weights(averaged.module))
    return Finetuned(plan.steps, done, loss, weights, other)


class _Loop:
    """Steps of the optimizer, one after another."""

    def __init__(
        self,
        student: Student,
        recipe: Recipe,
        plan: Plan,
        device: str,
        averaged: Any,
        teacher: nn.Module | None,
        labels: Tensor | None,
    ) -> None:
        self.student, self.recipe, self.plan, self.device = student, recipe, plan, device
        self.averaged, self.teacher, self.labels = averaged, teacher, labels
        self.optimizer = recipe.optimizer(student.model)
        self.scheduler = recipe.scheduler(self.optimizer, plan.steps_per_epoch)

    def load(self, saved: Mapping[str, Any]) -> None:
        load_state(self.student.model, self.optimizer, saved)
        if self.averaged is not None:
            load_weights(self.averaged.module, saved["averaged"])

    def state(self) -> dict[str, Any]:
        state = whole_state(self.student.model, self.optimizer)
        return state if self.averaged is None else {**state, "averaged": whole_weights(self.averaged.module)}

    def run(
        self, checkpoints: Checkpoints, samples: Samples, save_every: int | None, workers: int, progress: Progress
    ) -> float | None:
        """All steps that are left; returns the mean loss of those of the last epoch."""
        each, steps = self.plan.steps_per_epoch, self.plan.steps
        step, losses, said = self.plan.start, list[float](), ""
        parts = list[tuple[Part, Tensor]]()
        for part in read(self.plan, samples, workers):
            parts.append(part)
            if len(parts) < self.recipe.accumulate:
                continue
            values = self.step(step, parts)
            step, parts = step + 1, []
            losses.append(values["loss"])
            checkpoints.log({"step": step, "epoch": (step - 1) // each + 1, **values})
            progress(f"epoch {(step - 1) // each + 1} of {self.recipe.epochs}{said}", (step - 1) % each + 1, each)
            if step % (save_every or each) == 0 or step == steps:
                checkpoints.write(step, self.state())
            if step % each == 0:
                mean = math.fsum(losses) / len(losses)
                said = f", loss {mean:.4g} before"
                losses = losses if step == steps else []
        return math.fsum(losses) / len(losses) if losses else None

    def step(self, step: int, parts: list[tuple[Part, Tensor]]) -> dict[str, Any]:
        """One step; returns what is to be said of it."""
        if self.scheduler is not None:
            self.scheduler.step_update(step)
        rate = max(group["lr"] for group in self.optimizer.param_groups)
        fewer = self.student.fewer(self.recipe.seed, step)
        sums = torch.zeros(4, device=self.device)
        for i, (part, images) in enumerate(parts):
            self.student.exchange(i + 1 == len(parts))
            with chance("step", self.recipe.seed, step, i, self.plan.world.rank):
                loss = self.loss(part, images.to(self.device), fewer)
                (loss.total / len(parts)).backward()
            found = torch.stack([loss.total, loss.own, loss.gentler, loss.consistency])
            sums += mean_over_processes(found.detach()) / len(parts)
        total, own, gentler, consistency = sums.tolist()
        if not math.isfinite(total):
            raise MctfError(f"the loss of step {step + 1} is {total}; a smaller learning rate than {rate:g} may help")
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.averaged is not None:
            self.averaged.update(self.student.model)
        values = {"lr": rate, "loss": total, "own": own}
        if fewer is None:
            return values
        return {**values, "gentler": gentler, "consistency": consistency, "fewer": max(fewer)}

    def loss(self, part: Part, images: Tensor, fewer: list[int] | None) -> TwoPassLoss:
        """The loss of some images [B, C, H, W], as a part of the batch that all processes share."""
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.recipe.bf16):
            gentler = None if fewer is None else self.student(images, fewer)
            own = self.student(images)
            if self.teacher is not None:
                with torch.no_grad():
                    followed = self.teacher(images).float()
        weight, over = self.recipe.consistency, mean_over_processes
        if self.teacher is not None:
            return distillation(own, followed, gentler, consistency_weight=weight, over=over)
        assert self.labels is not None
        labels, smoothing = self.labels[part.numbers].to(self.device), self.recipe.smoothing
        return mctf(own, labels, gentler, consistency_weight=weight, label_smoothing=smoothing, over=over)


def _checkpoint_activations(model: nn.Module) -> None:
    """Have the model compute its activations anew for the gradients; raises ``ConfigError`` where it cannot."""
    ask = getattr(model, "set_grad_checkpointing", None)
    try:
        if ask is None:
            raise AssertionError("it has no set_grad_checkpointing")
        ask(True)
    except (AssertionError, NotImplementedError) as error:
        # What timm's models raise that cannot.
        raise ConfigError(f"checkpointing: the model does not offer it: {error}") from error


def _constant(teacher: nn.Module, inner: str) -> nn.Module:
    """A copy of the teacher, dense and compiled."""
    constant = deepcopy(teacher).eval().requires_grad_(False)
    constant.compile(backend=inner, dynamic=False, **compiled_apart())
    return constant
