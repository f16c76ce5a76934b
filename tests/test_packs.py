"""Several images packed into one sequence: their tokens fuse within each alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mctf_compile
from mctf_compile.passes.analysis.packs import runs
from mctf_compile.testing import Recorder
from mctf_compile.testing.soundness import ONLY_SIMILARITY

C, HEADS = 16, 2
LENGTHS = (13, 6, 9)
TWO = (13, 15)
N = sum(LENGTHS)
LOW, INF = torch.finfo(torch.float32).min, float("-inf")


def written():
    """As Pixtral makes it: the blocks of two images are written into a mask over all pairs."""
    mask, start = torch.full((N, N), LOW), 0
    for length in TWO:
        mask[start : start + length, start : start + length] = 0
        start += length
    return mask[None, None]


def compared():
    image = torch.cat([torch.full((length,), i) for i, length in enumerate(LENGTHS)])
    return image[:, None] == image[None, :]


MASKS = {
    "compared": compared,
    "filled": lambda: torch.zeros(N, N).masked_fill(~compared(), INF),
    "where": lambda: torch.where(compared(), 0.0, LOW)[None, None].expand(1, HEADS, N, N),
    "block_diag": lambda: torch.block_diag(*(torch.ones(n, n) for n in LENGTHS)).bool(),
}


class Packed(nn.Module):
    """Three blocks over images in one sequence; ``ends`` takes the pack apart again."""

    def __init__(self, mask=compared, spelling="sdpa", ends=False, anew=False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.ModuleList(nn.Linear(C, 3 * C) for _ in range(3))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(C, 2 * C), nn.GELU(), nn.Linear(2 * C, C)) for _ in range(3))
        self.mask, self.spelling, self.ends, self.anew = mask, spelling, ends, anew

    def forward(self, *images):
        x = torch.cat(images, 1)
        mask = self.mask()
        for qkv, mlp in zip(self.qkv, self.mlp):
            mask = self.mask() if self.anew else mask
            q, k, v = qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            if self.spelling == "sdpa":
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            elif self.spelling == "filled":
                hidden = ~mask if mask.dtype is torch.bool else mask < 0
                y = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(hidden, INF).softmax(-1) @ v
            else:
                added = torch.zeros(N, N).masked_fill(~mask, INF) if mask.dtype is torch.bool else mask
                y = (q @ k.mT * q.shape[-1] ** -0.5 + added).softmax(-1) @ v
            x = x + y.transpose(1, 2).flatten(2)
            x = x + mlp(x)
        return tuple(part.mean(1) for part in x.split(LENGTHS, 1)) if self.ends else x


def images(kinds=2):
    """One tensor for each image, of tokens that are copies of ``kinds``; the same ones in all images."""
    torch.manual_seed(1)
    base, made = torch.randn(kinds, C), []
    for length in LENGTHS:
        made.append(base[torch.randint(kinds, (length,))][None])
    return made


def run(model, inputs, **options):
    recorder = Recorder({"r": 4, "min_tokens": 1, **ONLY_SIMILARITY, **options})
    with torch.no_grad():
        return recorder.run(model, *inputs), recorder.reports[0]


@pytest.mark.parametrize("spelling", ["sdpa", "softmax", "filled"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_a_pack_is_read_off_its_mask_in_every_spelling(mask, spelling):
    model, inputs = Packed(mask, spelling).eval(), images()
    got, report = run(model, inputs)
    assert report.removed == 8 and not report.unmerged
    torch.testing.assert_close(got, model(*inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "tome"},
        {"method": "tofu"},
        {"attention": "exact"},
        {"attention": "current"},
        {"matching": "one_way"},
        {"r": 12},
    ],
    ids=str,
)
def test_tokens_of_two_images_are_never_fused(options):
    """Every token has its like in another image alone, and leaves for one of its own, whatever r asks for."""
    torch.manual_seed(2)
    tokens = torch.randn(1, max(LENGTHS), C)
    # Copies stand at an even position and an odd one, as those that may be matched do.
    model, inputs = Packed().eval(), [tokens[:, :length] for length in LENGTHS]
    alone = {} if "method" in options else {"min_tokens": 1, **ONLY_SIMILARITY}
    traced = mctf_compile.trace(model, *inputs, **{"r": 4, "layers": [0, 1, 2], **alone, **options})
    image = torch.cat([torch.full((length,), i) for i, length in enumerate(LENGTHS)])
    assert any(block.block.tokens_out < block.block.tokens_in for block in traced.blocks)
    for block in traced.blocks:
        for token in block.source.unique():
            assert len(image[block.source[0] == token].unique()) == 1


def two(kinds=2):
    first, *rest = images(kinds)
    return first, torch.cat(rest, 1)


@pytest.mark.parametrize("spelling", ["sdpa", "softmax"])
def test_a_pack_is_read_off_a_mask_that_is_written_into(spelling):
    model, inputs = Packed(written, spelling).eval(), two()
    got, report = run(model, inputs)
    assert report.removed == 8 and not report.unmerged
    torch.testing.assert_close(got, model(*inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spelling", ["sdpa", "softmax", "filled"])
def test_every_block_may_make_the_mask_anew(spelling):
    model, inputs = Packed(written, spelling, anew=True).eval(), two()
    got, report = run(model, inputs)
    assert report.removed == 8 and not report.unmerged
    torch.testing.assert_close(got, model(*inputs), atol=1e-5, rtol=1e-5)


def test_what_is_filled_with_a_small_number_is_no_pack():
    """Attention of all to all, some of it less."""

    class Less(Packed):
        def forward(self, x):
            mask = self.mask()
            for qkv, mlp in zip(self.qkv, self.mlp):
                q, k, v = qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
                y = (q @ k.mT).masked_fill(~mask, -1.0).softmax(-1) @ v
                x = x + y.transpose(1, 2).flatten(2)
                x = x + mlp(x)
            return x

    model, x = Less().eval(), torch.cat(images(), 1)
    got, report = run(model, [x])
    assert not report.removed
    torch.testing.assert_close(got, model(x), atol=1e-5, rtol=1e-5)


class MaskedLast(Packed):
    """The last block alone has a mask: those before it may fuse whatever tokens they like."""

    def forward(self, x):
        for i, (qkv, mlp) in enumerate(zip(self.qkv, self.mlp)):
            q, k, v = qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask() if i == 2 else None)
            x = x + y.transpose(1, 2).flatten(2)
            x = x + mlp(x)
        return x


@pytest.mark.parametrize(
    "mask",
    [*MASKS.values(), written, lambda: torch.full((N, N), INF).triu(1), lambda: written() > LOW],
    ids=[*MASKS, "written", "causal", "written, boolean"],
)
def test_a_mask_over_pairs_never_meets_tokens_that_were_fused_without_it(mask):
    model, x = MaskedLast(mask).eval(), torch.cat(images(), 1)
    got, _ = run(model, [x])
    torch.testing.assert_close(got, model(x), atol=1e-5, rtol=1e-5)


def test_what_takes_the_pack_apart_gets_its_tokens_back():
    model, inputs = Packed(ends=True).eval(), images()
    got, report = run(model, inputs)
    assert report.removed == 8 and report.unmerged
    for a, b in zip(got, model(*inputs)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["evit", "idlevit", "random", "pitome"])
def test_methods_that_know_no_images_leave_a_pack_dense(method):
    score = {"score": "mean_attention"} if method == "evit" else {}
    report = mctf_compile.explain(Packed().eval(), *images(), method=method, **score)
    assert not report.removed
    reasons = {block.reason for block in report.blocks}
    assert any("several images are packed into one sequence" in r or "class token" in r for r in reasons)


def test_runs_are_those_of_blocks_along_the_diagonal_alone():
    assert runs(compared()) == LENGTHS and runs(written()) == TWO
    assert runs(torch.zeros(4, 4)) == (4,)
    assert runs(torch.ones(4, 4, dtype=torch.bool).tril()) == ()
    # Every other token, as in dilated attention.
    assert runs((torch.arange(6)[:, None] - torch.arange(6)) % 2 == 0) == ()
    assert runs(torch.stack([compared(), torch.ones(N, N, dtype=torch.bool)])) == ()


@pytest.mark.parametrize("sizes", [None, [(64, 48), (40, 64)], [(32, 64), (64, 32)]], ids=str)
def test_pixtral_is_fused_as_people_feed_it(sizes):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.PixtralVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=64, patch_size=8
    )
    model = transformers.PixtralVisionModel(config).eval()
    # Positions that tell nothing apart, and patches that are copies of one.
    model.patch_positional_embedding.inv_freq.zero_()
    pixels = torch.randn(2, 3, 8, 8).repeat(1, 1, 8, 8)
    recorder = Recorder({"r": 8, "min_tokens": 1, **ONLY_SIMILARITY})
    with torch.no_grad():
        got = recorder.run(model, pixels, image_sizes=sizes)
        dense = model(pixels, image_sizes=sizes)
    assert max(report.removed for report in recorder.reports) == 16
    torch.testing.assert_close(got.last_hidden_state, dense.last_hidden_state, atol=1e-5, rtol=1e-5)


class Parts(nn.Module):
    """Tokens given in one part or in several, which the last block masks by the image that each is of."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleList([nn.Linear(8, 24), nn.Sequential(nn.Linear(8, 256), nn.GELU(), nn.Linear(256, 8))])
            for _ in range(3)
        )

    def forward(self, *parts: Tensor) -> Tensor:
        x = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        image = torch.cat([torch.full((n,), i) for i, n in enumerate((4, 5, 9))])
        for i, (qkv, mlp) in enumerate(self.blocks):
            q, k, v = (t[:, None] for t in qkv(x).chunk(3, -1))
            mask = image[:, None] == image if i == 2 else None
            x = x + F.scaled_dot_product_attention(q, k, v, mask)[:, 0]
            x = x + mlp(x)
        return x


@pytest.mark.parametrize("attention", ["approx", "current", "exact"])
def test_a_mask_of_other_parts_than_the_tokens_meets_them_all(attention):
    """What is made of 4 + 14 tokens is no mask of 4 + 5 + 9, though the numbers add up."""
    torch.manual_seed(0)
    model, x = Parts().eval(), torch.randn(2, 18, 8)
    options = {"r": 2, "min_tokens": 1, "protected": 4, "attention": attention, "layers": [0, 1, 2]}
    whole, parts = Recorder(options), Recorder(options)
    with torch.no_grad():
        expected, got = whole.run(model, x), parts.run(model, *x.split([4, 14], 1))
    assert [block.reason for block in parts.reports[0].blocks] == [
        None,
        None,
        "queries, keys, values and mask are put together of parts that do not line up, so no token is followed",
    ]
    assert [block.reason is None for block in whole.reports[0].blocks] == [True, True, False]
    torch.testing.assert_close(got, expected)


class SpelledOnAGrid(nn.Module):
    """Tokens of a grid, under a mask that is put together of two parts; attention is spelled out.

    ``causal``: the second part sees the first too.
    """

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.blocks = nn.ModuleList(
            nn.ModuleList([nn.Linear(8, 24), nn.Sequential(nn.Linear(8, 256), nn.GELU(), nn.Linear(256, 8))])
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (4, 4))
        mask = torch.zeros(16, 16)
        mask[:8, 8:] = float("-inf")
        if not self.causal:
            mask[8:, :8] = float("-inf")
        for qkv, mlp in self.blocks:
            q, k, v = qkv(x.flatten(1, 2)).chunk(3, -1)
            attended = (q @ k.mT * 8**-0.5 + mask).softmax(-1) @ v
            x = x + attended.unflatten(1, (4, 4))
            x = x + mlp(x)
        return x


@pytest.mark.parametrize("causal", [False, True], ids=["pack", "causal"])
def test_no_image_meets_another_where_a_mask_has_no_grid(causal):
    """The halves of the mask are no rows of the grid to whoever follows axes; so no token is fused."""
    torch.manual_seed(0)
    model, x = SpelledOnAGrid(causal).eval(), torch.randn(2, 16, 8)
    # Copies of the tokens of one image are in the other.
    x[:, 8:] = x[:, :8].flip(1)
    recorder = Recorder({"r": 3, "min_tokens": 1})
    with torch.no_grad():
        expected, got = model(x), recorder.run(model, x)
    for index, _, _ in recorder.groups:
        first, second = (set(index[0, part].tolist()) for part in (slice(0, 8), slice(8, 16)))
        assert not first & second
    assert {block.reason for block in recorder.reports[0].blocks} == {
        "queries, keys, values and mask are put together of parts that do not line up, so no token is followed"
    }
    torch.testing.assert_close(got, expected)
