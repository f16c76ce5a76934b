"""Options as fields of frozen dataclasses, each declared together with the check that its value must pass."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from mctf_compile.errors import ConfigError

# Takes an option's name and value; returns the value to keep, or raises ConfigError.
Check = Callable[[str, Any], Any]


def option(default: Any, check: Check) -> Any:
    """A dataclass field for an option with a default."""
    return field(default=default, metadata={"check": check})


class Frozen(Mapping[str, Any]):
    """A dict that is an option: nobody changes it, and it can be hashed whatever its values are."""

    def __init__(self, items: Mapping[str, Any]) -> None:
        self._items = copy.deepcopy(dict(items))

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items))

    def __repr__(self) -> str:
        return repr(self._items)


@dataclass(frozen=True)
class Options:
    """Base of dataclasses whose fields are options. Raises ``ConfigError`` for a value that fails its check."""

    def __post_init__(self) -> None:
        for f in fields(self):
            check = f.metadata.get("check")
            if check is not None:
                object.__setattr__(self, f.name, check(f.name, getattr(self, f.name)))

    @classmethod
    def option_names(cls) -> list[str]:
        return [f.name for f in fields(cls) if f.init]


def nearest(name: Any, known: list[str]) -> str:
    """``did you mean 'x'? `` where one of the known names is near, else nothing."""
    near = difflib.get_close_matches(str(name), known, 1, 0.5)
    return f"did you mean {near[0]!r}? " if near else ""


def hint(value: Any, allowed: Iterable[str]) -> str:
    """``; did you mean 'x'?`` where one of the allowed values is near, else nothing."""
    near = difflib.get_close_matches(str(value), allowed, 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def one_of(*allowed: str | None) -> Check:
    """One of the ``allowed`` words."""

    def check(name: str, value: Any) -> Any:
        if value not in allowed:
            words = [word for word in allowed if word is not None]
            raise ConfigError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}{hint(value, words)}")
        return value

    return check


def some_of(*allowed: str) -> Check:
    """One of the ``allowed`` words, or several; kept as a tuple in their order, each once."""

    def check(name: str, value: Any) -> tuple[str, ...]:
        several = (value,) if isinstance(value, str) else value
        if not isinstance(several, (list, tuple, set, frozenset)) or not several:
            raise ConfigError(f"{name}={value!r} must be one or several of {', '.join(map(repr, allowed))}.")
        for word in several:
            one_of(*allowed)(name, word)
        return tuple(word for word in allowed if word in several)

    return check


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} must be True or False.")
    return value


def integer(least: int, *words: str | None) -> Check:
    """A whole number from ``least`` on, or one of ``words``."""

    def check(name: str, value: Any) -> Any:
        if any(value is word or (isinstance(value, str) and value == word) for word in words):
            return value
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            also = "".join(f" or {word!r}" for word in words)
            raise ConfigError(f"{name}={value!r} must be a whole number >= {least}{also}.")
        return value

    return check


def tile(name: str, value: Any) -> tuple[int, int] | None:
    """Rows and columns of a tile of more than one token, or None."""
    if value is None:
        return None
    numbers = isinstance(value, (list, tuple)) and len(value) == 2 and all(type(n) is int and n > 0 for n in value)
    if not numbers or tuple(value) == (1, 1):
        raise ConfigError(f"{name}={value!r} must be the rows and columns of a tile, as (2, 2), or None.")
    return value[0], value[1]


def temperature(name: str, value: Any) -> float:
    """A finite number from 0 on."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ConfigError(f"{name}={value!r} must be a number >= 0; 0 turns the criterion off.")
    return value


def share(name: str, value: Any) -> float:
    """A share of the tokens: above 0, at most 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ConfigError(f"{name}={value!r} must be a number above 0 and at most 1.")
    return value


def block_numbers(name: str, value: Any) -> tuple[int, ...] | None:
    """Block numbers from 0 on, sorted and each once, or None."""
    if value is None:
        return None
    numbers = isinstance(value, (list, tuple, range, set)) and all(
        isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value
    )
    if not numbers:
        raise ConfigError(f"{name}={value!r} must be a list of block numbers >= 0, or None.")
    return tuple(sorted(set(value)))


def patterns(name: str, value: Any) -> tuple[str, ...] | None:
    """One pattern or several, of paths of modules."""
    if value is None:
        return None
    several = (value,) if isinstance(value, str) else value
    if not isinstance(several, (list, tuple)) or not several or not all(isinstance(p, str) and p for p in several):
        raise ConfigError(f"{name}={value!r} must be a path or pattern of modules, as 'student.*', or a list of such.")
    return tuple(several)
