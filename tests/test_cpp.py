"""The C++ kernels against the plain references in float64, and whole models on them."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from budgets import some_codes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mctf_compile  # noqa: F401  registers the backend and torch.ops.mctf
from mctf_compile import FusionConfig, rewrite
from mctf_compile.kernels import cpp
from mctf_compile.kernels.ahead import reference as ahead_reference
from mctf_compile.kernels.attention import aten
from mctf_compile.kernels.attention import reference as attention_reference
from mctf_compile.kernels.library import sources_digest
from mctf_compile.kernels.matching import reference as matching_reference
from mctf_compile.kernels.pooling import reference as pooling_reference
from mctf_compile.kernels.shift import reference as shift_reference

ops = torch.ops.mctf
examples = settings(max_examples=60, deadline=None, derandomize=True)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
# Of a head: less than a vector, a whole one, some and a part; a ViT's.
WIDTHS = [3, 16, 40, 64]
# What is added to the logits, by its shape: nothing, one for all images, for all heads, for all queries.
BIASES = [None, (1, 3, 1, 1), (2, 1, 1, 1), (1, 1)]


@pytest.fixture(autouse=True, scope="module")
def built():
    assert cpp.problem() is None
    with torch.no_grad():
        yield


@pytest.fixture(params=[1, 3], ids=["1-thread", "3-threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def positive(*shape: int, seed: int = 0) -> Tensor:
    return 0.1 + torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def qkv(nq: int, nk: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k and v as views of tensors that lie token by token."""
    counts = (nq, nk, nk)
    return [randn(2, n, 3, width, seed=i, dtype=dtype).transpose(1, 2) for i, n in enumerate(counts)]


def bias_of(shape: tuple[int, ...] | None, nq: int, nk: int) -> Tensor | None:
    """One that masks some keys, and for one query all of them."""
    if shape is None:
        return None
    bias = randn(*shape[:-2], *((nq, nk) if shape[-1] == 1 and len(shape) == 4 else (1, nk)), seed=9)
    bias = bias.masked_fill(randn(*bias.shape, seed=10) > 1, float("-inf"))
    bias[..., 0] = 0
    if bias.shape[-2] == nq:
        bias[..., nq // 2, :] = float("-inf")
    return bias


def error(actual: Tensor, exact: Tensor) -> float:
    return (actual.double() - exact).abs().max().item()


def no_worse(actual: Tensor, plain: Tensor, exact: Tensor) -> None:
    """At most three times the error of plain PyTorch in the same dtype, or a few roundings of the largest value.

    A kernel adds up in order, a matrix product of a library in blocks; vectors half as wide add up twice as many terms.
    """
    assert actual.shape == exact.shape and actual.isfinite().all()
    eps = torch.finfo(actual.dtype).eps
    roundings = 4 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
    assert error(actual, exact) <= max(3 * error(plain, exact), roundings * eps * exact.abs().max().item())


def probabilities(*operands) -> Tensor:
    """In float64, with zeros for a query that is masked out as a whole."""
    return attention_reference.probabilities(*operands).nan_to_num(0.0)


@dtypes
@pytest.mark.parametrize("bias", BIASES, ids=str)
@pytest.mark.parametrize(("nq", "nk"), [(1, 1), (5, 70), (37, 37), (197, 197)])
@pytest.mark.parametrize("width", WIDTHS)
def test_attention_is_the_reference(width, nq, nk, bias, dtype, threads):
    q, k, v = qkv(nq, nk, width, dtype)
    log_size, scale, bias = positive(2, nk).log(), width**-0.5, bias_of(bias, nq, nk)
    exact = probabilities(q, k, log_size, bias, scale) @ v.double()
    plain = aten.attention(q, k, v, log_size, bias, scale, 0.0).nan_to_num(0.0)
    no_worse(ops.attention_cpp(q, k, v, log_size, bias, scale), plain, exact)


@dtypes
@pytest.mark.parametrize("bias", BIASES, ids=str)
@pytest.mark.parametrize(("n", "r"), [(2, 0), (9, 4), (37, 5), (197, 16)])
@pytest.mark.parametrize("width", WIDTHS)
def test_ahead_is_the_reference(width, n, r, bias, dtype, threads):
    """With none of the map stored, with a part, and with all of it."""
    q, k, _ = qkv(n, n, width, dtype)
    log_size, scale, bias = positive(2, n).log(), width**-0.5, bias_of(bias, n, n)
    matching = matching_reference.match(randn(2, n, 6), None, torch.ones(2, n), r, 1, 0, 1.0, 0.0, 0.0, True)
    index, weight, _ = pooling_reference.group(positive(2, n, seed=1), torch.ones(2, n), *matching)
    v, weight = randn(2, n - r, 3, width, seed=3, dtype=dtype).transpose(1, 2), weight.float()
    exact = probabilities(q, k, log_size, bias, scale)
    received, weights, norm = ops.importance(q, k, log_size, bias, scale)
    plain = ops.ahead(weights, norm, v, index, weight, *matching, 0.0)
    for stored in (0, n // 3, n):
        importance, lse, rows = ops.importance_cpp(q, k, log_size, bias, scale, stored * n + n // 2)
        no_worse(importance, received, exact.mean((1, 2)))
        assert rows.shape == (2, 3, stored, n)
        if stored:
            no_worse(rows, (weights * norm)[:, :, :stored], exact[:, :, :stored])
        out = ops.ahead_cpp(q, k, v, log_size, bias, scale, lse, rows, index, weight)
        no_worse(out, plain, ahead_reference.ahead(exact, v.double(), weight.double(), *matching))
    assert torch.equal(ops.ahead_cpp(None, None, v, None, None, scale, lse, rows, index, weight), out)


def test_a_query_that_is_masked_out_attends_to_nothing():
    q, k, v = qkv(6, 6, 8, torch.float32)
    bias = torch.zeros(6, 6)
    bias[2] = float("-inf")
    out = ops.attention_cpp(q, k, v, None, bias, 1.0)
    assert (out[:, :, 2] == 0).all() and (out[:, :, [0, 1, 3, 4, 5]] != 0).all()
    # The lowest finite number masks nothing where it is all there is, as for the dense model.
    bias[2] = torch.finfo(torch.float32).min
    torch.testing.assert_close(ops.attention_cpp(q, k, v, None, bias, 1.0)[:, :, 2], v.mean(2))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_attention_hides_no_nan(value):
    q, k, v = qkv(9, 9, 8, torch.float32)
    q[0, 1, 4, 2] = value
    out = ops.attention_cpp(q, k, v, None, None, 1.0)
    assert out[0, 1, 4].isnan().all() and out.isnan().sum() == 8


def test_strides_do_not_matter():
    q, k, v = qkv(20, 20, 8, torch.float32)
    operands = [x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for x in (q, k, v)]
    log_size = positive(20, 2).t()
    assert operands[0].stride(3) != 1
    expected = ops.attention_cpp(q, k, v, log_size.contiguous(), None, 0.3)
    assert torch.equal(ops.attention_cpp(*operands, log_size, None, 0.3), expected)


def test_results_do_not_change_from_run_to_run(threads):
    q, k, _ = qkv(197, 197, 64, torch.float32)
    first, *others = (
        [
            *ops.importance_cpp(q, k, None, None, 0.125, 50 * 197),
            *ops.match_cpp(randn(1, 197, 48), positive(1, 197), torch.ones(1, 197), 157, 1, 0, 1.0, 20.0, 40.0, True),
        ]
        for _ in range(4)
    )
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))


@st.composite
def matchings(draw: st.DrawFn) -> tuple:
    """n, r, lead, tail, the temperatures, and whether both sides leave."""
    n = draw(st.integers(1, 80))
    lead = draw(st.integers(0, min(3, n)))
    tail = draw(st.integers(0, min(2, n - lead)))
    r = draw(st.integers(0, (n - lead - tail) // 2))
    taus = tuple(draw(st.sampled_from(t)) for t in ((0.0, 0.5, 1.0), (0.0, 1.0, 20.0), (0.0, 1.0, 40.0)))
    return n, r, lead, tail, taus, draw(st.booleans())


def same_matching(x: Tensor, importance: Tensor | None, size: Tensor, r, lead, tail, taus, bidirectional) -> None:
    actual = ops.match_cpp(x, importance, size, x.shape[1] - r, lead, tail, *taus, bidirectional)
    wide = None if importance is None else importance.double()
    exact = matching_reference.match(x.double(), wide, size.double(), r, lead, tail, *taus, bidirectional)
    for name, a, e in zip(("keep", "gone", "into"), actual, exact):
        assert a.tolist() == e.tolist(), name


@examples
@given(problem=matchings(), informed=st.booleans(), seed=st.integers(0, 2**20), half=st.booleans())
def test_match_is_the_reference(problem, informed, seed, half):
    n, *rest = problem
    x = randn(2, n, 21, seed=seed, dtype=torch.bfloat16 if half else torch.float32)
    importance = positive(2, n, seed=seed + 1) if informed else None
    same_matching(x, importance, 1 + 3 * positive(2, n, seed=seed + 2), *rest)


# Scores of these tokens are exact in every order of summation: the cosines are -1, 0 or 1.
@examples
@given(problem=matchings(), data=st.data())
def test_match_breaks_ties_to_the_lower_position(problem, data):
    n, r, lead, tail, taus, bidirectional = problem
    taus = tuple(min(1.0, round(tau)) for tau in taus)
    alphabet = torch.tensor([[0, 0, 0], [1, 0, 0], [-1, 0, 0], [4, 0, 0], [0, 2, 0], [0, 0, -0.5]])
    x = alphabet[data.draw(st.lists(st.integers(0, 5), min_size=n, max_size=n))].expand(2, n, 3)
    powers = st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=n, max_size=n)
    importance, size = (torch.tensor(data.draw(powers)).expand(2, n) for _ in range(2))
    same_matching(x, importance, size, r, lead, tail, taus, bidirectional)


def test_match_of_a_nan_is_that_of_aten():
    x = randn(2, 40, 24)
    x[0, 7] = float("nan")
    operands, others = (x, positive(2, 40), torch.ones(2, 40)), (1, 0, 1.0, 20.0, 40.0, True)
    pairs = zip(ops.match_cpp(*operands, 28, *others), ops.match(*operands, 12, *others))
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(("n", "lead", "tail", "r"), [(9, 0, 0, 5), (9, 5, 2, 2), (9, 0, 0, -1)])
def test_match_refuses_r_out_of_range(n, lead, tail, r):
    with pytest.raises(RuntimeError, match=f"r={r} of {n} tokens is out of range"):
        ops.match_cpp(randn(2, n, 4), None, torch.ones(2, n), n - r, lead, tail, 1.0, 20.0, 40.0, True)


def groups_of(n: int, r: int, seed: int = 0) -> list[Tensor]:
    """keep, gone and into of two images, in any order; several may go into one token."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(n, generator=generator) for _ in range(2)])
    return [order[:, r:], order[:, :r], torch.randint(n - r, (2, r), generator=generator)]


@pytest.mark.parametrize(("n", "r"), [(1, 0), (9, 4), (37, 30), (197, 16)])
def test_group_is_the_reference(n, r):
    raw, size = positive(n, 2, seed=1).T, 1 + 3 * positive(2, n, seed=2)
    # A group whose attention underflows has a mean nevertheless.
    raw[0, : n // 3] = 0
    index, weight, sums = ops.group_cpp(raw, size, *groups_of(n, r))
    exact = pooling_reference.group(raw, size, *groups_of(n, r))
    assert torch.equal(index, exact[0])
    torch.testing.assert_close((weight, sums), exact[1:], rtol=1e-6, atol=0)


@pytest.mark.parametrize("leading", [(2,), (2, 3), (2, 1)], ids=str)
@pytest.mark.parametrize("channels", [3, 16, 384])
@pytest.mark.parametrize(("n", "r"), [(1, 0), (9, 4), (37, 30), (197, 16)])
@dtypes
def test_pool_is_the_reference(n, r, channels, leading, dtype, threads):
    groups, dim = groups_of(n, r), len(leading)
    _, weight, _ = pooling_reference.group(positive(2, n, seed=1), torch.ones(2, n), *groups)
    x = randn(*leading, channels, n, seed=2, dtype=dtype).transpose(-1, -2)
    pooled = ops.pool_cpp(x, weight, *groups, dim)
    exact = pooling_reference.pool(x.double(), weight, *groups, dim)
    assert pooled.dtype is dtype and pooled.is_contiguous()
    no_worse(pooled, ops.pool(x, weight, *groups, dim), exact)


def test_pooling_hides_no_nan():
    x, raw, groups = randn(2, 9, 5), positive(2, 9), groups_of(9, 4)
    x[0, groups[1][0, 0]] = float("nan")
    raw[1, groups[0][1, 0]] = float("nan")
    _, weight, _ = ops.group_cpp(raw, torch.ones(2, 9), *groups)
    assert torch.equal(weight.isnan(), ops.group(raw, torch.ones(2, 9), *groups)[1].isnan())
    pooled = ops.pool_cpp(x, weight, *groups, 1)
    assert torch.equal(pooled.isnan(), ops.pool(x, weight, *groups, 1).isnan()) and pooled.isnan().any()


@pytest.mark.parametrize(("which", "position"), [(0, 9), (0, -1), (1, 9), (2, 5)])
def test_positions_that_do_not_exist_are_refused(which, position):
    groups = groups_of(9, 4)
    groups[which] = groups[which].clone()
    groups[which][1, 2] = position
    for call in (
        lambda: ops.group_cpp(positive(2, 9), torch.ones(2, 9), *groups),
        lambda: ops.pool_cpp(randn(2, 9, 5), torch.ones(2, 9), *groups, 1),
    ):
        with pytest.raises(RuntimeError, match=f"a matching has position {position} of {5 if which == 2 else 9}"):
            call()


def test_a_matching_of_other_tokens_is_refused():
    with pytest.raises(RuntimeError, match="pool: weights of 2 x 9 tokens for 2 x 8"):
        ops.pool_cpp(randn(2, 8, 5), torch.ones(2, 9), *groups_of(9, 4), 1)
    with pytest.raises(RuntimeError, match="a matching of 2 images for 1"):
        ops.group_cpp(positive(1, 9), torch.ones(1, 9), *groups_of(9, 4))


def test_rows_of_a_map_that_nothing_gives_are_refused():
    q, k, v = qkv(9, 9, 8, torch.float32)
    _, lse, rows = ops.importance_cpp(q, k, None, None, 1.0, 4 * 9)
    index, weight = torch.zeros(2, 9, dtype=torch.long), torch.ones(2, 9)
    with pytest.raises(RuntimeError, match="of the map of 9 tokens there are 4 rows, and neither q nor k"):
        ops.ahead_cpp(None, None, v, None, None, 1.0, lse, rows, index, weight)


def test_shapes_are_declared_as_they_are():
    q, k, v = qkv(37, 37, 8, torch.float32)
    lse, rows = torch.zeros(2, 3, 37), torch.zeros(2, 3, 20, 37)
    index, weight = torch.zeros(2, 37, dtype=torch.long), torch.ones(2, 37)
    calls = {
        ops.attention_cpp: (q, k, v, None, None, 1.0),
        ops.importance_cpp: (q, k, None, None, 1.0, 20 * 37),
        ops.ahead_cpp: (q, k, v, None, None, 1.0, lse, rows, index, weight),
        ops.match_cpp: (randn(2, 37, 8), None, torch.ones(2, 37), 28, 1, 0, 1.0, 1.0, 1.0, True),
        ops.group_cpp: (positive(2, 37), torch.ones(2, 37), *groups_of(37, 9)),
        ops.pool_cpp: (randn(2, 37, 8), torch.ones(2, 37), *groups_of(37, 9), 1),
    }
    for operator, operands in calls.items():
        torch.library.opcheck(operator.default, operands, test_utils=("test_schema", "test_faketensor"))


def test_a_gradient_is_refused():
    q, k, v = (x.requires_grad_() for x in qkv(5, 5, 8, torch.float32))
    with torch.enable_grad():
        out = ops.attention_cpp(q, k, v, None, None, 1.0)
        with pytest.raises(RuntimeError, match="have no gradient: compile the model where gradients are recorded"):
            out.sum().backward()


def channel_by_channel(x: Tensor, codes: Tensor, bias: Tensor | None) -> Tensor:
    """Products with powers of two are exact: each sum is rounded after each channel, in their order."""
    total, weight = torch.zeros(()), shift_reference.powers(codes, torch.float32)
    for c in range(x.shape[-1]):
        total = total + x[..., c : c + 1] * weight[:, c]
    return total if bias is None else total + bias


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (7, 30), (2, 197, 64), (2, 3, 5, 33), (3, 0, 8)], ids=str)
@pytest.mark.parametrize("outputs", [1, 24, 100])
def test_shift_layers_are_the_formula_bit_for_bit(shape, outputs, biased, threads):
    x, codes = randn(*shape), some_codes(outputs, shape[-1])
    bias = randn(outputs, seed=1) if biased else None
    assert torch.equal(ops.shift_linear_cpp(x, codes, bias), channel_by_channel(x, codes, bias))
    # Rows and channels that are not next to one another, codes in rows of a longer tensor.
    apart = torch.full((*shape[:-1], 2 * shape[-1]), float("nan"))[..., ::2].copy_(x)
    parted = torch.cat([codes, codes], 1)[:, : shape[-1]]
    assert torch.equal(ops.shift_linear_cpp(apart, parted, bias), channel_by_channel(x, codes, bias))
    by_channel = torch.cat([codes, codes]).t().contiguous().t()[outputs:]
    assert torch.equal(ops.shift_linear_cpp(x, by_channel, bias), channel_by_channel(x, codes, bias))


def test_shift_layers_in_bfloat16_are_rounded_once(threads):
    x, codes, bias = (
        t.bfloat16() if t.is_floating_point() else t for t in (randn(50, 64), some_codes(30, 64), randn(30))
    )
    exact = channel_by_channel(x.float(), codes, bias.float())
    assert torch.equal(ops.shift_linear_cpp(x, codes, bias), exact.bfloat16())


def test_shift_layers_refuse_other_channels():
    with pytest.raises(RuntimeError, match="weights of 5 channels for 4"):
        ops.shift_linear_cpp(randn(2, 4), some_codes(3, 5), None)


def vit(**options) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 96, "patch_size": 8, "depth": 3, "embed_dim": 24, "num_heads": 3, **options}
    return timm.create_model("vit_tiny_patch16_224", **sizes).eval()


@pytest.mark.parametrize("method", ["mctf", "tome"])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_a_model_is_the_one_on_aten(inner, method):
    """At 145 tokens and heads of 8 channels: 24 rows of the first map are stored, and the others computed again."""
    model, x = vit(), randn(2, 3, 96, 96)
    torch._dynamo.reset()
    on_cpp, on_aten = (
        torch.compile(
            copy.deepcopy(model),
            backend="mctf",
            options={"method": method, "r": 20, "kernels": kernels, "inner": inner, "strict": True},
        )(x)
        for kernels in ("cpp", "aten")
    )
    torch.testing.assert_close(on_cpp, on_aten, rtol=1e-4, atol=1e-5)


def test_later_maps_have_the_room_of_the_longest():
    """Maps of 145 and 95 tokens are stored in part, and one of 60, for which q and k are let go of then, whole."""
    model, x, r, graphs = vit(depth=4), randn(2, 3, 96, 96), [0, 50, 35, 8], []

    def backend(gm, inputs):
        graphs.append(rewrite(gm, inputs, FusionConfig(r=r, kernels="cpp"))[0])
        return graphs[0].forward

    torch._dynamo.reset()
    fused = torch.compile(model, backend=backend)(x)
    calls = graphs[0].graph.find_nodes(op="call_function", target=ops.ahead_cpp.default)
    maps = [(tuple(n.args[7].meta["val"].shape[2:]), n.args[0] is None) for n in calls]
    room = 3 * 8 * 145
    assert maps == [((24, 145), False), ((room // 95, 95), False), ((60, 60), True)]
    torch._dynamo.reset()
    on_aten = torch.compile(model, backend="mctf", options={"r": r, "kernels": "aten", "inner": "eager"})(x)
    torch.testing.assert_close(fused, on_aten, rtol=1e-4, atol=1e-5)


def test_one_model_is_compiled_for_inference_and_for_training():
    model, x = vit(), randn(2, 3, 96, 96)
    compiled = torch.compile(model, backend="mctf", options={"r": 20, "inner": "aot_eager", "kernels": "cpp"})
    without = compiled(x)
    with torch.enable_grad():
        recorded = compiled(x)
        recorded.sum().backward()
    torch.testing.assert_close(recorded.detach(), without, rtol=1e-4, atol=1e-5)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_what_does_not_build_is_told_by_its_first_line(monkeypatch):
    def load(*_, **__):
        raise RuntimeError("g++ says no\nand more")

    monkeypatch.setattr("torch._inductor.codecache.CppCodeCache.load", load)
    cpp.building.cache_clear()
    try:
        assert cpp.problem() == "the C++ kernels do not build: g++ says no"
    finally:
        cpp.building.cache_clear()


def test_what_was_compiled_of_other_sources_is_not_used(monkeypatch):
    """An operator's name alone does not say what it opens up into."""
    tags = []
    monkeypatch.setattr(
        "torch._inductor.compile_fx.compile_fx",
        lambda gm, inputs, **_: tags.append(torch.compiler.config.cache_key_tag) or gm.forward,
    )
    for _ in range(2):
        torch._dynamo.reset()
        torch.compile(vit(depth=2), backend="mctf", options={"r": 4})(randn(1, 3, 96, 96))
        monkeypatch.setattr("mctf_compile.inner.lowering.sources_digest", lambda: "other")
    assert len(set(tags)) == 2 and sources_digest() in tags[0] and "other" in tags[-1]
    assert torch.compiler.config.cache_key_tag == ""
