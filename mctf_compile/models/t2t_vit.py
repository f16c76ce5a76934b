"""T2T-ViT: neighbouring tokens are put together step by step before a Vision Transformer begins.

Source: Yuan et al., "Tokens-to-Token ViT", ICCV 2021 (arXiv 2101.11986). Performer: Choromanski et al., ICLR 2021
(arXiv 2009.14794).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mctf_compile.errors import ConfigError
from mctf_compile.models.vit import IMAGES, Mlp, blocks, initialize

# Kernel, stride and padding of the three soft splits: 224 pixels become a grid of 56, 28 and 14 (section 3.1).
SPLITS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))


class Performer(nn.Module):
    """Linear attention over random positive features, and an MLP: [B, N, D] -> [B, N, C].

    exp(wx − |x|²/2)/√m, with m = C/2 orthogonal rows w, stands for the exponential of softmax.
    """

    w: Tensor

    def __init__(self, given: int, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(given)
        self.kqv = nn.Linear(given, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        rows = width // 2
        features = nn.init.orthogonal_(torch.empty(rows, width)) * math.sqrt(rows)
        self.w = nn.Parameter(features, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, C]."""
        k, q, v = self.kqv(self.norm1(x)).chunk(3, -1)
        queries, keys = self._features(q), self._features(k)
        summed = queries @ (keys.transpose(1, 2) @ v)
        total = queries @ keys.sum(1)[..., None]
        # What enters has another width: the values are the residual stream that leaves.
        x = v + self.proj(summed / (total + 1e-8))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out

    def _features(self, x: Tensor) -> Tensor:
        """Positive features of queries or keys, [B, N, C] -> [B, N, m]."""
        half = x.square().sum(-1, keepdim=True) / 2
        return (F.linear(x, self.w) - half).exp() / math.sqrt(len(self.w))


class NarrowAttention(nn.Module):
    """Attention of one head from width D to width C, whose values are added to its result."""

    def __init__(self, given: int, width: int) -> None:
        super().__init__()
        # The published weights were trained with the width of what enters.
        self.scale = given**-0.5
        self.qkv = nn.Linear(given, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, C]."""
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v, scale=self.scale)[:, 0]) + v[:, 0]
        return out


class NarrowTransformer(nn.Module):
    """One head of attention and an MLP: [B, N, D] -> [B, N, C]."""

    def __init__(self, given: int, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(given)
        self.attn = NarrowAttention(given, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, C]."""
        x = self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class TokensToToken(nn.Module):
    """Images [B, 3, S, S] -> tokens [B, (S / 16)², C].

    Each soft split makes a token of all pixels, or tokens, of a window that overlaps its neighbours; a narrow layer of
    attention is between two splits.
    """

    def __init__(self, width: int, layer: Literal["performer", "transformer"], narrow: int = 64) -> None:
        super().__init__()
        made = Performer if layer == "performer" else NarrowTransformer
        areas = [kernel**2 for kernel, _, _ in SPLITS]
        self.attention1 = made(3 * areas[0], narrow)
        self.attention2 = made(narrow * areas[1], narrow)
        self.project = nn.Linear(narrow * areas[2], width)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, (S / 16)², C]."""
        x = self.attention1(_split(images, SPLITS[0]))
        x = self.attention2(_split(_grid(x), SPLITS[1]))
        tokens: Tensor = self.project(_split(_grid(x), SPLITS[2]))
        return tokens


def _split(x: Tensor, split: Sequence[int]) -> Tensor:
    """Windows of a map [B, C, H, W] as tokens, [B, N, C · area]."""
    kernel, stride, padding = split
    return F.unfold(x, kernel, padding=padding, stride=stride).transpose(1, 2)


def _grid(x: Tensor) -> Tensor:
    """Tokens of a square as a map: [B, N, C] -> [B, C, √N, √N]."""
    side = math.isqrt(x.shape[1])
    batch, _, width = x.shape
    return x.transpose(1, 2).reshape(batch, width, side, side)


class T2TViT(nn.Module):
    """Logits [B, K] of images [B, 3, S, S].

    Args:
        img_size: S, a multiple of 16.
        classes: K.
        layer: what is between two soft splits: linear attention ("performer") or attention ("transformer").
        depth: blocks after the tokens-to-token module.
        width: C.
        heads: H.
        ratio: the width of the MLP over C.
        drop: how likely the branches of the last block are left out in training.

    Raises ``ConfigError`` for another ``layer``, or an image that is not of whole patches.
    """

    pos_embed: Tensor

    def __init__(
        self,
        img_size: int = 224,
        classes: int = 1000,
        layer: Literal["performer", "transformer"] = "performer",
        depth: int = 14,
        width: int = 384,
        heads: int = 6,
        ratio: float = 3.0,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        if layer not in ("performer", "transformer"):
            raise ConfigError(f"layer={layer!r} must be 'performer' or 'transformer'.")
        if img_size % 16:
            raise ConfigError(f"img_size={img_size} must be a multiple of 16.")
        self.pretrained_cfg = {**IMAGES, "input_size": (3, img_size, img_size), "num_classes": classes}
        self.tokens_to_token = TokensToToken(width, layer)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(sinusoids(1 + (img_size // 16) ** 2, width)[None], requires_grad=False)
        self.blocks = blocks(depth, width, heads, int(ratio * width), 1.0, drop)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        self.apply(initialize)
        nn.init.trunc_normal_(self.cls_token, std=0.02, a=-2, b=2)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, K]."""
        x = self.tokens_to_token(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x)[:, 0])
        return logits


def sinusoids(count: int, width: int) -> Tensor:
    """Sines and cosines of positions by turns, [count, width] (Vaswani et al., NeurIPS 2017, section 3.5)."""
    channel = torch.arange(width, dtype=torch.float64)
    angles = torch.arange(count, dtype=torch.float64)[:, None] / 10000 ** (2 * (channel // 2) / width)
    return torch.where(channel.long() % 2 == 0, angles.sin(), angles.cos()).to(torch.float32)


def t2t_vit_14(**changes: Any) -> T2TViT:
    """T2T-ViT-14 with linear attention between the splits, 21.5 M parameters; ``changes``: arguments of ``T2TViT``."""
    return T2TViT(**changes)


def t2t_vit_t_14(**changes: Any) -> T2TViT:
    """T2T-ViT_t-14: as ``t2t_vit_14``, with attention between the splits."""
    return T2TViT(layer="transformer", **changes)
