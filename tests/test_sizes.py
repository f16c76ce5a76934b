"""Numbers of tokens that vary: one compilation serves images of every size."""

from __future__ import annotations

import copy
import re
import warnings
from dataclasses import dataclass

import pytest
import sympy
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional as F
from torch.utils._sympy.functions import FloorDiv

import mctf_compile
from mctf_compile.compiler import fuse_or_decline
from mctf_compile.config import FusionConfig
from mctf_compile.dynamic import Adjustable
from mctf_compile.methods import METHODS, Choice, Combine, Evidence, Merging, Site
from mctf_compile.passes.analysis.sizes import Sizes
from mctf_compile.passes.axes import AxisTable, product, quotient, size_of
from mctf_compile.passes.planning.counts import new_symbol
from mctf_compile.testing import TinyViT, VitSpec
from mctf_compile.testing.models import repeated_patches

PATCH = 4
# Rows and columns of patches; the first is what the model is compiled for.
SIZES = [(4, 6), (4, 4), (6, 4), (8, 8), (10, 6), (3, 3), (12, 12), (16, 8), (7, 9), (5, 2), (9, 15)]
FEW = [(4, 6), (7, 7), (3, 8)]


class Resizing(nn.Module):
    """A small ViT for images of any size, whose table of positions is resampled; without one unless ``position``."""

    def __init__(self, position: bool = False, **spec: object) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.vit = TinyViT(VitSpec(**spec))
        self.table = nn.Parameter(torch.randn(1, self.vit.spec.width, 4, 4) * 0.2) if position else None
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        vit = self.vit
        x = vit.embed(images)
        if self.table is not None:
            x = x + F.interpolate(self.table, size=x.shape[-2:], mode="bicubic")
        x = x.flatten(2).transpose(1, 2)
        if vit.spec.prefix:
            x = torch.cat([vit.prefix.expand(x.shape[0], -1, -1), x], 1)
        if vit.spec.suffix:
            x = torch.cat([x, vit.suffix.expand(x.shape[0], -1, -1)], 1)
        for block in vit.blocks:
            x = block(x, None)
        return vit._read(vit.norm(x), None)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    # Static compiles to compare with: all of one forward function.
    with torch._dynamo.config.patch(recompile_limit=100):
        yield


def images(rows: int, columns: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 100 + columns)
    return torch.randn(batch, 3, rows * PATCH, columns * PATCH, generator=generator)


def once(model: nn.Module, given: list[Tensor], **options: object) -> list[Tensor]:
    """The outputs of one compilation for inputs of several sizes; fails where another is made."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="mctf", options={"inner": "eager", **options}, dynamic=True)
    outputs = [compiled(given[0])]
    with torch._dynamo.config.patch(error_on_recompile=True):
        return outputs + [compiled(x) for x in given[1:]]


def static(model: nn.Module, x: Tensor, **options: object) -> Tensor:
    options = {**options, "inner": "eager"}
    torch._dynamo.reset()
    with warnings.catch_warnings():
        # The smallest are dense.
        warnings.simplefilter("ignore")
        return torch.compile(copy.deepcopy(model), backend="mctf", options=options, dynamic=False)(x)


def assert_each_as_static(model: nn.Module, sizes: list[tuple[int, int]], fuses_at: int = 0, **options: object) -> None:
    given = [images(*size) for size in sizes]
    with torch.no_grad():
        outputs = once(model, given, **options)
        for x, got in zip(given, outputs, strict=True):
            want = static(model, x, **options)
            torch.testing.assert_close(got, want, rtol=0, atol=2e-5, msg=lambda m, x=x: f"{tuple(x.shape)}: {m}")
        assert (outputs[fuses_at] - model(given[fuses_at])).abs().max() > 1e-3, "nothing was fused"


REQUESTS = [
    {"r": 3},
    {"r": [0, 5, 2], "method": "tome"},
    {"r": 7, "min_tokens": 20},
    {"r": "fast", "min_tokens": 1},
]


def test_eleven_sizes_through_one_compilation():
    assert len(SIZES) == 11
    assert_each_as_static(Resizing(position=True), SIZES, r=0.3, method="tome")


@pytest.mark.parametrize("options", REQUESTS, ids=str)
def test_every_kind_of_r(options):
    assert_each_as_static(Resizing(position=True), FEW, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "tofu", "r": 3},
        {"method": "pitome", "r": 3},
        {"method": "evit"},
        {"method": "idlevit"},
        {"attention": "exact", "r": 3, "min_tokens": 1},
        {"attention": "current", "r": 3, "min_tokens": 1},
        {"pooling": "max", "matching": "one_way", "r": 3, "min_tokens": 1},
    ],
    ids=str,
)
def test_other_methods(options):
    assert_each_as_static(Resizing(), FEW, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "evit", "keep_rate": 0.95},
        {"method": "evit", "keep_rate": 0.9},
        {"method": "idlevit", "keep_ratio": 0.95},
    ],
    ids=str,
)
def test_the_first_size_may_be_one_at_which_no_token_leaves(options):
    """Of 15 patches all stay, or one of them as the token of those that do not; what is traced there holds for more."""
    assert_each_as_static(Resizing(), [(3, 5), (6, 5), (9, 9)], fuses_at=1, **options)


@pytest.mark.parametrize(
    "spec",
    [
        {"spelling": "mha", "prefix": 0, "head": "mean"},
        {"spelling": "flat", "prefix": 0, "head": "dense"},
        {"spelling": "softmax", "prefix": 2, "suffix": 2, "head": "mean"},
        {"spelling": "einsum", "head": "spread"},
        {"extra": "cross_covariance", "head": "weights"},
        {"skip": "cat", "head": "map"},
        {"norm": "parallel", "mlp": "swiglu", "head": "class_attention"},
    ],
    ids=str,
)
def test_other_models(spec):
    assert_each_as_static(Resizing(**spec), FEW, method="tome", r=2, inner="aot_eager")


@pytest.mark.parametrize("spec", [{}, {"prefix": 0, "head": "spread"}, {"head": "dense"}], ids=str)
def test_duplicates_are_lossless_at_every_size(spec):
    model = Resizing(**spec)
    # Of three kinds of patches no block has as many different tokens as it leaves.
    sizes = ((6, 4), (9, 5), (6, 6))
    given = [repeated_patches(2, n, 3, seed=n)[..., : PATCH * m].contiguous() for n, m in sizes]
    with torch.no_grad():
        for x, got in zip(given, once(model, given, r=4, min_tokens=1, tau_info=0, tau_size=0), strict=True):
            torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)


def test_inductor_compiles_blocks_once_for_all_sizes():
    model = Resizing(position=True, depth=2)
    given = [images(*size) for size in FEW]
    with torch.no_grad():
        for x, got in zip(given, once(model, given, inner="inductor", method="tome", r=2), strict=True):
            torch.testing.assert_close(got, static(model, x, method="tome", r=2), rtol=0, atol=2e-5)


def test_gradients_at_every_size():
    model = Resizing(position=True).train()

    def gradients(output: Tensor) -> list[Tensor]:
        model.zero_grad()
        output.square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    given = [images(*size) for size in FEW]
    outputs = once(model, given, inner="aot_eager", method="tome", r=3)
    for x, output in zip(given, outputs, strict=True):
        torch._dynamo.reset()
        reference = torch.compile(
            model, backend="mctf", options={"inner": "eager", "method": "tome", "r": 3}, dynamic=False
        )
        for got, want in zip(gradients(output), gradients(reference(x)), strict=True):
            assert (got - want).abs().max() <= 2e-5 * want.abs().max().clamp(min=1e-3)


def test_r_and_size_change_together():
    model = Resizing()
    options = {"inner": "eager", "dynamic_r": True, "method": "tome", "r": 2}
    compiled = torch.compile(model, backend="mctf", options=options, dynamic=True)
    with torch.no_grad():
        got = {}
        for size in FEW:
            for r in (2, 0, 5, 0.4):
                mctf_compile.set_r(compiled, r)
                got[size, r] = compiled(images(*size))
        for (size, r), output in got.items():
            torch.testing.assert_close(output, static(model, images(*size), method="tome", r=r), rtol=0, atol=2e-5)


def planned(model: nn.Module, size: tuple[int, int] = (4, 6), **options: object):
    """What the passes find of a model whose size is symbolic, and the report."""
    found = []

    def take(gm, inputs):
        found.append(fuse_or_decline(gm, inputs, FusionConfig(**{"inner": "eager", **options})))
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=take, dynamic=True)(images(*size))
    return found[0]


@pytest.mark.parametrize("request_", [3, 0.35, 0.1, 1 / 3, [2, 0.29, 0.57]], ids=str)
def test_what_is_left_is_whole_numbers_at_every_size(request_):
    state, _ = planned(Resizing(), method="tome", r=request_, min_tokens=6)
    remaining = Adjustable(state, lambda: None, lambda: None).remaining
    for rows in range(2, 40, 3):
        for columns in range(2, 40, 5):
            tokens, want = 1 + rows * columns, []
            for r in request_ if isinstance(request_, list) else [request_] * 3:
                free = tokens - 1
                r = int(r * free) if isinstance(r, float) else r
                tokens -= max(min(r, free // 2, tokens - 6), 0)
                want.append(tokens)
            assert remaining(request_, (rows * PATCH, columns * PATCH)) == want, (rows, columns)


def test_the_report_is_of_the_size_of_the_example():
    _, report = planned(Resizing(), method="tome", r=5)
    assert [(b.tokens_in, b.tokens_out) for b in report.blocks] == [(25, 20), (20, 15), (15, 10)]
    _, same = planned_static(Resizing(), method="tome", r=5)
    assert report.macs_before == same.macs_before and report.macs_after == same.macs_after
    assert report.macs_by_block == same.macs_by_block


def test_tiles_are_those_of_a_known_grid():
    _, report = planned(Resizing(), method="tome", r=5, span="branch", partition=(2, 2))
    note = "the grid of these tokens differs from call to call, so every second one receives others"
    assert report.fused and [note in b.note for b in report.blocks] == [True] * 3
    assert_each_as_static(Resizing(), FEW, method="tome", r=5, span="branch")


def planned_static(model: nn.Module, **options: object):
    return None, mctf_compile.explain(model, images(4, 6), inner="eager", **options)


def test_where_a_method_would_do_nothing_the_model_runs_as_it_is():
    model = Resizing(head="dense")
    given = [images(8, 8), images(2, 2)]
    with torch.no_grad():
        fused, small = once(model, given, method="evit", keep_rate=0.9)
        # Of four patches all stay, where the graph would scale one as the token of the others.
        torch.testing.assert_close(small, model(given[1]), rtol=0, atol=0)
        assert not torch.allclose(fused, model(given[0]), atol=1e-3)


class TwoKinds(nn.Module):
    """Image tokens and others behind them, as many as are given of either."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = TinyViT(VitSpec(prefix=0, head="mean", depth=2))

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        x = torch.cat([x, other], 1)
        for block in self.vit.blocks:
            x = block(x, None)
        return x.mean(1)


def test_two_parts_that_vary_are_dense_with_the_reason():
    model = TwoKinds().eval()
    options = {"inner": "eager", "method": "tome", "r": 2}
    compiled = torch.compile(model, backend="mctf", options=options, dynamic=True)
    with torch.no_grad():
        with pytest.warns(UserWarning, match="several parts whose numbers vary"):
            compiled(torch.randn(2, 10, 16), torch.randn(2, 7, 16))
        given = torch.randn(2, 12, 16), torch.randn(2, 9, 16)
        torch.testing.assert_close(compiled(*given), model(*given), atol=1e-5, rtol=1e-5)


def test_sizes_are_those_of_the_inputs():
    env = ShapeEnv(duck_shape=False)
    number, size = (new_symbol(env, name, hint) for name, hint in (("n", 5), ("h", 24)))
    with FakeTensorMode(shape_env=env):
        sizes = Sizes.of([number, torch.empty(2, size)])
    n, h = (size_of(x) for x in (number, size))
    assert sizes.read([7, torch.empty(2, 9)]) == (7, 9) and sizes.hints == {n: 5, h: 24}
    assert sizes.known(n * h + 1) and not sizes.known(n + size_of(env.create_unbacked_symint()))


def test_a_graph_by_itself_fuses_a_fixed_number():
    def take(gm, inputs):
        found.append(mctf_compile.rewrite(gm, inputs, FusionConfig(r=2))[1].reason)
        return gm.forward

    found: list[str | None] = []
    with torch.no_grad():
        torch.compile(Resizing(), backend=take, dynamic=True)(images(4, 6))
    assert found[0] is not None and "a graph by itself fuses a fixed number" in found[0]


@dataclass(frozen=True)
class Counting(Merging):
    """Drops the last tokens, by Python's own numbers."""

    name = "counting"
    source = "none"
    site = Site.BETWEEN

    def choose(self, evidence: Evidence, r: int) -> Choice:
        position = torch.arange(evidence.x.shape[1], device=evidence.x.device).expand(len(evidence.x), -1)
        return Choice(position[:, : len(position[0]) - int(r)], position[:, len(position[0]) - int(r) :], None,
                      combine=Combine.DROP)  # fmt: skip


def test_a_method_that_decides_by_the_number_leaves_the_model_dense(monkeypatch):
    monkeypatch.setitem(METHODS, "counting", Counting)
    model = Resizing()
    options = {"inner": "eager", "method": "counting", "r": 2}
    compiled = torch.compile(model, backend="mctf", options=options, dynamic=True)
    with (
        torch.no_grad(),
        pytest.warns(UserWarning, match=r"cannot choose another number .*line \d+ of .*test_sizes.py"),
    ):
        torch.testing.assert_close(compiled(images(4, 6)), model(images(4, 6)))


class Strict(Resizing):
    """Its message about a size asks for the number, so that Dynamo compiles it anew for each."""

    def forward(self, images: Tensor) -> Tensor:
        torch._check_is_size(images.shape[0], f"a height of {images.shape[2]}")
        return super().forward(images)


@pytest.mark.parametrize(
    "kind, dynamic, remedy",
    [(Resizing, False, "dynamic=True"), (Strict, True, "a height of .*test_sizes.py")],
    ids=["static", "fixed"],
)
def test_the_last_size_that_dynamo_compiles_is_said(kind, dynamic, remedy):
    model = kind()
    compiled = torch.compile(
        model, backend="mctf", options={"inner": "eager", "r": 2, "min_tokens": 1}, dynamic=dynamic
    )
    said = []
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=3):
        for rows in range(3, 8):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                compiled(images(rows, rows + 1))
            said.append([str(w.message) for w in caught if "recompile_limit" in str(w.message)])
    assert [len(messages) for messages in said] == [0, 0, 1, 0, 0]
    assert re.search(remedy, said[2][0]), said[2][0]


def test_one_graph_for_all_sizes_says_nothing_of_limits():
    with torch._dynamo.config.patch(recompile_limit=3), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        once(Resizing(), [images(*size) for size in SIZES], r=3)


def test_regions_compute_numbers_with_a_fraction_themselves():
    # Numbers that are attributes of modules, as the scales here, are symbols under dynamic=True.
    state, report = planned(Resizing(), inner="inductor", kernels="aten", method="tome", r=2)
    assert report.fused and state.cut is not None


s, h, w = (sympy.Symbol(name, integer=True, positive=True) for name in "shw")


def test_an_axis_of_any_size_is_cut_at_places_from_either_end():
    table = AxisTable()
    tokens = table.fresh(s)
    table.cut(tokens, [1, s - 2])
    first, body, last = (table.slice(tokens, a, b) for a, b in ((0, 1), (1, s - 2), (s - 2, s)))
    assert [product(dim) for dim in (first, body, last)] == [1, s - 3, 2]
    assert table.slice(tokens, 1, s) is not None and table.slice(tokens, 2, s) is None
    # At a place that no number tells it is not.
    other = table.fresh(s)
    table.cut(other, [h])
    assert table.slice(other, 0, h) is None


def test_sizes_of_grids_divide():
    rows, columns = FloorDiv(h, 4), FloorDiv(w, 4)
    assert quotient(2 * rows * columns, rows) == 2 * columns
    assert quotient(rows * columns + 1, rows) is None
    assert quotient(s, 2) is None
