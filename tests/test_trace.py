"""Which original token went where, against what reference operators make of the same model."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import mctf_compile
from mctf_compile import ConfigError, MctfError, NothingFusedError
from mctf_compile.kernels.attention import reference as attention
from mctf_compile.kernels.matching import reference as matching
from mctf_compile.kernels.pooling import reference as pooling
from mctf_compile.testing import TinyViT, VitSpec


def model_of(**spec: object) -> tuple[TinyViT, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model = TinyViT(VitSpec(position=True, **spec)).eval().double()
    images, *others = model.example(kinds=16, seed=1)
    return model, (images.double(), *others)


@dataclass
class Stage:
    """What a block is expected to have done: lists of original tokens in each token before it and after it."""

    before: list[list[list[int]]]
    after: list[list[list[int]]]
    size: Tensor
    importance: Tensor


def stages(model: TinyViT, images: Tensor, r: int) -> list[Stage]:
    """MCTF spelled out in eager mode with the reference operators, one image and one token at a time where they are."""
    found = []
    x = model.embed(images).flatten(2).transpose(1, 2)
    x = torch.cat([model.prefix.expand(len(x), -1, -1), x], 1) + model.position
    size = x.new_ones(x.shape[:2])
    members = [[[n] for n in range(x.shape[1])] for _ in images]
    for i, block in enumerate(model.blocks):
        q, k, v = projected(block, x)
        a = attention.probabilities(q, k, size.log(), None, model.spec.head_dim**-0.5)
        if i:
            importance = a.mean((1, 2))
            keep, gone, into = matching.match(x, importance, size, r, 1, 0, 1.0, 20.0, 40.0, True)
            index, weight, total = pooling.group(importance * size, size, keep, gone, into)
            x = pooling.pool(x, weight, keep, gone, into, 1)
            joined = [
                [sorted(n for old, new in zip(olds, image) if new == m for n in old) for m in range(len(keep[0]))]
                for olds, image in zip(members, index.tolist())
            ]
            found.append(Stage(members, joined, total, importance))
            size, members = total, joined
            g = pooling.assignment(keep, gone, into)
            a = torch.einsum("bmn,bhnk,bjk->bhmj", g * weight[:, None], a, g)
            v = projected(block, x)[2]
        x = x + block.attn.proj((a @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return found


def projected(block: nn.Module, x: Tensor) -> list[Tensor]:
    """Queries, keys and values [B, H, N, D] of a block."""
    spec = block.spec
    parts = block.attn.qkv(block.norm1(x)).chunk(3, -1)
    return [part.unflatten(-1, (spec.heads, spec.head_dim)).transpose(1, 2) for part in parts]


def groups(position: Tensor, count: int) -> list[list[list[int]]]:
    """From [B, N] to the original tokens in each of ``count`` tokens."""
    return [[[n for n, m in enumerate(image) if m == j] for j in range(count)] for image in position.tolist()]


def test_every_token_is_followed_as_reference_operators_have_it() -> None:
    model, (images,) = model_of(depth=4, grid=5)
    found = mctf_compile.trace(model, images, r=3, min_tokens=1)
    expected = stages(model, images, 3)
    assert [block.index for block in found.blocks] == [1, 2, 3]
    for block, stage in zip(found.blocks, expected, strict=True):
        assert groups(block.source, block.size.shape[1]) == stage.after
        assert groups(block.before, block.importance.shape[1]) == stage.before
        torch.testing.assert_close(block.size, stage.size)
        torch.testing.assert_close(block.importance, stage.importance)
        per_token = torch.tensor(
            [
                [next(a for olds, a in zip(old, image) if n in olds) for n in range(26)]
                for old, image in zip(stage.before, stage.importance.tolist())
            ]
        )
        torch.testing.assert_close(block.spread_importance, per_token.double())
        assert block.judged_by == "importance" and not block.dropped.any()
        assert (block.first, block.grid) == (1, (5, 5)) and block.block.tokens_out == block.size.shape[1]


def test_the_output_is_that_of_the_compiled_model_which_stays_compiled() -> None:
    model, (images,) = model_of()
    fast = torch.compile(model, backend="mctf", options={"inner": "eager", "r": 2, "min_tokens": 1})
    with torch.no_grad():
        expected = fast(images)
        found = mctf_compile.trace(fast, images)
        torch.testing.assert_close(found.output, expected)
        assert [block.size.shape[1] for block in found.blocks] == [15, 13]
        with torch.compiler.set_stance("fail_on_recompile"):
            torch.testing.assert_close(fast(images), expected)


def test_options_are_those_of_the_compiled_model_and_those_given_come_first() -> None:
    model, (images,) = model_of(depth=2)
    options = {"inner": "inductor", "inductor": {"mode": "default"}, "kernels": "auto", "min_tokens": 1, "r": 4}

    def left(model: nn.Module, **others: object) -> int:
        return mctf_compile.trace(model, images, **others).blocks[0].size.shape[1]

    assert left(torch.compile(model, backend="mctf", options=options)) == 13
    assert left(torch.compile(model, backend="mctf"), r=1, min_tokens=1) == 16
    model.compile(backend="mctf", options=options)
    assert left(model) == 13 and left(model, r=2) == 15


def test_r_is_as_it_was_set_last() -> None:
    model, (images,) = model_of(depth=2)
    options = {"inner": "eager", "dynamic_r": True, "r": "auto", "target": "speedup=1.1", "min_tokens": 1}
    fast = torch.compile(model, backend="mctf", options=options)
    assert "speedup" in mctf_compile.trace(fast, images).report.target
    mctf_compile.set_r(fast, 5)
    assert mctf_compile.trace(fast, images).blocks[0].size.shape[1] == 12


def test_a_function_that_was_compiled() -> None:
    model, (images,) = model_of(depth=2)
    fast = torch.compile(lambda x: model(x).softmax(-1), backend="mctf", options={"r": 2, "min_tokens": 1})
    found = mctf_compile.trace(fast, images)
    assert found.blocks[0].size.shape == (2, 15)
    torch.testing.assert_close(found.output.sum(-1), torch.ones(2).double())


def test_a_model_of_another_backend_is_refused() -> None:
    model, (images,) = model_of()
    with pytest.raises(ConfigError, match="another backend"):
        mctf_compile.trace(torch.compile(model, backend="eager"), images)


def test_a_model_in_which_nothing_fuses_has_no_blocks_but_reasons() -> None:
    model, (images,) = model_of()
    found = mctf_compile.trace(model, images, r=0)
    assert not found.blocks and all(b.reason for b in found.report.blocks)
    torch.testing.assert_close(found.output, model(images))
    with pytest.raises(NothingFusedError):
        mctf_compile.trace(model, images, r=0, strict=True)
    with pytest.raises(MctfError, match="captured no graph"):
        mctf_compile.trace(lambda: 3)


def test_tokens_that_are_dropped_are_told_from_those_that_are_merged() -> None:
    """ToFu drops in the first half of its blocks and merges in the others."""
    model, (images,) = model_of(depth=4)
    blocks = mctf_compile.trace(model, images, method="tofu", r=2).blocks
    assert [block.dropped.sum(1).tolist() for block in blocks] == [[2, 2], [4, 4], [4, 4], [4, 4]]
    for block in blocks:
        held = block.source.masked_fill(block.dropped, -1)
        for image, size in zip(held, block.size):
            counted = torch.bincount(image[image >= 0], minlength=len(size)).double()
            torch.testing.assert_close(counted, size)
    assert blocks[0].importance is None and blocks[0].judged_by is None


def test_idle_tokens_are_back_in_the_next_block() -> None:
    model, (images,) = model_of(depth=4, grid=4)
    blocks = mctf_compile.trace(model, images, method="idlevit").blocks
    assert [block.index for block in blocks] == [1, 2, 3]
    for block, chosen in zip(blocks, (8, 4, 2)):
        assert block.before.tolist() == [list(range(17))] * 2
        assert block.dropped.sum(1).tolist() == [16 - chosen] * 2 and not block.dropped[:, 0].any()
        # The patches with the highest logits of the class token are those that stay.
        highest = block.importance[:, 1:].topk(chosen).indices + 1
        stay = [sorted(image) for image in highest.tolist()]
        assert [[n for n in range(1, 17) if not image[n]] for image in block.dropped.tolist()] == stay


def test_padding_is_never_in_a_token_with_patches() -> None:
    model, (images, real) = model_of(side="padding", head="mean", depth=3)
    for block in mctf_compile.trace(model, images, real, r=4, min_tokens=1).blocks:
        for image, valid in zip(block.source, real):
            assert not set(image[1:][valid].tolist()) & set(image[1:][~valid].tolist())


@pytest.mark.parametrize(
    ("spec", "first"),
    [
        ({"prefix": 3, "suffix": 2}, 3),
        ({"prefix": 0, "head": "mean", "layout": "bhwc"}, 0),
        ({"spelling": "einsum", "prefix": 2}, 2),
    ],
    ids=["ends", "grid-stream", "spelled-out"],
)
def test_patches_are_found_where_they_lie(spec: dict, first: int) -> None:
    model, inputs = model_of(depth=2, **spec)
    (block,) = mctf_compile.trace(model, *inputs, r=2, min_tokens=1).blocks
    assert (block.first, block.grid) == (first, (4, 4))
    assert block.source.shape[1] == model.spec.tokens


def test_patches_are_found_among_prefix_tokens_that_are_not_protected() -> None:
    model, (images,) = model_of(depth=2)
    (block,) = mctf_compile.trace(model, images, r=2, min_tokens=1, protected=0).blocks
    assert (block.first, block.grid) == (1, (4, 4))


class Broken(nn.Module):
    """Two models with a graph break between them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, _ = model_of(depth=2)
        self.two, _ = model_of(depth=3)

    def forward(self, images: Tensor) -> Tensor:
        y = self.one(images)
        torch._dynamo.graph_break()
        return y + self.two(images)


def test_blocks_of_every_graph_are_there() -> None:
    _, (images,) = model_of()
    found = mctf_compile.trace(Broken(), images, r=2, min_tokens=1)
    assert [(block.graph, block.index) for block in found.blocks] == [(0, 1), (1, 1), (1, 2)]
    assert len(found.reports) == 2 and found.report is found.reports[1]


def test_tokens_in_training_count_softly() -> None:
    """Modules in training keep all tokens: the map is a permutation, and sizes say how much each counts."""
    model, (images,) = model_of(depth=2)
    model, images = mctf_compile.attach(model.float(), images.float(), method="dtem", r=3).train(), images.float()
    block = mctf_compile.trace(model, images, method="dtem", r=3).blocks[0]
    assert [sorted(image) for image in block.source.tolist()] == [list(range(17))] * 2
    torch.testing.assert_close(block.size.sum(1), torch.full((2,), 17.0))
    assert (block.size[:, 1:] < 1).any() and not block.size.requires_grad
