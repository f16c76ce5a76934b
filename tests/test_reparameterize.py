"""ShiftAddViT's attention and MLPs in the place of a model's own: operators, the transform, and tokens fused in it."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

import mctf_compile
from mctf_compile import ConfigError, FusionConfig, losses, rewrite, shiftadd
from mctf_compile.kernels.binary import reference as binary
from mctf_compile.kernels.neighbours import reference as neighbours
from mctf_compile.kernels.routed import reference as routed
from mctf_compile.models import LVViT
from mctf_compile.passes.rules import shiftadd as rules
from mctf_compile.passes.rules.base import RULES
from mctf_compile.shiftadd.shift import codes_of, powers_of_two
from mctf_compile.testing import TinyViT, VitSpec, assert_rewrite_sound
from mctf_compile.testing.fuzz import shiftadd_cases, with_shiftadd
from mctf_compile.testing.models import repeated_patches

ops = torch.ops.mctf
GRID, WIDTH, HEADS = 4, 16, 2
IMAGES = torch.randn(2, 3, 4 * GRID, 4 * GRID, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
CLOSE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 3e-2, "atol": 2e-2},
}
EXAMPLES = settings(max_examples=30, deadline=None, derandomize=True)
# Where an error is expected, that is not what tells of parts that stay as they are.
SHIFTADD = {"reparameterize": "shiftadd"}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sizes(*shape: int) -> Tensor:
    return torch.randint(1, 6, shape, generator=torch.Generator().manual_seed(5)).double()


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype = torch.float64) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), **CLOSE[dtype])


# The operators.


@EXAMPLES
@given(st.integers(1, 9), st.integers(1, 3), st.integers(2, 9), st.booleans(), st.sampled_from(DTYPES))
def test_binary_attention_is_its_map_times_the_values(n: int, h: int, d: int, sized: bool, dtype: torch.dtype) -> None:
    q, k, v = (randn(2, h, n, d, seed=i, dtype=dtype) for i in range(3))
    size = sizes(2, n).float() if sized else None
    found = ops.binary_attention(q, k, v) if size is None else ops.sized_binary_attention(q, k, v, size)
    assert found.dtype is dtype
    close(found, binary.binary_attention(q, k, v, size), dtype)


@EXAMPLES
@given(st.integers(1, 9), st.integers(1, 3), st.integers(2, 9), st.booleans(), st.booleans())
def test_binary_importance_is_the_mean_of_the_map(n: int, h: int, d: int, sized: bool, one: bool) -> None:
    q, k = randn(2, h, 1 if one else n, d), randn(2, h, n, d, seed=1)
    size = sizes(2, n) if sized else None
    found = ops.binary_importance(q, k, size)
    close(found, binary.binary_importance(q, k, size))
    if not one:
        close(found.sum(1), torch.ones(2))


def test_sizes_count_copies() -> None:
    """Attention over tokens with sizes is that over as many copies of each."""
    q, k, v = (randn(1, 2, 3, 4, seed=i) for i in range(3))
    copies = torch.tensor([0, 0, 0, 1, 2, 2])
    size = copies.bincount()[None].double()
    all_of_them = ops.binary_attention(q[:, :, copies], k[:, :, copies], v[:, :, copies])
    close(ops.sized_binary_attention(q, k, v, size)[:, :, copies], all_of_them)
    received = ops.binary_importance(q[:, :, copies], k[:, :, copies], None)
    # Each query counts once: a mean over fused tokens is another one, for queries of one kind the same.
    close(
        ops.binary_importance(q[:, :, :1], k, size)[:, copies] / size[:, copies],
        ops.binary_importance(q[:, :, :1], k[:, :, copies], None),
    )
    assert received.shape == (1, 6)


def straight_through(x: Tensor) -> Tensor:
    """Zeros and ones with the gradient of clamp(x / ‖x‖, 0, 1), as a function of autograd's own."""

    class Binary(torch.autograd.Function):
        @staticmethod
        def forward(ctx, unit: Tensor) -> Tensor:
            ctx.save_for_backward(unit)
            return (unit > unit.mean(-1, keepdim=True)).to(unit.dtype)

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            (unit,) = ctx.saved_tensors
            return grad * ((unit >= 0) & (unit <= 1))

    return Binary.apply(x / x.norm(dim=-1, keepdim=True))


def test_gradients_of_binary_attention_go_straight_through() -> None:
    given_ = [randn(2, 2, 5, 4, seed=i).requires_grad_() for i in range(3)]
    again = [x.detach().clone().requires_grad_() for x in given_]
    size, out = sizes(2, 5), randn(2, 2, 5, 4, seed=7)
    (ops.sized_binary_attention(*given_, size) * out).sum().backward()
    q, k, v = again
    y = v / 2 + straight_through(q) @ (straight_through(k).mT @ (v * size[:, None, :, None])) / math.pi
    (y / y.norm(dim=-1, keepdim=True) * out).sum().backward()
    for x, other in zip(given_, again):
        assert x.grad.abs().sum() > 0
        close(x.grad, other.grad)


@EXAMPLES
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2), st.integers(0, 2), st.sampled_from((1, 3, 5)))
def test_neighbours_are_added_up_on_the_grid(rows: int, columns: int, lead: int, tail: int, kernel: int) -> None:
    x, weight = randn(2, 3, lead + rows * columns + tail, 4), randn(12, 1, kernel, kernel, seed=1)
    found = ops.neighbours(x, weight, lead, rows, columns)
    close(found, neighbours.neighbours(x, weight, lead, rows, columns))
    ends = torch.cat([found[:, :, :lead], found[:, :, lead + rows * columns :]], 2)
    assert not ends.any()


@EXAMPLES
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 9), st.booleans(), st.sampled_from(DTYPES))
def test_each_token_takes_one_of_two_weights(n: int, o: int, seed: int, biased: bool, dtype: torch.dtype) -> None:
    x, weight, other = randn(2, n, 8, dtype=dtype), randn(o, 8, dtype=dtype), randn(o, 8, seed=1, dtype=dtype)
    bias = randn(o, seed=2, dtype=dtype) if biased else None
    second = torch.rand(2, n, generator=torch.Generator().manual_seed(seed)) > 0.5
    expected = routed.routed_linear(x, second, weight, bias, other, None)
    close(ops.routed_linear(x, second, weight, bias, other, None), expected, dtype)
    close(ops.dispatched_linear(x, second, weight, bias, other, None), expected, dtype)
    for everybody in (True, False):
        same = torch.full_like(second, everybody)
        found = ops.dispatched_linear(x, same, weight, bias, other, None)
        close(found, F.linear(x, other) if everybody else F.linear(x, weight, bias), dtype)


def test_shapes_alone_are_those_of_results() -> None:
    q = torch.empty(2, 3, 5, 4, device="meta")
    assert ops.binary_attention(q, q, q).shape == q.shape
    assert ops.binary_importance(q, q, None).shape == (2, 5)
    assert ops.neighbours(q, torch.empty(12, 1, 3, 3, device="meta"), 1, 2, 2).shape == q.shape


# The transform, against a model written out by hand.


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(self.norm1(x))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Vit(nn.Module):
    """A plain ViT with a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos = nn.Parameter(torch.randn(1, 1 + GRID * GRID, WIDTH))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, 5)

    def tokens(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2)
        return torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.pos

    def forward(self, images: Tensor) -> Tensor:
        x = self.tokens(images)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def by_hand(model: Vit, images: Tensor) -> Tensor:
    """ShiftAddViT's forward pass, from the formulas: token by token where it can be."""
    x = model.tokens(images)
    for block, parts in zip(model.blocks, model.mctf_shiftadd.values()):
        q, k, v = block.heads(block.norm1(x))
        q, k = straight_through(q), straight_through(k)
        rows = [v[:, :, i] / 2 + (q[:, :, i : i + 1] @ k.mT @ v)[:, :, 0] / math.pi for i in range(v.shape[2])]
        y = torch.stack(rows, 2)
        y = y / y.norm(dim=-1, keepdim=True)
        grid = v[:, :, 1:].permute(0, 1, 3, 2).reshape(len(x), WIDTH, GRID, GRID)
        weight = parts["local"].weight
        near = F.conv2d(grid, weight, padding=weight.shape[-1] // 2, groups=WIDTH).flatten(2).transpose(1, 2)
        x = x + block.proj(y.transpose(1, 2).flatten(2) + F.pad(near, (0, 0, 1, 0)))
        (mixture,) = parts["mixtures"]
        z = block.norm2(x)
        p = mixture["router"].route(z).softmax(-1)
        fc1, fc2 = (expert.layer for expert in mixture["experts"])
        experts = [block.fc2(F.gelu(block.fc1(z))), fc2(F.gelu(fc1(z)))]
        x = x + torch.where(p[..., :1] >= p[..., 1:], p[..., :1] * experts[0], p[..., 1:] * experts[1])
    return model.head(x.mean(1))


def attached(kernel: int = 3, dtype: torch.dtype = torch.float64) -> Vit:
    """A model with modules that have learned something, by which about half of the tokens take either expert."""
    torch.manual_seed(0)
    model = Vit().to(dtype).eval()
    shiftadd.attach(model, IMAGES.to(dtype), kernel=kernel).train().eval()
    for module in model.modules():
        if isinstance(module, shiftadd.Local):
            nn.init.normal_(module.weight, std=0.2)
        elif isinstance(module, shiftadd.Router):
            nn.init.normal_(module.route.weight)
    return model


def run(model: nn.Module, images: Tensor = IMAGES, **options: object) -> Tensor:
    torch._dynamo.reset()
    given_ = {"method": "none", "inner": "eager", **SHIFTADD, **options}
    return torch.compile(model, backend="mctf", options=given_, dynamic=False)(images)


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_a_model_computes_what_the_paper_says(kernel: int) -> None:
    model = attached(kernel)
    with torch.no_grad():
        close(run(model), by_hand(model, IMAGES))


def test_inductor_and_float32_compute_the_same() -> None:
    model = attached(dtype=torch.float32)
    with torch.no_grad():
        close(run(model, IMAGES.float(), inner="inductor"), by_hand(model, IMAGES.float()), torch.float32)


def test_without_the_option_a_model_computes_what_it_did() -> None:
    torch.manual_seed(0)
    model = Vit().double().eval()
    before = model(IMAGES)
    shiftadd.attach(model, IMAGES)
    assert torch.equal(model(IMAGES), before)
    with torch.no_grad():
        close(run(model, reparameterize=None), before)


def test_it_is_trained_as_the_formulas_are() -> None:
    """Gradients of all parameters, those of the router and of the experts among them, and of the balance loss."""
    model, other = attached(), attached()
    for each in (model, other):
        each.train()
    fast = torch.compile(model, backend="mctf", options={"method": "none", "inner": "aot_eager", **SHIFTADD})
    torch._dynamo.reset()
    (fast(IMAGES).square().sum() + 0.01 * shiftadd.balance(model)).backward()
    logits: list[Tensor] = []
    hooks = [
        m.route.register_forward_hook(lambda _, args, out: logits.append(out))
        for m in other.modules()
        if isinstance(m, shiftadd.Router)
    ]
    expected = by_hand(other, IMAGES)
    for hook in hooks:
        hook.remove()
    loss = torch.stack([losses.balance(each, (1.0, 1.0)) for each in logits]).mean()
    (expected.square().sum() + 0.01 * loss).backward()
    learned = dict(model.named_parameters())
    assert any("router" in name for name in learned) and any("local" in name for name in learned)
    for name, parameter in other.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        torch.testing.assert_close(learned[name].grad, parameter.grad, rtol=1e-6, atol=1e-8, msg=name)


def test_fused_tokens_are_trained_through_the_same_operators() -> None:
    """Kernels without gradients are not taken, though they could run."""
    gradients = []
    for kernels in ("auto", "aten"):
        model = attached(dtype=torch.float32).train()
        options = {"method": "mctf", "r": 2, "min_tokens": 1, "kernels": kernels, "strict": True}
        run(model, IMAGES.float(), **options).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(grad is not None for grad in gradients[0].values())
    for name, grad in gradients[0].items():
        torch.testing.assert_close(grad, gradients[1][name], rtol=1e-4, atol=1e-5, msg=name)


# Tokens fused in it.


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(shiftadd_cases())
def test_rewrites_are_sound(case: shiftadd_cases) -> None:
    found = case.check()
    assert not found.problems, (found.problems, case.program())


class Means(nn.Module):
    """The mean of all tokens behind the attention of a second block: what is fused there is linear up to the end."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, 4, 4)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks[0](self.embed(images).flatten(2).transpose(1, 2))
        block = self.blocks[1]
        q, k, v = block.heads(block.norm1(x))
        x = x + block.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x.mean(1)


def means() -> tuple[nn.Module, Tensor]:
    """Such a model, and images of equal patches, whose neighbours are others in the second block alone."""
    torch.manual_seed(0)
    model, images = Means().double().eval(), repeated_patches(2, GRID, 3, 0).double()
    shiftadd.attach(model, images, experts=False)
    first, second = (parts["local"].weight.data for parts in model.mctf_shiftadd.values())
    first[..., 1, 1].normal_()
    second.normal_()
    return model, images


def each_once(call: Any) -> Any:
    """Attention that counts each fused token once."""
    given_ = rules.attention_operands(call, "query", "key", "value")
    out = ops.binary_attention(given_.query, given_.key, given_.value)
    return call.result(given_.layout.join(out, call.value("query").tensor))


def as_they_lie(call: Any) -> Any:
    """Neighbours of fused tokens in the order in which they are."""
    x, weight = call.value("x").tensor, call.value("weight").tensor
    return call.result(ops.neighbours(x, weight, 0, 1, x.shape[2]))


@pytest.mark.parametrize(("name", "wrong"), [("binary_attention", each_once), ("neighbours", as_they_lie)])
def test_fused_copies_attend_and_have_neighbours_as_all_of_them(
    name: str, wrong: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = means()
    options = {"method": "tome", "r": 8, "min_tokens": 1, "layers": [0], "strict": True, **SHIFTADD}
    with torch.no_grad():
        assert_rewrite_sound(model, images, duplicates=True, **options)
        overload = getattr(ops, name).default
        monkeypatch.setitem(RULES, overload, replace(RULES[overload], fused=wrong))
        with pytest.raises(AssertionError, match="fusing duplicates changed the output"):
            assert_rewrite_sound(model, images, duplicates=True, **options)


@cache
def fused_in(spelling: str, attention: str) -> Tensor:
    """The output of one model whose attention is written in some way."""
    torch.manual_seed(0)
    model = TinyViT(VitSpec(depth=2, spelling=spelling, position=True)).eval()
    model, (images,), own = with_shiftadd(model, model.example(9, 0), False, True, True, local=True)
    options = {**own, "method": "mctf", "attention": attention, "r": 4, "min_tokens": 1, "strict": True}
    with torch.no_grad():
        return run(model, images, **options)


WORDS = [("softmax", "approx"), ("softmax", "current"), ("softmax", "exact"), ("einsum", "approx"), ("flat", "approx")]


@pytest.mark.parametrize(("spelling", "attention"), WORDS)
def test_attention_in_other_words_is_the_same_attention(spelling: str, attention: str) -> None:
    torch.testing.assert_close(fused_in(spelling, attention), fused_in("sdpa", attention), rtol=1e-8, atol=1e-10)


def test_fewer_tokens_cost_less_and_linear_attention_less_than_maps() -> None:
    model = attached()
    dense = mctf_compile.explain(model, IMAGES, method="none")
    linear = mctf_compile.explain(model, IMAGES, method="none", **SHIFTADD)
    fused = mctf_compile.explain(model, IMAGES, r=4, min_tokens=1, layers=[0], **SHIFTADD)
    width, n = WIDTH // HEADS, 1 + GRID * GRID
    maps = 2 * 2 * HEADS * 2 * n * n * width
    sums = 2 * 2 * (HEADS * 2 * n * width * width + GRID * GRID * WIDTH * 9 + n * WIDTH * 2)
    assert linear.macs_before == dense.macs_before - maps + sums
    assert fused.macs_before == linear.macs_before and fused.macs_after < fused.macs_before
    assert [b.tokens_out for b in fused.blocks] == [n - 4, n - 4]


@pytest.mark.parametrize("method", ["none", "mctf"])
def test_autocast_and_lower_precision(method: str) -> None:
    model, images = attached(dtype=torch.float32), IMAGES.float()
    options = {"method": method, **({"r": 2, "min_tokens": 1} if method == "mctf" else {})}
    with torch.no_grad():
        exact = run(model, images, **options)
        with torch.autocast("cpu", torch.bfloat16):
            found = run(model, images, **options)
        half = run(attached(dtype=torch.bfloat16), images.bfloat16(), **options)
    assert found.dtype is half.dtype is torch.bfloat16
    # Zeros and ones may be others in bfloat16, so that no more than the size of numbers agrees.
    for each in (found, half):
        assert each.isfinite().all() and (each.float() - exact).norm() < exact.norm()


def test_tokens_are_multiplied_by_their_own_weights_alone() -> None:
    """In C++ where there are no gradients; by codes where they are packed."""
    torch.manual_seed(0)
    model = attached(dtype=torch.float32)
    seen: dict[str, list[str]] = {}

    def backend(name: str, kernels: str) -> Callable[..., object]:
        def compiled(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
            config = FusionConfig(r=2, min_tokens=1, kernels=kernels, **SHIFTADD)
            fused, report = rewrite(gm, inputs, config)
            seen[name] = [str(n.target) for n in fused.graph.nodes] + report.remarks
            return fused.forward

        return compiled

    def output(name: str, kernels: str) -> Tensor:
        torch._dynamo.reset()
        return torch.compile(model, backend=backend(name, kernels), dynamic=False)(IMAGES.float())

    with torch.no_grad():
        plain, dispatched = output("plain", "aten"), output("dispatched", "cpp")
        shiftadd.pack(model)
        packed = output("packed", "cpp")
    output("gradients", "cpp")
    for name in ("dispatched", "packed"):
        assert seen[name].count("mctf.dispatched_linear.default") == 4, name
        assert "mctf.powers.default" not in seen[name] and not any("stays ATen" in line for line in seen[name])
    for name in ("plain", "gradients"):
        assert seen[name].count("mctf.routed_linear.default") == 4
    assert any("routed_linear" in line and "no gradient" in line for line in seen["gradients"])
    for found in (dispatched, packed):
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("outputs", [{}, {"r": 2, "min_tokens": 1}], ids=["dense", "fused"])
def test_an_exported_program_has_it(outputs: dict[str, int]) -> None:
    model = attached()
    options = {"method": "mctf", **outputs} if outputs else {"method": "none"}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = mctf_compile.export(model, (IMAGES,), **SHIFTADD, **options)
        close(program.module()(IMAGES), run(model, **options))


# What belongs to the model.


def test_modules_are_saved_and_copied_with_the_model() -> None:
    model = attached()
    state = model.state_dict()
    other = Vit().double().eval()
    shiftadd.attach(other, IMAGES)
    other.load_state_dict(state)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = run(model)
        assert torch.equal(run(other), expected)
        for parameter in model.mctf_shiftadd.parameters():
            parameter.zero_()
        assert torch.equal(run(twin), expected) and not torch.equal(run(model), expected)


def test_packed_layers_keep_what_is_attached_to_them() -> None:
    model = attached()
    with torch.no_grad():
        expected = run(model)
        shiftadd.pack(model)
        experts = [m for m in model.modules() if isinstance(m, shiftadd.Expert)]
        assert len(experts) == 4 and all(isinstance(e.layer, shiftadd.ShiftLinear) for e in experts)
        close(run(model), expected)


def test_shift_layers_are_chosen_by_where_they_are() -> None:
    names = {"attention": {"qkv", "proj"}, "mlp": {"fc1", "fc2"}, "all": {"qkv", "proj", "fc1", "fc2"}}
    for layers, expected in names.items():
        model = shiftadd.shift(Vit().double().eval(), IMAGES, layers=layers)
        shifted = {n.rpartition(".")[2] for n, m in model.named_modules() if hasattr(m, "parametrizations")}
        assert shifted == expected, layers
    with pytest.raises(ConfigError, match=r"layers='heads' is not one of .*'mlp'"):
        shiftadd.shift(Vit(), IMAGES.float(), layers="heads")


def test_parts_may_be_left_out() -> None:
    for chosen, left in (("attention", "experts"), ("experts", "attention")):
        model = Vit().double().eval()
        shiftadd.attach(model, IMAGES, **{left: False})
        parts = {key for each in model.mctf_shiftadd.values() for key in each}
        assert parts == {{"attention": "local", "experts": "mixtures"}[chosen]}
        with torch.no_grad():
            assert run(model).isfinite().all()


# The balance loss.


def test_the_balance_loss_is_the_formula() -> None:
    logits, latency = randn(5, 7, 2), (3.0, 1.0)
    p = logits.float().reshape(-1, 2).softmax(-1).tolist()
    times = [[0.0, 0.0], [0.0, 0.0]]
    for row in p:
        for i in (0, 1):
            share = latency[i] / 4
            times[0][i] += share * row[i]
            times[1][i] += share * 0.5 * (1 + math.erf((row[i] - row[1 - i]) * 2 / math.sqrt(2)))
    expected = sum(((a - b) / 2) ** 2 / ((a + b) / 2) ** 2 for a, b in times)
    assert losses.balance(logits, latency).item() == pytest.approx(expected, rel=1e-5)
    assert losses.balance(torch.zeros(4, 2), (1, 1)).item() == 0
    # Even shares take longer in the slower expert.
    assert losses.balance(torch.zeros(4, 2), latency).item() == pytest.approx(2 * 0.25)


def test_the_balance_loss_sends_fewer_tokens_to_the_slower_expert() -> None:
    logits = torch.zeros(64, 2, requires_grad=True)
    losses.balance(logits, (3.0, 1.0)).backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1] < 0).all()


# What it says no to.


class Sequence(nn.Module):
    """Tokens that are given, and lie in no grid."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class Causal(Vit):
    """Attention to earlier tokens alone."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.tokens(images)
        q, k, v = self.blocks[0].heads(x)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.head(x[:, 0])


class Gated(Vit):
    """Attention weights that are multiplied by something before they meet the values."""

    def __init__(self, gate: bool = True) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.rand(1, HEADS, 1, 1))
        self.gated = gate

    def forward(self, images: Tensor) -> Tensor:
        x = self.tokens(images)
        q, k, v = self.blocks[0].heads(x)
        weights = (q @ k.mT).softmax(-1)
        weights = weights * self.gate if self.gated else weights
        x = x + (weights @ v).transpose(1, 2).flatten(2)
        return self.head(x[:, 0])


class Biased(Vit):
    """A bias on the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1, HEADS, 1 + GRID * GRID, 1 + GRID * GRID))

    def forward(self, images: Tensor) -> Tensor:
        x = self.tokens(images)
        q, k, v = self.blocks[0].heads(x)
        x = x + F.scaled_dot_product_attention(q, k, v, self.bias).transpose(1, 2).flatten(2)
        return self.head(x[:, 0])


def test_what_cannot_be_attached_is_said() -> None:
    with pytest.raises(ConfigError, match="does not tell the grid of its tokens"):
        shiftadd.attach(Sequence(), torch.randn(2, 9, WIDTH), experts=False)
    with pytest.raises(ConfigError, match="its logits meet something else"):
        shiftadd.attach(Biased(), IMAGES.float(), experts=False)
    with pytest.raises(ConfigError, match="its logits meet something else"):
        shiftadd.attach(Causal(), IMAGES.float(), experts=False)
    with pytest.raises(ConfigError, match="its attention weights meet something else"):
        shiftadd.attach(Gated(), IMAGES.float(), experts=False)
    with pytest.raises(ConfigError, match="it has no self-attention"):
        shiftadd.attach(nn.Conv2d(3, 4, 3), IMAGES.float())
    with pytest.warns(UserWarning, match=r"the attention of block stays as it is: .*grid"):
        shiftadd.attach(Sequence(), torch.randn(2, 9, WIDTH))
    with pytest.raises(ConfigError, match="kernel=4 must be an odd number"):
        shiftadd.attach(Vit(), IMAGES.float(), kernel=4)
    with pytest.raises(ConfigError, match="leave nothing to attach"):
        shiftadd.attach(Vit(), IMAGES.float(), attention=False, experts=False)
    with pytest.raises(ConfigError, match="already, as 'mctf_shiftadd'"):
        shiftadd.attach(attached(), IMAGES)
    with pytest.raises(ConfigError, match="needs example inputs"):
        shiftadd.attach(Vit())


def test_what_cannot_be_compiled_is_said() -> None:
    with pytest.raises(ConfigError, match=r"finds none of its modules in this model; mctf_compile\.shiftadd\.attach"):
        run(Vit().double().eval())
    with pytest.raises(
        ConfigError, match="reparameterize='shift' is not one of None, 'shiftadd'; did you mean 'shiftadd'"
    ):
        FusionConfig(reparameterize="shift")
    model = attached()
    with pytest.raises(ConfigError, match="no router of this model has run in training"):
        shiftadd.balance(model)
    with pytest.raises(ConfigError, match="this model has no routers"):
        shiftadd.balance(Vit())
    with pytest.raises(ConfigError, match=r"latency=\(1, 0\) must be 2 numbers above 0"):
        losses.balance(torch.zeros(3, 2), (1, 0))


def test_a_model_that_has_changed_is_refused_and_not_computed_otherwise() -> None:
    model = Gated(gate=False).double().eval()
    shiftadd.attach(model, IMAGES, experts=False).train().eval()
    with torch.no_grad():
        run(model)
        model.gated = True
        with pytest.raises(ConfigError, match=r"does not fit .*: its attention weights meet something else"):
            run(model)
        model = attached()
        model.mctf_shiftadd["0"]["local"].weight = nn.Parameter(torch.zeros(8, 1, 3, 3).double())
        with pytest.raises(ConfigError, match="was made for 8 channels, and its values have 16"):
            run(model)


def test_untrained_modules_are_named() -> None:
    model = Vit().double().eval()
    shiftadd.attach(model, IMAGES)
    with (
        torch.no_grad(),
        pytest.warns(UserWarning, match=r"untrained: train them, or load their weights \(mctf_shiftadd"),
    ):
        run(model)
    model.load_state_dict(model.state_dict())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model)


def test_a_model_without_attention_in_a_graph_of_its_own_is_left_alone() -> None:
    """As the pieces that a graph break cuts off are."""
    layer = nn.Linear(3, 3).double()
    x = randn(2, 3)
    with torch.no_grad():
        torch.testing.assert_close(run(layer, x), layer(x))


@pytest.mark.parametrize("weights", [powers_of_two, codes_of])
def test_dispatched_tokens_may_be_multiplied_by_codes(weights: Callable[[Tensor], Tensor]) -> None:
    from mctf_compile.kernels import cpp

    assert cpp.problem() is None
    x, weight, other = randn(2, 9, 8).float(), randn(5, 8).float(), randn(5, 8, seed=1).float()
    second = torch.arange(18).view(2, 9) % 3 == 0
    found = ops.dispatched_linear(x, second, weight, None, weights(other), None)
    close(found, routed.routed_linear(x, second, weight, None, powers_of_two(other), None), torch.float32)


def test_another_family_of_models_can_have_it() -> None:
    torch.manual_seed(0)
    model = LVViT(img_size=64, classes=4, depth=2, width=32, heads=2).eval()
    images = randn(2, 3, 64, 64).float()
    shiftadd.attach(model, images)
    report = mctf_compile.explain(model, images, r=2, **SHIFTADD)
    assert report.fused and len(model.mctf_shiftadd) == 2
