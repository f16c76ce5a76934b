"""What a reduction method is: where it acts, what it needs to see, and which tokens it chooses."""

from __future__ import annotations

import enum
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from mctf_compile.errors import ConfigError
from mctf_compile.methods.attached import Attached
from mctf_compile.options.fields import Options, block_numbers, flag, integer, one_of, option, patterns, some_of, tile
from mctf_compile.options.schedule import (
    AUTO,
    NOT_CHOSEN,
    Removal,
    Schedule,
    Target,
    check_r,
    parse_r,
    parse_target,
    removal,
)
from mctf_compile.options.tuned import TunedSchedule, read_schedule


class Site(enum.Enum):
    """Where in a block the number of tokens changes."""

    AHEAD = "before attention, whose map is pooled along (one step ahead)"
    BEFORE = "before attention, which is computed on the tokens that are left"
    BETWEEN = "between attention and the MLP"
    AFTER = "after the block"
    AROUND = "before attention, and back after the block: the others pass it by"
    BRANCH = "in a branch, whose result is given back before it is added to the residual stream"


class Need(enum.Enum):
    """What a method asks of a block beside its tokens. Nothing is computed that no method asks for."""

    IMPORTANCE = "the mean attention that each token receives"
    CLASS_ATTENTION = "the attention of the class token"
    CLASS_LOGITS = "the logits of the class token's query"
    KEYS = "the keys of attention"
    LEARNED = "what a module that was attached to the model computes"


class Reads(enum.Enum):
    """Where in a block an attached module reads the tokens."""

    STREAM = "the residual stream that the block reads"
    PROJECTION = "the input of its query projection"


# The option ``span``, and the branches of a block that one of ``BRANCH`` may choose.
REST, BRANCH = "rest", "branch"
ATTENTION, CROSS, MLP = "attention", "cross", "mlp"

# What is asked of the first prefix token.
OF_CLASS_TOKEN = {Need.CLASS_ATTENTION, Need.CLASS_LOGITS}


@dataclass(frozen=True)
class Tiles:
    """A grid of ``height`` x ``width`` tokens in tiles, in each of which one receives others; see the options."""

    height: int
    width: int
    tile: tuple[int, int]
    seed: int | None = None

    @property
    def receivers(self) -> int:
        return -(-self.height // self.tile[0]) * -(-self.width // self.tile[1])


@dataclass(frozen=True)
class Evidence:
    """What a method sees of a block: tensors of the graph. What it did not ask for is None.

    ``x`` [B, N, C]: the residual stream; ``size`` [B, N]: token sizes; ``lead`` and ``tail``: protected tokens
    at its ends; ``index`` of ``depth``: the block in its tower. ``padding``: bool [B, N] where attention masks
    tokens out, else None; padding and other tokens must not be combined where ``r`` leaves a choice. ``image``: int64
    [B, N] where several images are packed into one sequence, else None; a token of one is never combined with one of
    another, and no choice of ``r`` asks for it where each leaves for the next or a neighbour of its kind. What is
    floating is float32 or wider, but for ``x``, and autocast is off.

    ``importance`` [B, N]: the mean over heads and queries of the block's attention; ``class_attention``
    [B, N]: its mean over heads for the query of the first token; ``class_logits`` [B, N]: the logits of that
    query, up to a positive factor; ``keys`` [B, N, D]: the mean over heads; ``learned`` [B, N, K]. ``tiles``: where
    in the grid of the unprotected tokens those are that receive others; None for every second token.
    """

    x: Tensor
    size: Tensor
    lead: int
    tail: int
    index: int
    depth: int
    padding: Tensor | None = None
    image: Tensor | None = None
    importance: Tensor | None = None
    class_attention: Tensor | None = None
    class_logits: Tensor | None = None
    keys: Tensor | None = None
    learned: Tensor | None = None
    tiles: Tiles | None = None

    @property
    def metric(self) -> Tensor:
        """What tokens are alike by, [B, N, D]: their keys; in a branch, which begins before there are any, themselves.

        Source: Bolya & Hoffman, CVPR Workshops 2023 (arXiv 2303.17604), section 4.
        """
        return self.x if self.keys is None else self.keys

    @property
    def kind(self) -> Tensor | None:
        """[B, N]: tokens of two kinds are not combined; None where all are of one."""
        return self.padding if self.image is None else self.image


class Combine(enum.Enum):
    """What becomes of the tokens that leave."""

    MEAN = "the weighted mean of each group"
    MLERP = "the weighted mean of each group, with the largest norm of its members"
    MAX = "the maximum of each group"
    DROP = "nothing; the tokens kept stay as they are"


@dataclass(frozen=True)
class Choice:
    """Which tokens leave into which, and how they are combined.

    ``keep`` [B, M], ``gone`` [B, r], ``into`` [B, r] as ``mctf::match`` returns them. Without ``into`` the
    tokens that left go with the kept ones most similar to them, should an operator want all tokens back.
    ``weight`` [B, N], before normalisation, for ``Combine.MEAN`` and ``Combine.MLERP``. ``gain`` [B, M]: a factor for
    the combined residual stream, where the method wants another than the mean. ``mixed``: a group may hold padding
    beside other tokens; it is padding where the token that stays is. ``zeroed``: tokens that were dropped come back as
    zeros, should an operator want all tokens.

    Raises ``ConfigError`` where tokens are to be combined and ``into`` does not say with which.
    """

    keep: Tensor
    gone: Tensor
    into: Tensor | None
    weight: Tensor | None = None
    combine: Combine = Combine.MEAN
    gain: Tensor | None = None
    mixed: bool = False
    zeroed: bool = False

    def __post_init__(self) -> None:
        if self.into is None and self.combine is not Combine.DROP:
            raise ConfigError(
                f"Choice(combine={self.combine}) combines the tokens that leave with others, and into=None does not "
                "say with which; give into, the position in keep of each, or combine=Combine.DROP."
            )


@dataclass(frozen=True)
class Relaxed:
    """How tokens count in training, where all of them stay, so that gradients reach what decides.

    ``size`` [B, N]: how much each counts for others; ``order`` [B, N]: the old position of each, None where
    none moves; ``x`` [B, N, C]: the residual stream in that order, None where it stays. ``whole_to_itself``:
    a token counts fully for itself whatever its size, as in DynamicViT's masked softmax. ``back`` [B, N]: a factor for
    what the tokens are where an operator or output wants all of them, None for 1.
    """

    size: Tensor
    order: Tensor | None = None
    x: Tensor | None = None
    whole_to_itself: bool = False
    back: Tensor | None = None


@dataclass(frozen=True)
class Count:
    """The tokens before a block: ``now`` in all, ``protected`` of them; ``first`` unprotected ones at the start.

    ``spare``: tokens of the unprotected half that must stay without a partner. ``receivers``: those that may not leave;
    None for half of the unprotected ones.
    """

    now: int
    protected: int
    first: int
    spare: int = 0
    receivers: int | None = None

    @property
    def free(self) -> int:
        return self.now - self.protected


@dataclass(frozen=True)
class Method(Options):
    """A reduction method. Subclasses are frozen dataclasses whose fields are the method's options.

    ``name`` and ``source``: what it is called, and the paper. ``site``: where it acts. ``needs``: what it
    reads of a block. ``sized``: whether a token that others left into counts for them too; a method without
    sizes leaves every token a size of 1. ``matches``: whether it chooses by ``match`` of
    ``mctf_compile.methods.combining``, which knows of tiles. ``reads``: where the modules that ``attach`` adds read the
    tokens; None for a method that has none. ``keeps_images_apart``: whether ``choose`` combines no tokens of two images
    that ``Evidence.image`` tells apart, and drops none. ``hint``: what to do where its needs cannot be met.

    Options of every method:
        layers: blocks (0-based) of a tower that it acts on; None for the method's default.
        protected: number of prefix tokens never removed; ``"auto"`` reads it off the graph.
        modules: which modules' blocks may fuse, by their paths in the model or patterns of such, as ``"student.*"``
            or ``["visual", "blocks.[0-5]"]``; None for all.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    site: ClassVar[Site]
    needs: ClassVar[Collection[Need]] = ()
    sized: ClassVar[bool] = True
    matches: ClassVar[bool] = False
    reads: ClassVar[Reads | None] = None
    keeps_images_apart: ClassVar[bool] = False
    hint: ClassVar[str] = ""

    layers: tuple[int, ...] | None = option(None, block_numbers)
    protected: int | str = option("auto", integer(0, "auto"))
    modules: tuple[str, ...] | None = option(None, patterns)

    @property
    def active(self) -> bool:
        """Whether these options ask for any token to be removed."""
        return True

    @property
    def fuses_at(self) -> Site:
        """Where it acts under these options: its ``site``, or in branches."""
        return self.site

    @property
    def counts_sizes(self) -> bool:
        """Whether attention adds the logarithm of sizes to its logits."""
        return self.sized

    def default_layers(self, depth: int) -> Collection[int]:
        """The blocks of ``depth`` that it acts on by default."""
        return range(depth)

    def acts_on(self, depth: int) -> list[int]:
        """The blocks of ``depth`` that it acts on, in order: those of the option ``layers``, or its default."""
        return sorted(self.default_layers(depth) if self.layers is None else self.layers)

    def check_model(self, depth: int, tokens: object) -> None:
        """Raise ``ConfigError`` where the options are for a model of another depth, or of other tokens in a block."""

    def removal(self, index: int, depth: int, count: Count) -> Removal:
        """How many tokens block ``index`` of a tower of ``depth`` removes.

        Raises ``ConfigError`` where options do not fit.
        """
        raise NotImplementedError

    def choose(self, evidence: Evidence, r: int) -> Choice:
        """Choose ``r`` tokens to leave, none of them protected."""
        raise NotImplementedError

    def module(self, width: int, lead: int, tail: int, before: Attached | None) -> Attached:
        """A new module for one block of ``width`` channels, for methods that have some.

        ``before``: that of the block before it, if any.
        """
        raise NotImplementedError

    def relax(self, evidence: Evidence, n: int, r: int) -> Relaxed:
        """What training does instead of removing ``r`` of the ``n`` first tokens, for methods with modules."""
        raise NotImplementedError


@dataclass(frozen=True)
class Merging(Method):
    """A method that removes a scheduled number of tokens per block.

    Options:
        r: tokens removed per block: int, ratio < 1 of the unprotected tokens, list with one entry per
            block, ``(r, inflection)``, a preset name (``"fast"``), or ``"auto"``: the least that meets ``target``.
        target: for ``r="auto"``: ``"gmacs=2.6"`` (per image), ``"speedup=1.5"`` (times fewer multiply-accumulates) or
            ``"latency_ms=20"`` (per call, measured when it is compiled).
        schedule: a file that ``mctf tune`` wrote, which says ``r`` and the method, for the model that it was found for.
        min_tokens: no block leaves fewer tokens than this (protected ones included).
        proportional: add log size to the logits of attention over fused tokens.
        span: how far tokens stay fused: ``rest``, until an operator needs the original ones; or ``branch``: only within
            a branch of each block, and the residual stream keeps them all.
        partition: in branches, the tile of the token grid in which one token receives others, as ``(2, 2)``; None for
            every second token.
        partition_seed: of the place in each tile that receives, the same at every call; None for the first.
        match_every: in branches, how many blocks one after another on a residual stream fuse the tokens that the first
            of them has matched.
        branches: which branches those are: one or several of ``attention``, ``cross`` (to other tokens) and ``mlp``.
    """

    r: int | float | list[Any] | tuple[Any, ...] | str = option(16, check_r)
    target: Target | str | None = option(None, parse_target)
    schedule: TunedSchedule | str | None = option(None, read_schedule)
    min_tokens: int = option(1, integer(1))
    proportional: bool = option(True, flag)
    span: str = option(REST, one_of(REST, BRANCH))
    branches: tuple[str, ...] = option((ATTENTION,), some_of(ATTENTION, CROSS, MLP))
    partition: tuple[int, int] | None = option(None, tile)
    partition_seed: int | None = option(None, integer(0, None))
    match_every: int = option(1, integer(1))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.in_branch:
            for name in ("branches", "partition", "match_every"):
                value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
                if value != default:
                    shown = list(value) if name == "branches" else value
                    raise ConfigError(f"{name}={shown!r} has no effect without span='branch'.")
        if self.partition_seed is not None and self.partition is None:
            raise ConfigError(f"partition_seed={self.partition_seed} has no effect without a partition.")
        if self.partition is not None and not self.matches:
            raise ConfigError(f"partition={self.partition}: method {self.name!r} does not match tokens pair by pair.")
        if self.in_branch and self.reads is not None:
            raise ConfigError(f"span='branch': the modules of method {self.name!r} learn with tokens that stay fused.")
        if self.solved_for is None and self.r == AUTO:
            raise ConfigError("r='auto' needs a target, as in target='speedup=1.5', 'gmacs=2.6' or 'latency_ms=20'.")

    @property
    def solved_for(self) -> Target | None:
        """The target that ``r`` is yet to be solved for."""
        return self.target if self.r == AUTO and isinstance(self.target, Target) else None

    @cached_property
    def requested(self) -> Schedule:
        return parse_r(self.r)

    @property
    def active(self) -> bool:
        return self.solved_for is not None or self.requested.asks_for_fusion

    @property
    def in_branch(self) -> bool:
        """Whether tokens are fused within branches alone."""
        return self.span == BRANCH

    @property
    def fuses_at(self) -> Site:
        return Site.BRANCH if self.in_branch else self.site

    @property
    def counts_sizes(self) -> bool:
        return self.sized and self.proportional

    def check_model(self, depth: int, tokens: object) -> None:
        if isinstance(self.schedule, TunedSchedule):
            self.schedule.check(depth, tokens)

    def removal(self, index: int, depth: int, count: Count) -> Removal:
        request = self.requested.per_block(depth)[index]
        preset = self.requested.layers(depth)
        if preset is not None and self.layers is None and index not in preset:
            return Removal(0, NOT_CHOSEN)
        return removal(request, count.now, count.protected, self.min_tokens, count.spare, count.receivers)


METHODS: dict[str, type[Method]] = {}


def register_method(method: type[Method]) -> type[Method]:
    """Make a class available as ``options={"method": method.name}``; usable as a decorator.

    Raises ``ConfigError`` where the name is taken.
    """
    if method.name in METHODS:
        raise ConfigError(f"a method named {method.name!r} is already registered.")
    METHODS[method.name] = method
    return method


def get_method(name: Any) -> type[Method]:
    """The method of that name; raises ``ConfigError`` that lists the known ones."""
    if not isinstance(name, str) or name not in METHODS:
        raise ConfigError(f"unknown method {name!r}; the methods are: {', '.join(sorted(METHODS))}.")
    return METHODS[name]
