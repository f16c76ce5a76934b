"""The model in training: compiled with fused tokens, with what its losses read, in one process or in several."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from mctf_compile.compat import buffers_left_alone, compiled_apart
from mctf_compile.compiler import explain
from mctf_compile.config import FusionConfig
from mctf_compile.dynamic import set_r
from mctf_compile.errors import ConfigError, MctfError
from mctf_compile.evaluating.sharding import World
from mctf_compile.finetuning.samples import number_from
from mctf_compile.methods import Merging

# Whole tensors in the memory of the first process, whatever they are shards of.
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
FROM_WHOLE = StateDictOptions(full_state_dict=True)


class Readout(nn.Module):
    """A timm classifier that returns what its classifier reads beside the logits: [B, C] and [B, K].

    That is the class token after the final norm, where the model has one, and else the pooled tokens.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for part in ("forward_features", "forward_head"):
            if not callable(getattr(model, part, None)):
                raise ConfigError(f"the model has no {part!r}, as timm's models have; give its loss a loop of its own.")
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        model = cast(Any, self.model)
        tokens = model.forward_features(images)
        # FSDP2 hangs its hooks on what is returned, which must be no view of what others change.
        return model.forward_head(tokens, pre_logits=True).clone(), model.forward_head(tokens)


class Student:
    """A model that is trained with fused tokens.

    ``removed``: the tokens that each block removes. ``gentle``: whether there are passes that remove fewer.

    Args:
        model: a timm classifier in train mode, on its device; under ``world`` it becomes distributed.
        image: [1, C, H, W].
        options: of the backend.
        inner: what compiles the graphs.
        gentle: whether passes that remove fewer are asked for.
        world: the processes that share each batch.
        sharded: whether they share the parameters too, by FSDP2; they have copies otherwise, by DDP.

    Raises:
        ConfigError: an option is wrong, or does not fit the model.
        MctfError: nothing fuses.
    """

    def __init__(
        self,
        model: nn.Module,
        image: Tensor,
        options: Mapping[str, Any],
        *,
        inner: str,
        gentle: bool,
        world: World,
        sharded: bool,
    ) -> None:
        readout, method = Readout(model), FusionConfig.from_options(options).method
        # Of a single image the graph shows no batch, which modules that learn need.
        report = explain(readout, image.repeat(2, 1, 1, 1), **options)
        if not report.fused:
            reasons = "; ".join(sorted({block.reason for block in report.blocks if block.reason})) or report.reason
            raise MctfError(f"there is nothing to train with fused tokens: {reasons}")
        # While a method's modules learn, all tokens stay; there is no r to change.
        self.gentle = gentle and isinstance(method, Merging) and method.reads is None
        if self.gentle and len(report.towers) > 1:
            raise MctfError(
                "the model has several towers, whose r one list cannot say; choose the modules of one by "
                "modules='...', or train without consistency"
            )
        self.removed = [block.removed for block in report.blocks]
        self.model, self.sharded = model, sharded
        if sharded:
            from torch.distributed.fsdp import fully_shard

            # One unit: between two, tokens would be given back.
            fully_shard(readout)
        given = {"inner": inner, **options, **({"dynamic_r": True} if self.gentle else {})}
        readout.compile(backend="mctf", options=given, dynamic=False, **compiled_apart())
        self._readout = readout
        self._run: nn.Module = readout
        if world.size > 1 and not sharded:
            self._run = nn.parallel.DistributedDataParallel(readout, **buffers_left_alone())

    def __call__(self, images: Tensor, fewer: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Features [B, C] and logits [B, K], in float32; with ``fewer`` tokens removed by each block."""
        changed: AbstractContextManager[Any] = nullcontext() if fewer is None else set_r(self._readout, list(fewer))
        with changed:
            features, logits = self._run(images)
        return features.float(), logits.float()

    def fewer(self, seed: int, step: int) -> list[int] | None:
        """The tokens that each block removes in the gentler pass of a step; None without such a pass.

        Where most blocks remove r, a whole number below r / 2 by chance; blocks that remove others, in proportion.

        Source: Lee et al., CVPR 2024, whose code draws from 0 to 7 for r = 16.
        """
        if not self.gentle:
            return None
        most = max(self.removed)
        drawn = random.Random(number_from("fewer", seed, step)).randrange((most + 1) // 2)
        return [count * drawn // most for count in self.removed]

    def exchange(self, now: bool) -> None:
        """Whether the next gradients are exchanged among processes; those of a step are once, with its last part."""
        if self.sharded:
            cast(Any, self._readout).set_requires_gradient_sync(now)
        elif isinstance(self._run, nn.parallel.DistributedDataParallel):
            self._run.require_backward_grad_sync = now


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """A state dict of whole tensors, on the first process; all of them must call it."""
    return cast(dict[str, Tensor], get_model_state_dict(model, options=WHOLE))


def whole_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Weights and the optimizer's state, as ``whole_weights``."""
    return {"model": whole_weights(model), "optimizer": get_optimizer_state_dict(model, optimizer, options=WHOLE)}


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load a state dict of whole tensors, which every process gives."""
    set_model_state_dict(model, cast(Any, weights), options=FROM_WHOLE)


def load_state(model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load what ``whole_state`` made; every process gives it."""
    # Making the optimizer's state is a step of it, whatever that does to the weights.
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=FROM_WHOLE)
    load_weights(model, state["model"])
