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


def test_a_sampler_compiles_once_and_draws_what_it_draws_alone() -> None:
    pytest.importorskip("sklearn")
    from generate import SIZE, Velocity, sample
    from torch._dynamo.utils import counters

    torch.manual_seed(0)
    model = Velocity().eval()
    # As training leaves it: with all gates closed nothing but the first layer would be seen.
    for block in model.blocks:
        torch.nn.init.normal_(block.modulation.weight, std=0.1)
    drawn = {}
    for r in (0, 0.5):
        torch._dynamo.reset()
        counters.clear()
        options = {"method": "tome", "span": "branch", "r": r, "inner": "eager"}
        drawn[r] = sample(torch.compile(model, backend="mctf", options=options), 4, 5, seed=0)
        assert counters["stats"]["unique_graphs"] == 1 and drawn[r].shape == (4, 1, SIZE, SIZE)
    torch.testing.assert_close(drawn[0], sample(model, 4, 5, seed=0))
    assert not torch.allclose(drawn[0], drawn[0.5], atol=1e-3)
    assert torch.nn.functional.cosine_similarity(drawn[0].flatten(), drawn[0.5].flatten(), 0) > 0.9


def test_the_distance_between_features_is_frechets() -> None:
    pytest.importorskip("sklearn")
    numpy, linalg = pytest.importorskip("numpy"), pytest.importorskip("scipy.linalg")
    from generate import frechet

    g = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=g)
    a, b = torch.randn(200, 6, generator=g), torch.randn(300, 6, generator=g) @ mixing + 1
    first, second = numpy.cov(a.double().numpy().T), numpy.cov(b.double().numpy().T)
    apart = ((a.double().mean(0) - b.double().mean(0)) ** 2).sum().item()
    expected = apart + numpy.trace(first + second - 2 * linalg.sqrtm(first @ second).real)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-6) and abs(frechet(a, a)) < 1e-9


def test_figures_have_their_joints_where_their_limbs_end() -> None:
    from pose import COLOURS, LIMBS, SIZE, figures

    images, joints = figures(20, torch.Generator().manual_seed(0))
    assert images.shape == (20, 3, SIZE, SIZE) and 0 <= joints.min() and joints.max() <= 1
    # The last limbs are drawn over the others: there their own colour is.
    for (_, end), colour in list(zip(LIMBS, COLOURS))[-2:]:
        at = (joints[:, end] * SIZE).long()
        drawn = torch.stack([image[:, y, x] for image, (x, y) in zip(images, at.tolist())])
        assert (drawn == torch.tensor(colour)).all(1).float().mean() > 0.8


def test_a_heat_map_says_where_its_joint_is() -> None:
    from pose import where

    heat = torch.full((1, 2, 16, 16), -1e4)
    heat[0, 0, 3, 12] = heat[0, 1, 0, 0] = 1e4
    torch.testing.assert_close(where(heat), torch.tensor([[[12.5 / 16, 3.5 / 16], [0.5 / 16, 0.5 / 16]]]))


def test_half_of_the_patches_of_a_figure_run() -> None:
    from pose import Light, OnLimbs, Pose, figures

    torch.manual_seed(0)
    model, (images, _) = Pose().eval(), figures(2, torch.Generator().manual_seed(0))
    mctf_compile.attach(model, images, method="select", score=OnLimbs(Light().eval()))
    options = {"method": "select", "keep_ratio": 0.5}
    (block,) = mctf_compile.trace(model, images, **options).blocks
    assert (~block.dropped).sum(1).tolist() == [32, 32]
    assert torch.equal(~block.dropped, torch.zeros(2, 64, dtype=torch.bool).scatter(1, _highest(model, images), True))


def _highest(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The 32 patches of each image with the highest scores; of equal ones the first."""
    scores = model.mctf_select["0"].score(images)
    return scores.argsort(dim=1, descending=True, stable=True)[:, :32]
