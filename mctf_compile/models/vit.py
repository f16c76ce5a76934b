"""What the models share: attention, the MLP, and a pre-norm block of both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# How the images of these models are prepared, in timm's words.
IMAGES: dict[str, Any] = {
    "input_size": (3, 224, 224),
    "crop_pct": 0.9,
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "num_classes": 1000,
}


class Attention(nn.Module):
    """Self-attention of [B, N, C] without a bias in ``qkv``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        projected: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return projected


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """Attention and an MLP after their norms, each added to the residual stream.

    Args:
        width: C.
        heads: H.
        hidden: the width of the MLP.
        skip: what a branch is divided by before it is added: 1, or more in deep models.
        drop: how likely the branches of an image are left out in training (Huang et al., ECCV 2016).
    """

    def __init__(self, width: int, heads: int, hidden: int, skip: float = 1.0, drop: float = 0.0) -> None:
        super().__init__()
        self.skip, self.drop = skip, drop
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        x = x + self._kept(self.attn(self.norm1(x))) / self.skip
        return x + self._kept(self.mlp(self.norm2(x))) / self.skip

    def _kept(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop == 0:
            return branch
        keep = 1 - self.drop
        return branch * branch.new_empty(len(branch), 1, 1).bernoulli_(keep) / keep


def blocks(depth: int, width: int, heads: int, hidden: int, skip: float, drop: float) -> nn.ModuleList:
    """Blocks of which later ones are left out more often in training, the last with ``drop``."""
    rates = torch.linspace(0, drop, depth).tolist()
    return nn.ModuleList(Block(width, heads, hidden, skip, rate) for rate in rates)


def initialize(module: nn.Module) -> None:
    """Weights of linear layers from a normal distribution of 0.02, cut at two units; biases are zero."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-2, b=2)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
