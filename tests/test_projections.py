"""One projection to queries, keys and values, taken apart in every way: its parts cost what they cost apart."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mctf_compile.testing import Recorder
from mctf_compile.testing.soundness import ONLY_SIMILARITY

B, N, C, H = 2, 40, 32, 4


def heads(t):
    return t.unflatten(-1, (H, -1)).transpose(1, 2)


def apart(y):
    """[B, N, 3 C] -> [B, N, 3, H, D]."""
    return y.unflatten(2, (3, H, -1))


TAKEN_APART = {
    "chunk": lambda y: map(heads, y.chunk(3, -1)),
    "split": lambda y: map(heads, y.split(C, -1)),
    "split_with_sizes": lambda y: map(heads, torch.ops.aten.split_with_sizes(y, [C, C, C], -1)),
    "split in two": lambda y: (heads(t) for part in y.split([2 * C, C], -1) for t in part.split(C, -1)),
    "tensor_split": lambda y: map(heads, y.tensor_split(3, -1)),
    "tensor_split at": lambda y: map(heads, y.tensor_split((C, 2 * C), dim=-1)),
    "narrow": lambda y: (heads(y.narrow(-1, i * C, C)) for i in range(3)),
    "slices": lambda y: (heads(y[..., i * C : (i + 1) * C]) for i in range(3)),
    "slices from the end": lambda y: (heads(y[..., a : a + C or 3 * C]) for a in (-3 * C, -2 * C, -C)),
    "slices of slices": lambda y: (heads(t) for t in (y[..., :C], y[..., C:][..., :C], y[..., C:][..., C:])),
    "unbind": lambda y: (t.transpose(1, 2) for t in apart(y).unbind(2)),
    "permute": lambda y: apart(y).permute(2, 0, 3, 1, 4),
    "movedim": lambda y: (t.transpose(1, 2) for t in apart(y).movedim(2, 0).unbind(0)),
    "moveaxis": lambda y: apart(y).moveaxis((2, 3), (0, 2)),
    "transposes": lambda y: apart(y).transpose(1, 2).transpose(0, 1).transpose(2, 3).unbind(0),
    "swapaxes": lambda y: apart(y).swapaxes(2, 3).swapdims(1, 3).unbind(1),
    "select": lambda y: (apart(y).select(2, i).transpose(1, 2) for i in range(3)),
    "indexed": lambda y: (apart(y)[:, :, i].transpose(1, 2) for i in range(3)),
    "squeezed": lambda y: (t.squeeze(2).transpose(1, 2) for t in apart(y).split(1, 2)),
    "cloned": lambda y: (heads(t).contiguous() for t in y.clone().chunk(3, -1)),
    "reshaped": lambda y: y.reshape(B, N, 3, H, C // H).permute(2, 0, 3, 1, 4).unbind(0),
}


class Net(nn.Module):
    """Five blocks of attention, whose projection is one linear, or several (``lora``, ``separate``)."""

    def __init__(self, parts, lora=False, separate=False):
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.ModuleList(nn.Linear(C, 3 * C) for _ in range(5))
        self.down = nn.ModuleList(nn.Linear(C, 4, bias=False) for _ in range(5))
        self.up = nn.ModuleList(nn.Linear(4, 3 * C, bias=False) for _ in range(5))
        self.out = nn.ModuleList(nn.Linear(C, C) for _ in range(5))
        self.parts, self.lora, self.separate = parts, lora, separate

    def forward(self, x):
        for qkv, down, up, out in zip(self.qkv, self.down, self.up, self.out):
            if self.separate:
                pieces = zip(qkv.weight.chunk(3), qkv.bias.chunk(3), up.weight.chunk(3))
                low = down(x)
                q, k, v = (
                    heads(F.linear(x, w, b) + (0.5 * F.linear(low, u) if self.lora else 0)) for w, b, u in pieces
                )
            else:
                y = qkv(x)
                q, k, v = self.parts(y + 0.5 * up(down(x)) if self.lora else y)
            x = x + out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x.mean(1)


def fused(model, **options):
    recorder = Recorder({"r": 6, "min_tokens": 4, **options})
    torch.manual_seed(1)
    kinds = torch.randn(B, 3, C)
    x = kinds.gather(1, torch.randint(3, (B, N, 1)).expand(-1, -1, C))
    with torch.no_grad():
        got = recorder.run(model, x)
        dense = model(x)
    return got, dense, recorder.reports[0]


@cache
def fused_separately(attention, lora):
    """The same with three layers of their own."""
    expected, _, report = fused(Net(None, lora, separate=True).eval(), attention=attention, **ONLY_SIMILARITY)
    return expected, report


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("attention", ["approx", "current"])
@pytest.mark.parametrize("name", TAKEN_APART)
def test_every_spelling_of_a_projection_costs_the_same(name, attention, lora):
    """As much as three layers of their own, and gives what these give."""
    got, dense, report = fused(Net(TAKEN_APART[name], lora).eval(), attention=attention, **ONLY_SIMILARITY)
    expected, separate = fused_separately(attention, lora)
    assert report.removed == 24 == separate.removed
    assert report.macs_after == separate.macs_after
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got, dense, atol=1e-5, rtol=1e-5)
