"""The files of pictures: images to draw on, videos as several frames, and what is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mctf_compile.errors import ConfigError
from mctf_compile.packages import pillow

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")


# The endings of files that hold one picture, and of those that hold an animation.
STILLS, MOVING = (".png", ".jpg", ".jpeg", ".webp"), (".gif",)


def check_ending(path: Path) -> None:
    """Raise ``ConfigError`` where nothing can be drawn into a file of that ending."""
    if path.suffix.lower() not in STILLS + MOVING:
        raise ConfigError(f"cannot draw {str(path)!r}: its ending must be one of {', '.join(STILLS + MOVING)}.")


def read(path: Path, most: int) -> list[Image]:
    """The image of a file, the frames of one that has several, or the images of a folder in the order of their names.

    Of more than ``most`` frames as many are taken, spread evenly. Raises ``ConfigError`` for what is not there or no
    image, ``ImportError`` where Pillow is missing.
    """
    if not path.is_dir():
        return _opened(path, most)
    endings = set(pillow().registered_extensions())
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in endings and file.is_file())
    if not files:
        raise ConfigError(f"the folder {path} has no images")
    return [_opened(file, 1)[0] for file in evenly_chosen(files, most)]


def _opened(path: Path, most: int) -> list[Image]:
    turned = pillow("ImageOps").exif_transpose
    try:
        with pillow().open(path) as image:
            frames = []
            for number in evenly_chosen(range(getattr(image, "n_frames", 1)), most):
                image.seek(number)
                frames.append(turned(image).convert("RGB"))
            return frames
    except FileNotFoundError as error:
        raise ConfigError(f"there is no image {path}") from error
    except (OSError, ValueError, SyntaxError, pillow().DecompressionBombError) as error:
        reason = "it is of no kind that Pillow knows" if "cannot identify" in str(error) else error
        raise ConfigError(f"{path} cannot be read as an image: {reason}") from error


def evenly_chosen(items: Sequence[T], most: int) -> list[T]:
    """All items, or ``most`` of them at even distances, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / max(most - 1, 1))] for i in range(most)]
