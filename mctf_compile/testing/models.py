"""Small Vision Transformers in the many ways people write them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SPELLINGS = ("sdpa", "softmax", "einsum", "flat", "separate", "mha")
NORMS = ("pre", "post", "parallel")
MLPS = ("gelu", "swiglu", "none")
HEADS = ("cls", "mean", "max", "map", "dense")


@dataclass(frozen=True)
class VitSpec:
    """A Vision Transformer to build.

    ``grid``: patches a side; ``prefix``, ``suffix``: extra tokens before and after the patches;
    ``spelling``: how attention is written; ``head``: what is read out (``cls`` needs a prefix).
    """

    depth: int = 3
    heads: int = 2
    head_dim: int = 8
    grid: int = 4
    prefix: int = 1
    suffix: int = 0
    spelling: str = "sdpa"
    norm: str = "pre"
    mlp: str = "gelu"
    head: str = "cls"
    layer_scale: bool = False
    qk_norm: bool = False
    position: bool = False

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


class Attention(nn.Module):
    """[B, N, C] -> [B, N, C], spelled in one of ``SPELLINGS``."""

    def __init__(self, spec: VitSpec) -> None:
        super().__init__()
        self.spec = spec
        width = spec.width
        if spec.spelling == "mha":
            self.mha = nn.MultiheadAttention(width, spec.heads, batch_first=True)
        elif spec.spelling == "separate":
            self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        else:
            self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.q_norm = nn.LayerNorm(spec.head_dim) if spec.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(spec.head_dim) if spec.qk_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.spec.spelling == "mha":
            return self.proj(self.mha(x, x, x, need_weights=False)[0])
        b, n, c = x.shape
        h, d = self.spec.heads, self.spec.head_dim
        if self.spec.spelling == "separate":
            q, k, v = (f(x).view(b, n, h, d).transpose(1, 2) for f in (self.q, self.k, self.v))
        elif self.spec.spelling == "sdpa":
            q, k, v = self.qkv(x).reshape(b, n, 3, h, d).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (t.reshape(b, n, h, d).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        q, k = self.q_norm(q), self.k_norm(k)
        return self.proj(getattr(self, f"_{self.spec.spelling}")(q, k, v).transpose(1, 2).reshape(b, n, c))

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    _separate = _sdpa

    def _softmax(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return logits.softmax(dim=-1) @ v

    def _einsum(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("bhij,bhjd->bhid", F.softmax(logits, dim=-1), v)

    def _flat(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, h, n, d = q.shape
        q, k, v = (t.reshape(b * h, n, d) for t in (q, k, v))
        weights = torch.bmm(q, k.transpose(1, 2)).mul(d**-0.5).softmax(-1)
        return torch.bmm(weights, v).view(b, h, n, d)


class Mlp(nn.Module):
    """[B, N, C] -> [B, N, C]."""

    def __init__(self, spec: VitSpec) -> None:
        super().__init__()
        gated = spec.mlp == "swiglu"
        self.gated = gated
        self.fc1 = nn.Linear(spec.width, spec.width * (4 if gated else 2))
        self.fc2 = nn.Linear(spec.width * 2, spec.width)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            gate, x = self.fc1(x).chunk(2, dim=-1)
            return self.fc2(F.silu(gate) * x)
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention and MLP around a residual stream."""

    def __init__(self, spec: VitSpec) -> None:
        super().__init__()
        self.norm = spec.norm
        self.norm1, self.norm2 = nn.LayerNorm(spec.width), nn.LayerNorm(spec.width)
        self.attn = Attention(spec)
        self.mlp = None if spec.mlp == "none" else Mlp(spec)
        scale = torch.full((spec.width,), 0.5)
        self.gamma1 = nn.Parameter(scale.clone()) if spec.layer_scale else 1.0
        self.gamma2 = nn.Parameter(scale.clone()) if spec.layer_scale else 1.0

    def forward(self, x: Tensor) -> Tensor:
        if self.norm == "parallel" and self.mlp is not None:
            y = self.norm1(x)
            return x + self.gamma1 * self.attn(y) + self.gamma2 * self.mlp(y)
        if self.norm == "post":
            x = self.norm1(x + self.gamma1 * self.attn(x))
            return x if self.mlp is None else self.norm2(x + self.gamma2 * self.mlp(x))
        x = x + self.gamma1 * self.attn(self.norm1(x))
        return x if self.mlp is None else x + self.gamma2 * self.mlp(self.norm2(x))


class TinyViT(nn.Module):
    """A Vision Transformer after ``spec``: images [B, 3, 4·grid, 4·grid] -> [B, 5] (``dense``: tokens)."""

    def __init__(self, spec: VitSpec) -> None:
        super().__init__()
        self.spec = spec
        width = spec.width
        self.embed = nn.Conv2d(3, width, 4, 4)
        self.prefix = nn.Parameter(torch.randn(1, spec.prefix, width))
        self.suffix = nn.Parameter(torch.randn(1, spec.suffix, width))
        total = spec.prefix + spec.grid**2 + spec.suffix
        self.position = nn.Parameter(torch.randn(1, total, width) * 0.2) if spec.position else None
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.depth))
        self.norm = nn.LayerNorm(width)
        self.latent = nn.Parameter(torch.randn(1, 1, width))
        self.head = nn.Linear(width, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2)
        ends = [t.expand(x.shape[0], -1, -1) for t in (self.prefix, self.suffix)]
        if self.spec.prefix or self.spec.suffix:
            x = torch.cat([t for t in (ends[0], x, ends[1]) if t.shape[1]], dim=1)
        if self.position is not None:
            x = x + self.position
        for block in self.blocks:
            x = block(x)
        return self._read(self.norm(x))

    def _read(self, x: Tensor) -> Tensor:
        kind, first = self.spec.head, self.spec.prefix
        if kind == "dense":
            return x
        if kind == "cls":
            return self.head(x[:, 0])
        if kind == "mean":
            return self.head(x[:, first : x.shape[1] - self.spec.suffix].mean(dim=1))
        if kind == "max":
            return self.head(x.amax(dim=1))
        b, n, c = x.shape
        k = x.view(b, n, self.spec.heads, -1).transpose(1, 2)
        q = self.latent.expand(b, -1, -1).view(b, 1, self.spec.heads, -1).transpose(1, 2)
        return self.head(F.scaled_dot_product_attention(q, k, k).transpose(1, 2).reshape(b, c))


def repeated_patches(batch: int, grid: int, kinds: int, seed: int, patch: int = 4) -> Tensor:
    """Images [batch, 3, grid·patch, grid·patch] whose patches are copies of ``kinds`` different ones."""
    generator = torch.Generator().manual_seed(seed)
    tiles = torch.randn(batch, kinds, 3, patch, patch, generator=generator)
    which = torch.randint(0, kinds, (batch, grid, grid), generator=generator)
    images = torch.stack([tile[index] for tile, index in zip(tiles, which)])
    return images.permute(0, 3, 1, 4, 2, 5).reshape(batch, 3, grid * patch, grid * patch)
