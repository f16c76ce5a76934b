"""LV-ViT: a Vision Transformer with a convolutional stem, trained on a label for every token.

Source: Jiang et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers", NeurIPS 2021
(arXiv 2104.10858).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mctf_compile.errors import ConfigError
from mctf_compile.models.vit import IMAGES, blocks, initialize


class Stem(nn.Module):
    """Patch embedding by four convolutions: images [B, 3, H, W] -> [B, C, H / patch, W / patch]."""

    def __init__(self, patch: int, width: int, inner: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, inner, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(inner)
        self.proj = nn.Conv2d(inner, width, patch // 2, stride=patch // 2)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, C, H / patch, W / patch]."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        tokens: Tensor = self.proj(x)
        return tokens


class LVViT(nn.Module):
    """Logits of images; in training, those of every patch beside them.

    In eval mode the result is [B, K]: the logits of the class token, and half of the largest of each class among
    those of the patches. In training it is that of the class token, [B, K], and those of the patches, [B, N, K]
    (see ``mctf_compile.losses.token_labeling``).

    Args:
        img_size: height and width of an image; a multiple of ``patch``.
        patch: height and width of a patch.
        classes: K.
        depth: blocks.
        width: C.
        heads: H.
        ratio: the width of the MLP over C.
        skip: what a branch is divided by before it is added to the residual stream.
        drop: how likely the branches of the last block are left out in training.

    Raises ``ConfigError`` for an image that is not of whole patches.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch: int = 16,
        classes: int = 1000,
        depth: int = 16,
        width: int = 384,
        heads: int = 6,
        ratio: float = 3.0,
        skip: float = 2.0,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        if img_size % patch or patch % 2:
            raise ConfigError(f"img_size={img_size} must be a multiple of patch={patch}, and that even.")
        self.pretrained_cfg = {**IMAGES, "input_size": (3, img_size, img_size), "num_classes": classes}
        self.patch_embed = Stem(patch, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (img_size // patch) ** 2, width))
        self.blocks = blocks(depth, width, heads, int(ratio * width), skip, drop)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        self.aux_head = nn.Linear(width, classes)
        self.apply(initialize)
        for position in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(position, std=0.02, a=-2, b=2)

    def forward(self, images: Tensor, box: Tensor | None = None) -> Any:
        """Logits of images [B, 3, H, W].

        ``box``: bool [H / patch, W / patch], see ``draw_box``: there the patches of an image are those of another of
        the batch, the one that is as far from its end (MixToken). The logits of a patch come back in the
        place of the image that it was taken from.
        """
        grid = self.patch_embed(images)
        if box is not None:
            grid = torch.where(box, grid.flip(0), grid)
        x = torch.cat([self.cls_token.expand(len(grid), -1, -1), grid.flatten(2).transpose(1, 2)], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        logits, patches = self.head(x[:, 0]), self.aux_head(x[:, 1:])
        if not self.training:
            return logits + 0.5 * patches.amax(1)
        if box is not None:
            patches = torch.where(box.flatten()[:, None], patches.flip(0), patches)
        return logits, patches


def lv_vit_small(**changes: Any) -> LVViT:
    """LV-ViT-S: 16 blocks of width 384, 6 heads, 26 M parameters; ``changes``: other arguments of ``LVViT``."""
    return LVViT(**changes)


def draw_box(height: int, width: int, generator: torch.Generator | None = None) -> Tensor:
    """A random box of a grid of patches, bool [height, width], for MixToken.

    It covers a share 1 − λ of the grid, λ uniform in [0, 1], around a uniform point, and is cut at the borders. A
    mask, as the numbers of a box would compile the model again for each.

    Source: Jiang et al.; the box is CutMix's (Yun et al., ICCV 2019).
    """
    share, y, x = torch.rand(3, generator=generator).tolist()
    tall, wide = int(height * share**0.5), int(width * share**0.5)
    top, left = int(y * height) - tall // 2, int(x * width) - wide // 2
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    return (rows >= top) & (rows < top + tall) & (columns >= left) & (columns < left + wide)
