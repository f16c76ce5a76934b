"""The roofline of the kernels: the table in the README, and figures worked out by hand."""

from pathlib import Path

import pytest

from mctf_compile.kernels.roofline import BlockShape, table

README = Path(__file__).parents[1] / "kernels" / "README.md"
SMALL = BlockShape("DeiT-S", 384, 197, 256)


def test_the_readme_has_the_table():
    assert README.read_text().endswith(table() + "\n")


def test_attention_by_hand():
    """q, k, v, o of 50,432 tokens and 384 channels; 302,592 log-sum-exps; 50,432 sizes."""
    cost = SMALL.attention()
    assert cost.flops == 15_260_319_744
    assert cost.bytes == 154_927_104 + 1_210_368 + 201_728
    assert cost.floor == pytest.approx(52.113e-6, rel=1e-4)


def test_importance_by_hand():
    """One product; q and k; log-sum-exps out, and 7 tiles' sums of each head out and in; sizes in, a out."""
    cost = SMALL.importance()
    assert cost.flops == 7_630_159_872
    assert cost.bytes == 77_463_552 + 15 * 1_210_368 + 2 * 201_728
