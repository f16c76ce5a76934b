"""Images: those of a folder, read when they are asked for, with their labels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mctf_compile.errors import ConfigError, MctfError
from mctf_compile.packages import pillow, timm

# What makes a [C, H, W] of a PIL image.
Transform = Callable[[Any], Tensor]


class Images(Protocol):
    """A tensor [N, C, H, W], or what stands for one that would not fit into memory."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice) -> Tensor: ...


@dataclass(frozen=True)
class Files:
    """Image files as ``Images``.

    ``paths``: one for each image. ``transform``: what makes a tensor [C, H, W] of the PIL image of a file;
    ``altered``: what is done to that, given the number of the image as well.
    """

    paths: Sequence[Path]
    transform: Transform
    altered: Callable[[Tensor, int], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, part: slice) -> Tensor:
        return torch.stack([self._read(i) for i in range(len(self.paths))[part]])

    def _read(self, number: int) -> Tensor:
        path = self.paths[number]
        try:
            with pillow().open(path) as picture:
                image = self.transform(picture.convert("RGB"))
        except (OSError, SyntaxError) as error:
            # Of a broken PNG Pillow says so by a SyntaxError.
            raise MctfError(f"{path} cannot be read: {error}") from error
        return image if self.altered is None else self.altered(image, number)


@dataclass(frozen=True)
class Chosen:
    """Some of other images, by their numbers."""

    images: Images
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, part: slice) -> Tensor:
        return torch.cat([self.images[number : number + 1] for number in self.numbers[part]])


def padded(part: Tensor, batch: int) -> Tensor:
    """A batch of full size, by repeating the first image: a shorter one would be compiled once more."""
    return torch.cat([part, part[:1].expand(batch - len(part), *part.shape[1:])]) if len(part) < batch else part


class Folder:
    """The images of a folder whose subfolders are the classes.

    ``paths`` and ``labels`` [N]: of the images taken. ``total``: the images there are. ``numbering``: how the
    subfolders became classes of the model.

    Args:
        path: the folder.
        outputs: the classes of the model; None where there is no model to know of.
        limit: take this many images at most, spread evenly over the classes' images.
        class_map: a file that names the class 0, 1, ... of the model, one in a line. Without, subfolders that all
            have numbers for names are the classes of these numbers; others are the first classes, as they are sorted.

    Raises:
        ConfigError: there is no such folder, it has no classes or no images, or the model lacks one of the classes.
    """

    def __init__(
        self, path: Path, outputs: int | None = None, limit: int | None = None, class_map: Path | None = None
    ) -> None:
        names = subfolders(path)
        index, self.numbering = _numbered(path, names, outputs, class_map)
        for name in names:
            deeper = next((entry for entry in sorted((path / name).iterdir()) if entry.is_dir()), None)
            if deeper is not None:
                raise ConfigError(f"{deeper} is a folder in the folder of a class; images are read of neither.")
        found = _listed(path, index)
        if not found:
            raise ConfigError(f"{path}: there are no images in its {len(names)} subfolders, one for each class.")
        self.path, self.classes, self.total = path, names, len(found)
        count = min(limit or self.total, self.total)
        chosen = [found[i * self.total // count] for i in range(count)]
        self.paths = [file for file, _ in chosen]
        self.labels = torch.tensor([label for _, label in chosen])

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def digest(self) -> str:
        """What tells these images and labels from others: their names, sizes and classes."""
        return digest_of(self.path, self.paths, self.labels.tolist())


def digest_of(folder: Path, paths: Sequence[Path], labels: Sequence[int]) -> str:
    """What tells images and their labels from others, by the names and sizes of their files."""
    lines = [f"{p.relative_to(folder)} {p.stat().st_size} {label}" for p, label in zip(paths, labels, strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def subfolders(path: Path) -> list[str]:
    """The names of a folder's subfolders, numbers in them by their value; raises ``ConfigError`` where it has none."""
    if not path.is_dir():
        raise ConfigError(f"{path}: {'not a folder' if path.exists() else 'no such folder'}")
    names = [entry.name for entry in path.iterdir() if entry.is_dir()]
    if not names:
        raise ConfigError(f"{path} has no subfolders; it needs one for each class, with its images")
    ordered: list[str] = sorted(names, key=timm("timm.utils.misc").natural_key)
    return ordered


def flat(path: Path) -> list[Path]:
    """The images in a folder itself, by name."""
    endings = timm("timm.data").get_img_extensions()
    return sorted(file for file in path.iterdir() if file.suffix.lower() in endings)


def _numbered(
    path: Path, names: Sequence[str], outputs: int | None, class_map: Path | None
) -> tuple[dict[str, int], str]:
    """The class of each subfolder, and how it was found."""
    if class_map is not None:
        listed = [line.strip() for line in class_map.read_text(encoding="utf-8").splitlines()]
        index = {name: number for number, name in enumerate(listed)}
        missing = next((name for name in names if name not in index), None)
        if missing is not None:
            raise ConfigError(f"{class_map} has no line for the class {missing!r}, a subfolder of {path}.")
        how = f"The subfolders are the classes that {class_map.name} numbers."
    elif all(name.isdecimal() for name in names):
        index = {name: int(name) for name in names}
        how = "The names of the subfolders are the numbers of their classes."
    else:
        index = {name: number for number, name in enumerate(names)}
        how = f"The {len(names)} subfolders, sorted, are taken as the first of the model's classes."
    index = {name: index[name] for name in names}
    last = max(names, key=index.__getitem__)
    if outputs is not None and index[last] >= outputs:
        raise ConfigError(
            f"{path} has {len(names)} subfolders, one for each class, and {last!r} is the class {index[last]}; the "
            f"model has the {outputs} classes from 0 to {outputs - 1}. A class map can name them."
        )
    return index, how


def _listed(path: Path, index: dict[str, int]) -> list[tuple[Path, int]]:
    """The images in the subfolders and their classes, as timm's reader finds them."""
    try:
        reader: Any = timm("timm.data.readers").create_reader("", root=str(path), class_map=index)
    except RuntimeError:
        return []
    return [(Path(file), label) for file, label in reader.samples]
