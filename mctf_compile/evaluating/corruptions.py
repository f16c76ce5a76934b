"""Corruptions of images at five severities each, the same for an image every time.

The kinds and their strengths are those of Hendrycks and Dietterich, *Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations* (ICLR 2019, arXiv 1903.12261), as far as they need no pictures of their own.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mctf_compile.errors import ConfigError
from mctf_compile.options.fields import hint

# Takes an image [C, H, W] with values from 0 to 1, the strength and a source of chance; returns the like.
Corrupt = Callable[[Tensor, float, torch.Generator], Tensor]


def gaussian_noise(x: Tensor, strength: float, chance: torch.Generator) -> Tensor:
    """Noise of this standard deviation."""
    return x + strength * torch.randn(x.shape, generator=chance)


def shot_noise(x: Tensor, strength: float, chance: torch.Generator) -> Tensor:
    """So many photons where the image is brightest."""
    return torch.poisson(x.clamp(0, 1) * strength, generator=chance) / strength


def impulse_noise(x: Tensor, strength: float, chance: torch.Generator) -> Tensor:
    """This part of the values becomes 0 or 1."""
    drawn = torch.rand(x.shape, generator=chance)
    return torch.where(drawn < strength, (drawn < strength / 2).to(x.dtype), x)


def gaussian_blur(x: Tensor, strength: float, chance: torch.Generator) -> Tensor:
    """A Gaussian of this standard deviation, in pixels; the border is continued by its own pixels."""
    reach = int(4 * strength + 0.5)
    bell = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=x.dtype) / strength) ** 2)
    bell = (bell / bell.sum()).expand(x.shape[0], 1, 1, -1)
    padded = functional.pad(x[None], (reach,) * 4, mode="replicate")
    rows = functional.conv2d(padded, bell, groups=x.shape[0])
    return functional.conv2d(rows, bell.mT, groups=x.shape[0])[0]


def contrast(x: Tensor, strength: float, chance: torch.Generator) -> Tensor:
    """The distance from the mean of each channel, times this."""
    mean = x.mean((1, 2), keepdim=True)
    return mean + strength * (x - mean)


def brightness(x: Tensor, strength: float, chance: torch.Generator) -> Tensor:
    """As if the value of each pixel in HSV were larger by this: its colour stays."""
    value = x.amax(0, keepdim=True)
    return torch.where(value > 0, x * ((value + strength).clamp(max=1) / value.clamp_min(1e-6)), value + strength)


def jpeg(x: Tensor, strength: float, chance: torch.Generator) -> Tensor:
    """Written and read as a JPEG of this quality."""
    from torchvision.io import decode_jpeg, encode_jpeg

    values = (x.clamp(0, 1) * 255).round().to(torch.uint8)
    found: Tensor = decode_jpeg(encode_jpeg(values, int(strength))).to(x.dtype) / 255
    return found


def pixelate(x: Tensor, strength: float, chance: torch.Generator) -> Tensor:
    """Made smaller by this factor, and large again."""
    size = [max(int(side * strength), 1) for side in x.shape[1:]]
    small = functional.interpolate(x[None], size, mode="area")
    return functional.interpolate(small, x.shape[1:], mode="nearest")[0]


# With the strengths of severities 1 to 5.
CORRUPTIONS: dict[str, tuple[Corrupt, tuple[float, ...]]] = {
    "gaussian_noise": (gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (shot_noise, (60, 25, 12, 5, 3)),
    "impulse_noise": (impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "gaussian_blur": (gaussian_blur, (1, 2, 3, 4, 6)),
    "contrast": (contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "brightness": (brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "jpeg": (jpeg, (25, 18, 15, 10, 7)),
    "pixelate": (pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
}


@dataclass(frozen=True)
class Corruption:
    """A corruption of ``CORRUPTIONS`` at a severity from 1 to 5. Raises ``ConfigError`` for any other.

    Called with an image [C, H, W] of values from 0 to 1 and its number, gives another such image. Chance depends on the
    name, the severity and the number alone.
    """

    name: str
    severity: int

    def __post_init__(self) -> None:
        if self.name not in CORRUPTIONS:
            raise ConfigError(
                f"there is no corruption {self.name!r}{hint(self.name, CORRUPTIONS)}; "
                f"there are: {', '.join(CORRUPTIONS)}"
            )
        if not 1 <= self.severity <= 5:
            raise ConfigError(f"a severity is a whole number from 1 to 5; {self.name} was given {self.severity}")

    def __str__(self) -> str:
        return f"{self.name}-{self.severity}"

    def __call__(self, image: Tensor, number: int) -> Tensor:
        corrupt, strengths = CORRUPTIONS[self.name]
        chance = torch.Generator().manual_seed(zlib.crc32(f"{self} {number}".encode()))
        # As a file would keep them: whole 255ths.
        return (corrupt(image, strengths[self.severity - 1], chance).clamp(0, 1) * 255).round() / 255

    @classmethod
    def parse(cls, text: str) -> Corruption:
        """``NAME`` at severity 3, or ``NAME-SEVERITY``."""
        name, dash, severity = text.rpartition("-")
        return cls(name, int(severity)) if dash and severity.isdecimal() else cls(text, 3)
