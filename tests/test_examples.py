"""The examples show what the compiler did."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import timm
import torch

import mctf_compile

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))


def test_the_map_of_a_fusion_has_its_tokens(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from fusion_map import borders, draw, groups_of, mean_colours

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4).eval()
    traced = mctf_compile.trace(model, torch.randn(2, 3, 64, 64), r=2, min_tokens=1)
    for i, block in enumerate(traced.blocks, 1):
        groups = groups_of(block)
        # The class token fuses with none.
        assert groups.shape == (4, 4) and len(groups.unique()) == 16 - 2 * i and block.source[0, 0] not in groups
    photo = torch.rand(8, 8, 3)
    painted = mean_colours(photo, groups)
    for token in groups.unique():
        inside = [(2 * y + a, 2 * x + b) for y, x in (groups == token).nonzero() for a in range(2) for b in range(2)]
        mean = torch.stack([photo[y, x] for y, x in inside]).mean(0)
        assert all(torch.allclose(painted[y, x], mean) for y, x in inside)
    differ = int((groups[1:] != groups[:-1]).sum() + (groups[:, 1:] != groups[:, :-1]).sum())
    assert len(borders(groups, 2)) == differ
    draw(photo, traced.blocks[-2:], tmp_path / "new" / "map.png")
    assert (tmp_path / "new" / "map.png").stat().st_size > 1000
