"""Looking at a model changes nothing: not the model, not the random state, not what Dynamo has compiled."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from functools import partial

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.utils import counters
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import mctf_compile
from mctf_compile import ConfigError
from mctf_compile.capture import capture
from mctf_compile.passes.analysis.blocks import GIVEN
from mctf_compile.testing import assert_rewrite_sound, check_rewrite

TOKENS = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def nothing(model: nn.Module, x: Tensor) -> None:
    """What a model does between its blocks."""


@torch.compiler.disable
def graph_break(model: nn.Module, x: Tensor) -> None:
    model.seen.append(x)
    model.table["last"] = x
    model.count.add_(1)
    model.latest = model.latest + random.random() + numpy.random.rand() + torch.rand(())


def asks_for_a_value(model: nn.Module, x: Tensor) -> None:
    if x.sum() > 1e9:
        raise AssertionError


class Net(nn.Module):
    """Three blocks of attention with everything that a run leaves traces in; ``between`` follows the second."""

    def __init__(self, between: Callable[[nn.Module, Tensor], None] = nothing) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(16)
        self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in range(3))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.1)) for _ in range(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("latest", torch.zeros(3))
        self.last, self.seen, self.table, self.between = None, [], {}, between

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        self.last = x
        self.latest = self.latest + 1
        x = self.norm(x.flatten(0, 1)).view_as(x)
        x = self.block(1, self.block(0, x))
        self.between(self, x)
        x = self.block(2, x)
        return x.mean(1) if scale is None else x.mean(1) * scale

    def block(self, i: int, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (2, 8)).transpose(1, 2) for t in self.qkv[i](x).chunk(3, -1))
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.mlp[i](x)


def entries() -> list[object]:
    return _debug_get_cache_entry_list(Net.forward.__code__)


def state(model: Net) -> dict[str, object]:
    """All that a call of the model changes, as values to compare."""
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "tensors": {name: (id(tensor), tensor._version, tensor.tolist()) for name, tensor in held.items()},
        "python": (id(model.last), list(model.seen), dict(model.table), [m.training for m in model.modules()]),
        "random": (torch.get_rng_state().tolist(), random.getstate(), repr(numpy.random.get_state())),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "counters": {name: dict(counter) for name, counter in counters.items() if counter},
    }


BETWEEN = pytest.mark.parametrize("between", [nothing, graph_break, asks_for_a_value], ids=lambda f: f.__name__)


@BETWEEN
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("compiled_before", [True, False], ids=["compiled", "new"])
def test_a_look_leaves_the_world_as_it_was(between, training, compiled_before):
    model = Net(between).train(training)
    compiled = torch.compile(model, backend="eager", dynamic=False)
    if compiled_before:
        compiled(TOKENS)
    before = state(model)
    reports = [mctf_compile.explain(model, TOKENS, r=2) for _ in range(3)]
    assert state(model) == before
    assert all(report.fused for report in reports) and len({str(report) for report in reports}) == 1
    if compiled_before:
        with torch._dynamo.config.patch(error_on_recompile=True):
            compiled(TOKENS)
    else:
        assert not entries()


@BETWEEN
def test_attaching_changes_nothing_else(between):
    model = Net(between).train()
    before = state(model)
    mctf_compile.attach(model, TOKENS, method="dtem")
    new = {name for name in model.state_dict() if name.startswith("mctf_dtem.")}
    assert new
    tensors = state(model).pop("tensors")
    assert {name: value for name, value in tensors.items() if name not in new} == before["tensors"]
    assert (model.last, model.seen, model.table) == (None, [], {})


def test_graph_breaks_are_looked_past():
    found = capture(Net(graph_break), (TOKENS,), {}, lambda gm, inputs: len(list(gm.graph.nodes))).found
    whole = capture(Net(), (TOKENS,), {}, lambda gm, inputs: len(list(gm.graph.nodes))).found
    assert len(whole) == 1 and len(found) > 1 and max(found) < whole[0]


def test_a_report_says_where_the_model_breaks():
    report = mctf_compile.explain(Net(graph_break), TOKENS, r=2)
    (remark,) = report.remarks
    # Two blocks before the break, one behind it.
    assert len(report.blocks) == 2 and "2 graphs of the model, 2 of them with attention" in remark
    line = 1 + open(__file__).read().splitlines().index("        self.between(self, x)")
    assert f"a graph break at line {line} of {__file__} (Skip" in remark


def test_the_graph_with_attention_is_the_one_reported():
    """Whatever else there is more of."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.net = nn.Linear(16, 100_000), Net()

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.wide(x).sum(-1, keepdim=True)
            nowhere()
            return self.net(x)

    report = mctf_compile.explain(Model(), TOKENS, r=2)
    assert len(report.blocks) == 3 and "2 graphs of the model, 1 of them with attention" in report.remarks[0]


@torch.compiler.disable
def nowhere() -> None:
    pass


def test_a_model_that_asks_for_values_is_followed_on_a_copy():
    """A break in a branch that only values decide; the model itself is left as it was, as the look above has it."""

    def branch(model: nn.Module, x: Tensor) -> None:
        if x.abs().sum() > 0:
            model.seen.append("taken")

    model = Net(branch)
    found = capture(model, (TOKENS,), {}, lambda gm, inputs: gm)
    assert found.stopped is None and len(found.found) > 2
    (at,) = found.breaks
    assert __file__ in at.place and at.why == "Data-dependent branching"
    assert model.seen == []


def test_a_look_that_ends_before_the_model_says_where():
    model = Net(asks_for_a_value)
    # A function may hold what it likes, and is not copied.
    report = mctf_compile.explain(lambda x: model(x), TOKENS, r=2)
    # Of the two blocks before it.
    assert len(report.blocks) == 2
    remark = report.remarks[-1]
    assert __file__ in remark and "needs the values of tensors" in remark and "up to a graph break" in remark


def test_compiling_names_the_break():
    model = Net(graph_break).eval()
    with torch.no_grad(), pytest.warns(UserWarning, match=r"cuts the model by a graph break at line \d+ of .*test_cap"):
        torch.compile(model, backend="mctf", options={"r": 2, "inner": "eager"})(TOKENS)


class Packed(nn.Module):
    """Attention that asks for the numbers of tokens of several images, as the vision towers of Qwen2-VL."""

    def __init__(self, plain: bool = False) -> None:
        super().__init__()
        self.qkv, self.out, self.plain = nn.Linear(16, 48), nn.Linear(16, 16), plain

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        parts = self.qkv(x).unflatten(1, (3, 2, 8)).permute(1, 2, 0, 3).unbind(0)
        numbers = ends.diff().tolist()
        images = zip(*(t.split(numbers, 1) for t in parts))
        return self.out(torch.cat([self.attend(*image) for image in images], 1).transpose(0, 1).flatten(1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.plain:
            return (q @ k.mT * 8**-0.5).softmax(-1) @ v
        return F.scaled_dot_product_attention(q[None], k[None], v[None])[0]


class PackedNet(nn.Module):
    def __init__(self, plain: bool = False) -> None:
        super().__init__()
        self.attention = nn.ModuleList(Packed(plain) for _ in range(2))
        self.mlp = nn.ModuleList(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 999), nn.Linear(999, 16)) for _ in "ab")

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        for attention, mlp in zip(self.attention, self.mlp):
            x = x + attention(x, ends)
            x = x + mlp(x)
        return x


ENDS = torch.tensor([0, 24, 40])
BREAK = 1 + open(__file__).read().splitlines().index("        numbers = ends.diff().tolist()")


@pytest.mark.parametrize("plain", [False, True], ids=["one", "three"])
def test_attention_behind_a_break_is_named_with_the_break_and_its_remedy(plain):
    report = mctf_compile.explain(PackedNet(plain).eval(), torch.randn(40, 16), ENDS, r=2)
    assert report.reason == GIVEN and len(report.blocks) == 2
    (remark,) = report.remarks
    assert "graphs of the model, 1 of them with attention" in remark
    assert remark.count(f"line {BREAK} of {__file__}") == 1
    assert remark.count("torch._dynamo.config.capture_scalar_outputs = True") == 1


def test_compiling_names_a_break_between_attention_and_its_tokens():
    model = PackedNet().eval()
    compiled = torch.compile(model, backend="mctf", options={"r": 2, "inner": "eager"})
    x = torch.randn(40, 16)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        torch.testing.assert_close(compiled(x, ENDS), model(x, ENDS))
    said = [str(w.message) for w in caught if str(w.message).startswith("mctf:")]
    assert len(said) == len(set(said)) == 2 and all(f"line {BREAK} of {__file__}" in line for line in said)
    assert "no self-attention" in said[0] and "capture_scalar_outputs = True" in said[0]
    assert GIVEN in said[1]


def test_attention_of_two_inputs_that_layers_read_is_in_one_graph():
    """Queries and keys that the graph itself makes are no others'."""
    layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def cross(x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (layer(t) for layer, t in zip(layers, (x, y, y)))
        return x + F.scaled_dot_product_attention(q, k, v)

    report = mctf_compile.explain(cross, TOKENS, torch.randn(2, 20, 16), r=2)
    assert not report.blocks and report.reason == "the graph has no self-attention over tokens"


def test_a_block_that_is_compiled_alone_says_how_to_fuse_it():
    model = Net().eval()
    reports = [mctf_compile.explain(partial(model.block, 0), TOKENS, r=2, **layers) for layers in ({}, {"layers": [0]})]
    assert "compile the model as one, or give layers=[0]" in reports[0].blocks[0].reason and reports[1].fused


def test_what_cannot_be_followed_at_all_is_an_error():
    def first(x: Tensor) -> Tensor:
        return x.nonzero() if bool(x) else x

    with pytest.raises(mctf_compile.MctfError, match=r"captured no graph of this model: line .* needs the values"):
        mctf_compile.explain(first, torch.ones(()))


def test_errors_come_as_they_are():
    model = Net()
    with pytest.raises(ConfigError, match="r is a list of 1 entries"):
        mctf_compile.explain(model, TOKENS, r=[1])
    for between in (nothing, graph_break):
        with pytest.raises(Exception, match=r"size|shape"):
            mctf_compile.explain(Net(between), torch.zeros(2, 12, 15))


def test_constants_are_those_of_the_model():
    """A look knows the values of buffers, as compilation does."""

    class Masked(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.qkv = nn.Linear(16, 48)
            bias = torch.zeros(12, 12)
            bias[:6, 6:] = value
            self.register_buffer("bias", bias)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                q, k, v = (t.unflatten(2, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
                x = x + F.scaled_dot_product_attention(q, k, v, self.bias).transpose(1, 2).flatten(2)
            return x.mean(1)

    reasons = [
        {b.reason for b in mctf_compile.explain(Masked(v).eval(), TOKENS, method="tome", r=2).blocks}
        for v in (0.5, float("-inf"))
    ]
    assert reasons[0] == {None} and "masked by pairs of tokens" in reasons[1].pop()


def test_inputs_by_name():
    model, scale = Net().eval(), torch.tensor(2.0)
    positional = mctf_compile.explain(model, TOKENS, scale, r=2)
    named = [
        mctf_compile.explain(model, kwargs={"x": TOKENS, "scale": scale}, r=2),
        mctf_compile.explain(model, TOKENS, kwargs={"scale": scale}, r=2),
    ]
    assert {str(report) for report in named} == {str(positional)}
    with torch.no_grad():
        assert assert_rewrite_sound(model, kwargs={"x": TOKENS, "scale": scale}, r=2).removed == positional.removed
        assert check_rewrite(model, TOKENS, kwargs={"scale": scale}, r=2).report.removed == positional.removed
    assert hasattr(mctf_compile.attach(Net(), kwargs={"x": TOKENS}, method="dtem"), "mctf_dtem")


def test_a_graph_takes_inputs_by_name():
    gm = make_fx(Net().eval(), pre_dispatch=True, tracing_mode="fake", _allow_non_fake_inputs=True)(TOKENS)
    (name,) = (n.target for n in gm.graph.find_nodes(op="placeholder"))
    fused, report = mctf_compile.rewrite(gm, [], kwargs={name: TOKENS})
    assert report.fused and fused is not gm
    with pytest.raises(TypeError, match=rf"kwargs has \['y'\], where the graph has the inputs \['{name}'"):
        mctf_compile.rewrite(gm, [], kwargs={"y": TOKENS})
