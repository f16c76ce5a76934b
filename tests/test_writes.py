"""Writes into tensors that the graph has made are replaced, whatever view they go through; others stay declined."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import mctf_compile
from mctf_compile.passes.analysis.mutations import still_written
from mctf_compile.passes.analysis.normalize import fake_inputs, normalize
from mctf_compile.testing import Recorder
from mctf_compile.testing.soundness import ONLY_SIMILARITY


def assigned(x):
    y = x.clone()
    y[:, 1:3] = x.flip(0)[:, 1:3]
    return y


def added(x):
    y = x * 1
    y[:, 0] += 1
    y[:, 0] *= y[:, 1]
    return y


def masked(x):
    y = x.clone()
    y[y > 0] = 0.5
    y[x[:, :, 0] > 1] = 2.0
    return y


def strided(x):
    y = x.clone()
    y[:, ::2, 1:-1] = 3.0
    y[..., -1] = x[..., 0]
    return y


def view_read_later(x):
    y = x.clone()
    first, rest, flat = y[:, 0], y[:, 1:], y.view(x.shape[0], -1)
    y[:, :2] = 0.0
    first.add_(1)
    flat[:, -3:] *= 2
    return first.sum(-1), rest, flat, y.mT


def viewed_by_what_comes_later(x):
    y = x.clone()
    y.add_(1)
    like = x[:, :3].flip(0)
    return y[:, :3].reshape_as(like), y.to(like), y.expand_as(x * 2)


def through_transposes(x):
    y = x.clone()
    y.mT[:, 0].copy_(x[:, :, 1])
    y.permute(2, 0, 1)[1] = x[:, :, 2]
    y.unsqueeze(0)[0, :, 2].zero_()
    return y


def through_parts(x):
    y = x.clone()
    a, b = y.chunk(2, 1)
    a.mul_(2)
    rows = y.unbind(0)
    rows[0].sub_(1)
    c, d = y.split([1, y.shape[1] - 1], 1)
    d.neg_()
    return y, a, b + 1, rows[1], c


def reshaped(x):
    y = x.clone()
    y.view(-1)[:7] = 1.0
    y.reshape(x.shape[0], -1)[:, 3].neg_()
    y.flatten(1).unflatten(1, x.shape[1:])[:, 2].exp_()
    return y


def of_itself(x):
    y = x.clone()
    y[:, 1:] = y[:, :-1] + 1
    y[:, :-1].add_(y[:, 1:])
    return y, y[:, 0]


def of_another_dtype(x):
    y = x.long()
    y[:, 0] = x[:, 1] * 3
    y[:, 1] += (x[:, 1] * 3).int()
    return y


def one_after_another(x):
    y = torch.zeros_like(x)
    for i in range(x.shape[1]):
        y[:, i] = y[:, i - 1] * 0.5 + x[:, i]
    return y


PROGRAMS = [
    assigned,
    added,
    masked,
    strided,
    view_read_later,
    viewed_by_what_comes_later,
    through_transposes,
    through_parts,
    reshaped,
    of_itself,
    of_another_dtype,
    one_after_another,
]


# Written to after it was saved for the backward pass; through one of several views; of whole numbers.
WITHOUT_GRADIENT = (added, through_parts, of_another_dtype)


class Model(nn.Module):
    def __init__(self, program):
        super().__init__()
        self.program = program

    def forward(self, x):
        return self.program(x)


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_write_is_left_and_none_is_lost(program):
    captured = []
    torch._dynamo.reset()
    x = torch.randn(2, 4, 6)

    def backend(gm: fx.GraphModule, inputs):
        normal = normalize(gm, fake_inputs(gm, inputs))
        captured.append(normal)
        return normal

    """Values and gradients are those of the program, where PyTorch has any through its writes."""
    gradients, results = [], []
    for run in (program, torch.compile(Model(program), backend=backend, fullgraph=True)):
        given = x.clone().requires_grad_(program not in WITHOUT_GRADIENT)
        results.append(run(given))
        if given.requires_grad:
            outputs = results[-1] if isinstance(results[-1], tuple) else (results[-1],)
            gradients.append(torch.autograd.grad(sum((y * y.detach()).sum() for y in outputs), given)[0])
    assert not still_written(captured[0].graph)
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    assert not gradients or torch.equal(*gradients)


class Blocks(nn.Module):
    """Three blocks of attention in which ``write`` makes the projection of tokens [B, 1 + N, C]."""

    def __init__(self, write) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in range(3))
        self.mlp = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.register_buffer("held", torch.zeros(2, 25, 48))
        self.write = write

    def forward(self, x):
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        for qkv, mlp in zip(self.qkv, self.mlp):
            q, k, v = (t.unflatten(2, (2, 8)).transpose(1, 2) for t in self.write(self, x, qkv(x)).chunk(3, -1))
            x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + mlp(x).relu()
        return x[:, 0]


def of_channels(self, x, y):
    y[:, :, :16] += 0.1 * x
    y[..., 32:].mul_(0.5)
    return y


def of_the_class_token(self, x, y):
    y[:, 0] = 0.5
    return y


def of_all_others(self, x, y):
    y[:, 1:] *= 0.5
    y[:, :1] += 1
    return y


def of_what_is_large(self, x, y):
    y[y > 1] = 1.0
    return y


def of_one_token(self, x, y):
    y[:, 5] += 1
    return y


def of_half_of_them(self, x, y):
    y[:, 1:13] = 0.5
    return y


# Whether each fuses without giving tokens back.
FUSES = {
    of_channels: True,
    of_the_class_token: True,
    of_all_others: True,
    of_what_is_large: True,
    of_one_token: False,
    of_half_of_them: False,
}


@pytest.mark.parametrize("attention", ["approx", "exact", "current"])
@pytest.mark.parametrize("write", FUSES)
def test_writes_into_parts_of_fused_tokens(write, attention):
    kinds = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(3))
    x = kinds[:, torch.arange(24) % 3].contiguous()
    recorder = Recorder({"r": 6, "attention": attention, "min_tokens": 1, **ONLY_SIMILARITY})
    with torch.no_grad():
        got = recorder.run(Blocks(write), x)
        torch.testing.assert_close(got, Blocks(write)(x), atol=1e-5, rtol=1e-5)
    (report,) = recorder.reports
    if FUSES[write]:
        assert report.removed == 12 and not report.unmerged


def into_an_input(self, x, y):
    """Its caller sees the write, and so does the view of it that is read."""
    seen = self.given[:, 0]
    self.given[:, 1:3] = 1.0
    return y + seen.sum() + self.given.sum()


def into_a_buffer(self, x, y):
    seen = self.held[:, 0]
    self.held[:, :, 1:3] += y[:, :, 1:3]
    return y + seen.sum()


def into_repeated_memory(self, x, y):
    z = y[:, :1].clone()
    z.expand(-1, 3, -1)[:, 0].mul_(0.5)
    return y * z


@pytest.mark.parametrize("write", [into_an_input, into_a_buffer, into_repeated_memory])
def test_what_others_see_in_memory_stays_declined(write):
    class Given(Blocks):
        def forward(self, x, given):
            self.given = given
            y = super().forward(x)
            self.given = None
            return y

    x, given = torch.randn(2, 24, 16), torch.zeros(2, 5, 3)
    report = mctf_compile.explain(Given(write), x, given.clone(), r=4)
    assert not report.fused and "writes into" in report.reason
    expected, mine = given.clone(), given.clone()
    dense, model = Given(write), Given(write)
    torch._dynamo.reset()
    with torch.no_grad():
        wanted = dense(x, expected)
        got = torch.compile(model, backend="mctf", options={"r": 4, "inner": "eager"})(x, mine)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(mine, expected)
    torch.testing.assert_close(model.held, dense.held)


def test_a_mask_that_is_written_to_where_nothing_depends_on_inputs_is_no_constant():
    """Such writes stay in the graph; what the mask was made as does not tell what it is."""

    class Masked(Blocks):
        def forward(self, x):
            mask = torch.ones(24, 24, dtype=torch.bool)
            mask[:, 3:9] = torch.eye(24, dtype=torch.bool)[:, 3:9]
            for qkv in self.qkv:
                q, k, v = (t.unflatten(2, (2, 8)).transpose(1, 2) for t in qkv(x).chunk(3, -1))
                x = x + F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
            return x

    report = mctf_compile.explain(Masked(None), torch.randn(2, 24, 16), r=4)
    assert not report.fused and "masked by pairs" in report.reason


class Blank(nn.Module):
    """A block, and a dropout of everything that is written in place: it makes a number of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.mlp = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + F.gelu(self.mlp(x))
        return x.mean(1) + torch.ops.aten.feature_alpha_dropout_(x.mean(1), 1.0, True)


def test_a_write_of_what_makes_a_number_of_its_own_is_followed():
    torch._dynamo.reset()
    x = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0)).repeat_interleave(4, 1)
    model = Blank().eval()
    options = {"method": "tome", "r": 4, "min_tokens": 1, "inner": "eager", "strict": True}
    with torch.no_grad():
        got = torch.compile(model, backend="mctf", options=options, dynamic=False)(x)
        torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)
