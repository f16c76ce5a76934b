"""What a training run keeps in its folder, whole at every moment: checkpoints, metrics, and the weights at its end."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mctf_compile import packages
from mctf_compile.errors import MctfError

FORMAT = "mctf training 1"
KEPT = 2
_NAME = re.compile(r"checkpoint-(\d+)\.pt")


class Checkpoints:
    """The folder of a training run.

    timm's ``CheckpointSaver`` renames a file that may not be on the disk yet, which a power failure leaves empty under
    its good name, and finds the one to go on from by the order of names, in which step 10 comes before step 9. Here a
    checkpoint is written, synchronised and then renamed, and only after that the oldest goes.

    Args:
        folder: one that is there.
        writes: whether this process is the one that writes; the others only read.
    """

    METRICS = "metrics.jsonl"

    def __init__(self, folder: Path, writes: bool = True) -> None:
        self.folder, self.writes = folder, writes

    def all(self) -> list[Path]:
        """The checkpoints, the newest last."""
        return sorted((path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)), key=step_of)

    def read(self) -> dict[str, Any] | None:
        """The newest checkpoint, and None where there is none yet.

        Raises ``MctfError`` for a file that is damaged, which says what to do.
        """
        found = self.all()
        if not found:
            return None
        file = found[-1]
        try:
            state: Any = torch.load(file, map_location="cpu", weights_only=True)
            whole = isinstance(state, dict) and state.get("format") == FORMAT and state["step"] == step_of(file)
            problem = "it is no checkpoint of a training run"
        except Exception as error:
            # What a damaged file makes of the reader is of any kind.
            whole, problem = False, (str(error).splitlines() or [type(error).__name__])[0]
        if whole:
            return dict(state)
        before = f"goes on from {found[-2].name}" if len(found) > 1 else "starts anew"
        raise MctfError(f"{file} is damaged: {problem}. Without this file the same command {before}")

    def write(self, step: int, state: Mapping[str, Any]) -> None:
        """Keep what is to be known to go on from a step, and of older checkpoints only the newest.

        Raises ``MctfError`` where it cannot be written; those that were there still are.
        """
        if not self.writes:
            return
        file = self.folder / f"checkpoint-{step:08d}.pt"
        values = {"format": FORMAT, "step": step, **state}
        self._replace(file, lambda new: torch.save(values, new))
        for old in self.all()[:-KEPT]:
            old.unlink()

    def write_weights(self, name: str, weights: Mapping[str, Tensor]) -> Path:
        """Write a state dict as ``.safetensors``; raises ``MctfError`` where it cannot be written."""
        file = self.folder / name
        if self.writes:
            save = packages.required("safetensors.torch", "a file of weights", "safetensors").save_file
            # Weights that share their memory are written once each, as every reader expects them.
            apart = {key: value.detach().cpu().contiguous().clone() for key, value in weights.items()}
            self._replace(file, lambda new: save(apart, str(new), {"format": "pt"}))
        return file

    def log(self, values: Mapping[str, Any]) -> None:
        """Add a line of JSON to the metrics."""
        if not self.writes:
            return
        try:
            with open(self.folder / self.METRICS, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(dict(values)) + "\n")
        except OSError as error:
            raise self._unwritten(self.folder / self.METRICS, error) from error

    def rewind(self, step: int) -> None:
        """Forget what was written after a step: lines of metrics, and files that were not finished."""
        if not self.writes:
            return
        for unfinished in self.folder.glob("*.new"):
            unfinished.unlink()
        file = self.folder / self.METRICS
        if file.exists():
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step)
            self._replace(file, lambda new: new.write_text(kept, encoding="utf-8"))

    def _replace(self, file: Path, write: Callable[[Path], Any]) -> None:
        """Have ``write`` make a file beside ``file``, and put it in its place once it is on the disk."""
        new = file.with_name(f"{file.name}.new")
        try:
            try:
                write(new)
                synchronise(new)
                os.replace(new, file)
                synchronise(file.parent)
            except Exception:
                new.unlink(missing_ok=True)
                raise
        except (OSError, RuntimeError) as error:
            # PyTorch and safetensors have errors of their own for a disk that is full.
            raise self._unwritten(file, error) from error

    def _unwritten(self, file: Path, error: Exception) -> MctfError:
        found = self.all()
        kept = f"{found[-1].name} is whole, and the same command goes on from there" if found else "nothing is lost yet"
        # PyTorch does not say that a disk is full.
        free = f"{shutil.disk_usage(self.folder).free >> 20} MiB are free there"
        return MctfError(f"{file} cannot be written: {str(error).splitlines()[0]} ({free}); {kept}")


def step_of(file: Path) -> int:
    """The steps that were done when a checkpoint was written, by its name."""
    match = _NAME.fullmatch(file.name)
    assert match is not None, file
    return int(match[1])


def synchronise(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
