"""The examples show what the compiler did."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import timm
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))


def test_patches_are_followed_through_every_fusion() -> None:
    pytest.importorskip("matplotlib")
    from fusion_map import follow

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4).eval()
    groups, report = follow(model, torch.randn(2, 3, 64, 64), {"r": 2, "min_tokens": 1})
    assert [g.block for g in groups] == [1, 2, 3] == [b.index for b in report.blocks if b.reason is None]
    for i, found in enumerate(groups, 1):
        assert found.position.shape == (2, 17)
        assert all(len(image.unique()) == 17 - 2 * i for image in found.position)
