"""Patch selection: before the first block, the patches that matter stay (Kinfu & Vidal, BMVC 2023)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mctf_compile.errors import ConfigError
from mctf_compile.methods.attached import Attached
from mctf_compile.methods.base import (
    Choice,
    Count,
    Evidence,
    Method,
    Need,
    Reads,
    Relaxed,
    Site,
    register_method,
)
from mctf_compile.methods.combining import highest
from mctf_compile.narrowing import present
from mctf_compile.options.fields import integer, one_of, option, share
from mctf_compile.options.schedule import Removal

# The values of ``score``, beside a callable; and the argument that gives scores to a model that this is attached to.
INPUT, JOINTS = "input", "joints"
ARGUMENT = "patch_scores"


def _score(name: str, value: Any) -> Any:
    if value not in (INPUT, JOINTS) and not callable(value):
        raise ConfigError(f"{name}={value!r} must be {INPUT!r}, {JOINTS!r}, or a callable that takes the images.")
    return value


class GivenScores(Attached):
    """Scores of the patches that come from outside the model: an argument of its call, or a callable on its images.

    A callable that is a module is a submodule, and its parameters are the model's.
    """

    method = "select"

    def __init__(self, lead: int, tail: int, score: str | Callable[..., Tensor]) -> None:
        super().__init__()
        self.lead, self.tail, self.score = lead, tail, score
        # The scores of this call, or the images that they are computed of.
        self.given: Tensor | None = None

    @property
    def state(self) -> str:
        return "trained"

    def added_to(self, model: nn.Module) -> None:
        model.register_forward_pre_hook(self.take, with_kwargs=True)

    def take(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The hook of the model: takes the scores out of its call, or the first input, of which they are computed.

        Dynamo runs it outside of its graph where the model itself is compiled, so nothing is computed here.
        """
        self.given = kwargs.get(ARGUMENT)
        others = {name: value for name, value in kwargs.items() if name != ARGUMENT}
        if callable(self.score):
            if self.given is not None:
                raise ConfigError(f"{ARGUMENT} was given, and score={self.score!r} computes it.")
            self.given = args[0] if args else next(iter(others.values()))
        return args, others

    def observe(self, reader: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # Without scores nothing is said, and nothing fuses.
        return args if self.given is None else super().observe(reader, args)

    def forward(self, x: Tensor) -> Tensor:
        """Scores [B, N, 1] of the tokens [B, N, C], those of the protected ones are 0."""
        given, self.given = present(self.given), None
        scores = self.score(given) if callable(self.score) else given
        scores = by_patch(scores, x.shape[1] - self.lead - self.tail).to(torch.float32)
        # Compiled for any batch, this says that both are of one size.
        if scores.shape[0] != x.shape[0]:
            raise ConfigError(f"{ARGUMENT} are of {scores.shape[0]} images, and the model was given {x.shape[0]}.")
        return F.pad(scores, (self.lead, self.tail))[..., None]


class JointTokens(Attached):
    """One learned token per joint; a patch counts for as much as the joint that attends to it most.

    In training every patch stays, and those that would leave are masked from the others; the gradient of the mask is
    that of the attention.
    """

    method = "select"

    def __init__(self, width: int, lead: int, tail: int, joints: int) -> None:
        super().__init__()
        self.lead, self.tail = lead, tail
        self.norm = nn.LayerNorm(width)
        self.tokens = nn.Parameter(nn.init.trunc_normal_(torch.empty(joints, width), std=width**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        """The largest share of a joint's attention, times the number of patches: [B, N, C] -> [B, N, 1]."""
        patches = x[:, self.lead : x.shape[1] - self.tail]
        logits = F.linear(self.norm(patches), self.tokens) / math.sqrt(x.shape[2])
        shares = logits.softmax(1).amax(2) * patches.shape[1]
        return F.pad(shares, (self.lead, self.tail))[..., None]


@register_method
@dataclass(frozen=True)
class Select(Method):
    """Keeps the patches with the highest scores, before the first block.

    What made the others is not computed where it makes each patch by itself, as a patch embedding does. The scores are
    those of ``mctf_compile.attach``, and come with each call of the model: see the documentation of methods.

    Options:
        keep_ratio: share of the patches that stay.
        score: ``input``, as the argument ``patch_scores`` of each call; a callable, which takes the images (``attach``
            needs it, the backend does not); or ``joints``, as learned tokens attend to them.
        joints: how many learned tokens.
        given_back: what a patch that left is where an operator or output wants all: ``zeros``, or ``nearest``: the kept
            one most like it.
    """

    name: ClassVar[str] = "select"
    source: ClassVar[str] = "Kinfu & Vidal, BMVC 2023, arXiv 2306.04225"
    site: ClassVar[Site] = Site.BEFORE
    needs: ClassVar[Collection[Need]] = (Need.LEARNED,)
    reads: ClassVar[Reads] = Reads.STREAM
    sized: ClassVar[bool] = False
    hint: ClassVar[str] = f"with score='input', each call gives {ARGUMENT}=; score='joints' needs nothing"

    keep_ratio: float = option(0.6, share)
    score: str | Callable[..., Tensor] = option(INPUT, _score)
    joints: int = option(17, integer(1))
    given_back: str = option("zeros", one_of("zeros", "nearest"))

    def default_layers(self, depth: int) -> Collection[int]:
        return (0,)

    def module(self, width: int, lead: int, tail: int, before: Attached | None) -> Attached:
        if self.score == JOINTS:
            return JointTokens(width, lead, tail, self.joints)
        return GivenScores(lead, tail, self.score)

    def relax(self, evidence: Evidence, n: int, r: int) -> Relaxed:
        """Every token stays; one that would leave counts for itself alone, straight through to its score."""
        score = present(evidence.learned)[..., 0]
        keep, _ = torch.ops.mctf.select(score, n - evidence.lead - evidence.tail - r, evidence.lead, evidence.tail)
        stays = torch.zeros_like(score).scatter(1, keep, 1.0) + (score - score.detach())
        return Relaxed(stays, whole_to_itself=True, back=stays if self.given_back == "zeros" else None)

    def removal(self, index: int, depth: int, count: Count) -> Removal:
        kept = math.ceil(self.keep_ratio * count.free)
        return Removal(count.free - kept, None if kept < count.free else f"keep_ratio={self.keep_ratio} keeps all")

    def choose(self, evidence: Evidence, r: int) -> Choice:
        choice = highest(present(evidence.learned)[..., 0], evidence, r)
        return replace(choice, zeroed=self.given_back == "zeros")


def by_patch(scores: Tensor, patches: int) -> Tensor:
    """Scores [B, patches] of what says something of places in an image.

    Args:
        scores: [B, patches]; or a map [B, h, w]; or one for each of J joints, [B, J, h, w], of which the largest
            counts. A finer map than that of the patches is pooled by its maxima. Boolean or numbers.
        patches: how many patches an image has.

    Raises ``ConfigError`` where they do not fit.
    """
    if scores.dtype is torch.bool:
        scores = scores.to(torch.float32)
    if scores.dim() == 4:
        scores = scores.amax(1)
    if scores.dim() == 3:
        tall, wide = scores.shape[1:]
        height = math.isqrt(patches * tall // wide)
        if height and height * wide == (patches // height) * tall and patches % height == 0:
            scores = F.adaptive_max_pool2d(scores[:, None], (height, patches // height))[:, 0].flatten(1)
    if scores.dim() != 2 or scores.shape[1] != patches:
        raise ConfigError(
            f"{ARGUMENT} of shape {list(scores.shape)} do not fit {patches} patches: they must be [B, {patches}], or "
            "maps [B, h, w] or [B, J, h, w] of the proportions of an image."
        )
    return scores
