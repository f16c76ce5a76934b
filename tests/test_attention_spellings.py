"""Attention in other words: a softmax that is spelled out, and queries that share keys and values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mctf_compile
from mctf_compile.testing import Recorder, TinyViT, VitSpec, assert_rewrite_sound
from mctf_compile.testing.models import repeated_patches
from mctf_compile.testing.soundness import ONLY_SIMILARITY, assert_fused_alike
from mctf_compile.testing.spellings import einsum, sdpa, softmax

B, N, C, H, D = 2, 24, 32, 4, 8


def over(e):
    return e / e.sum(-1, keepdim=True)


SOFTMAXES = {
    "exponentials": lambda x: over(x.exp()),
    "without amax": lambda x: over(torch.exp(x - x.amax(-1, keepdim=True))),
    "without max": lambda x: over(torch.exp(x - x.max(-1, keepdim=True)[0])),
    "without a detached max": lambda x: over((x - x.max(dim=-1, keepdim=True).values.detach()).exp()),
    "without logsumexp": lambda x: torch.exp(x - torch.logsumexp(x, -1, keepdim=True)),
    "a sum unsqueezed": lambda x: (e := x.exp()) / e.sum(-1)[..., None],
    "another dimension": lambda x: (e := x.mT.exp()).div(e.sum(2, keepdim=True)).mT,
    "in place": lambda x: (e := (x - x.amax(-1, keepdim=True)).exp_()).div_(e.sum(-1, keepdim=True)),
    "of shifted keys": lambda x: over(torch.exp(x - x.amax(-2, keepdim=True))),
    "in float64": lambda x: over((x.double() - x.double().amax(-1, keepdim=True)).exp()).float(),
}

NO_SOFTMAXES = {
    "over all": lambda x: (e := x.exp()) / e.sum(),
    "of others": lambda x: x.exp() / (2 * x).exp().sum(-1, keepdim=True),
    "powers of two": lambda x: over(torch.exp2(x)),
    "sums of squares": lambda x: over(x.square()),
    "and one more": lambda x: (e := x.exp()) / (1 + e.sum(-1, keepdim=True)),
}


class Net(nn.Module):
    """Three blocks of attention: ``attend`` takes q [B, N, C], and k and v [B, N, ``heads`` D]."""

    def __init__(self, attend, heads=H):
        super().__init__()
        torch.manual_seed(0)
        self.q = nn.ModuleList(nn.Linear(C, C) for _ in range(3))
        self.kv = nn.ModuleList(nn.Linear(C, 2 * heads * D) for _ in range(3))
        self.out = nn.ModuleList(nn.Linear(C, C) for _ in range(3))
        self.attend, self.heads = attend, heads

    def forward(self, x):
        for q, kv, out in zip(self.q, self.kv, self.out):
            query = q(x).unflatten(-1, (H, D)).transpose(1, 2)
            key, value = (t.unflatten(-1, (self.heads, D)).transpose(1, 2) for t in kv(x).chunk(2, -1))
            x = x + out(self.attend(query, key, value).transpose(1, 2).flatten(2))
        return x.mean(1)


def run(model, autocast=False, **options):
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(1)
    kinds = torch.randn(B, 3, C, generator=generator)
    x = kinds.gather(1, torch.randint(3, (B, N, 1), generator=generator).expand(-1, -1, C))
    recorder = Recorder({"r": 4, "min_tokens": 1, **ONLY_SIMILARITY, **options})
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got, dense = recorder.run(model, x), model(x)
    return got, dense, recorder.reports[0]


def spelled(softmax):
    return lambda q, k, v: softmax(q @ k.mT * D**-0.5) @ v


@pytest.mark.parametrize("attention", ["approx", "exact", "current"])
@pytest.mark.parametrize("name", SOFTMAXES)
def test_a_softmax_that_is_spelled_out_is_found(name, attention):
    got, dense, report = run(Net(spelled(SOFTMAXES[name])).eval(), attention=attention)
    assert report.removed == 8 and not report.unmerged
    torch.testing.assert_close(got, dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NO_SOFTMAXES)
def test_what_is_no_softmax_over_keys_is_not_taken_for_one(name):
    got, dense, report = run(Net(spelled(NO_SOFTMAXES[name])).eval())
    assert not report.fused
    torch.testing.assert_close(got, dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["without amax", "exponentials"])
def test_in_float32_under_autocast(name):
    got, dense, report = run(Net(spelled(lambda x: SOFTMAXES[name](x.float()))).eval(), autocast=True)
    assert report.removed == 8 and not report.unmerged
    torch.testing.assert_close(got.float(), dense.float(), atol=3e-2, rtol=3e-2)


def repeated(t, times):
    return t[:, :, None].expand(-1, -1, times, -1, -1).reshape(B, -1, N, D)


def by_bmm(q, k, v):
    """Images and heads in one dimension."""
    weights = (torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT) * D**-0.5).softmax(-1)
    return torch.bmm(weights, v.flatten(0, 1)).unflatten(0, (B, H))


GROUPED = {
    "enable_gqa": (2, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)),
    "enable_gqa, one head": (1, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=0.3)),
    "enable_gqa, all heads": (H, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)),
    "repeat_interleave": (
        2,
        lambda q, k, v: F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)),
    ),
    "expand and reshape": (2, lambda q, k, v: F.scaled_dot_product_attention(q, repeated(k, 2), repeated(v, 2))),
    "expand": (1, lambda q, k, v: F.scaled_dot_product_attention(q, k.expand(-1, H, -1, -1), v.expand(-1, H, -1, -1))),
    "broadcast": (1, F.scaled_dot_product_attention),
    "spelled out, one head": (1, spelled(SOFTMAXES["without amax"])),
    "spelled out, groups": (2, lambda q, k, v: spelled(lambda x: x.softmax(-1))(q, repeated(k, 2), repeated(v, 2))),
    "spelled out in groups": (
        2,
        lambda q, k, v: ((q.unflatten(1, (2, 2)) @ k[:, :, None].mT * D**-0.5).softmax(-1) @ v[:, :, None]).flatten(
            1, 2
        ),
    ),
    "bmm, groups": (2, lambda q, k, v: by_bmm(q, repeated(k, 2), repeated(v, 2))),
    "einsum": (
        1,
        lambda q, k, v: torch.einsum(
            "bhqk,bkd->bhqd",
            SOFTMAXES["without amax"](torch.einsum("bhqd,bkd->bhqk", q, k[:, 0]) * D**-0.5),
            v[:, 0],
        ),
    ),
}


@pytest.mark.parametrize("attention", ["approx", "exact", "current"])
@pytest.mark.parametrize("name", GROUPED)
def test_heads_that_share_keys_and_values(name, attention):
    heads, attend = GROUPED[name]
    got, dense, report = run(Net(attend, heads).eval(), attention=attention)
    assert report.removed == 8 and not report.unmerged, report
    torch.testing.assert_close(got, dense, atol=1e-5, rtol=1e-5)


def test_compiled_with_grouped_heads():
    heads, attend = GROUPED["enable_gqa"]
    model, x = Net(attend, heads).eval(), torch.randn(B, 3, C)[:, torch.arange(N) % 3]
    torch._dynamo.reset()
    options = {"r": 4, "min_tokens": 1, **ONLY_SIMILARITY}
    assert mctf_compile.explain(model, x, **options).removed == 8
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="mctf", options=options)(x), model(x))


class TokensAsHeads(nn.Module):
    """Attention that takes the tokens for heads: they are as many as those of a table, or share its only one."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.tokens = TinyViT(VitSpec(depth=2, prefix=0, head="dense"))
        self.table = nn.Parameter(torch.randn(1, 2, 16).expand(heads, -1, -1).clone())

    def forward(self, images):
        x = self.tokens(images).transpose(0, 1)
        return F.scaled_dot_product_attention(x, self.table, self.table, enable_gqa=True)


@pytest.mark.parametrize("heads", [16, 8, 1])
def test_tokens_in_the_place_of_grouped_heads(heads):
    torch.manual_seed(0)
    model = TokensAsHeads(heads).eval()
    report = assert_rewrite_sound(model, repeated_patches(2, 4, 3, seed=0), method="tome", r=3, layers=[0])
    assert report.fused


class GivenBack(nn.Module):
    """Blocks of which the last two have a mask that nobody can read, so that tokens come back in them."""

    def __init__(self, attention: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attention = attention
        self.blocks = nn.ModuleList(
            nn.ModuleList([nn.Linear(8, 24), nn.Sequential(nn.Linear(8, 256), nn.GELU(), nn.Linear(256, 8))])
            for _ in range(4)
        )

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        for i, (qkv, mlp) in enumerate(self.blocks):
            q, k, v = qkv(x).chunk(3, -1)
            mask = (torch.where(seen > 0, 0.0, float("-inf")).to(x.dtype),) if i > 1 else ()
            x = x + self.attention(q, k, v, *mask)
            x = x + mlp(x)
        return x


@pytest.mark.parametrize("pooling", ["attention", "mean", "size"])
def test_the_weights_of_tokens_that_came_back_are_summed(pooling):
    """Each value has the attention of all its copies, whatever weights the copies were pooled by."""
    made = []
    for attention in (softmax, einsum, sdpa):
        torch.manual_seed(0)
        made.append(GivenBack(attention).eval().double())
    x, seen = torch.randn(2, 18, 8, dtype=torch.float64), torch.ones(18, 18).tril()
    options = {"r": 4, "min_tokens": 1, "layers": [0, 1], "pooling": pooling}
    with torch.no_grad():
        for model in made[:-1]:
            assert_fused_alike(model, made[-1], x, seen, tolerance=1e-12, **options)
