"""What a reduction method is: where it fuses, what it needs to see, and which tokens it chooses."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mctf_compile.errors import ConfigError

if TYPE_CHECKING:
    from mctf_compile.config import FusionConfig


class Site(enum.Enum):
    """Where in a block the tokens are fused."""

    AHEAD = "before attention, whose map is pooled along (one step ahead)"
    BEFORE = "before attention, which is computed on the fused tokens"
    BETWEEN = "between attention and the MLP"
    AFTER = "after the block"


@dataclass(frozen=True)
class Evidence:
    """What a method sees of a block: tensors of the graph.

    ``x`` [B, N, C]: the residual stream that is fused; ``size`` [B, N]: token sizes;
    ``importance`` [B, N]: mean attention received, of the block's own attention. ``padding``: bool [B, N]
    where attention masks tokens out, else None; padding and other tokens must not be combined.
    """

    x: Tensor
    size: Tensor
    importance: Tensor
    padding: Tensor | None = None


@dataclass(frozen=True)
class Choice:
    """Which tokens leave into which, and with what weights they are combined.

    ``keep`` [B, M], ``gone`` [B, r], ``into`` [B, r] as ``mctf::match`` returns them; ``weight`` [B, N]
    before normalisation; ``maximum``: combine by the maximum instead.
    """

    keep: Tensor
    gone: Tensor
    into: Tensor
    weight: Tensor
    maximum: bool = False


@dataclass(frozen=True)
class Method:
    """A reduction method.

    ``layers(depth)``: the blocks that fuse by default. ``site(config)``: where. ``choose(evidence, r,
    lead, tail, config)``: r tokens to remove, with ``lead`` and ``tail`` protected ones at the ends.
    """

    name: str
    source: str
    layers: Callable[[int], range]
    site: Callable[[FusionConfig], Site]
    choose: Callable[[Evidence, int, int, int, FusionConfig], Choice]


METHODS: dict[str, Method] = {}


def register_method(method: Method) -> Method:
    """Make ``method`` available as ``options={"method": method.name}``."""
    if method.name in METHODS:
        raise ConfigError(f"a method named {method.name!r} is already registered.")
    METHODS[method.name] = method
    return method


def get_method(name: Any) -> Method:
    """The method of that name; raises ``ConfigError`` that lists the known ones."""
    if not isinstance(name, str) or name not in METHODS:
        raise ConfigError(f"unknown method {name!r}; the methods are: {', '.join(sorted(METHODS))}.")
    return METHODS[name]
