"""``method="select"``: patches that are chosen from outside run through the model as if there were no others."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mctf_compile
from mctf_compile import ConfigError, pose
from mctf_compile.methods.select import GivenScores, by_patch
from mctf_compile.testing import TinyViT, VitSpec

GRID = (16, 12)


def compiled(model: nn.Module, **options: Any) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(
        model, backend="mctf", options={"method": "select", "inner": "eager", "strict": True, **options}
    )


def highest(scores: Tensor, keep_ratio: float) -> Tensor:
    """int64 [B, M], the patches that stay, by position; of equal scores the first."""
    count = math.ceil(keep_ratio * scores.shape[1])
    return scores.argsort(dim=1, descending=True, stable=True)[:, :count].sort(1).values


def of(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def selected(model: TinyViT, images: Tensor, keep: Tensor) -> Tensor:
    """What a TinyViT computes of some of its patches, written out; dense outputs are 0 for the others."""
    spec, ends = model.spec, [t.expand(len(images), -1, -1) for t in (model.prefix, model.suffix)]
    x = torch.cat([ends[0], model.embed(images).flatten(2).mT, ends[1]], 1)
    if model.position is not None:
        x = x + model.position
    n, lead = x.shape[1], spec.prefix
    first = torch.arange(lead).expand(len(x), -1)
    last = torch.arange(n - spec.suffix, n).expand(len(x), -1)
    tokens = torch.cat([first, keep + lead, last], 1)
    y = of(x, tokens)
    for block in model.blocks:
        y = block(y, None)
    y = model.norm(y)
    if spec.head == "dense":
        return torch.zeros_like(x).scatter(1, tokens[..., None].expand_as(y), y)
    return model._read(y, None)


@settings(max_examples=15, deadline=None)
@given(
    st.builds(
        VitSpec,
        prefix=st.integers(0, 2),
        suffix=st.integers(0, 1),
        grid=st.integers(2, 5),
        depth=st.integers(1, 2),
        spelling=st.sampled_from(("sdpa", "softmax", "separate", "flat")),
        norm=st.sampled_from(("pre", "parallel")),
        mlp=st.sampled_from(("gelu", "swiglu")),
        head=st.sampled_from(("mean", "max", "dense")),
        position=st.booleans(),
    ),
    st.sampled_from((0.2, 0.5, 0.9)),
    st.integers(0, 99),
)
def test_the_model_runs_on_the_patches_that_stay(spec: VitSpec, keep_ratio: float, seed: int) -> None:
    torch.manual_seed(seed)
    model = TinyViT(spec).eval()
    images, scores = torch.randn(2, 3, 4 * spec.grid, 4 * spec.grid), torch.randn(2, spec.grid**2)
    keep = highest(scores, keep_ratio)
    expected = model(images) if keep.shape[1] == spec.grid**2 else selected(model, images, keep)
    mctf_compile.attach(model, images, method="select")
    with torch.no_grad():
        fast = compiled(model, keep_ratio=keep_ratio, strict=keep.shape[1] < spec.grid**2)
        torch.testing.assert_close(fast(images, patch_scores=scores), expected, rtol=1e-4, atol=1e-5)


def vitpose(depth: int = 2) -> nn.Module:
    from transformers import VitPoseBackboneConfig, VitPoseConfig, VitPoseForPoseEstimation

    torch.manual_seed(0)
    backbone = VitPoseBackboneConfig(
        hidden_size=32, num_hidden_layers=depth, num_attention_heads=2, num_experts=1, out_indices=[depth]
    )
    return VitPoseForPoseEstimation(VitPoseConfig(backbone_config=backbone, num_labels=17)).eval()


def test_vitpose_gets_zeros_on_its_grid() -> None:
    """256 x 192 pixels, 16 x 12 patches, a patch embedding with padding, and a head of heat maps."""
    model, images, joints = vitpose(), torch.randn(2, 3, 256, 192), torch.rand(2, 17, 2)
    scores = pose.near_joints(joints, GRID)
    backbone, keep = model.backbone, highest(scores, 0.6)
    with torch.no_grad():
        x = backbone.embeddings(images)
        y = of(x, keep)
        for layer in backbone.encoder.layer:
            y = layer(y)
        grid = torch.zeros_like(x).scatter(1, keep[..., None].expand(-1, -1, 32), backbone.layernorm(y))
        expected = model.head(grid.mT.unflatten(2, GRID))
        mctf_compile.attach(model, images, method="select")
        heatmaps = compiled(model)(images, patch_scores=scores).heatmaps
    torch.testing.assert_close(heatmaps, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
def test_patches_that_leave_are_not_embedded(batch: int) -> None:
    """Multiply-accumulates of the embedding and of both blocks are those of the patches that stay."""
    model, images = vitpose(), torch.randn(batch, 3, 256, 192)
    dense = mctf_compile.explain(model, images).macs_before
    mctf_compile.attach(model, images, method="select")
    report = mctf_compile.explain(
        model, images, kwargs={"patch_scores": torch.randn(batch, 192)}, method="select", keep_ratio=0.5
    )
    assert (report.blocks[0].tokens_in, report.blocks[0].tokens_out) == (192, 96)

    def work(n: int, c: int = 32) -> int:
        return n * 768 * c + 2 * (12 * n * c * c + 2 * n * n * c)

    assert report.macs_before == dense
    assert dense - report.macs_after == batch * (work(192) - work(96))


def test_all_are_embedded_where_joints_are_to_choose() -> None:
    torch.manual_seed(0)
    model, images = TinyViT(VitSpec()).eval(), torch.randn(1, 3, 16, 16)
    mctf_compile.attach(model, images, method="select", score="joints", joints=3)
    report = mctf_compile.explain(model, images, method="select", score="joints", keep_ratio=0.5)
    embedded, head = 16 * 48 * 16, 16 * 5
    blocks = sum(work[1] for work in report.macs_by_block if work is not None)
    assert report.macs_after == embedded + blocks + head


class OnGrid(nn.Module):
    """A convolution over the patches of a TinyViT: an operator that wants all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = TinyViT(VitSpec(position=True, prefix=0, head="dense")), nn.Conv2d(16, 5, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.tokens(images).mT.unflatten(2, (4, 4)))


@pytest.mark.parametrize("made", [lambda: TinyViT(VitSpec(position=True)), OnGrid], ids=["class", "grid"])
def test_joints_learn_and_choose(made: Callable[[], nn.Module]) -> None:
    """Masked in training as they are gone afterwards; and a gradient reaches the learned tokens."""
    torch.manual_seed(0)
    model, images = made(), torch.randn(2, 3, 16, 16)
    dense = model(images)
    mctf_compile.attach(model, images, method="select", score="joints", joints=3)
    torch.testing.assert_close(model(images), dense)
    options = {"score": "joints", "joints": 3, "keep_ratio": 0.4}
    learned = dict(model.mctf_select.named_parameters())
    assert learned["0.tokens"].shape == (3, 16)
    trained = compiled(model.train(), **options)(images)
    gradients = torch.autograd.grad(trained.square().sum(), list(learned.values()))
    assert all(g.isfinite().all() for g in gradients)
    assert gradients[list(learned).index("0.tokens")].abs().max() > 0
    with torch.no_grad():
        chosen = compiled(model.eval(), **options)(images)
    torch.testing.assert_close(trained, chosen, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(chosen, dense)


def test_scores_are_computed_of_the_images() -> None:
    """By a module, which is trained with the model's own parameters and saved with them."""
    torch.manual_seed(0)
    model, light, images = TinyViT(VitSpec(head="mean")).eval(), nn.Conv2d(3, 2, 4, 2), torch.randn(2, 3, 16, 16)
    by_hand = copy.deepcopy(model)
    mctf_compile.attach(by_hand, images, method="select")
    mctf_compile.attach(model, images, method="select", score=light)
    assert any(p is light.weight for p in model.parameters())
    assert "mctf_select.0.score.weight" in model.state_dict()
    with torch.no_grad():
        expected = compiled(by_hand)(images, patch_scores=light(images))
        torch.testing.assert_close(compiled(model)(images), expected)
        torch.testing.assert_close(compiled(copy.deepcopy(model))(images), expected)
    with pytest.raises(Exception, match="patch_scores was given, and score="):
        model(images, patch_scores=torch.randn(2, 16))


def test_a_model_is_what_it_was_without_the_backend_or_scores() -> None:
    torch.manual_seed(0)
    model, images = TinyViT(VitSpec()).eval(), torch.randn(2, 3, 16, 16)
    dense = model(images)
    mctf_compile.attach(model, images, method="select")
    assert torch.equal(model(images), dense)
    assert torch.equal(model(images, patch_scores=torch.randn(2, 16)), dense)
    with pytest.raises(ConfigError, match="with score='input', each call gives patch_scores="):
        mctf_compile.explain(model, images, method="select")


@pytest.mark.parametrize("given_back", ["zeros", "nearest"])
def test_what_patches_that_left_come_back_as(given_back: str) -> None:
    torch.manual_seed(0)
    model, images, scores = TinyViT(VitSpec(head="dense", depth=1)).eval(), torch.randn(1, 3, 16, 16), torch.rand(1, 16)
    entry = torch.cat([model.prefix, model.embed(images).flatten(2).mT], 1)
    mctf_compile.attach(model, images, method="select")
    with torch.no_grad():
        out = compiled(model, keep_ratio=0.3, given_back=given_back)(images, patch_scores=scores)[0, 1:]
    keep = highest(scores, 0.3)[0]
    similar = torch.cosine_similarity(entry[0, 1:, None], entry[0, None, 1:], dim=-1)[:, keep]
    for patch in set(range(16)) - set(keep.tolist()):
        expected = torch.zeros(16) if given_back == "zeros" else out[keep[similar[patch].argmax()]]
        assert torch.equal(out[patch], expected)
    assert (out[keep].abs().amax(1) > 0).all()


def test_a_trace_says_which_were_dropped() -> None:
    torch.manual_seed(0)
    model, images, scores = TinyViT(VitSpec()).eval(), torch.randn(1, 3, 16, 16), torch.rand(1, 16)
    mctf_compile.attach(model, images, method="select")
    (block,) = mctf_compile.trace(
        model, images, kwargs={"patch_scores": scores}, method="select", keep_ratio=0.25
    ).blocks
    kept = highest(scores, 0.25)[0] + 1
    assert block.dropped[0].nonzero().flatten().tolist() == sorted({*range(1, 17)} - {*kept.tolist()})


def test_scores_change_from_call_to_call_without_recompilation() -> None:
    torch.manual_seed(0)
    model, images = TinyViT(VitSpec(head="mean")).eval(), torch.randn(2, 3, 16, 16)
    mctf_compile.attach(model, images, method="select")
    fast, plain = compiled(model, keep_ratio=0.5), copy.deepcopy(model)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            scores = torch.rand(2, 16, generator=torch.Generator().manual_seed(seed))
            expected = selected(plain, images, highest(scores, 0.5))
            torch.testing.assert_close(fast(images, patch_scores=scores), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        (torch.arange(12.0)[None], torch.arange(12.0)),
        (torch.arange(12.0).view(1, 3, 4), torch.arange(12.0)),
        (torch.arange(12) > 5, (torch.arange(12) > 5).float()),
        # Two joints, and a map of twice the resolution.
        (
            torch.stack([torch.zeros(6, 8), torch.arange(48.0).view(6, 8)])[None],
            torch.tensor([9.0, 11, 13, 15, 25, 27, 29, 31, 41, 43, 45, 47]),
        ),
    ],
)
def test_scores_by_patch(scores: Tensor, expected: Tensor) -> None:
    assert torch.equal(by_patch(scores if scores.dim() > 1 else scores[None], 12)[0], expected)


@pytest.mark.parametrize("shape", [(1, 11), (1, 4, 4), (1, 2, 5, 5), (12,)])
def test_scores_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="do not fit 12 patches"):
        by_patch(torch.zeros(shape), 12)


def test_joints_give_scores_by_distance() -> None:
    torch.manual_seed(0)
    joints, visible = torch.rand(3, 4, 2), torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1], [1, 1, 1, 1]]).bool()
    scores = pose.near_joints(joints, GRID, visible)
    for b in range(3):
        seen = [(int(x * 12), int(y * 16)) for (x, y), v in zip(joints[b].tolist(), visible[b]) if v]
        for patch in range(192):
            row, column = divmod(patch, 12)
            assert scores[b, patch] == -min((column - x) ** 2 + (row - y) ** 2 for x, y in seen)
    # The last row and column are those of the far edge.
    edge = pose.near_joints(torch.ones(1, 1, 2), GRID)
    assert edge[0].argmax() == 191


@settings(max_examples=60, deadline=None)
@given(st.tuples(st.integers(0, 11), st.integers(0, 15)), st.tuples(st.integers(0, 11), st.integers(0, 15)))
def test_lines_are_those_of_bresenham(first: tuple[int, int], last: tuple[int, int]) -> None:
    """One patch for every step along the longer side, at most half a patch from the line."""
    ends = torch.tensor([[[(x + 0.5) / 12, (y + 0.5) / 16] for x, y in (first, last)]])
    scores = pose.on_limbs(ends, [(0, 1)], GRID)
    line = [divmod(patch, 12)[::-1] for patch in (scores[0] == 0).nonzero().flatten().tolist()]
    long = 0 if abs(last[0] - first[0]) >= abs(last[1] - first[1]) else 1
    start, end = sorted((first[long], last[long]))
    assert sorted(cell[long] for cell in line) == list(range(start, end + 1))
    for cell in line:
        along = Fraction(cell[long] - first[long], (last[long] - first[long]) or 1)
        exact = first[1 - long] + along * (last[1 - long] - first[1 - long])
        assert abs(cell[1 - long] - exact) <= Fraction(1, 2)


def test_a_limb_counts_where_both_of_its_joints_are_seen() -> None:
    joints = torch.tensor([[[0.1, 0.1], [0.9, 0.1], [0.9, 0.9]]])
    limbs = [(0, 1), (1, 2)]
    both = pose.on_limbs(joints, limbs, GRID)
    one = pose.on_limbs(joints, limbs, GRID, torch.tensor([[True, True, False]]))
    assert torch.equal(one, pose.on_limbs(joints[:, :2], [(0, 1)], GRID))
    assert (both == 0).sum() > (one == 0).sum()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda j: pose.near_joints(j + 1, GRID), r"joint 0 of image 0 is at \(1.5, 1.5\), outside the image"),
        (lambda j: pose.near_joints(j[0], GRID), "must be"),
        (
            lambda j: pose.near_joints(j, GRID, torch.zeros(2, 3, dtype=torch.bool)),
            "image 0 shows no joint: nothing says which of its patches matter",
        ),
        (lambda j: pose.on_limbs(j, [(0, 3)], GRID), "must be pairs of joints from 0 to 2"),
        (lambda j: pose.on_limbs(j, [], GRID), "must be pairs of joints"),
        (
            lambda j: pose.on_limbs(j, [(0, 1)], GRID, torch.tensor([[True, True, True], [False, True, True]])),
            "image 1 shows no limb",
        ),
    ],
)
def test_what_selects_nothing_is_refused(call: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        call(torch.full((2, 3, 2), 0.5))


def test_joints_outside_are_left_out_by_visible() -> None:
    joints = torch.tensor([[[0.2, 0.2], [1.7, -3.0]]])
    seen = pose.near_joints(joints, GRID, torch.tensor([[True, False]]))
    assert torch.equal(seen, pose.near_joints(joints[:, :1], GRID))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"score": "heat"}, "score='heat' must be 'input', 'joints', or a callable"),
        ({"keep_ratio": 0}, "keep_ratio=0 must be"),
        ({"given_back": "last"}, "is not one of 'zeros', 'nearest'"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        mctf_compile.FusionConfig("select", **options)


def test_one_compilation_serves_batches_of_any_size() -> None:
    """Each image by its own scores, also where Dynamo does not know that both have one batch."""
    torch.manual_seed(0)
    model = TinyViT(VitSpec(head="mean")).eval()
    plain, images, scores = copy.deepcopy(model), torch.randn(5, 3, 16, 16), torch.rand(5, 16)
    expected = selected(plain, images, highest(scores, 0.5))
    mctf_compile.attach(model, images, method="select")
    fast = compiled(model, keep_ratio=0.5)
    with torch.no_grad():
        # From the second one on the batch is symbolic.
        for batch in (2, 5, 3, 1, 4):
            out = fast(images[:batch], patch_scores=scores[:batch])
            torch.testing.assert_close(out, expected[:batch], rtol=1e-4, atol=1e-5)


class Wrapped(nn.Module):
    """For what passes on no arguments by name that a model does not declare."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, scores: Tensor) -> Tensor:
        return self.model(images, patch_scores=scores)


def test_an_exported_program_takes_scores() -> None:
    torch.manual_seed(0)
    model = TinyViT(VitSpec(head="mean")).eval()
    plain, images, scores = copy.deepcopy(model), torch.randn(3, 3, 16, 16), torch.rand(3, 16)
    mctf_compile.attach(model, images, method="select")
    with torch.no_grad():
        program = mctf_compile.export(Wrapped(model).eval(), (images, scores), method="select", keep_ratio=0.5)
        for batch in (3, 2):
            expected = selected(plain, images[:batch], highest(scores[:batch], 0.5))
            out = program.module()(images[:batch], scores[:batch])
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_scores_of_other_images_are_refused() -> None:
    torch.manual_seed(0)
    model, images = TinyViT(VitSpec()).eval(), torch.randn(2, 3, 16, 16)
    mctf_compile.attach(model, images, method="select")
    with pytest.raises(ConfigError, match="patch_scores are of 3 images, and the model was given 2"):
        model(images, patch_scores=torch.rand(3, 16))


def test_a_module_that_says_the_same_of_all_images_fuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GivenScores, "forward", lambda self, x: torch.arange(17.0)[None, :, None])
    torch.manual_seed(0)
    model, images = TinyViT(VitSpec()).eval(), torch.randn(2, 3, 16, 16)
    mctf_compile.attach(model, images, method="select")
    report = mctf_compile.explain(model, images, kwargs={"patch_scores": torch.rand(2, 16)}, method="select")
    assert "speaks of other images than those of this block" in str(report.blocks[0])


@pytest.mark.parametrize(("protected", "tokens"), [(0, 9), (1, 9), (3, 10)])
def test_protected_tokens_are_those_of_the_option(protected: int, tokens: int) -> None:
    """With 0 the class token competes, and patches are not made apart from it: all are embedded, and it fuses."""
    torch.manual_seed(0)
    model, images = TinyViT(VitSpec()).eval(), torch.randn(2, 3, 16, 16)
    entry = torch.cat([model.prefix.expand(2, -1, -1), model.embed(images).flatten(2).mT], 1)
    blocks, scores = copy.deepcopy(model.blocks), torch.rand(2, 16) + 1
    mctf_compile.attach(model, images, method="select")
    seen: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        compiled(model, keep_ratio=0.5, protected=protected)(images, patch_scores=scores)
        rest = torch.cat([torch.zeros(2, 1), scores], 1)[:, protected:].argsort(1, descending=True) + protected
        first = torch.arange(protected).expand(2, -1)
        y = of(entry, torch.cat([first, rest[:, : tokens - protected]], 1))
        for block in blocks:
            y = block(y, None)
    report = mctf_compile.explain(
        model, images, kwargs={"patch_scores": scores}, method="select", keep_ratio=0.5, protected=protected
    )
    assert report.blocks[0].tokens_out == tokens
    # Without protection the class token has the lowest score and leaves; as the report says, position 0 holds another.
    torch.testing.assert_close(seen[0], model.norm(y)[:, 0], rtol=1e-4, atol=1e-5)


def test_calls_from_several_threads_have_their_own_scores() -> None:
    torch.manual_seed(0)
    model, images = TinyViT(VitSpec(head="mean")).eval(), torch.randn(2, 3, 16, 16)
    plain, scores = copy.deepcopy(model), [torch.rand(2, 16) for _ in range(4)]
    expected = [selected(plain, images, highest(each, 0.5)) for each in scores]
    mctf_compile.attach(model, images, method="select")
    fast = compiled(Wrapped(model).eval(), keep_ratio=0.5)
    with torch.no_grad():
        fast(images, scores[0])

    def calls(number: int) -> float:
        with torch.no_grad():
            errors = [(fast(images, scores[number]) - expected[number]).abs().max().item() for _ in range(30)]
        return max(errors)

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(calls, range(4))) < 1e-4
