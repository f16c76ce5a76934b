"""Where the tokens of a residual stream are made, and how the kept ones are made alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from mctf_compile.narrowing import node_of
from mctf_compile.passes.analysis.token_axes import Axes
from mctf_compile.passes.axes import Tokens, has_batch, mentions
from mctf_compile.passes.rewriting.stream import Stream, Value
from mctf_compile.passes.rules import schema_arguments

aten = torch.ops.aten


def origins(entry: fx.Node, tokens: Tokens, axes: Axes) -> list[fx.Node]:
    """The values of every image that ``entry`` is computed from, and in which its tokens are told apart first."""

    def of_tokens(node: fx.Node) -> bool:
        if not isinstance(axes.dims.get(node), tuple):
            return False
        dims = axes.of(node)
        return mentions(dims, tokens) and has_batch(dims, tokens)

    found: list[fx.Node] = []
    seen, stack = set[fx.Node](), [entry]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        before = [n for n in node.all_input_nodes if of_tokens(n)]
        stack.extend(before)
        if not before:
            found.append(node)
    return found


def made_of_kept(node: fx.Node, stream: Stream, env: Mapping[fx.Node, Any]) -> Value:
    """The value of an origin after the first fusion of its tokens, which drops some of them.

    Of a convolution that takes each patch by itself, the patches that are dropped are not read.
    """
    value: Value = env[node]
    places = stream.places(value.dims)
    patches = _patch_embedding(node) if [(p.dim, p.rest) for p in places] == [(2, (3,))] else None
    if patches is None:
        return stream.raise_to(Value(value.tensor, value.dims, stream), 1)
    images, weight = env[patches.images].tensor, env[patches.weight].tensor
    bias = None if patches.bias is None else env[patches.bias].tensor
    keep = stream.fusion(1, 0, 0).keep
    kept = torch.ops.mctf.keep(_cut(images, weight.shape[2:], value.tensor.shape[2:], patches.padding), keep, 1)
    # A grid of fused tokens has them all in one dimension.
    return Value(F.linear(kept, weight.flatten(1), bias).mT.unsqueeze(3), value.dims, stream, 1)


@dataclass(frozen=True)
class _PatchEmbedding:
    """The operands of a convolution of images [B, C, H, W] whose windows do not overlap."""

    images: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    padding: list[int]


def _patch_embedding(node: fx.Node) -> _PatchEmbedding | None:
    if node.target is not aten.conv2d.default:
        return None
    call = schema_arguments(node)
    window = list(node_of(call["weight"]).meta["val"].shape[2:])
    stride, padding, dilation = ([*call[name]] * (2 // len(call[name])) for name in ("stride", "padding", "dilation"))
    if stride != window or dilation != [1, 1] or call["groups"] != 1:
        return None
    return _PatchEmbedding(node_of(call["input"]), node_of(call["weight"]), call["bias"], padding)


def _cut(images: Tensor, window: Any, grid: Any, padding: list[int]) -> Tensor:
    """[B, C, H, W] as patches [B, N, C · window], row by row."""
    (tall, wide), (rows, columns) = window, grid
    x = F.pad(images, (padding[1], padding[1], padding[0], padding[0])) if any(padding) else images
    x = x[:, :, : rows * tall, : columns * wide].reshape(x.shape[0], -1, rows, tall, columns, wide)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(x.shape[0], rows * columns, -1)
