"""``mctf_compile.visualize``: which patches became one token, drawn on the image."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mctf_compile.errors import ConfigError
from mctf_compile.narrowing import present
from mctf_compile.packages import pillow
from mctf_compile.pictures.files import MOVING, check_ending
from mctf_compile.pictures.painting import borders, heat, token_colours
from mctf_compile.provenance import BlockTrace, Trace, trace

if TYPE_CHECKING:
    from PIL.Image import Image

# What a method judges tokens by, in words.
JUDGED_BY = {
    "importance": "informativeness",
    "class_attention": "attention of the class token",
    "class_logits": "logits of the class token",
}
# Pixels: the least width of a panel, the space between panels, the height of a line, and that of its letters.
PANEL, GAP, LINE, SIZE = 224, 8, 20, 13
# Milliseconds that a frame of an animation over blocks or images stays, and the last one.
STAYS, LAST_STAYS = 700, 2000
INK, PAPER = (30, 33, 38), (255, 255, 255)


@dataclass(frozen=True)
class Panel:
    """An image [3, H, W] in 0..1 with a caption."""

    caption: str
    image: Tensor


@dataclass(frozen=True)
class Scene:
    """One image or frame: what it is, and what became of its tokens at one or more blocks."""

    photo: Panel
    panels: list[Panel]


@dataclass(frozen=True)
class Drawing:
    """Scenes that make a picture or an animation.

    Attributes:
        scenes: by block for one image, by frame for several.
        title: one line about the whole.
        cover: what all scenes have in common and a still shows once: an image, and its patches.
    """

    scenes: list[Scene]
    title: str
    cover: list[Panel]

    def save(self, path: str | Path) -> None:
        """Write a still (.png, .jpg, .webp) of all scenes, or an animation over them (.gif).

        Raises ``ConfigError`` for another ending.
        """
        path = Path(path)
        check_ending(path)
        if path.suffix.lower() in MOVING:
            first, *others = self.frames()
            stays = [STAYS] * len(others) + [LAST_STAYS]
            first.save(path, save_all=True, append_images=others, duration=stays, loop=0)
        else:
            self.sheet().save(path)

    def frames(self) -> list[Image]:
        """One picture for each scene: the image, and what became of it."""
        return [self._page([_row([scene.photo, *scene.panels])], 1) for scene in self.scenes]

    def sheet(self) -> Image:
        """All scenes in one picture."""
        if self.cover:
            rows = [_row(self.cover), *(_row(scene.panels) for scene in self.scenes)]
        else:
            rows = [_row([scene.photo, *scene.panels]) for scene in self.scenes]
        # How many to a row make a page of about 3 by 2.
        columns = round((1.5 * len(rows) * rows[0].height / rows[0].width) ** 0.5)
        return self._page(rows, min(max(columns, 1), len(rows)))

    def _page(self, cells: Sequence[Image], columns: int) -> Image:
        """Pictures of one size in rows under the title."""
        body = _tiled(cells, columns)
        title = _text(self.title, body.width)
        page: Image = pillow().new("RGB", (body.width + 2 * GAP, title.height + body.height + 2 * GAP), PAPER)
        page.paste(title, (GAP, GAP))
        page.paste(body, (GAP, GAP + title.height))
        return page

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.sheet().save(buffer, "PNG")
        return buffer.getvalue()


def visualize(
    model: Callable[..., Any],
    *inputs: Any,
    picture: Tensor | None = None,
    blocks: Sequence[int] | None = None,
    **options: Any,
) -> Drawing:
    """Draw which patches of an image became one token, block by block, and what the method judged them by.

    Tokens have the mean colour of all their pixels, wherever they are; patches that were dropped are dark.

    Args:
        model: as for ``mctf_compile.trace``.
        inputs: as for ``mctf_compile.trace``; the first with four dimensions or five are the images [B, C, H, W], or
            videos [B, T, C, H, W] or [B, C, T, H, W]. Several images, or the frames of a video, are drawn one
            after another, at the last of the blocks alone unless ``blocks`` says otherwise.
        picture: [B, 3, H, W] or [B, T, 3, H, W] in 0..1, what to draw on; the inputs themselves where None.
        blocks: the numbers of the blocks to draw; all that reduce tokens where None.
        options: as for the backend.

    Raises:
        ConfigError: a block that reduces no tokens, or patches that lie in no grid; else as ``trace``.
        ImportError: Pillow is missing; the message names what installs it.
    """
    pillow()
    videos = as_videos(inputs, model) if picture is None else picture
    videos = videos if videos.dim() == 5 else videos[:, None]
    return draw(trace(model, *inputs, **options), videos, blocks)


def draw(traced: Trace, videos: Tensor, blocks: Sequence[int] | None = None) -> Drawing:
    """A drawing of what was traced on ``videos`` [B, T, 3, H, W] in 0..1; ``blocks`` as for ``visualize``."""
    chosen = _chosen(traced, blocks)
    videos = torch.stack([_enlarged(video.float().cpu().clamp(0, 1)) for video in videos])
    title = traced.report.summary
    if videos.shape[0] * videos.shape[1] == 1:
        video = videos[0]
        photo = Panel("image", video[0])
        scenes = [Scene(photo, [still for (still,) in _panels(block, video, 0)]) for block in chosen]
        (patches,) = _tokens(chosen[0], video, torch.arange(chosen[0].source.shape[1])).unbind(0)
        cover = [photo, Panel(f"{chosen[0].source.shape[1]} tokens", patches)][: len(scenes[0].panels)]
        return Drawing(scenes, title, cover)
    scenes = []
    for i, video in enumerate(videos):
        stills = [
            panel for block in (chosen if blocks is not None else chosen[-1:]) for panel in _panels(block, video, i)
        ]
        for f, frame in enumerate(video):
            number = f"image {i}" if len(video) == 1 else f"frame {f}"
            scenes.append(Scene(Panel(number, frame), [panel[f] for panel in stills]))
    return Drawing(scenes, title, [])


def _chosen(traced: Trace, blocks: Sequence[int] | None) -> list[BlockTrace]:
    if not traced.blocks:
        raise ConfigError(f"there is nothing to draw, for no token was reduced: {_why(traced)}.")
    if blocks is None:
        return traced.blocks
    known = sorted({block.index for block in traced.blocks})
    for number in blocks:
        if number not in known:
            reasons = [b.reason for report in traced.reports for b in report.blocks if b.index == number and b.reason]
            raise ConfigError(
                f"block {number} reduces no tokens ({reasons[0] if reasons else 'there is none'}); those "
                f"that do are {', '.join(map(str, known))}."
            )
    return [block for block in traced.blocks if block.index in blocks]


def _why(traced: Trace) -> str:
    return traced.report.reason or "no block fused"


def _panels(block: BlockTrace, video: Tensor, image: int) -> list[list[Panel]]:
    """The panels of a block for one video [T, 3, H, W], each for every frame: its tokens, and what judged them."""
    painted = _tokens(block, video, block.source[image], block.dropped[image])
    left = f"block {block.index}: {block.block.tokens_in} -> {block.block.tokens_out} tokens"
    panels = [[Panel(left, still) for still in painted]]
    if block.importance is not None:
        values = _patches(block, video, present(block.spread_importance)[image].float())
        panels.append([Panel(f"{JUDGED_BY[present(block.judged_by)]} before", still) for still in heat(values, video)])
    return panels


def _tokens(block: BlockTrace, video: Tensor, source: Tensor, dropped: Tensor | None = None) -> Tensor:
    """[T, 3, H, W]: the patches in the colours of the tokens [N] that they are part of."""
    groups = _patches(block, video, source)
    gone = torch.zeros_like(groups, dtype=torch.bool) if dropped is None else _patches(block, video, dropped)
    return borders(token_colours(video, groups, gone), groups.masked_fill(gone, -1))


def _patches(block: BlockTrace, video: Tensor, values: Tensor) -> Tensor:
    """Of one value for each original token [N], those of the patches: [frames, rows, columns]."""
    grid = laid_out(block, video)
    return values[block.first : block.first + grid[0] * grid[1] * grid[2]].reshape(grid).cpu()


def laid_out(block: BlockTrace, video: Tensor) -> tuple[int, int, int]:
    """Frames, rows and columns of a block's patches; raises ``ConfigError`` where nobody can tell."""
    grid = block.grid
    if len(grid) == 1:
        # As high and wide as the picture, where that is possible.
        height, width = video.shape[2:]
        rows = round((grid[0] * height / width) ** 0.5)
        grid = (rows, grid[0] // max(rows, 1)) if rows and grid[0] % rows == 0 else grid
    if len(grid) == 2:
        return 1, *grid
    if len(grid) == 3 and grid[0] <= video.shape[0]:
        return grid
    raise ConfigError(
        f"the {'x'.join(map(str, grid))} patches of block {block.index} lie in no grid that could be "
        f"drawn on {video.shape[0]} frames of {video.shape[2]}x{video.shape[3]} pixels."
    )


def as_videos(inputs: Sequence[Any], model: Any) -> Tensor:
    """The images or videos among a model's inputs as [B, T, 3, H, W] in 0..1; raises ``ConfigError`` where none is.

    Undoes the normalisation that a timm model asks for; else the least value becomes black, the greatest white.
    """
    found = next((x for x in inputs if isinstance(x, Tensor) and x.dim() in (4, 5) and x.is_floating_point()), None)
    if found is None:
        raise ConfigError("no input is an image [B, C, H, W] or a video; give picture= to draw on.")
    videos = found.detach()[:, None] if found.dim() == 4 else found.detach()
    if found.dim() == 5 and videos.shape[2] not in (1, 3) and videos.shape[1] in (1, 3):
        videos = videos.transpose(1, 2)
    if videos.shape[2] not in (1, 3):
        raise ConfigError(f"an input of shape {tuple(found.shape)} has no colours to draw; give picture=.")
    config = getattr(getattr(model, "_orig_mod", model), "pretrained_cfg", None) or {}
    if len(config.get("mean", ())) == videos.shape[2]:
        mean, deviation = (videos.new_tensor(config[key])[:, None, None] for key in ("mean", "std"))
        videos = videos * deviation + mean
    else:
        low, high = videos.amin(), videos.amax()
        videos = (videos - low) / (high - low).clamp(min=torch.finfo(videos.dtype).tiny)
    return videos.expand(-1, -1, 3, -1, -1)


# Panels on paper.


def _enlarged(video: Tensor) -> Tensor:
    """[T, 3, H, W] with every pixel repeated, so that a panel is not too small to see."""
    times = max(1, -(-PANEL // video.shape[3]))
    return video.repeat_interleave(times, 2).repeat_interleave(times, 3)


def _row(panels: Sequence[Panel]) -> Image:
    """Panels side by side, each with its caption above."""
    return _tiled([_captioned(panel) for panel in panels], len(panels))


def _captioned(panel: Panel) -> Image:
    pixels = (panel.image * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    height, width = pixels.shape[:2]
    caption = _text(panel.caption, width)
    page: Image = pillow().new("RGB", (width, caption.height + height), PAPER)
    page.paste(caption, (0, 0))
    page.paste(pillow().frombytes("RGB", (width, height), bytes(pixels.flatten().tolist())), (0, caption.height))
    return page


def _text(text: str, width: int) -> Image:
    """Text on as many lines as it takes."""
    font = pillow("ImageFont").load_default(SIZE)
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if font.getlength(longer) <= width else [*lines, word]
    page: Image = pillow().new("RGB", (width, LINE * len(lines)), PAPER)
    drawn = pillow("ImageDraw").Draw(page)
    for i, line in enumerate(lines):
        drawn.text((0, LINE * i + 2), line, fill=INK, font=font)
    return page


def _tiled(cells: Sequence[Image], columns: int) -> Image:
    """Pictures in rows, with space between them."""
    width, height = max(cell.width for cell in cells), max(cell.height for cell in cells)
    rows = -(-len(cells) // columns)
    page: Image = pillow().new("RGB", (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP), PAPER)
    for i, cell in enumerate(cells):
        page.paste(cell, (i % columns * (width + GAP), i // columns * (height + GAP)))
    return page
