"""The properties that every rewrite must have, over models and options that Hypothesis makes up."""

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mctf_compile.testing import Recorder, TinyViT, VitSpec, assert_rewrite_sound, repeated_patches
from mctf_compile.testing.soundness import ONLY_SIMILARITY
from mctf_compile.testing.strategies import fusion_options, vit_specs

QUICK = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)


def build(spec: VitSpec, seed: int) -> TinyViT:
    torch.manual_seed(seed)
    return TinyViT(spec).eval()


def kinds_of(images: torch.Tensor, spec: VitSpec) -> torch.Tensor:
    """[B, N]: a number for every token, equal for exact duplicates; special tokens have their own."""
    patches = torch.nn.functional.unfold(images, 4, stride=4).transpose(1, 2)
    same = (patches[:, :, None] == patches[:, None]).all(-1)
    body = same.int().argmax(-1)
    count = spec.prefix + spec.suffix
    own = torch.arange(count) + body.shape[1]
    own = own.expand(len(images), -1)
    return torch.cat([own[:, : spec.prefix], body, own[:, spec.prefix :]], 1)


def only_duplicates_fused(index: torch.Tensor, kinds: torch.Tensor) -> bool:
    for row, kind in zip(index, kinds):
        for group in row.unique():
            if len(kind[row == group].unique()) > 1:
                return False
    return True


# A detour to the grid gives the original tokens back; the fuzzer has those too.
UNBROKEN = ("none", "linear_attention", "cross_covariance")
WEIGHTED = fusion_options(pooling=("attention", "size"), spans=("rest",))


@QUICK
@given(spec=vit_specs(extras=UNBROKEN), options=WEIGHTED, kinds=st.integers(1, 2), seed=st.integers(0, 99))
def test_fusing_exact_duplicates_changes_nothing(spec, options, kinds, seed):
    model, images = build(spec, seed), repeated_patches(2, spec.grid, kinds, seed)
    recorder = Recorder({**options, **ONLY_SIMILARITY})
    with torch.no_grad():
        dense, fused = model(images), recorder.run(model, images)
    index = recorder.index()
    assume(index is not None and only_duplicates_fused(index, kinds_of(images, spec)))
    torch.testing.assert_close(fused, dense, atol=1e-4, rtol=1e-4)
    assert recorder.reports[0].unmerged == []


@QUICK
@given(
    spec=vit_specs(position=True, extras=UNBROKEN),
    options=fusion_options(spans=("rest",)),
    batch=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_outputs_keep_their_contract_and_sizes_add_up(spec, options, batch, seed):
    model = build(spec, seed)
    images = torch.randn(batch, 3, 4 * spec.grid, 4 * spec.grid, generator=torch.Generator().manual_seed(seed))
    recorder = Recorder(options)
    with torch.no_grad():
        dense, fused = model(images), recorder.run(model, images)
    assert (fused.shape, fused.dtype, fused.device) == (dense.shape, dense.dtype, dense.device)
    total = spec.prefix + spec.grid**2 + spec.suffix
    left = total
    for (index, _, size), block in zip(recorder.groups, [b for b in recorder.reports[0].blocks if b.removed]):
        assert (index.shape[1], size.shape[1]) == (block.tokens_in, block.tokens_out) == (left, left - block.removed)
        assert size.sum(1).tolist() == [total] * batch
        left -= block.removed


@pytest.mark.parametrize("spelling", ["sdpa", "softmax", "einsum", "flat", "separate", "mha"])
@pytest.mark.parametrize("attention", ["approx", "exact", "current"])
def test_every_spelling_of_attention_gives_the_same_numbers(spelling, attention):
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    options = {"r": 3, "attention": attention, "min_tokens": 1}
    reference, model = build(VitSpec(), 0), build(VitSpec(spelling=spelling), 0)
    if spelling in ("softmax", "einsum", "flat"):
        model.load_state_dict(reference.state_dict())
    with torch.no_grad():
        report = assert_rewrite_sound(model, images, **options)
        if spelling in ("softmax", "einsum", "flat"):
            expected = Recorder(options).run(reference, images)
            torch.testing.assert_close(Recorder(options).run(model, images), expected, atol=1e-5, rtol=1e-5)
    assert [b.tokens_out for b in report.blocks] == [17, 14, 11]
    assert report.unmerged == []


def test_maxima_pool_the_map_alike_in_every_spelling():
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    options = {"r": 3, "pooling": "max", "min_tokens": 1}
    reference, model = build(VitSpec(), 0), build(VitSpec(spelling="softmax"), 0)
    model.load_state_dict(reference.state_dict())
    with torch.no_grad():
        expected = Recorder(options).run(reference, images)
        torch.testing.assert_close(Recorder(options).run(model, images), expected, atol=1e-5, rtol=1e-5)


def test_maxima_of_talking_heads_count_every_copy():
    """Talking heads leave no weights that add up, so their columns are multiplied by sizes before they are summed."""
    model = build(VitSpec(heads=1, head_dim=4, grid=3, prefix=0, spelling="talking", head="mean"), 0)
    with torch.no_grad():
        assert_rewrite_sound(
            model, *model.example(1, 0), duplicates=True, r=1, pooling="max", min_tokens=1, **ONLY_SIMILARITY
        )


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_r_0_is_the_inner_compilers_own_result(inner):
    model, images = build(VitSpec(depth=2), 0), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch._dynamo.reset()
        dense = torch.compile(model, backend=inner)(images)
        torch._dynamo.reset()
        assert torch.equal(torch.compile(model, backend="mctf", options={"r": 0, "inner": inner})(images), dense)
