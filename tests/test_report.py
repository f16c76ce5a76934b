"""What explain reports: GMACs against the published figures, tokens of each block, and clamps."""

import pytest
import timm
import torch

import mctf_compile

# Multiply-accumulates (1e9) of one 224² image, measured on the official MCTF implementation.
GMACS = {
    "deit_tiny_patch16_224": {0: 1.254, 8: 0.978, 16: 0.705, 20: 0.598, "fast": 0.745},
    "deit_small_patch16_224": {0: 4.599, 8: 3.593, 16: 2.594, 18: 2.370, 20: 2.191, "fast": 2.750},
    "deit_base_patch16_224": {0: 17.58, 16: 9.92},
}


@pytest.fixture(scope="module")
def models():
    return {name: timm.create_model(name).eval() for name in GMACS}


@pytest.mark.parametrize(("name", "r", "expected"), [(n, r, g) for n, by_r in GMACS.items() for r, g in by_r.items()])
def test_gmacs_are_the_published_ones_within_one_percent(models, name, r, expected):
    report = mctf_compile.explain(models[name], torch.randn(1, 3, 224, 224), r=r)
    width = models[name].embed_dim
    # The official code multiplies the pooled map (M x M) with the values; here it is never built, and the
    # product over the N old tokens is what runs. The two figures are compared without that difference.
    pooled = sum(width * (b.tokens_in**2 - b.tokens_out**2) for b in report.blocks if b.reason is None)
    assert (report.macs_after - pooled) / 1e9 == pytest.approx(expected, rel=0.005)
    assert report.macs_after / 1e9 == pytest.approx(expected, rel=0.0125)


def test_tokens_of_every_block_at_r_16(models):
    report = mctf_compile.explain(models["deit_small_patch16_224"], torch.randn(1, 3, 224, 224), r=16)
    assert [b.tokens_out for b in report.blocks] == [197, 181, 165, 149, 133, 117, 101, 85, 69, 53, 37, 21]
    assert [b.index for b in report.blocks if b.reason is not None] == [0]
    assert report.removed == 176


def test_fast_fuses_35_percent_at_three_layers(models):
    report = mctf_compile.explain(models["deit_small_patch16_224"], torch.randn(1, 3, 224, 224), r="fast")
    fused = {b.index: (b.tokens_in, b.tokens_out) for b in report.blocks if b.reason is None}
    assert fused == {3: (197, 129), 6: (129, 85), 9: (85, 56)}


def test_clamps_are_reported(models):
    report = mctf_compile.explain(models["deit_tiny_patch16_224"], torch.randn(1, 3, 224, 224), r=80)
    assert report.blocks[1].removed == 80
    assert report.blocks[2].note == "r clamped from 80 to 58 by half of the 116 unprotected tokens"
    assert report.blocks[-1].tokens_out >= 10


def test_macs_scale_with_the_batch(models):
    one, four = (
        mctf_compile.explain(models["deit_tiny_patch16_224"], torch.randn(b, 3, 224, 224), r=16) for b in (1, 4)
    )
    assert four.macs_after == 4 * one.macs_after and four.macs_before == 4 * one.macs_before
