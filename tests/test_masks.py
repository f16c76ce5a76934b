"""Key padding masks in every spelling fuse with padding kept apart; what masks pairs of tokens does not fuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mctf_compile
from mctf_compile import ConfigError
from mctf_compile.testing import Recorder, TinyViT, VitSpec
from mctf_compile.testing.soundness import ONLY_SIMILARITY, assert_fused_alike

aten, mctf = torch.ops.aten, torch.ops.mctf
B, N, C, HEADS = 2, 24, 16, 2
LOW, INF = torch.finfo(torch.float32).min, float("-inf")


def rows(valid):
    return valid[:, None, :, None]


def columns(valid):
    return valid[:, None, None, :]


def filled(valid, how=INF, symmetric=False):
    """As timm's NaFlexViT makes it, in place."""
    both = rows(valid) & columns(valid) if symmetric else columns(valid).expand(-1, 1, N, N)
    mask = torch.zeros_like(both, dtype=torch.float32)
    mask.masked_fill_(~both, how)
    return mask


def by_index(valid):
    """As transformers makes it: read at the positions of all images and keys."""
    image, key = torch.arange(valid.shape[0])[:, None, None, None], torch.arange(N)[None, None, None, :]
    query = torch.arange(N)[None, None, :, None]
    return ((query >= 0) & valid[image, key]).expand(-1, -1, N, N)


def joined(valid):
    """Another value of the mask for the first token."""
    return columns(torch.cat([torch.ones_like(valid[:, :1]), valid[:, 1:]], 1))


SPELLINGS = {
    "boolean": columns,
    "expanded": lambda v: columns(v).expand(-1, 1, N, N),
    "repeated": lambda v: columns(v).repeat(1, HEADS, N, 1),
    "symmetric": lambda v: rows(v) & columns(v),
    "symmetric, transposed": lambda v: (rows(v) & columns(v)).mT,
    "and": lambda v: columns(v) & torch.ones(1, 1, N, 1, dtype=torch.bool),
    "__and__": lambda v: torch.ops.aten.__and__.Tensor(columns(v), rows(v)),
    "logical_and": lambda v: torch.logical_and(columns(v), rows(v)),
    "bitwise_and": lambda v: torch.bitwise_and(columns(v), rows(v)),
    "or": lambda v: ~(~columns(v) | ~rows(v)),
    "__or__": lambda v: ~torch.ops.aten.__or__.Tensor(~columns(v), ~rows(v)),
    "logical_or": lambda v: torch.logical_not(torch.logical_or(~columns(v), torch.logical_not(rows(v)))),
    "xor": lambda v: (~columns(v)) ^ torch.ones_like(rows(v)),
    "__xor__": lambda v: torch.ops.aten.__xor__.Tensor(~columns(v), torch.ones_like(rows(v))),
    "logical_xor": lambda v: torch.logical_xor(~columns(v), torch.ones_like(v)[:, None, None]),
    "multiplied": lambda v: columns(v) * rows(v),
    "compared": lambda v: columns(v.long()) == 1,
    "compared sums": lambda v: columns(v.float()) + rows(v.float()) > 1.5,
    "compared products": lambda v: columns(v.float()) * rows(v.float()) != 0,
    "lengths": lambda v: columns(torch.arange(N) < v.sum(1, keepdim=True)).expand(-1, 1, N, N),
    "read by index": by_index,
    "joined": joined,
    "filled": filled,
    "filled, finfo.min": lambda v: filled(v, LOW),
    "filled, symmetric": lambda v: filled(v, INF, True),
    "filled, symmetric, finfo.min": lambda v: filled(v, LOW, True),
    "filled, full_like": lambda v: torch.full_like(columns(v).float(), -1e9).masked_fill(columns(v), 0.0),
    "where": lambda v: torch.where(columns(v), 0.0, INF),
    "where, tensors": lambda v: torch.where(columns(v) & rows(v), torch.tensor(0.0), torch.tensor(LOW)),
    "where, full": lambda v: torch.where(columns(v), torch.zeros(()), torch.full((), INF)),
    "scaled": lambda v: (1 - columns(v).float()) * LOW,
    "scaled, small": lambda v: (1.0 - columns(v).float()) * -1e4,
    "scaled, expanded": lambda v: (columns(v).float().expand(-1, 1, N, N) - 1.0) * 1e9,
    "inverted and filled": lambda v: (i := 1.0 - columns(v).expand(-1, 1, N, N).float()).masked_fill(i.bool(), LOW),
    "logarithm": lambda v: columns(v).float().log(),
    "with a soft bias": lambda v: filled(v, INF) + torch.linspace(-1, 1, HEADS)[None, :, None, None],
}


class Seeing(nn.Module):
    """Three blocks of attention and MLP under one mask, from outside or made by ``mask``."""

    def __init__(self, mask=None, spelling="sdpa") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.ModuleList(nn.Linear(C, 3 * C) for _ in range(3))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(C, 2 * C), nn.GELU(), nn.Linear(2 * C, C)) for _ in range(3))
        self.mask, self.spelling = mask, spelling

    def forward(self, x, valid):
        mask = valid if self.mask is None else self.mask(valid)
        for qkv, mlp in zip(self.qkv, self.mlp):
            q, k, v = (t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in qkv(x).chunk(3, -1))
            if self.spelling == "sdpa":
                y = F.scaled_dot_product_attention(q, k, v, mask)
            else:
                logits = q @ k.mT
                logits = logits.masked_fill(~mask, LOW) if mask.dtype is torch.bool else logits + mask
                y = logits.softmax(-1) @ v
            x = x + y.transpose(1, 2).flatten(2)
            x = x + mlp(x)
        return x


def copies(seed=0):
    """Tokens [B, N, C] that are copies of three, and which of them are real; the padding last."""
    g = torch.Generator().manual_seed(seed)
    kinds = torch.randn(B, 3, C, generator=g)
    x = kinds.gather(1, torch.randint(3, (B, N, 1), generator=g).expand(-1, -1, C))
    return x, torch.arange(N) < torch.tensor([[20], [13]])


def run(model, *inputs, **options):
    recorder = Recorder({"r": 4, "min_tokens": 1, **ONLY_SIMILARITY, **options})
    with torch.no_grad():
        got = recorder.run(model, *inputs)
    return got, recorder.reports[0]


@pytest.mark.parametrize("spelling", ["sdpa", "softmax"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_padding_in_every_spelling_fuses_apart(name, spelling):
    """Copies are lossless for real tokens, and what padding holds does not matter to them."""
    x, valid = copies()
    model = Seeing(SPELLINGS[name], spelling).eval()
    with torch.no_grad():
        dense = model(x, valid)
    symmetric = not dense.isfinite().all()
    recorder = Recorder({"r": 4, "min_tokens": 1, **ONLY_SIMILARITY})
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=recorder, dynamic=False)
    other = torch.where(valid[..., None], x, 3 * torch.randn(B, N, C))
    with torch.no_grad():
        got, got_other = compiled(x, valid), compiled(other, valid)
    (report,) = recorder.reports
    assert [b.tokens_out for b in report.blocks] == [N, N - 4, N - 8] and not report.unmerged
    # A real token that sees padding of -inf for all its queries is lost in the dense model as well.
    finite = dense[valid].isfinite().all(-1)
    assert finite.all() or (symmetric and spelling == "softmax")
    torch.testing.assert_close(got[valid][finite], dense[valid][finite], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got_other[valid][finite], dense[valid][finite], atol=1e-5, rtol=1e-5)


class Clearing(Seeing):
    """What padding attended to is cleared: where it sees nothing that is 0 / 0, which nobody reads."""

    def forward(self, x, valid):
        mask = self.mask(valid)
        for qkv, mlp in zip(self.qkv, self.mlp):
            q, k, v = (t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in qkv(x).chunk(3, -1))
            logits = q @ k.mT
            logits = logits.masked_fill(~mask, INF) if mask.dtype is torch.bool else logits + mask
            y = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
            x = x + y.masked_fill(~valid[:, :, None], 0.0)
            x = x + mlp(x)
        return x


@pytest.mark.parametrize("name", ["symmetric", "filled, symmetric"])
def test_padding_that_sees_nothing_says_nothing_of_the_others(name):
    x, valid = copies()
    model = Clearing(SPELLINGS[name]).eval()
    recorders = [
        Recorder({"r": 4, "min_tokens": 1, "pooling": "attention", **ONLY_SIMILARITY}),
        Recorder({"method": "evit", "score": "mean_attention", "keep_rate": 0.8, "layers": [0, 1]}),
    ]
    with torch.no_grad():
        dense = model(x, valid)
        lossless, scored = (recorder.run(model, x, valid) for recorder in recorders)
    assert dense.isfinite().all() and all(recorder.reports[0].fused for recorder in recorders)
    torch.testing.assert_close(lossless[valid], dense[valid], atol=1e-5, rtol=1e-5)
    assert scored.isfinite().all()


class SeeingLast(Seeing):
    """The last of three blocks alone has a mask."""

    def forward(self, x, mask):
        for i, (qkv, mlp) in enumerate(zip(self.qkv, self.mlp)):
            q, k, v = (t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in qkv(x).chunk(3, -1))
            x = x + F.scaled_dot_product_attention(q, k, v, mask if i == 2 else None).transpose(1, 2).flatten(2)
            x = x + mlp(x)
        return x


def test_a_block_that_gets_its_tokens_back_reads_what_the_block_before_made():
    """Not what that block would have made of the fused tokens without attention one step ahead."""
    x, mask = torch.randn(B, N, C), torch.rand(B, 1, N, N)
    model = SeeingLast().eval()
    recorder = Recorder({"r": 4, "min_tokens": 1})
    with torch.no_grad():
        recorder.run(model, x, mask)
    assert [b.tokens_out for b in recorder.reports[0].blocks] == [N, N - 4, N - 4]
    called = [n.target for n in recorder.graphs[0].graph.nodes if n.op == "call_function"]
    sdpa, ahead, sized = aten.scaled_dot_product_attention.default, mctf.ahead.default, mctf.attention.default
    assert [target for target in called if target in (sdpa, ahead, sized)] == [sdpa, ahead, sdpa]


def block_of(valid):
    return torch.arange(N) // 8


PAIRS = {
    "causal": lambda v: torch.ones(N, N, dtype=torch.bool).tril()[None, None],
    "causal, compared": lambda v: (torch.arange(N)[:, None] >= torch.arange(N))[None, None],
    "padding and causal": lambda v: columns(v) & torch.ones(N, N, dtype=torch.bool).tril(),
    "padding and blocks": lambda v: columns(v) & rows(v) & (block_of(v)[:, None] == block_of(v)),
    "either": lambda v: columns(v) | rows(v),
    "alike": lambda v: columns(v) == rows(v),
    "unlike": lambda v: columns(v) ^ rows(v) | torch.eye(N, dtype=torch.bool),
    "exclusive": lambda v: ~(columns(v) ^ rows(v)),
    "two of them": lambda v: columns(v) & rows(v.roll(3, 1)),
    "one, negated": lambda v: columns(v) & ~rows(v) | torch.eye(N, dtype=torch.bool),
    "sums": lambda v: columns(v.float()) + rows(v.float()) > 0.5,
    "by heads": lambda v: columns(v) | torch.tensor([True, False])[None, :, None, None],
    "added for either": lambda v: torch.zeros(B, 1, N, N).masked_fill(~columns(v) & ~rows(v), INF),
}


@pytest.mark.parametrize("spelling", ["sdpa", "softmax"])
@pytest.mark.parametrize("name", PAIRS)
def test_a_mask_that_is_none_of_padding_stays_dense(name, spelling):
    x, valid = copies()
    model = Seeing(PAIRS[name], spelling).eval()
    with torch.no_grad():
        dense = model(x, valid)
    got, report = run(model, x, valid)
    assert not report.removed and all(b.reason for b in report.blocks)
    torch.testing.assert_close(got, dense, atol=1e-5, rtol=1e-5, equal_nan=True)


def given(symmetric=False, boolean=True):
    x, valid = copies()
    mask = rows(valid) & columns(valid) if symmetric else columns(valid).expand(-1, 1, N, N).contiguous()
    return x, valid, mask if boolean else torch.zeros(mask.shape).masked_fill(~mask, LOW)


@pytest.mark.parametrize("boolean", [True, False])
def test_a_mask_that_is_given_cannot_be_read(boolean):
    x, _, mask = given(boolean=boolean)
    (reason,) = {b.reason for b in mctf_compile.explain(Seeing(), x, mask, r=4).blocks}
    assert "input of the graph" in reason and "padding='assume'" in reason


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize("spelling", ["sdpa", "softmax"])
def test_a_mask_that_is_given_may_be_taken_for_padding(symmetric, boolean, spelling):
    x, valid, mask = given(symmetric, boolean)
    model = Seeing(spelling=spelling).eval()
    got, report = run(model, x, mask, padding="assume")
    with torch.no_grad():
        dense = model(x, mask)
    assert report.removed == 8 and not report.unmerged
    torch.testing.assert_close(got[valid], dense[valid], atol=1e-5, rtol=1e-5)


def compiled(model):
    torch._dynamo.reset()
    options = {"r": 4, "min_tokens": 1, "inner": "eager", "padding": "assume", **ONLY_SIMILARITY}
    return torch.compile(model, backend="mctf", options=options)


@pytest.mark.parametrize("boolean", [True, False])
def test_the_first_call_looks_at_a_mask_that_is_taken_for_padding(boolean):
    x, valid, mask = given(boolean=boolean)
    model = Seeing().eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(x, mask)[valid], model(x, mask)[valid], atol=1e-5, rtol=1e-5)
        for wrong in (
            torch.ones(B, 1, N, N, dtype=torch.bool).tril(),
            torch.stack([columns(valid)[:, 0].expand(-1, N, N), torch.ones(B, N, N, dtype=torch.bool)], 1),
            rows(valid).expand(-1, 1, N, N),
        ):
            given_wrong = wrong if boolean else torch.zeros(wrong.shape).masked_fill(~wrong, LOW)
            with pytest.raises(ConfigError, match="padding='assume'"):
                compiled(model)(x, given_wrong)


def test_a_mask_that_the_graph_makes_is_read_whatever_is_assumed():
    x, valid = copies()
    _, report = run(Seeing(PAIRS["causal"]).eval(), x, valid, padding="assume")
    assert not report.removed


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("low", [INF, LOW])
def test_queries_of_padding_that_see_nothing_are_left_alone(symmetric, low):
    """Whatever a query of padding gets, the compiled model gives real tokens what the dense one does."""
    x, valid = copies()
    model = Seeing(lambda v: filled(v, low, symmetric)).eval()
    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(model, backend="mctf", options={"r": 4, "min_tokens": 1, **ONLY_SIMILARITY})(x, valid)
        torch.testing.assert_close(got[valid], model(x, valid)[valid], atol=1e-5, rtol=1e-5)


# Which of two kinds each of 64 tokens is a copy of, in no order that a matching of every other token would meet.
KINDS = torch.randint(2, (64,), generator=torch.Generator().manual_seed(0))


def naflex():
    """timm's NaFlexViT, and patches [2, 64, C] that are copies, with coordinates and which of them are real."""
    from timm import create_model

    torch.manual_seed(0)
    model = create_model("naflexvit_base_patch16_gap", depth=3, embed_dim=48, num_heads=3, num_classes=10).eval()
    for name, tensor in model.named_parameters():
        # Without positions copies stay copies.
        tensor.data.zero_() if "pos_embed" in name else tensor.data.add_(0.02 * torch.randn_like(tensor))
    patches = torch.randn(2, 2, 768)[:, KINDS]
    coordinates, valid = torch.zeros(2, 64, 2, dtype=torch.long), torch.zeros(2, 64, dtype=torch.bool)
    for i, (h, w) in enumerate([(8, 8), (6, 7)]):
        coordinates[i, : h * w] = torch.cartesian_prod(torch.arange(h), torch.arange(w))
        valid[i, : h * w] = True
    return model, patches, {"patch_coord": coordinates, "patch_valid": valid}


@pytest.mark.parametrize("symmetric", [True, False])
def test_naflexvit_makes_a_mask_of_padding(symmetric):
    from timm.models.naflexvit import create_attention_mask

    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = naflex()[0].blocks

        def forward(self, x, valid):
            mask = create_attention_mask(valid, 0, symmetric=symmetric, dtype=x.dtype)
            for block in self.blocks:
                x = block(x, attn_mask=mask)
            return x

    model, valid = Blocks(), torch.arange(64) < torch.tensor([[64], [42]])
    x = torch.randn(2, 2, 48)[:, KINDS]
    got, report = run(model, x, valid, r=8)
    with torch.no_grad():
        dense = model(x, valid)
    assert report.removed == 16 and not report.unmerged
    torch.testing.assert_close(got[valid], dense[valid], atol=1e-5, rtol=1e-5)


def largest(model, inputs, kwargs, **options):
    """What a model gives with its graphs rewritten, and the report of the largest one."""
    recorder = Recorder({"r": 8, "min_tokens": 1, **ONLY_SIMILARITY, **options})
    with torch.no_grad():
        got = recorder.run(model, *inputs, **kwargs)
    return got, max(recorder.reports, key=lambda report: report.macs_before)


def test_naflexvit_is_fused_as_people_feed_it():
    """It reads sizes off its coordinates, so that its blocks are a graph of their own, with a mask that is given."""
    model, patches, kwargs = naflex()
    _, report = largest(model, [patches], kwargs)
    assert not report.removed and all("padding='assume'" in b.reason for b in report.blocks)
    got, report = largest(model, [patches], kwargs, padding="assume")
    assert report.removed == 16
    other = torch.where(kwargs["patch_valid"][..., None], patches, 3 * torch.randn_like(patches))
    with torch.no_grad():
        dense = model(patches, **kwargs)
    torch.testing.assert_close(got, dense, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(largest(model, [other], kwargs, padding="assume")[0], dense, atol=1e-5, rtol=1e-5)


def test_siglip2_is_fused_as_people_feed_it():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Siglip2VisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, num_patches=64
    )
    model = transformers.Siglip2VisionModel(config).eval()
    for name, tensor in model.named_parameters():
        tensor.data.zero_() if "position" in name else tensor.data.add_(0.02 * torch.randn_like(tensor))
    patches, (_, _, told) = torch.randn(2, 2, 768)[:, KINDS], naflex()
    valid = told["patch_valid"]
    kwargs = {"pixel_attention_mask": valid.long(), "spatial_shapes": torch.tensor([[8, 8], [6, 7]])}
    other = torch.where(valid[..., None], patches, 3 * torch.randn_like(patches))
    with torch.no_grad():
        dense = model(patches, **kwargs)
    for given_patches in (patches, other):
        got, report = largest(model, [given_patches], kwargs)
        assert report.removed == 16
        torch.testing.assert_close(got.pooler_output, dense.pooler_output, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got.last_hidden_state[valid], dense.last_hidden_state[valid], atol=1e-5, rtol=1e-5)
    assert mctf_compile.explain(model, patches, kwargs=kwargs, r=8).removed == 16


def test_what_a_product_makes_low_is_no_padding():
    """Logits of tokens that take part may be as low as a mask; spelled out they are what the softmax reads."""
    torch.manual_seed(0)
    models = [TinyViT(VitSpec(spelling=spelling, side="padding")).double().eval() for spelling in ("sdpa", "softmax")]
    for block in models[0].blocks:
        queries = slice(0, 16)
        block.attn.qkv.weight.data[queries], block.attn.qkv.bias.data[queries] = 0.0, 1e5
    models[1].load_state_dict(models[0].state_dict())
    images, valid = models[0].example(16, 0)
    seen = []
    models[0].blocks[1].attn.qkv.register_forward_hook(lambda *given: seen.append(given[2]))
    with torch.no_grad():
        models[0](images.double(), valid)
        q, k, _ = seen[0].unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        assert (q @ k.transpose(-2, -1) * 8**-0.5).amax((1, 2)).lt(-5e3).any(), "no token's logits are that low"
        models[0].blocks[1].attn.qkv._forward_hooks.clear()
        assert_fused_alike(*models, images.double(), valid, r=3, min_tokens=1, attention="exact", tau_info=20)
