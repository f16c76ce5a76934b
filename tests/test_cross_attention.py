"""Cross-attention onto fused tokens counts each as often as its size says, whatever became of the tokens that read."""

from __future__ import annotations

import pytest
import torch
from decoders import Attend, C, Layer
from torch import Tensor, nn
from torch.nn import functional as F

from mctf_compile.passes.planning.plan import QUERIES
from mctf_compile.testing import assert_rewrite_sound
from mctf_compile.testing.soundness import Recorder

# The first block fuses, between attention and the MLP.
OPTIONS = {"method": "tome", "r": 5, "min_tokens": 1, "layers": [0]}
N, M = 16, 12


class Encoder(nn.Module):
    """A block of self-attention over [B, N, C], some keys of which a mask hides."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(2))
        self.attend = Attend()
        self.mlp = nn.Sequential(nn.Linear(C, 8 * C), nn.GELU(), nn.Linear(8 * C, C))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.norms[0](x)
        x = x + self.attend(y, y, mask)
        return x + self.mlp(self.norms[1](x))


class Both(nn.Module):
    """Queries read what an encoder makes of an image."""

    def __init__(self, plain: bool = False) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(), Layer(plain)
        self.queries = nn.Parameter(torch.randn(1, M, C))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.queries.expand(len(x), -1, -1), self.encoder(x))


def both(**changes: bool) -> Both:
    torch.manual_seed(0)
    return Both(**changes).double().eval()


def tokens(kinds: int, n: int = N, seed: int = 0) -> Tensor:
    """[2, n, C] of so many kinds, in an order of its own for each image; up to n / 2, neighbours are copies."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, kinds, C, generator=generator, dtype=torch.float64)
    place = torch.arange(n) if kinds > n // 2 else torch.arange(n) // 2
    order = torch.stack([(place + shift) % kinds for shift in range(2)])
    return x.gather(1, order[..., None].expand(-1, -1, C))


def heads(x: Tensor) -> Tensor:
    return x.unflatten(2, (2, -1)).transpose(1, 2)


def reading(layer: Attend, x: Tensor, y: Tensor, size: Tensor) -> Tensor:
    """Attention to [B, K, C] of which each counts as often as ``size`` [B, K] says, summed over copies one by one."""
    q, k, v = heads(layer.q(x)), heads(layer.k(y)), heads(layer.v(y))
    weight = (q @ k.mT * q.shape[-1] ** -0.5).exp() * size[:, None, None]
    return layer.o((weight @ v / weight.sum(-1, keepdim=True)).transpose(1, 2).flatten(2))


def mean(x: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The mean of the tokens that go to each of ``count`` places, and how many these are."""
    member = F.one_hot(index, count).to(x.dtype)
    size = member.sum(1)
    return member.mT @ x / size[..., None], size


def fused(model: nn.Module, *inputs: Tensor, **options: object) -> tuple[Tensor, Recorder]:
    recorder = Recorder({**OPTIONS, **options})
    with torch.no_grad():
        return recorder.run(model, *inputs), recorder


@pytest.mark.parametrize("plain", [False, True], ids=["one", "three"])
@torch.no_grad()
def test_keys_count_by_their_sizes(plain):
    model, x = both(plain=plain), tokens(16)
    found, recorder = fused(model, x)
    ((index, _, size),) = recorder.groups
    assert recorder.reports[0].blocks[1].reason == QUERIES and not recorder.reports[0].unmerged
    encoder, decoder = model.encoder, model.decoder
    y = encoder.norms[0](x)
    memory, counted = mean(x + encoder.attend(y, y), index, size.shape[1])
    torch.testing.assert_close(counted, size.double())
    assert (size > 1).any() and size.shape[1] == N - 5
    memory = memory + encoder.mlp(encoder.norms[1](memory))
    q = model.queries.expand(2, -1, -1)
    z = decoder.norms[0](q)
    q = q + decoder.self_attn(z, z)
    q = q + reading(decoder.cross_attn, decoder.norms[1](q), memory, size.double())
    torch.testing.assert_close(found, q + decoder.mlp(decoder.norms[2](q)), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_two_streams_that_are_fused_apart_meet():
    model, x = both(), tokens(16)
    found, recorder = fused(model, x, modules="*")
    report = recorder.reports[0]
    assert [b.removed for b in report.blocks] == [5, 5] and not report.unmerged
    (of_keys, _, size), (of_queries, _, rows) = recorder.groups
    encoder, decoder = model.encoder, model.decoder
    y = encoder.norms[0](x)
    memory, _ = mean(x + encoder.attend(y, y), of_keys, size.shape[1])
    memory = memory + encoder.mlp(encoder.norms[1](memory))
    q = model.queries.expand(2, -1, -1)
    z = decoder.norms[0](q)
    q, _ = mean(q + decoder.self_attn(z, z), of_queries, rows.shape[1])
    q = q + reading(decoder.cross_attn, decoder.norms[1](q), memory, size.double())
    q = q + decoder.mlp(decoder.norms[2](q))
    q = q.gather(1, of_queries[..., None].expand(-1, -1, C))
    torch.testing.assert_close(found, q, rtol=1e-6, atol=1e-6)


METHODS = [
    {"method": "tome"},
    {"method": "mctf"},
    {"method": "mctf", "attention": "exact"},
    {"method": "tofu"},
    {"method": "pitome"},
]


@pytest.mark.parametrize("plain", [False, True], ids=["one", "three"])
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("modules", [None, "*"], ids=["keys", "both"])
def test_copies_change_nothing(plain, method, modules):
    model = both(plain=plain)
    model.queries.data = tokens(4, M, seed=1)[:1]
    named = {} if modules is None else {"modules": modules}
    report = assert_rewrite_sound(model, tokens(4), duplicates=True, **{**OPTIONS, **method}, **named)
    assert report.blocks[0].removed == 5
    # Attention in three operators has a map over both, which is of neither stream alone.
    assert report.blocks[1].removed == (5 if modules and not plain else 0)


VALID = torch.ones(2, N, dtype=torch.bool)
VALID[1, 10:] = False


class Masked(Both):
    """Padding is hidden from the encoder and from the decoder, by masks that each makes for itself."""

    def __init__(self, form: str, plain: bool, everywhere: bool = True) -> None:
        super().__init__(plain)
        self.form, self.everywhere = form, everywhere

    def mask(self, valid: Tensor, rows: int, additive: bool) -> Tensor:
        mask = valid.to(torch.bool)[:, None, None]
        if self.form == "expanded":
            # As transformers makes it: of positions, all of which are there.
            mask = (torch.arange(rows) >= 0)[None, None, :, None] & mask
            mask = mask.expand(-1, 1, rows, -1)
        return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -1e9) if additive else mask

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        memory = self.encoder(x, self.mask(valid, N, False) if self.everywhere else None)
        mask = self.mask(valid.bool(), M, self.decoder.cross_attn.plain)
        q = self.queries.expand(len(x), -1, -1)
        y = self.decoder.norms[0](q)
        q = q + self.decoder.self_attn(y, y)
        q = q + self.decoder.cross_attn(self.decoder.norms[1](q), memory, mask)
        return q + self.decoder.mlp(self.decoder.norms[2](q))


@pytest.mark.parametrize("plain", [False, True], ids=["one", "three"])
@pytest.mark.parametrize("form", ["row", "expanded"])
def test_padding_is_hidden_from_queries_that_read_fused_keys(form, plain):
    torch.manual_seed(0)
    model = Masked(form, plain).double().eval()
    model.queries.data = tokens(4, M, seed=1)[:1]
    report = assert_rewrite_sound(model, tokens(4), VALID, duplicates=True, **OPTIONS)
    assert report.blocks[0].removed == 5 and not report.unmerged
    report = assert_rewrite_sound(model, tokens(4), VALID, duplicates=True, **OPTIONS, modules="*")
    assert report.blocks[0].removed == 5
    if not plain:
        assert report.blocks[1].removed == 5 and not report.unmerged


@pytest.mark.parametrize("plain", [False, True], ids=["one", "three"])
@pytest.mark.parametrize("form", ["row", "expanded"])
def test_a_mask_that_only_the_decoder_has_is_no_mean(form, plain):
    """Copies that it tells apart were fused: what is hidden of them is not the others."""
    torch.manual_seed(0)
    model = Masked(form, plain, everywhere=False).double().eval()
    report = assert_rewrite_sound(model, tokens(4), VALID, duplicates=True, **OPTIONS)
    assert any("has no mean" in line for line in report.unmerged)
    assert_rewrite_sound(model, tokens(4), VALID, duplicates=True, **OPTIONS, modules="*")


class Predicted(Both):
    """What queries see of an image they say themselves, as in Mask2Former: a bias of both streams' tokens."""

    def forward(self, x: Tensor) -> Tensor:
        memory, q = self.encoder(x), self.queries.expand(len(x), -1, -1)
        y = self.decoder.norms[0](q)
        q = q + self.decoder.self_attn(y, y)
        bias = (q @ memory.mT).unsqueeze(1)
        q = q + self.decoder.cross_attn(self.decoder.norms[1](q), memory, bias)
        return q + self.decoder.mlp(self.decoder.norms[2](q))


@pytest.mark.parametrize("plain", [False, True], ids=["one", "three"])
@pytest.mark.parametrize("modules", ["encoder", "*"])
def test_a_bias_of_both_streams(plain, modules):
    torch.manual_seed(0)
    model = Predicted(plain).double().eval()
    model.queries.data = tokens(4, M, seed=1)[:1]
    report = assert_rewrite_sound(model, tokens(4), duplicates=True, **OPTIONS, modules=modules)
    assert report.blocks[0].removed == 5
