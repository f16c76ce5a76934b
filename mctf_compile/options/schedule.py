"""How many tokens each block removes."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from mctf_compile.errors import ConfigError

# Presets: the request per fusing block, and the fusing blocks as fractions of the depth.
PRESETS: dict[str, tuple[float, tuple[float, ...]]] = {
    # "MCTF-fast" of the official code: ratio 0.35 before blocks 3, 6 and 9 of 12.
    "fast": (0.35, (0.25, 0.5, 0.75)),
}

# Why a block fuses nothing that no option asked for.
NOT_CHOSEN = "not among the layers that fuse"
ALONE = (
    "the only block of its tower, and by default the first one stays dense; compile the model as one, or give "
    "layers=[0]"
)

# The ``r`` that is solved for a target.
AUTO = "auto"
GMACS, SPEEDUP, LATENCY = "gmacs", "speedup", "latency_ms"


@dataclass(frozen=True)
class Target:
    """A goal for ``r="auto"``: at most ``gmacs`` per image or ``latency_ms`` per call; ``speedup`` times fewer MACs."""

    quantity: str
    value: float

    def __str__(self) -> str:
        return f"{self.quantity}={self.value:g}"


@dataclass(frozen=True)
class Removal:
    """What one block removes: ``r`` tokens, and a note: what a clamp did, or why nothing is removed.

    ``acts``: whether the method has something to do even where the number of tokens stays.
    """

    r: int
    note: str | None = None
    acts: bool = False


class PerBlock(tuple[Any, ...]):
    """The option ``r`` as a list with one entry per block, which nobody changes: unlike any ``(r, inflection)``."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (PerBlock, list)) and list(self) == list(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((PerBlock, *self))

    def __repr__(self) -> str:
        return repr(list(self))


@dataclass(frozen=True)
class Schedule:
    """A validated ``r`` option: ``request`` is an int, a ratio, a list or (r, inflection)."""

    request: int | float | tuple[Any, ...]
    inflection: float | None = None
    preset: tuple[float, ...] | None = None

    def per_block(self, depth: int) -> list[int | float]:
        """The request for each of ``depth`` blocks. Raises ``ConfigError`` for a list of another length."""
        if isinstance(self.request, tuple):
            if len(self.request) != depth:
                raise ConfigError(
                    f"r is a list of {len(self.request)} entries, but the model has {depth} attention blocks; "
                    f"give one entry per block."
                )
            return list(self.request)
        if self.inflection is None:
            return [self.request] * depth
        # Bolya et al., ICLR 2023, section 4.1: linear from lo to hi, with mean r.
        low = int(self.request * (1 - self.inflection))
        high = 2 * self.request - low
        step = (high - low) / (depth - 1) if depth > 1 else 0.0
        return [max(int(low + step * i), 0) for i in range(depth)]

    @property
    def asks_for_fusion(self) -> bool:
        """Whether any block is asked to remove tokens at all."""
        return any(self.request) if isinstance(self.request, tuple) else self.request > 0

    def layers(self, depth: int) -> list[int] | None:
        """The blocks that a preset fuses, or None where the schedule names none."""
        return None if self.preset is None else sorted({int(f * depth) for f in self.preset})


def check_r(name: str, r: Any) -> Any:
    """The option ``r``, if it is one, with a list in a form that does not change."""
    if r != AUTO:
        parse_r(r)
    return PerBlock(r) if isinstance(r, list) else r


def parse_target(name: str, target: Any) -> Target | None:
    """Validate the option ``target``; raises ``ConfigError``."""
    if target is None or isinstance(target, Target):
        return target
    quantity, _, value = target.partition("=") if isinstance(target, str) else ("", "", "")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    least = 1 if quantity == SPEEDUP else 0
    if quantity not in (GMACS, SPEEDUP, LATENCY) or not least < number < math.inf:
        raise ConfigError(
            f"{name}={target!r} must be 'gmacs=2.6' (per image), 'speedup=1.5' (times fewer MACs, above "
            "1) or 'latency_ms=20' (per call)."
        )
    return Target(quantity, number)


def distribute(total: int, blocks: Collection[int], depth: int) -> list[int]:
    """``total`` tokens over some of ``depth`` blocks, as evenly as can be; later blocks remove what is left over."""
    each, over = divmod(total, max(len(blocks), 1))
    more = sorted(blocks)[len(blocks) - over :]
    return [each + (i in more) if i in blocks else 0 for i in range(depth)]


def least(meets: Callable[[int], bool], most: int) -> int | None:
    """The least whole number up to ``most`` that meets a goal which all greater ones meet too, or None."""
    if not meets(most):
        return None
    low, high = -1, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(middle) else (middle, high)
    return high


def quarters(depth: int) -> list[int]:
    """Blocks 3, 6 and 9 of 12."""
    return sorted({depth // 4, depth // 2, 3 * depth // 4})


def parse_r(r: Any) -> Schedule:
    """Validate the option ``r``; raises ``ConfigError``."""
    if isinstance(r, str):
        if r not in PRESETS:
            raise ConfigError(f"r={r!r} is no preset; the presets are {', '.join(map(repr, (*PRESETS, AUTO)))}.")
        return Schedule(PRESETS[r][0], preset=PRESETS[r][1])
    if isinstance(r, (list, PerBlock)):
        return Schedule(tuple(_one(v, f"r[{i}]") for i, v in enumerate(r)))
    if isinstance(r, tuple):
        if len(r) != 2 or isinstance(r[1], bool) or not isinstance(r[1], (int, float)) or not -1 <= r[1] <= 1:
            raise ConfigError(f"r={r!r} must be (r, inflection) with an inflection from -1 to 1, or a list per block.")
        base = _one(r[0], "r[0]")
        if not isinstance(base, int):
            raise ConfigError(f"r={r!r}: with an inflection, r must be a whole number of tokens.")
        return Schedule(base, inflection=float(r[1]))
    return Schedule(_one(r, "r"))


def _one(value: Any, name: str) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{name}={value!r} must be a number of tokens, or a ratio below 1.")
    if value < 0 or value != value:
        raise ConfigError(f"{name}={value!r} is negative; r counts the tokens that a block removes.")
    if isinstance(value, float) and value >= 1:
        raise ConfigError(f"{name}={value!r}: a float is a ratio and must be below 1; give a count as an int.")
    return value


def removal(
    request: int | float,
    tokens: int,
    protected: int,
    min_tokens: int,
    spare: int = 0,
    receivers: int | None = None,
) -> Removal:
    """The effective r of a block: the request, clamped to the floor and to half of the unprotected tokens.

    Where that is 0, the note says why.

    ``spare``: tokens of that half that must stay. ``receivers``: the unprotected tokens that may not leave, where those
    are not the other half.

    Source: official MCTF, ``parse_r`` and the clamps of its matching; the floor here holds for ratios too.
    """
    if request == 0:
        return Removal(0, "r is 0 for this block")
    free = tokens - protected
    r = int(request * free) if isinstance(request, float) else request
    most = free // 2 if receivers is None else free - receivers
    floor, half = max(tokens - min_tokens, 0), max(most - spare, 0)
    effective = max(min(r, floor, half), 0)
    if effective == r:
        return Removal(r, None if r else f"r={request} of {free} tokens rounds to 0")
    limit = f"min_tokens={min_tokens}" if floor <= half else f"half of the {free} unprotected tokens"
    if floor > half and receivers is not None:
        limit = f"the {receivers} tokens that receive others, one in each tile"
    return Removal(effective, f"r clamped from {r} to {effective} by {limit}")
