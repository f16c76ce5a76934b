"""How a model is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from mctf_compile import packages
from mctf_compile.errors import ConfigError
from mctf_compile.options.fields import nearest

# What a schedule of timm needs that is not known here: how well the model does.
BY_RESULT = ("plateau",)


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; the defaults are those of MCTF's published runs, for one step of few images.

    Attributes:
        epochs: times that each image is seen.
        batch: images of one step of the optimizer, over all processes.
        accumulate: parts that the images of a step are computed in, one after another.
        opt: the optimizer, as ``timm.optim`` names it.
        lr: learning rate.
        weight_decay: of weights that are matrices.
        sched: the course of the learning rate, as ``timm.scheduler`` names it; ``none``: it stays.
        min_lr: the learning rate at the end, and that at the start of a warm-up.
        warmup: epochs over which the learning rate rises.
        smoothing: label smoothing.
        consistency: weight of the consistency with a pass that fuses fewer tokens; 0: there is no such pass.
        ema: decay of a moving average of the weights, which is kept beside them; None: there is none.
        bf16: compute in bfloat16 where autocast does.
        checkpointing: compute activations anew for the gradients, which takes time and saves memory.
        seed: of the order of the images, their augmentation, and what else is left to chance.

    Raises ``ConfigError`` for a value out of range, and for an unknown optimizer or schedule.
    """

    epochs: int = 30
    batch: int = 32
    accumulate: int = 1
    opt: str = "adamw"
    lr: float = 3e-5
    weight_decay: float = 0.05
    sched: str = "cosine"
    min_lr: float = 1e-6
    warmup: int = 0
    smoothing: float = 0.1
    consistency: float = 3.0
    ema: float | None = None
    bf16: bool = False
    checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "accumulate"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be a whole number above 0.")
        for name in ("lr", "weight_decay", "min_lr", "warmup", "consistency"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be a number >= 0.")
        if not 0 <= self.smoothing < 1:
            raise ConfigError(f"smoothing={self.smoothing!r} must be a number from 0 to below 1.")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError(f"ema={self.ema!r} must be a number above 0 and below 1.")
        if self.sched in BY_RESULT:
            raise ConfigError(f"sched={self.sched!r} follows the accuracy, which is not measured between epochs.")
        known = packages.timm("timm.optim").list_optimizers()
        if self.opt not in known:
            raise ConfigError(f"timm has no optimizer {self.opt!r}; {nearest(self.opt, known)}as adamw, lamb or lion.")

    def optimizer(self, model: nn.Module) -> Optimizer:
        """For the parameters of a model; what the model says so of has no weight decay."""
        make = packages.timm("timm.optim").create_optimizer_v2
        made: Optimizer = make(model, opt=self.opt, lr=self.lr, weight_decay=self.weight_decay)
        return made

    def scheduler(self, optimizer: Optimizer, steps_per_epoch: int) -> Any:
        """Timm's scheduler, whose ``step_update(step)`` depends on nothing but the step; None where there is none."""
        try:
            return packages.timm("timm.scheduler").create_scheduler_v2(
                optimizer,
                sched=self.sched,
                num_epochs=self.epochs,
                min_lr=min(self.min_lr, self.lr),
                warmup_lr=min(self.min_lr, self.lr),
                warmup_epochs=self.warmup,
                step_on_epochs=False,
                updates_per_epoch=steps_per_epoch,
            )[0]
        except ValueError as error:
            raise ConfigError(f"sched={self.sched!r}: {error}") from error
