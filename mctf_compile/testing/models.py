"""Small Vision Transformers in the many ways people write them."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SPELLINGS = ("sdpa", "softmax", "einsum", "flat", "separate", "mha", "talking")
NORMS = ("pre", "post", "parallel")
MLPS = ("gelu", "swiglu", "none")
HEADS = ("cls", "mean", "max", "map", "dense", "class_attention", "weights", "spread")
LAYOUTS = ("bnc", "nbc", "bhwc", "bchw")
SIDES = ("none", "bias", "rope", "rope_patches", "scale", "gate", "padding")
SKIPS = ("none", "add", "cat")
EXTRAS = ("none", "grid", "linear_attention", "cross_covariance")
# Spellings whose logits a side tensor can be added to.
OPEN = ("sdpa", "softmax", "einsum", "separate", "talking")


@dataclass(frozen=True)
class VitSpec:
    """A Vision Transformer to build.

    ``grid``: patches a side; ``prefix``, ``suffix``: extra tokens before and after the patches;
    ``spelling``: how attention is written; ``head``: what is read out (``cls`` and ``class_attention`` need
    a prefix); ``layout`` of the residual stream (a grid has no extra tokens); ``side``: a tensor with the
    token axis that meets the tokens in every block; ``skip``: a long connection from the first block to the
    last; ``extra``: a layer of another kind after every block; ``inplace``: residual adds that write.

    ``position``: whether positions can be told apart, by an embedding or by the side tensor. Without, equal
    patches are equal tokens throughout.
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
    layout: str = "bnc"
    side: str = "none"
    skip: str = "none"
    extra: str = "none"
    layer_scale: bool = False
    qk_norm: bool = False
    inplace: bool = False
    position: bool = False

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def tokens(self) -> int:
        return self.prefix + self.grid**2 + self.suffix

    def __str__(self) -> str:
        """The call that builds it, without the defaults."""
        changed = [f for f in fields(self) if getattr(self, f.name) != f.default]
        return f"VitSpec({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in changed)})"


def to_tokens(x: Tensor, layout: str) -> Tensor:
    """A residual stream in some layout as [B, N, C]."""
    if layout == "nbc":
        return x.transpose(0, 1)
    if layout == "bhwc":
        return x.flatten(1, 2)
    return x.flatten(2).transpose(1, 2) if layout == "bchw" else x


def from_tokens(x: Tensor, layout: str, grid: int) -> Tensor:
    """The inverse of ``to_tokens``."""
    if layout == "nbc":
        return x.transpose(0, 1)
    if layout == "bhwc":
        return x.reshape(x.shape[0], grid, grid, x.shape[2])
    return x.transpose(1, 2).unflatten(2, (grid, grid)) if layout == "bchw" else x


class Norm(nn.LayerNorm):
    """A layer norm over channels, wherever the layout has them."""

    def __init__(self, spec: VitSpec) -> None:
        super().__init__(spec.width)
        self.channels_first = spec.layout == "bchw"

    def forward(self, x: Tensor) -> Tensor:
        if self.channels_first:
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return super().forward(x)


class Side(nn.Module):
    """What meets the tokens in attention: a bias, a rotation, a scale, or a gate between two maps.

    It is the same for all tokens unless ``spec.position``.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, spec: VitSpec) -> None:
        super().__init__()
        self.spec = spec
        n, body = spec.tokens, spec.grid**2
        shape = {"bias": (spec.heads, n, n), "gate": (spec.heads, n, n), "scale": (1, n, 1)}.get(spec.side)
        if shape is not None:
            same = torch.randn(shape[0], 1, shape[2] if shape[2] == 1 else 1).expand(shape).clone()
            self.table = nn.Parameter(torch.randn(shape) if spec.position else same)
        if spec.side.startswith("rope"):
            turns = torch.rand(body if spec.side == "rope_patches" else n, spec.head_dim // 2)
            turns = turns if spec.position else turns[:1].expand_as(turns)
            angle = torch.cat([turns, turns], -1)
            self.register_buffer("cos", angle.cos())
            self.register_buffer("sin", angle.sin())

    def rotate(self, x: Tensor) -> Tensor:
        """Half-rotated rotary embedding of [B, H, N, D], of all tokens or of the patches alone."""
        if not self.spec.side.startswith("rope"):
            return x
        ends = self.spec.side == "rope_patches"
        first = self.spec.prefix if ends else 0
        last = x.shape[2] - (self.spec.suffix if ends else 0)
        y = x[:, :, first:last]
        half = torch.cat([-y[..., y.shape[-1] // 2 :], y[..., : y.shape[-1] // 2]], -1)
        y = y * self.cos + half * self.sin
        return torch.cat([x[:, :, :first], y, x[:, :, last:]], 2) if ends else y


class TinyAttention(nn.Module):
    """The residual stream -> the same shape, spelled in one of ``SPELLINGS``."""

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
        self.side = Side(spec)
        self.talk = nn.ModuleList(nn.Linear(spec.heads, spec.heads) for _ in range(2 * (spec.spelling == "talking")))
        self.q_norm = nn.LayerNorm(spec.head_dim) if spec.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(spec.head_dim) if spec.qk_norm else nn.Identity()

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        x = to_tokens(x, self.spec.layout)
        return from_tokens(self.proj(self._attend(x, valid)), self.spec.layout, self.spec.grid)

    def _attend(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """[B, N, C] -> [B, N, C]; ``valid`` [B, N] says which keys take part."""
        if self.spec.side == "scale":
            x = x * (1 + 0.1 * self.side.table)
        if self.spec.spelling == "mha":
            return self.mha(x, x, x, need_weights=False)[0]
        b, n, c = x.shape
        h, d = self.spec.heads, self.spec.head_dim
        if self.spec.spelling == "separate":
            q, k, v = (f(x).view(b, n, h, d).transpose(1, 2) for f in (self.q, self.k, self.v))
        elif self.spec.spelling == "sdpa":
            q, k, v = self.qkv(x).reshape(b, n, 3, h, d).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (t.reshape(b, n, h, d).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        q, k = self.side.rotate(self.q_norm(q)), self.side.rotate(self.k_norm(k))
        return getattr(self, f"_{self.spec.spelling}")(q, k, v, valid).transpose(1, 2).reshape(b, n, c)

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        mask = None if valid is None else valid[:, None, None]
        if self.spec.side == "bias":
            mask = self.side.table
        return F.scaled_dot_product_attention(q, k, v, mask)

    _separate = _sdpa

    def _mix(self, logits: Tensor, valid: Tensor | None) -> Tensor:
        """Logits [B, H, N, N] -> attention weights, with what the spec has on the way."""
        if self.spec.side == "bias":
            logits = logits + self.side.table
        if valid is not None:
            logits = logits.masked_fill(~valid[:, None, None], float("-inf"))
        weights = logits.softmax(dim=-1)
        if self.spec.side == "gate":
            weights = 0.7 * weights + 0.3 * self.side.table.softmax(dim=-1)
        return weights

    def _softmax(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        return self._mix((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1), valid) @ v

    def _einsum(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        logits = torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("bhij,bhjd->bhid", self._mix(logits, valid), v)

    def _talking(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        logits = self.talk[0](logits.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        weights = self._mix(logits, valid)
        return self.talk[1](weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v

    def _flat(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        b, h, n, d = q.shape
        q, k, v = (t.reshape(b * h, n, d) for t in (q, k, v))
        weights = torch.bmm(q, k.transpose(1, 2)).mul(d**-0.5).softmax(-1)
        return torch.bmm(weights, v).view(b, h, n, d)


class Mlp(nn.Module):
    """The residual stream -> the same shape."""

    def __init__(self, spec: VitSpec) -> None:
        super().__init__()
        gated = spec.mlp == "swiglu"
        self.gated, self.axis = gated, 1 if spec.layout == "bchw" else -1
        layer = (lambda i, o: nn.Conv2d(i, o, 1)) if spec.layout == "bchw" else nn.Linear
        self.fc1 = layer(spec.width, spec.width * (4 if gated else 2))
        self.fc2 = layer(spec.width * 2, spec.width)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            gate, x = self.fc1(x).chunk(2, dim=self.axis)
            return self.fc2(F.silu(gate) * x)
        return self.fc2(F.gelu(self.fc1(x)))


class Extra(nn.Module):
    """A layer that is no softmax attention over tokens, on [B, N, C]."""

    def __init__(self, spec: VitSpec) -> None:
        super().__init__()
        self.spec = spec
        self.qkv = nn.Linear(spec.width, 3 * spec.width)
        self.conv = nn.Conv2d(spec.width, spec.width, 3, padding=1, padding_mode="circular", groups=spec.width)

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, f"_{self.spec.extra}")(x)

    def _grid(self, x: Tensor) -> Tensor:
        """A depthwise convolution on the patches' grid; the other tokens pass."""
        first, g = self.spec.prefix, self.spec.grid
        body = x[:, first : first + g * g]
        mixed = self.conv(body.transpose(1, 2).reshape(x.shape[0], -1, g, g)).flatten(2).transpose(1, 2)
        return torch.cat([x[:, :first], mixed, x[:, first + g * g :]], 1)

    def _linear_attention(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        total = torch.einsum("bnc,bc->bn", q, k.sum(1))
        return torch.einsum("bnc,bcd->bnd", q, torch.einsum("bnc,bnd->bcd", k, v)) / total[..., None]

    def _cross_covariance(self, x: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        weights = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(1, 2)).softmax(-1)
        return (weights @ v).transpose(1, 2)


class TinyBlock(nn.Module):
    """Attention and MLP around a residual stream."""

    def __init__(self, spec: VitSpec) -> None:
        super().__init__()
        self.spec = spec
        self.norm1, self.norm2 = Norm(spec), Norm(spec)
        self.attn = TinyAttention(spec)
        self.mlp = None if spec.mlp == "none" else Mlp(spec)
        self.extra = None if spec.extra == "none" else Extra(spec)
        scale = torch.full((spec.width, 1, 1) if spec.layout == "bchw" else (spec.width,), 0.5)
        self.gamma1 = nn.Parameter(scale.clone()) if spec.layer_scale else 1.0
        self.gamma2 = nn.Parameter(scale.clone()) if spec.layer_scale else 1.0

    def _add(self, x: Tensor, y: Tensor) -> Tensor:
        return x.add_(y) if self.spec.inplace else x + y

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        x = self._main(x, valid)
        if self.extra is not None:
            y = self.extra(to_tokens(x, self.spec.layout))
            x = x + from_tokens(y, self.spec.layout, self.spec.grid)
        return x

    def _main(self, x: Tensor, valid: Tensor | None) -> Tensor:
        if self.spec.norm == "parallel" and self.mlp is not None:
            y = self.norm1(x)
            return x + self.gamma1 * self.attn(y, valid) + self.gamma2 * self.mlp(y)
        if self.spec.norm == "post":
            x = self.norm1(x + self.gamma1 * self.attn(x, valid))
            return x if self.mlp is None else self.norm2(x + self.gamma2 * self.mlp(x))
        x = self._add(x, self.gamma1 * self.attn(self.norm1(x), valid))
        return x if self.mlp is None else self._add(x, self.gamma2 * self.mlp(self.norm2(x)))


class TinyViT(nn.Module):
    """A Vision Transformer after ``spec``: images [B, 3, 4·grid, 4·grid] -> [B, 5] (``dense``: tokens).

    With ``side="padding"`` the second input, bool [B, grid²], says which patches are real.
    """

    def __init__(self, spec: VitSpec) -> None:
        super().__init__()
        self.spec = spec
        width = spec.width
        self.embed = nn.Conv2d(3, width, 4, 4)
        self.prefix = nn.Parameter(torch.randn(1, spec.prefix, width))
        self.suffix = nn.Parameter(torch.randn(1, spec.suffix, width))
        self.position = nn.Parameter(torch.randn(1, spec.tokens, width) * 0.2) if spec.position else None
        self.blocks = nn.ModuleList(TinyBlock(spec) for _ in range(spec.depth))
        self.join = nn.Linear(2 * width, width) if spec.skip == "cat" else None
        self.norm = nn.LayerNorm(width)
        self.latent = nn.Parameter(torch.randn(1, 1, width))
        self.score = nn.Linear(width, 1)
        self.head = nn.Linear(width, 5)

    def forward(self, images: Tensor, valid: Tensor | None = None) -> Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2)
        ends = [t.expand(x.shape[0], -1, -1) for t in (self.prefix, self.suffix)]
        if self.spec.prefix or self.spec.suffix:
            x = torch.cat([t for t in (ends[0], x, ends[1]) if t.shape[1]], dim=1)
        if valid is not None:
            valid = F.pad(valid, (self.spec.prefix, self.spec.suffix), value=True)
        if self.position is not None:
            x = x + self.position
        x = from_tokens(x, self.spec.layout, self.spec.grid)
        if self.spec.inplace:
            x = x.clone()
        for i, block in enumerate(self.blocks):
            x = block(x, valid)
            if i == 0:
                early = x.clone() if self.spec.inplace else x
        return self._read(self.norm(self._late(x, early)), valid)

    def _late(self, x: Tensor, early: Tensor) -> Tensor:
        """The long skip connection, and the stream as [B, N, C]."""
        x, early = (to_tokens(t, self.spec.layout) for t in (x, early))
        if self.spec.skip == "add":
            return x + early
        return x if self.join is None else self.join(torch.cat([x, early], -1))

    def _read(self, x: Tensor, valid: Tensor | None) -> Tensor:
        kind, first = self.spec.head, self.spec.prefix
        if kind == "dense":
            return x if valid is None else x * valid[..., None]
        if kind == "cls":
            return self.head(x[:, 0])
        if kind == "mean":
            if valid is not None:
                return self.head((x * valid[..., None]).sum(1) / valid.sum(1, keepdim=True))
            return self.head(x[:, first : x.shape[1] - self.spec.suffix].mean(dim=1))
        if kind == "max":
            return self.head(x.amax(dim=1))
        if kind == "weights":
            return self.head((self.score(x).softmax(dim=1) * x).sum(dim=1))
        if kind == "spread":
            return self.head(x.std(dim=1) + x.norm(dim=1) + x.logsumexp(dim=1))
        b, n, c = x.shape
        k = x.view(b, n, self.spec.heads, -1).transpose(1, 2)
        if kind == "class_attention":
            q = self.score.weight * x[:, :1]
        else:
            q = self.latent.expand(b, -1, -1)
        q = q.view(b, 1, self.spec.heads, -1).transpose(1, 2)
        return self.head(F.scaled_dot_product_attention(q, k, k).transpose(1, 2).reshape(b, c))

    def example(self, kinds: int, seed: int, batch: int = 2) -> tuple[Tensor, ...]:
        """Inputs whose patches are copies of ``kinds`` different ones, with padding where the spec has it."""
        images = repeated_patches(batch, self.spec.grid, kinds, seed)
        if self.spec.side != "padding":
            return (images,)
        real = torch.arange(self.spec.grid**2).expand(batch, -1) < torch.tensor([self.spec.grid**2 - 3, 4])[:, None]
        return images, real


MEETINGS = ("apart", "product", "cross")


class TinyTowers(nn.Module):
    """Two Vision Transformers, or one that runs twice where ``second`` is None, on images of their own.

    ``meet``: whether their outputs are only returned (``apart``), are multiplied with one another as well
    (``product``, for heads that give one vector), or the tokens of the second look at those of the first (``cross``,
    for ``head="dense"``).
    """

    def __init__(self, first: VitSpec, second: VitSpec | None = None, meet: str = "apart") -> None:
        super().__init__()
        self.first = TinyViT(first)
        self.second = self.first if second is None else TinyViT(second)
        self.meet = meet
        self.query = nn.Linear(self.second.spec.width, first.width)

    def forward(self, one: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        a, b = self.first(one), self.second(other)
        if self.meet == "product":
            return a, b, a @ b.mT
        if self.meet == "cross":
            keys = a[:, None]
            return a, F.scaled_dot_product_attention(self.query(b)[:, None], keys, keys)[:, 0]
        return a, b

    def example(self, kinds: int, seed: int, batch: int = 2) -> tuple[Tensor, Tensor]:
        """Images for both, whose patches are copies of ``kinds`` different ones."""
        return (
            repeated_patches(batch, self.first.spec.grid, kinds, seed),
            repeated_patches(batch, self.second.spec.grid, kinds, seed + 1),
        )


def repeated_patches(batch: int, grid: int, kinds: int, seed: int, patch: int = 4) -> Tensor:
    """Images [batch, 3, grid·patch, grid·patch] whose patches are copies of ``kinds`` different ones."""
    generator = torch.Generator().manual_seed(seed)
    tiles = torch.randn(batch, kinds, 3, patch, patch, generator=generator)
    which = torch.randint(0, kinds, (batch, grid, grid), generator=generator)
    images = torch.stack([tile[index] for tile, index in zip(tiles, which)])
    return images.permute(0, 3, 1, 4, 2, 5).reshape(batch, 3, grid * patch, grid * patch)
