"""What a model says of each image, and the folder that keeps it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mctf_compile.errors import ConfigError, MctfError

# Classes that are kept of each image.
TOP = 5


@dataclass(frozen=True)
class Outcomes:
    """Of N images: the most likely classes, int64 [N, ``TOP`` or all], the likeliest first; its probability [N]."""

    top: Tensor
    confidence: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> Outcomes:
        """Of logits [N, K]; among equal ones the smaller class comes first."""
        logits = logits.detach().float().cpu()
        order = logits.argsort(dim=1, descending=True, stable=True)[:, :TOP]
        return cls(order, logits.softmax(1).amax(1))

    @classmethod
    def together(cls, parts: Iterable[Outcomes]) -> Outcomes:
        held = list(parts)
        return cls(torch.cat([part.top for part in held]), torch.cat([part.confidence for part in held]))

    def right(self, labels: Tensor, within: int = 1) -> Tensor:
        """Whether the label is among the first classes, bool [N]."""
        return (self.top[:, :within] == labels[:, None]).any(1)

    def __len__(self) -> int:
        return len(self.top)


# The file of a folder that says what is kept in it.
FACTS = "run.json"


def claim(folder: Path, facts: Mapping[str, Any], rank: int, run: str, kept: str) -> None:
    """Make a folder that of one run, told from others by ``facts``; a run with equal facts may go on in it.

    Args:
        folder: made where it is missing.
        facts: what the run depends on, as JSON takes it.
        rank: the number of this process among those that claim it.
        run: what the folder is of, for messages.
        kept: what is in it.

    Raises:
        ConfigError: the folder was begun with other facts, which the message names, or holds something else.
        MctfError: it cannot be written.
    """
    given = json.loads(json.dumps(dict(facts)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / FACTS
        if not file.exists():
            # Another process may be at the same.
            if not all(path.name.startswith(FACTS) for path in folder.iterdir()):
                raise ConfigError(f"{folder} is not empty and holds no {run}; name another folder")
            new = folder / f"{FACTS}.{rank}"
            new.write_text(json.dumps(given, indent=1) + "\n")
            os.replace(new, file)
        found = json.loads(file.read_text())
    except OSError as error:
        raise MctfError(f"{kept} cannot be kept in {folder}: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{folder / FACTS} is damaged: {error}") from error
    wrong = sorted(name for name in {*found, *given} if found.get(name) != given.get(name))
    if wrong:
        name = wrong[0]
        raise ConfigError(
            f"{folder} holds another {run}: its {name} is {found.get(name)!r}, and now it is {given.get(name)!r}; name "
            "another folder"
        )


# The outcomes of each batch, by its number.
Batches = dict[int, Outcomes]


class Kept:
    """A folder of outcomes: a line of JSON for each batch, on disk before the next one begins.

    Whatever is killed meanwhile loses the batch that it was at. Several processes may write into one folder.

    Args:
        folder: made where it is missing.
        facts: what the outcomes depend on beside the setting: the model and its weights, images, sizes, versions.
        rank: the number of this process among those that write.

    Raises:
        ConfigError: the folder was begun with other facts, which the message names, or holds something else.
        MctfError: it cannot be written.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], rank: int = 0) -> None:
        self.folder, self.rank = folder, rank
        claim(folder, facts, rank, "evaluation", "outcomes")

    def read(self, key: str) -> Batches:
        """The outcomes that are there, of every process. A line that was not finished is none."""
        found: Batches = {}
        for file in sorted(self.folder.glob(f"{_name(key)}.*.jsonl")):
            whole, _, _ = file.read_bytes().rpartition(b"\n")
            for number, line in enumerate(whole.splitlines()):
                try:
                    values = json.loads(line)
                    outcomes = Outcomes(torch.tensor(values["top"]), torch.tensor(values["confidence"]))
                    found[int(values["batch"])] = outcomes
                except (ValueError, KeyError, TypeError) as error:
                    raise MctfError(f"{file}, line {number + 1} is damaged: {error}") from error
        return found

    def add(self, key: str, batch: int, outcomes: Outcomes) -> None:
        """Keep the outcomes of a batch."""
        file = self.folder / f"{_name(key)}.{self.rank}.jsonl"
        values = {"batch": batch, "top": outcomes.top.tolist(), "confidence": outcomes.confidence.tolist()}
        try:
            with open(file, "a+b") as stream:
                _end_at_a_line(stream)
                stream.write(json.dumps(values).encode() + b"\n")
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise MctfError(f"outcomes cannot be kept in {file}: {error}; those kept so far are whole") from error


def _end_at_a_line(stream: Any) -> None:
    """Cut off what a write that was interrupted left behind the last whole line."""
    stream.seek(0, os.SEEK_END)
    size = stream.tell()
    if not size:
        return
    stream.seek(size - 1)
    if stream.read(1) != b"\n":
        stream.seek(0)
        stream.truncate(stream.read().rfind(b"\n") + 1)


def _name(key: str) -> str:
    """A name of a file that says what the key does, and is unlike any other's."""
    return f"{re.sub('[^a-zA-Z0-9]+', '-', key).strip('-')[:60]}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def weights_digest(model: nn.Module) -> str:
    """What tells a model's weights from others."""
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        total.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()[:16]


def missing(batches: Sequence[int], found: Sequence[Iterable[int]]) -> list[int]:
    """The batches that no process has."""
    there = {number for numbers in found for number in numbers}
    return [number for number in batches if number not in there]
