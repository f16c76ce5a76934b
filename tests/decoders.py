"""Small decoders, whose tokens read others by cross-attention."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

# The width of all of them.
C = 16


class Attend(nn.Module):
    """Attention of some tokens to others, [B, N, C] and [B, K, C] -> [B, N, C], in one operator or in three."""

    def __init__(self, plain: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(C, C) for _ in range(4))
        self.plain = plain

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (f(z).unflatten(2, (2, -1)).transpose(1, 2) for f, z in ((self.q, x), (self.k, y), (self.v, y)))
        if self.plain:
            logits = q @ k.mT * q.shape[-1] ** -0.5
            out = (logits if mask is None else logits + mask).softmax(-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask)
        return self.o(out.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A layer of a decoder; ``cross_first``: it reads before its tokens see one another, as in a Perceiver."""

    def __init__(self, plain: bool = False, cross_first: bool = False) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(3))
        self.self_attn, self.cross_attn = Attend(plain), Attend(plain)
        self.mlp = nn.Sequential(nn.Linear(C, 2 * C), nn.GELU(), nn.Linear(2 * C, C))
        self.cross_first = cross_first

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.cross_first:
            x = x + self.cross_attn(self.norms[1](x), memory, mask)
        y = self.norms[0](x)
        x = x + self.self_attn(y, y)
        if not self.cross_first:
            x = x + self.cross_attn(self.norms[1](x), memory, mask)
        return x + self.mlp(self.norms[2](x))
