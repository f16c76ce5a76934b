"""Towers: blocks are numbered, scheduled and counted along one residual stream, however many streams a graph has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from mctf_compile import ConfigError, FusionConfig, Report, explain, rewrite
from mctf_compile.errors import cause_of
from mctf_compile.testing import TinyViT, VitSpec

METHODS: list[dict[str, Any]] = [
    {"r": 3},
    {"r": 3, "attention": "exact"},
    {"r": 3, "attention": "current"},
    {"method": "tome", "r": 3},
    {"method": "tome", "r": 0.4},
    {"method": "tofu", "r": [2, 3, 1]},
    {"method": "pitome", "r": 3},
    {"method": "evit", "keep_rate": 0.7},
    {"method": "idlevit", "keep_ratio": 0.7},
]
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def vit(seed: int = 0, **changes: Any) -> TinyViT:
    torch.manual_seed(seed)
    return TinyViT(VitSpec(**changes)).eval()


class Of(nn.Module):
    """What ``function`` makes of some modules and the inputs."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def fused(model: nn.Module, *inputs: Tensor, **options: Any) -> tuple[Any, Report]:
    """What the rewritten model gives, and the report. A fault of a pass is raised."""
    if "r" in options:
        options = {"min_tokens": 1, **options}
    reports = []

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        graph, report = rewrite(gm, example_inputs, FusionConfig(kernels="aten", **options))
        reports.append(report)
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        result = torch.compile(model.eval(), backend=backend, dynamic=False)(*inputs)
    (report,) = reports
    return result, report


def tokens(report: Report, tower: int = 0) -> list[tuple[int | None, int | None]]:
    return [(b.tokens_in, b.tokens_out) for b in report.blocks if b.tower == tower]


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_a_module_that_runs_several_times_is_reduced_alike(options: dict[str, Any]) -> None:
    net = vit()
    alone, single = fused(net, IMAGES, **options)
    model = Of(lambda m, x, y: (m.net(x), m.net(x), m.net(y)), net=net)
    (a, b, other), report = fused(model, IMAGES, IMAGES.flip(0), **options)
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    torch.testing.assert_close(a, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other, alone.flip(0), rtol=1e-5, atol=1e-5)
    assert single.removed > 0 and [tokens(report, t) for t in range(3)] == [tokens(single)] * 3
    assert [b.index for b in report.blocks] == [0, 1, 2] * 3
    assert report.towers[1] == "tower 1: net.blocks, run 2 of 3"


@pytest.mark.parametrize("options", [{"r": 3}, {"method": "tome", "r": 3}], ids=str)
def test_one_table_of_positions_for_two_images(options: dict[str, Any]) -> None:
    """Adding one tensor to both makes their token axes one; their streams stay two."""
    net = vit(position=True)
    (a, b), report = fused(Of(lambda m, x, y: (m.net(x), m.net(y)), net=net), IMAGES, IMAGES.flip(3), **options)
    for image, got in ((IMAGES, a), (IMAGES.flip(3), b)):
        torch.testing.assert_close(got, fused(net, image, **options)[0], rtol=1e-5, atol=1e-5)
    assert report.removed == 2 * fused(net, IMAGES, **options)[1].removed


def test_a_student_behind_options_of_its_own() -> None:
    def distil(m: Of, x: Tensor) -> Tensor:
        return (m.teacher(x) - m.student(x)).square().mean()

    model = Of(distil, teacher=vit(1, depth=4), student=vit(2, depth=2))
    _, report = fused(model, IMAGES, method="tome", r=3, modules="student")
    assert report.towers == ["tower 0: teacher.blocks", "tower 1: student.blocks"]
    assert [b.removed for b in report.blocks] == [0, 0, 0, 0, 3, 3]
    assert {b.reason for b in report.blocks[:4]} == {"not among the modules that may fuse (student)"}
    assert report.blocks[5].module.startswith("student.blocks.1")
    # A list has an entry for each block of the towers that may fuse, and a number of a block is its number there.
    _, report = fused(model, IMAGES, method="tome", r=[1, 2], modules=["student.*"])
    assert [b.removed for b in report.blocks] == [0, 0, 0, 0, 1, 2]
    _, report = fused(model, IMAGES, method="tome", r=3, layers=[1])
    assert [b.removed for b in report.blocks] == [0, 3, 0, 0, 0, 3]
    _, report = fused(model, IMAGES, method="tome", r=3, modules="teacher.blocks.[23]*")
    assert [b.removed for b in report.blocks] == [0, 0, 3, 3, 0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": [1, 2]}, r"towers of several depths \(teacher.blocks of 3 blocks, student.blocks of 2 blocks\)"),
        ({"layers": [3]}, "layers=.3.: block 3 does not exist; the deepest of its towers has 3"),
        ({"r": [1, 2, 3], "modules": "student"}, "r is a list of 3 entries, but the model has 2"),
        ({"modules": 3}, "modules=3 must be a path or pattern"),
    ],
    ids=str,
)
def test_options_that_fit_no_tower(options: dict[str, Any], message: str) -> None:
    model = Of(lambda m, x: m.teacher(x) - m.student(x), teacher=vit(1), student=vit(2, depth=2))
    with pytest.raises(Exception, match=message) as caught:
        fused(model, IMAGES, method="tome", **options)
    assert isinstance(cause_of(caught.value), ConfigError)


def test_modules_that_no_block_is_in_are_named() -> None:
    _, report = fused(vit(), IMAGES, r=3, modules="studnet")
    assert not report.fused and report.reason == "not among the modules that may fuse (studnet)"


def test_a_target_takes_as_much_of_towers_that_are_alike() -> None:
    net = vit(grid=6)
    x = torch.randn(2, 3, 24, 24)
    (a, b), report = fused(Of(lambda m, x: (m.net(x), m.net(x)), net=net), x, r="auto", target="speedup=1.2")
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert tokens(report, 0) == tokens(report, 1) and report.removed > 0
    assert report.macs_before / report.macs_after >= 1.2
    # Blocks of one tower get tokens as evenly as can be.
    removed = [b.removed for b in report.blocks if b.tower == 0 and b.reason is None]
    assert max(removed) - min(removed) <= 1


def test_an_encoder_and_its_decoder() -> None:
    """The decoder adds mask tokens and has a width of its own."""
    torch.manual_seed(0)
    config = transformers.ViTMAEConfig(
        image_size=32,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        decoder_hidden_size=8,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    model = Of(lambda m, x, noise: m.mae(x, noise=noise).logits, mae=transformers.ViTMAEForPreTraining(config))
    logits, report = fused(model, torch.randn(2, 3, 32, 32), torch.rand(2, 64), r=3)
    assert logits.shape == (2, 64, 48) and [b.index for b in report.blocks] == [0, 1, 2, 0, 1]
    assert [b.removed for b in report.blocks] == [0, 3, 3, 0, 3]
    assert tokens(report, 1) == [(65, 65), (65, 62)]


class Stage(nn.Module):
    """One attention block on [B, N, C]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))


def test_the_stages_of_a_pyramid_are_one_tower() -> None:
    def forward(m: Of, x: Tensor) -> Tensor:
        x = m.second(m.first(m.stem(x).flatten(2).mT))
        x = m.pool(x.mT.unflatten(2, (8, 8))).flatten(2).mT
        return m.fourth(m.third(x)).mean(1)

    torch.manual_seed(0)
    model = Of(
        forward,
        stem=nn.Conv2d(3, 16, 4, 4),
        first=Stage(16),
        second=Stage(16),
        pool=nn.Conv2d(16, 32, 2, 2),
        third=Stage(32),
        fourth=Stage(32),
    )
    _, report = fused(model, torch.randn(2, 3, 32, 32), method="tome", r=2, layers=[2, 3])
    assert len(report.towers) == 1 and [b.removed for b in report.blocks] == [0, 0, 2, 2]
    assert tokens(report)[2:] == [(16, 14), (14, 12)]


class Tables(nn.Module):
    """Blocks whose queries and keys are scaled by a table over the tokens; all come back for a convolution midway."""

    def __init__(self, copies: bool, depth: int = 8, width: int = 64, grid: int = 6) -> None:
        super().__init__()
        self.grid = grid
        self.blocks = nn.ModuleList(Stage(width) for _ in range(depth))
        self.mix = nn.Conv2d(width, width, 3, padding=1, groups=width)
        table = torch.randn(grid * grid, width // 2)
        self.tables = [table.clone() if copies else table for _ in range(depth)]

    def forward(self, x: Tensor) -> Tensor:
        for i, (block, table) in enumerate(zip(self.blocks, self.tables)):
            if i == len(self.blocks) // 2:
                x = self.mix(x.mT.unflatten(2, (self.grid, self.grid))).flatten(2).mT
            q, k, v = block.qkv(x).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(q * table, k * table, v)
            x = x + block.proj(out.transpose(1, 2).flatten(2))
            x = x + block.down(F.gelu(block.up(x)))
        return x.mean(1)


@pytest.mark.parametrize("options", [{"r": 4}, {"r": 8, "attention": "exact"}, {"method": "tome", "r": 4}], ids=str)
def test_a_table_is_fused_anew_after_the_tokens_came_back(options: dict[str, Any]) -> None:
    x, results = torch.randn(2, 36, 64), []
    for copies in (False, True):
        torch.manual_seed(0)
        result, report = fused(Tables(copies), x, **options)
        assert report.unmerged and report.removed > 0
        results.append(result)
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_table_that_is_read_in_two_layouts() -> None:
    """A scale per token meets the residual stream as [B, N, C], and the queries of a later block as [N, B, C]."""

    def forward(m: Of, x: Tensor, copy: Tensor, scale: Tensor) -> Tensor:
        x = m.first(x)
        x = x * scale
        y = (x.transpose(0, 1) * copy.unsqueeze(1)).transpose(0, 1)
        return m.second(x + y).mean(1)

    torch.manual_seed(0)
    model, x, scale = Of(forward, first=Stage(16), second=Stage(16)), torch.randn(2, 36, 16), torch.rand(36, 16)
    one = fused(
        Of(lambda m, x, s: forward(m, x, s, s), first=model.first, second=model.second), x, scale, method="tome", r=4
    )
    two = fused(model, x, scale.clone(), scale, method="tome", r=4)
    torch.testing.assert_close(one[0], two[0], rtol=0, atol=0)
    assert one[1].removed == two[1].removed == 8


class Joint(nn.Module):
    """One attention over text and image tokens, with a residual stream for each; ``last``: text behind the image."""

    def __init__(self, last: bool, depth: int = 2, width: int = 16, cls: bool = False) -> None:
        super().__init__()
        self.last = last
        self.cls = nn.Parameter(torch.randn(1, 1, width)) if cls else None
        self.text = nn.ModuleList(Stage(width) for _ in range(depth))
        self.image = nn.ModuleList(Stage(width) for _ in range(depth))

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        if self.cls is not None:
            x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1)
        for text, image in zip(self.text, self.image):
            streams = [image.qkv(x), text.qkv(t)] if self.last else [text.qkv(t), image.qkv(x)]
            q, k, v = torch.cat(streams, 1).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            parts = out.split([s.shape[1] for s in streams], 1)
            own, other = parts if self.last else parts[::-1]
            t, x = t + text.proj(other), x + image.proj(own)
            t, x = t + text.down(F.gelu(text.up(t))), x + image.down(F.gelu(image.up(x)))
        return x, t


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "layers": [0, 1]},
        {"r": 4, "layers": [0, 1], "attention": "exact"},
        {"r": 4, "layers": [0, 1], "attention": "current"},
        {"method": "tome", "r": 4},
        {"method": "tofu", "r": 4},
        {"method": "pitome", "r": 4},
        {"method": "random", "r": 4},
        {"method": "evit", "keep_rate": 0.6, "layers": [0, 1]},
        {"method": "idlevit", "keep_ratio": 0.6, "layers": [0, 1]},
    ],
    ids=str,
)
def test_the_image_of_joint_attention_fuses_and_its_text_stays(options: dict[str, Any], last: bool) -> None:
    """Image tokens that are copies of each other lose nothing; text tokens are keys, and never candidates."""
    torch.manual_seed(0)
    model, t = Joint(last).eval(), torch.randn(2, 5, 16)
    x = torch.randn(2, 3, 16).repeat(1, 8, 1)
    if options.get("method") in (None, "tome", "tofu", "pitome"):
        options = {**options, **({"tau_info": 0, "tau_size": 0} if "method" not in options else {})}
    got, report = fused(model, x, t, **options)
    assert [tuple(y.shape) for y in got] == [(2, 24, 16), (2, 5, 16)]
    if options.get("method") in ("evit", "idlevit"):
        assert not report.fused and "reads the class token, and there is none" in report.reason
        return
    assert tokens(report) == [(24, 20), (20, 16)]
    if options.get("method") in (None, "tome", "pitome"):
        with torch.no_grad():
            dense = model(x, t)
        for mine, theirs in zip(got, dense):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_the_class_token_of_joint_attention_is_its_own_streams() -> None:
    """The first key is a text token; the query that EViT reads is that of the image's class token."""
    torch.manual_seed(0)
    model, x, t = Joint(False, cls=True).eval(), torch.randn(2, 24, 16), torch.randn(2, 5, 16)
    got, report = fused(model, x, t, method="evit", keep_rate=0.5, layers=[0], fuse_token=False)
    assert tokens(report)[0] == (25, 13)
    with torch.no_grad():
        stream = torch.cat([model.cls.expand(2, -1, -1), x], 1)
        joined = torch.cat([model.text[0].qkv(t), model.image[0].qkv(stream)], 1)
        q, k, _ = joined.unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        logits = torch.einsum("bhd,bhnd->bhn", q[:, :, 5], k) * q.shape[-1] ** -0.5
        kept = logits.softmax(-1).mean(1)[:, 6:].topk(12, dim=1).indices
    # Tokens that left come back as copies of those that stayed.
    for patches, chosen in zip(got[0][:, 1:], kept):
        assert {tuple(row) for row in patches.tolist()} == {tuple(row) for row in patches[chosen].tolist()}
        assert len(patches[chosen].unique(dim=0)) == 12


class Beside(nn.Module):
    """Two blocks, and between them an attention with no residual connection, which is added to their stream."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = TinyViT(VitSpec(depth=2)).blocks

    def forward(self, x: Tensor) -> Tensor:
        other = x.relu()
        x = self.first(x, None)
        x = x + F.scaled_dot_product_attention(other, other, other).tanh()
        return self.second(x, None).mean(1)


def test_attention_beside_a_residual_stream_ends_no_tower() -> None:
    _, report = fused(Beside(), torch.randn(2, 17, VitSpec().width), method="tome", r=3)
    assert [(b.tower, b.tokens_in, b.tokens_out) for b in report.blocks if b.reason is None] == [
        (0, 17, 14),
        (0, 14, 11),
    ]


class GivenBackWithin(nn.Module):
    """What stands between attention and the end of a block needs the tokens in their grid."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in range(3))
        self.mlp = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for i, (qkv, mlp) in enumerate(zip(self.qkv, self.mlp)):
            q, k, v = qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + (mlp(x) if i != 1 else mlp(x).roll(1, 1) + x.roll(2, 1))
        return x.mean(1)


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_what_was_seen_of_fused_tokens_fuses_no_others(options: dict[str, Any]) -> None:
    if "evit" in str(options) or "idlevit" in str(options):
        pytest.skip("the model has no class token, which this method reads")
    x = torch.randn(2, 3, 16).repeat(1, 8, 1)
    options = {**options, "layers": [0, 1, 2]} | ({"tau_info": 0, "tau_size": 0} if "method" not in options else {})
    model = GivenBackWithin().eval()
    got, report = fused(model, x, **options)
    assert report.blocks[1].reason is not None and "within the block" in report.blocks[1].reason
    if options.get("method") != "tofu":
        with torch.no_grad():
            torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)


# What is as long as tokens that were fused, without being made of them.
AS_LONG: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "another image": lambda x, y: y.expand_as(x).amax(2),
    "one image of another batch": lambda x, y: y[0].expand_as(x).amax(2),
    "a row": lambda x, y: y[:, :1].expand_as(x).sin(),
    "a row that meets them": lambda x, y: y[:, :1].expand_as(x) * x,
    "a row, summed up": lambda x, y: y[:1, :1].expand_as(x).sum(1),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "any size"])
@pytest.mark.parametrize("name", AS_LONG)
def test_what_borrows_the_shape_of_fused_tokens_has_that_of_all(name: str, dynamic: bool) -> None:
    """Every token is there four times in a row, so that fusing three of 12 pairs loses nothing."""

    def run(of: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        for block in of.vit.blocks:
            x = block(x, None)
        return x, AS_LONG[name](x, y)

    model = Of(run, vit=vit(depth=2, prefix=0)).eval()
    torch._dynamo.reset()
    options = {"method": "tome", "r": 3, "min_tokens": 4, "inner": "eager", "strict": True}
    compiled = torch.compile(model, backend="mctf", options=options, dynamic=dynamic)
    draw = torch.Generator().manual_seed(0)
    for tokens in (24, 32) if dynamic else (24,):
        x, y = (torch.randn(3, tokens // 4, 16, generator=draw).repeat_interleave(4, 1) for _ in range(2))
        with torch.no_grad():
            for found, expected in zip(compiled(x, y), model(x, y), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert explain(model, x, y, **options).removed == 6
