"""Attention and its masks in the many ways people write them; each is a function that stands by itself."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Attention over q, k, v [B, H, N, D] or [B, N, D]. ``bias`` is added to the logits; a boolean one says who takes part.


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention by PyTorch's one operator: q, k, v [..., N, D], a bias that broadcasts to [..., N, N]."""
    return F.scaled_dot_product_attention(q, k, v, bias)


def softmax(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention as two products with a softmax in between."""
    logits: Tensor = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if bias is not None:
        logits = logits.masked_fill(~bias, float("-inf")) if bias.dtype is torch.bool else logits + bias
    return logits.softmax(dim=-1) @ v


def einsum(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention by Einstein sums."""
    logits = torch.einsum("...id,...jd->...ij", q * q.shape[-1] ** -0.5, k)
    if bias is not None:
        logits = logits.masked_fill(~bias, float("-inf")) if bias.dtype is torch.bool else logits + bias
    return torch.einsum("...ij,...jd->...id", torch.softmax(logits, -1), v)


def keys_first(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention with its logits transposed: the softmax is over their rows, the bias is transposed too."""
    logits: Tensor = k @ q.transpose(-2, -1) * q.shape[-1] ** -0.5
    if bias is not None:
        bias = bias.transpose(-2, -1)
        logits = logits.masked_fill(~bias, float("-inf")) if bias.dtype is torch.bool else logits + bias
    return logits.softmax(dim=-2).transpose(-2, -1) @ v


def batched(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention by ``bmm`` over all leading dimensions in one."""
    logits: Tensor = torch.bmm(q.flatten(0, -3), k.flatten(0, -3).transpose(1, 2)) * q.shape[-1] ** -0.5
    if bias is not None:
        logits = logits.unflatten(0, q.shape[:-2])
        logits = logits.masked_fill(~bias, float("-inf")) if bias.dtype is torch.bool else logits + bias
        logits = logits.flatten(0, -3)
    result: Tensor = torch.bmm(logits.softmax(-1), v.flatten(0, -3)).unflatten(0, q.shape[:-2])
    return result


def exponentials(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention whose softmax is written out: exponentials over their sum."""
    logits: Tensor = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if bias is not None:
        logits = logits.masked_fill(~bias, float("-inf")) if bias.dtype is torch.bool else logits + bias
    powers = torch.exp(logits - logits.amax(-1, keepdim=True))
    weights: Tensor = powers / powers.sum(-1, keepdim=True)
    return weights @ v


SPELLINGS = (sdpa, softmax, einsum, keys_first, batched, exponentials)
# Those that take keys and values of one head for queries of several.
BROADCASTING = (sdpa, softmax, einsum, keys_first, exponentials)


def grouped(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention of queries in more heads than keys and values have: [B, H, N, D] and [B, H/g, N, D]."""
    return F.scaled_dot_product_attention(q, k, v, bias, enable_gqa=True)


# Padding: of bool [B, (1,) 1, N], which keys take part, a mask that broadcasts to [B, (H,) N, N].


def boolean(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """As it is."""
    return keys


def expanded(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """The same for every query, said once for each."""
    return keys.expand(*keys.shape[:-2], keys.shape[-1], keys.shape[-1])


def negated(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Not those that are padding."""
    return ~(~keys | torch.zeros(keys.shape[-1], 1, dtype=torch.bool))


def compared(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Whole numbers of which one is meant."""
    return keys.long() == 1


def filled(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Minus infinity added where there is padding."""
    return torch.zeros_like(keys, dtype=dtype).masked_fill(~keys, float("-inf"))


def written(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """The least number written where there is padding, for every query."""
    every = keys.expand(*keys.shape[:-2], keys.shape[-1], keys.shape[-1])
    mask = torch.zeros_like(every, dtype=dtype)
    mask.masked_fill_(~every, torch.finfo(dtype).min)
    return mask


def chosen(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """One of two numbers."""
    return torch.where(keys, torch.zeros((), dtype=dtype), torch.full((), float("-inf"), dtype=dtype))


def scaled(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """A large number times one less."""
    return (1.0 - keys.to(dtype)) * -1e4


def logarithm(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """The logarithm of one or zero."""
    return keys.to(dtype).log()


PADDINGS = (boolean, expanded, negated, compared, filled, written, chosen, scaled, logarithm)


def symmetric(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Padding sees nothing either."""
    return keys & keys.transpose(-2, -1)


def symmetric_filled(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """The same, as the least number that is added."""
    both = keys & keys.transpose(-2, -1)
    return torch.zeros_like(both, dtype=dtype).masked_fill(~both, torch.finfo(dtype).min)


SYMMETRIC = (symmetric, symmetric_filled)


# Several images in one sequence, of these lengths: masks [N, N] that let each see itself alone.


def same_image(lengths: list[int], dtype: torch.dtype) -> Tensor:
    """The numbers of two tokens' images compared."""
    image = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
    return image[:, None] == image


def other_images_filled(lengths: list[int], dtype: torch.dtype) -> Tensor:
    """Minus infinity added where they differ."""
    image = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
    mask = torch.zeros(len(image), len(image), dtype=dtype)
    return mask.masked_fill(image[:, None] != image, float("-inf"))


def blocks_of_ones(lengths: list[int], dtype: torch.dtype) -> Tensor:
    """Blocks along the diagonal."""
    blocks: Tensor = torch.block_diag(*[torch.ones(n, n) for n in lengths])
    return blocks.bool()


def blocks_written(lengths: list[int], dtype: torch.dtype) -> Tensor:
    """The same, written one by one."""
    mask, start = torch.full((sum(lengths), sum(lengths)), torch.finfo(dtype).min, dtype=dtype), 0
    for n in lengths:
        mask[start : start + n, start : start + n] = 0.0
        start += n
    return mask


PACKS = (same_image, other_images_filled, blocks_of_ones, blocks_written)


# Masks over pairs of tokens [N, N] under which copies stay copies, and no token can stand for two.


def but_itself(n: int, dtype: torch.dtype) -> Tensor:
    """Every token sees all but itself."""
    return ~torch.eye(n, dtype=torch.bool)


def but_itself_filled(n: int, dtype: torch.dtype) -> Tensor:
    """The same, as a number that is added."""
    return torch.zeros(n, n, dtype=dtype).masked_fill(torch.eye(n, dtype=torch.bool), -1e9)


PAIRS = (but_itself, but_itself_filled)
