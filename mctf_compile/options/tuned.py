"""The files that ``mctf tune`` writes, and the option ``schedule`` takes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mctf_compile.errors import ConfigError
from mctf_compile.options.fields import Frozen

FORMAT = "mctf schedule 1"


@dataclass(frozen=True)
class TunedSchedule:
    """What such a file says.

    ``file``: its path. ``options``: the options of the backend that it stands for: the method, r, and what else was
    found. ``blocks`` and ``tokens``: of the model that it was found for. ``about``: what was promised and on what,
    which changes nothing.
    """

    file: str
    options: Frozen
    blocks: int
    tokens: int
    about: Frozen = field(default_factory=lambda: Frozen({}), compare=False)

    def check(self, depth: int, tokens: object) -> None:
        """Raise ``ConfigError`` for a model of another depth, or of another number of tokens where that is known."""
        if depth != self.blocks:
            raise ConfigError(
                f"schedule={self.file!r} was found for a model of {self.blocks} attention blocks, and this one has "
                f"{depth}; mctf tune finds one for it."
            )
        if isinstance(tokens, int) and tokens != self.tokens:
            raise ConfigError(
                f"schedule={self.file!r} was found for {self.tokens} tokens, and this model has {tokens}: of another "
                "size of images, perhaps; mctf tune finds one for it."
            )

    def completing(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The options given with the file, and those that it says.

        Raises ``ConfigError`` where they disagree; with ``dynamic_r`` an r is what ``set_r`` made of that of the file.
        """
        for name, value in self.options.items():
            overridden = name == "r" and given.get("dynamic_r") is True
            if name in given and given[name] != value and not overridden:
                raise ConfigError(
                    f"{name}={given[name]!r} and schedule={self.file!r}, which has {name}={value!r}, disagree; leave "
                    "one of them out."
                )
        return {**self.options, **given, "schedule": self}

    def write(self) -> None:
        """Write the file, which is whole at every moment; ``OSError`` where it cannot be."""
        values = {
            "format": FORMAT,
            "options": dict(self.options),
            "blocks": self.blocks,
            "tokens": self.tokens,
            **self.about,
        }
        new = Path(f"{self.file}.new")
        new.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        os.replace(new, self.file)


def read_schedule(name: str, value: Any) -> TunedSchedule | None:
    """The option ``schedule``: the path of a file, which is read. Raises ``ConfigError`` where it is no schedule."""
    if value is None or isinstance(value, TunedSchedule):
        return value
    if not isinstance(value, (str, os.PathLike)):
        raise ConfigError(f"{name}={value!r} must be the path of a file that mctf tune wrote.")
    file = os.fspath(value)
    try:
        values = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{name}={file!r} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"{name}={file!r} is no schedule: {error}.") from error
    known = isinstance(values, dict) and values.get("format") == FORMAT
    fits = known and isinstance(values.get("options"), dict) and isinstance(values["options"].get("r"), list)
    if not fits or not all(type(values.get(key)) is int for key in ("blocks", "tokens")):
        raise ConfigError(f"{name}={file!r} is no schedule: mctf tune writes files of the format {FORMAT!r}.")
    about = {k: v for k, v in values.items() if k not in ("format", "options", "blocks", "tokens")}
    return TunedSchedule(file, Frozen(values["options"]), values["blocks"], values["tokens"], Frozen(about))
