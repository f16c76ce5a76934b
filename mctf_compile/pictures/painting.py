"""Pixels: tokens in their colours, with borders, and maps of numbers."""

from __future__ import annotations

import torch
from torch import Tensor

# A dropped patch keeps this much of its brightness.
DIMMED = 0.25
BORDER = (1.0, 1.0, 1.0)
# Values from this quantile on have the greatest colour.
BRIGHTEST = 0.95
# From the least to the greatest: the dark end of the scale, then its way to yellow.
HEAT = (
    (0.0, 0.0, 0.02),
    (0.25, 0.04, 0.41),
    (0.58, 0.15, 0.40),
    (0.87, 0.32, 0.23),
    (0.99, 0.65, 0.04),
    (0.99, 1.0, 0.64),
)


def token_colours(video: Tensor, groups: Tensor, dropped: Tensor) -> Tensor:
    """Every patch in the mean colour of all pixels that its token stands for; a dropped one as it is, dimmed.

    Args:
        video: [T, 3, H, W] in 0..1.
        groups: int64 [t, rows, columns], the token of each patch; a patch has the pixels nearest to it.
        dropped: bool like ``groups``; these patches are in no token.

    Returns:
        Like ``video``.
    """
    pixels, gone = at_pixels(groups, video), at_pixels(dropped, video)
    count = int(groups.max()) + 1
    # A token may have a million pixels.
    sums = video.new_zeros(count, 3, dtype=torch.double)
    sums = sums.index_add(0, pixels[~gone], video.movedim(1, -1)[~gone].double())
    means = (sums / torch.bincount(pixels[~gone], minlength=count).clamp(min=1)[:, None]).to(video.dtype)
    return torch.where(gone[:, None], DIMMED * video, means[pixels].movedim(-1, 1))


def borders(video: Tensor, groups: Tensor, width: int = 1, colour: tuple[float, float, float] = BORDER) -> Tensor:
    """``video`` with a line in the first ``width`` rows or columns of a patch, where its neighbour is another token."""
    pixels = at_pixels(groups, video)
    edge = torch.zeros_like(pixels, dtype=torch.bool)
    across = pixels[:, :, 1:] != pixels[:, :, :-1]
    down = pixels[:, 1:] != pixels[:, :-1]
    for i in range(width):
        edge[:, :, 1 + i :] |= across[:, :, : across.shape[2] - i]
        edge[:, 1 + i :] |= down[:, : down.shape[1] - i]
    return torch.where(edge[:, None], video.new_tensor(colour)[:, None, None], video)


def heat(values: Tensor, like: Tensor) -> Tensor:
    """Numbers [t, rows, columns] as colours like [T, 3, H, W]: black for the least, yellow for the greatest 5 %.

    A token or two often have most of the attention; between the others there would be no difference to see.
    """
    low, high = values.min(), values.quantile(BRIGHTEST)
    high = high if high > low else values.max()
    values = values.clamp(max=high)
    scaled = (values - low) / (high - low).clamp(min=torch.finfo(values.dtype).tiny) * (len(HEAT) - 1)
    stops = like.new_tensor(HEAT)
    below = scaled.floor().long().clamp(max=len(HEAT) - 2)
    part = (scaled - below).to(like.dtype)[..., None]
    colours = (1 - part) * stops[below] + part * stops[below + 1]
    return torch.stack([at_pixels(channel, like) for channel in colours.unbind(-1)], 1)


def at_pixels(values: Tensor, video: Tensor) -> Tensor:
    """[t, rows, columns] -> [T, H, W]: at each pixel of [T, 3, H, W] the value of the patch that it is in."""
    for dim, size in enumerate((video.shape[0], *video.shape[2:])):
        place = torch.arange(size, device=values.device) * values.shape[dim] // size
        values = values.index_select(dim, place)
    return values
