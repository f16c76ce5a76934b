"""Branches on fused tokens, beside a residual stream that keeps them all."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import mctf_compile
from mctf_compile import Choice, ConfigError, Evidence, FusionConfig, Merging, Need, Site
from mctf_compile.kernels.matching import aten as aten_matching
from mctf_compile.kernels.matching import reference
from mctf_compile.methods import METHODS
from mctf_compile.methods.combining import combined, match
from mctf_compile.passes.rewriting.insertion import Insertion
from mctf_compile.passes.rewriting.stream import Stream
from mctf_compile.testing import Recorder, TinyViT, VitSpec, assert_rewrite_sound
from mctf_compile.testing.soundness import assert_fused_alike, check_rewrite
from mctf_compile.testing.strategies import fusion_options, vit_specs

aten = torch.ops.aten
DENSE = VitSpec(depth=2, head="dense")


def vit(spec: VitSpec = DENSE) -> TinyViT:
    torch.manual_seed(0)
    return TinyViT(spec).eval()


def images(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def merged(x: Tensor, y: Tensor, r: int, lead: int = 1) -> tuple[Tensor, Tensor, list[list[int]]]:
    """ToMe's matching of one image's tokens ``x`` [N, C], and what it makes of others: means, sizes, members."""
    unit = F.normalize(x, dim=-1)
    a = [i for i in range(0, len(x), 2) if i >= lead]
    b = [i for i in range(1, len(x), 2) if i >= lead]
    best = {i: max(b, key=lambda j: (unit[i] @ unit[j]).item()) for i in a}
    gone = sorted(a, key=lambda i: -(unit[i] @ unit[best[i]]).item())[:r]
    groups = [[i, *(g for g in gone if best[g] == i)] for i in range(len(x)) if i not in gone]
    return torch.stack([y[g].mean(0) for g in groups]), torch.tensor([float(len(g)) for g in groups]), groups


def given_back(y: Tensor, groups: list[list[int]]) -> Tensor:
    x = y.new_empty(sum(map(len, groups)), y.shape[1])
    for value, group in zip(y, groups):
        x[group] = value
    return x


def attention_of_means(block: nn.Module, x: Tensor, size: Tensor | None) -> Tensor:
    """The attention of a ``TinyBlock`` on [M, C], whose token j counts ``size[j]`` times."""
    h, d = block.spec.heads, block.spec.head_dim
    q, k, v = block.attn.qkv(x).reshape(len(x), 3, h, d).permute(1, 2, 0, 3)
    logits = q @ k.transpose(1, 2) / d**0.5 + (0 if size is None else size.log())
    return block.attn.proj((logits.softmax(-1) @ v).transpose(0, 1).reshape(len(x), h * d))


@pytest.mark.parametrize("branches", [("attention",), ("attention", "mlp"), ("mlp",)])
def test_tome_in_branches_is_its_formula(branches):
    """x + unmerge(f(merge(norm(x)))), each match that of the tokens before the block (ToMe-SD)."""
    model = vit()
    found = Recorder({"method": "tome", "r": 4, "span": "branch", "branches": branches})
    with torch.no_grad():
        got = found.run(model, images())
        x = model.embed(images()).flatten(2).transpose(1, 2)
        x = torch.cat([model.prefix.expand(2, -1, -1), x], 1)
        for block in model.blocks:
            rows = []
            for row in x:
                fused, size, groups = merged(row, block.norm1(row), 4)
                if "attention" in branches:
                    middle = row + given_back(attention_of_means(block, fused, size), groups)
                else:
                    middle = row + attention_of_means(block, block.norm1(row), None)
                y = block.norm2(middle)
                if "mlp" in branches:
                    y = given_back(block.mlp(torch.stack([y[g].mean(0) for g in groups])), groups)
                else:
                    y = block.mlp(y)
                rows.append(middle + y)
            x = torch.stack(rows)
    torch.testing.assert_close(got, model.norm(x), atol=1e-5, rtol=1e-5)
    assert [(b.tokens_in, b.tokens_out, b.reason) for b in found.reports[0].blocks] == [(17, 13, None)] * 2


def test_mlerp_keeps_the_norm_of_what_enters_the_branch():
    """ToFu: the mean of the normed tokens, with the largest norm among them."""
    model = vit(replace(DENSE, depth=1))
    with torch.no_grad():
        got = Recorder({"method": "tofu", "prune_layers": 0, "r": 4, "span": "branch"}).run(model, images())
        (block,) = model.blocks
        x = model.embed(images()).flatten(2).transpose(1, 2)
        x = torch.cat([model.prefix.expand(2, -1, -1), x], 1)
        rows = []
        for row in x:
            y = block.norm1(row)
            fused, size, groups = merged(row, y, 4)
            norms = torch.stack([y[g].norm(dim=-1).max() for g in groups])
            fused = fused / fused.norm(dim=-1, keepdim=True) * norms[:, None]
            row = row + given_back(attention_of_means(block, fused, size), groups)
            rows.append(row + block.mlp(block.norm2(row)))
    torch.testing.assert_close(got, model.norm(torch.stack(rows)), atol=1e-5, rtol=1e-5)


def test_the_residual_stream_keeps_all_tokens():
    """What has fewer than 17 tokens lies between a pooling and an unmerging, and no residual addition is among it."""
    found = Recorder({"method": "tome", "r": 4, "span": "branch", "branches": ["attention", "mlp"]})
    with torch.no_grad():
        found.run(vit(), images())
    nodes = found.graphs[0].graph.nodes
    given_back = [n for n in nodes if n.target is torch.ops.mctf.unmerge.default]
    (added,) = {tuple(user.target for user in n.users) for n in given_back}
    assert len(given_back) == 4 and added == (aten.add.Tensor,)
    assert {n.meta["val"].shape for g in given_back for n in g.users} == {(2, 17, 16)}
    linears = [n.meta["val"].shape[1] for n in nodes if n.target is aten.linear.default]
    assert linears == [13] * 8


QUICK = settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
BRANCHING = fusion_options(("attention", "size", "mean", "max", "mlerp"), spans=("branch",))


@QUICK
@given(vit_specs(), BRANCHING, st.integers(1, 3), st.integers(0, 99))
def test_a_branch_on_exact_duplicates_changes_nothing(spec, options, kinds, seed):
    torch.manual_seed(seed)
    model = TinyViT(spec).eval()
    with torch.no_grad():
        found = check_rewrite(model, *model.example(kinds, seed), **options)
    assert found.problems == [] and found.at_zero == 0.0


def sizes_forgotten(monkeypatch):
    monkeypatch.setattr(Stream, "log_size", lambda self, g, lead, tail: torch.zeros_like(self.size(g, lead, tail)))


def given_back_in_another_order(monkeypatch):
    right = Stream.map
    monkeypatch.setattr(Stream, "map", lambda self, *of: right(self, *of).roll(1, 1))


def stream_fused_too(monkeypatch):
    """The residual addition takes the stream to the fused tokens, and nobody gives it back but the output."""
    monkeypatch.setattr(
        Insertion,
        "_emit_beside_stream",
        lambda self, node, right=Insertion._emit_beside_stream: (
            right(self, node) if node in self._within else self.program.evaluate(node, self.program.env)
        ),
    )


@pytest.mark.parametrize("mutant", [sizes_forgotten, given_back_in_another_order])
def test_a_broken_branch_is_found(mutant, monkeypatch):
    mutant(monkeypatch)
    # In a second block a fault of the first would have left no duplicates to fuse.
    model = vit(replace(DENSE, depth=1))
    with torch.no_grad():
        found = check_rewrite(model, *model.example(3, 0), method="tome", r=6, span="branch")
    assert "fusing duplicates changed the output" in str(found.problems)


def test_a_stream_that_is_fused_is_found(monkeypatch):
    stream_fused_too(monkeypatch)
    with pytest.raises(AssertionError):
        test_the_residual_stream_keeps_all_tokens()


class Blocks(nn.Module):
    """A residual stream [B, N, C] through layers that differ by what is between its branches."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def attend(self, y: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(y).chunk(3, -1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Cross(Blocks):
    """Self-attention, attention to a text, and an MLP, with a modulation by the step (PixArt's block)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(32, 32)
        self.step = nn.Linear(32, 96)

    def forward(self, x: Tensor, text: Tensor, step: Tensor) -> Tensor:
        shift, scale, gate = self.step(step)[:, None].chunk(3, -1)
        x = x + gate * self.attend(self.norm1(x) * (1 + scale) + shift)
        q = self.q(self.norm2(x)).unflatten(-1, (2, -1)).transpose(1, 2)
        k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.kv(text).chunk(2, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm3(x))))

    def example(self, kinds: int = 3) -> tuple[Tensor, ...]:
        of = torch.randint(0, kinds, (16,), generator=torch.Generator().manual_seed(1))
        x = torch.randn(2, kinds, 32, generator=torch.Generator().manual_seed(0))
        return x[:, of], torch.randn(2, 5, 32), torch.randn(2, 32)


def kinds_of(report: mctf_compile.Report) -> list[list[str]]:
    return [[branch.kind for branch in block.branches] for block in report.blocks]


@pytest.mark.parametrize("branches", ["attention", "cross", "mlp", ["attention", "cross", "mlp"]])
def test_each_branch_of_a_conditioned_block_can_run_on_fused_tokens(branches):
    torch.manual_seed(0)
    model = Cross().eval()
    options = {"method": "tome", "r": 6, "span": "branch", "branches": branches}
    with torch.no_grad():
        report = assert_rewrite_sound(model, *model.example(), duplicates=True, **options)
        found = Recorder(options)
        found.run(model, *model.example())
    assert kinds_of(report) == [[branches] if isinstance(branches, str) else branches]
    # The text keeps its five tokens.
    linears = [n.meta["val"].shape[1] for n in found.graphs[0].graph.nodes if n.target is aten.linear.default]
    fewer = {"attention": [10, 10, 16, 5, 16, 16, 16], "cross": [16, 16, 10, 5, 10, 16, 16]}
    if isinstance(branches, str) and branches in fewer:
        assert [n for n in linears if n != 96] == fewer[branches]
    before, after = report.macs_before, report.macs_after
    assert after < before
    saved = sum(b.macs_before - b.macs_after for b in report.blocks[0].branches)
    assert saved == before - after


class Shared(Blocks):
    """A projection that queries, keys, values and the MLP share (parallel layers of a 22-billion ViT)."""

    def __init__(self) -> None:
        super().__init__()
        self.together = nn.Linear(32, 3 * 32 + 64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, hidden = self.together(self.norm1(x)).split([32, 32, 32, 64], -1)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.proj(y) + self.fc2(F.gelu(hidden))


class Convolved(Blocks):
    """An MLP with a convolution over the grid between its layers (MixFFN)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(64, 64, 3, padding=1, groups=64)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        hidden = self.fc1(self.norm2(x)).transpose(1, 2).unflatten(2, (4, 4))
        return x + self.fc2(F.gelu(self.conv(hidden).flatten(2).transpose(1, 2)))


class Gated(Blocks):
    """Attention that returns beside an MLP, both added before they are added to the stream."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        return x + (self.attend(y) + self.fc2(F.gelu(self.fc1(y))))


def tokens_of_linears(model: nn.Module, x: Tensor, **options) -> list[int]:
    found = Recorder({"method": "tome", "r": 6, "span": "branch", **options})
    with torch.no_grad():
        found.run(model, x)
    assert found.reports[0].fused, found.reports[0]
    return [n.meta["val"].shape[1] for n in found.graphs[0].graph.nodes if n.target is aten.linear.default]


@pytest.mark.parametrize(
    ("layers", "branches", "expected"),
    [
        # What the MLP reads is no mean: the shared projection runs on all tokens, queries, keys and values are fused.
        (Shared, ("attention",), [16, 10, 16]),
        (Convolved, ("attention",), [10, 10, 16, 16]),
        # The convolution needs the grid, and what leads to it all tokens.
        (Convolved, ("mlp",), [16, 16, 16, 10]),
        (Gated, ("attention",), [10, 10, 16, 16]),
    ],
)
def test_only_the_branch_runs_on_fused_tokens(layers, branches, expected):
    torch.manual_seed(0)
    assert tokens_of_linears(layers().eval(), torch.randn(2, 16, 32), branches=branches) == expected


class Unread(Blocks):
    """A block, and a self-attention that no residual connection is seen around: a sum in other words."""

    def __init__(self, spelled: bool) -> None:
        super().__init__()
        self.spelled = spelled
        self.qkv2, self.proj2 = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv2(x).chunk(3, -1))
        y = (q @ k.mT / 4).softmax(-1) @ v if self.spelled else F.scaled_dot_product_attention(q, k, v)
        return 2 * torch.lerp(x, self.proj2(y.transpose(1, 2).flatten(2)), 0.5)


@pytest.mark.parametrize("spelled", [False, True])
def test_self_attention_is_neither_an_mlp_nor_attention_to_others(spelled):
    torch.manual_seed(0)
    model, x = Unread(spelled).eval(), torch.randn(2, 16, 32)
    assert tokens_of_linears(model, x, branches=("mlp",)) == [16, 16, 10, 10, 16, 16]
    assert tokens_of_linears(model, x, branches=("attention", "cross")) == [10, 10, 16, 16, 16, 16]


@dataclass(frozen=True)
class ByKeys(Merging):
    """ToMe's matching of keys, which in a branch take a projection of all tokens."""

    name: ClassVar[str] = "by_keys"
    source: ClassVar[str] = "a test"
    site: ClassVar[Site] = Site.BETWEEN
    needs = (Need.KEYS,)

    def choose(self, evidence: Evidence, r: int) -> Choice:
        return combined("size", evidence, *match(evidence, evidence.keys, r))


@pytest.mark.parametrize("spelling", ["sdpa", "softmax", "einsum"])
def test_a_method_of_ones_own_gets_what_it_asks_for(spelling, monkeypatch):
    monkeypatch.setitem(METHODS, "by_keys", ByKeys)
    model = vit(replace(DENSE, spelling=spelling))
    with torch.no_grad():
        patches = model.example(3, 0)
        report = assert_rewrite_sound(model, *patches, method="by_keys", r=8, span="branch", duplicates=True)
    # Its keys are those of all tokens, which are computed beside those of the fused ones.
    (of_keys,) = {block.branches[0].macs_after for block in report.blocks}
    without = mctf_compile.explain(model, *patches, method="tome", r=8, span="branch").blocks[0].branches[0]
    assert of_keys > without.macs_after


def test_informativeness_costs_the_map_that_the_branch_saves():
    """``exact`` computes it, and such a branch is declined where it does not pay."""
    with torch.no_grad():
        report = mctf_compile.explain(vit(), images(), r=4, span="branch", attention="exact", min_tokens=1)
        assert [b.reason.partition(":")[0] for b in report.blocks] == [
            "with all that fusing takes, it would cost more on fused tokens"
        ] * 2
        assert mctf_compile.explain(vit(), images(), r=4, span="branch", min_tokens=1).fused


def test_every_block_fuses_by_default_and_none_hands_tokens_on():
    report = mctf_compile.explain(vit(), images(), r=3, span="branch")
    assert [(b.index, b.tokens_in, b.tokens_out) for b in report.blocks] == [(0, 17, 14), (1, 17, 14)]
    assert "attention alone, " in str(report) and " -> " in str(report.blocks[0].branches[0])


def test_a_block_without_such_a_branch_says_so():
    report = mctf_compile.explain(vit(replace(DENSE, mlp="none")), images(), r=3, span="branch", branches="mlp")
    assert {b.reason for b in report.blocks} == {"no branch of the block (mlp) can run on fewer tokens by itself"}


def test_a_mask_that_an_input_gives_keeps_padding_apart():
    model = vit(replace(DENSE, side="padding"))
    with torch.no_grad():
        report = assert_rewrite_sound(model, *model.example(2, 0), r=4, span="branch", min_tokens=1)
    assert report.fused


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_compiled_branches_are_the_rewritten_ones(inner):
    options = {"method": "tome", "r": 4, "span": "branch", "branches": ["attention", "mlp"]}
    model = vit()
    with torch.no_grad():
        expected = Recorder(options).run(model, images())
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="mctf", options={**options, "inner": inner, "strict": True})
        torch.testing.assert_close(compiled(images()), expected, atol=1e-4, rtol=1e-4)


def test_gradients_reach_every_token_through_a_branch():
    model = vit(replace(DENSE, depth=1)).train()
    x = images().requires_grad_()
    torch._dynamo.reset()
    fast = torch.compile(
        model,
        backend="mctf",
        options={"method": "tome", "r": 6, "span": "branch", "inner": "aot_eager", "strict": True},
    )
    fast(x).square().mean().backward()
    assert (x.grad.flatten(1).abs() > 0).float().mean() > 0.99
    assert all(p.grad is not None for p in model.blocks.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"span": "branches"}, "span='branches' is not one of 'rest', 'branch'; did you mean 'branch'?"),
        ({"branches": ["mlp"]}, "branches=['mlp'] has no effect without span='branch'."),
        ({"span": "branch", "branches": ["atention"]}, "did you mean 'attention'?"),
        ({"span": "branch", "branches": []}, "branches=[] must be one or several of"),
        ({"span": "branch", "attention": "current"}, "attention='current' fuses after a block"),
        ({"method": "dtem", "span": "branch"}, "the modules of method 'dtem' learn with tokens that stay fused"),
        ({"method": "evit", "span": "branch"}, "method 'evit' takes no option 'span'"),
    ],
)
def test_a_wrong_option_says_what_is_right(options, message):
    with pytest.raises(ConfigError) as raised:
        FusionConfig(**options)
    assert message in str(raised.value)


@pytest.mark.parametrize("name", ["mctf", "tome", "tofu", "pitome", "random"])
def test_methods_that_remove_a_number_act_in_branches(name):
    with torch.no_grad():
        report = assert_rewrite_sound(vit(), images(), method=name, r=4, span="branch")
    assert [b.tokens_out for b in report.blocks] == [13, 13]


def test_tiles_have_one_token_that_receives_and_merge_sets_are_those_of_the_paper():
    """Against ToMe-SD's formulas, tile by tile: destinations, nearest one by cosine, the r most alike leave."""
    x = torch.randn(2, 1 + 35, 8, generator=torch.Generator().manual_seed(2))
    size = torch.ones(2, 36)
    got = torch.ops.mctf.match_tiles(x, None, size, 17, 1, 0, 5, 7, [2, 2], None, [1.0, 0.0, 0.0], None)
    expected = reference.match_tiles(x, None, size, 17, 1, 0, 5, 7, (2, 2), {}, (1.0, 0.0, 0.0))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    # Of rows 0, 2, 4 and columns 0, 2, 4, 6.
    assert got[0][0, -12:].tolist() == [1 + 7 * i + j for i in (0, 2, 4) for j in (0, 2, 4, 6)]


@pytest.mark.parametrize("taus", [(1.0, 2.0, 3.0), (0.5, 0.0, 1.0), (0.0, 1.0, 0.0)])
def test_tiles_are_matched_by_all_criteria(taus, monkeypatch):
    """The same few scores at a time, and against the reference."""
    generator = torch.Generator().manual_seed(4)
    x, importance = torch.randn(2, 18, 8, generator=generator), torch.rand(2, 18, generator=generator)
    size = torch.randint(1, 5, (2, 18), generator=generator).float()
    expected = reference.match_tiles(x, importance, size, 7, 1, 1, 4, 4, (2, 2), {}, taus)
    for scores in (1 << 20, 16):
        monkeypatch.setattr(aten_matching, "SCORES", scores)
        got = torch.ops.mctf.match_tiles(x, importance, size, 7, 1, 1, 4, 4, [2, 2], None, list(taus), None)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("grid", [(4, 4), (5, 7), (1, 6)])
def test_a_seed_puts_one_place_in_each_tile(grid):
    chosen = [aten_matching.tiles(*grid, (2, 3), seed) for seed in range(20)]
    for receive, leave in chosen:
        tiles = {(p // grid[1] // 2, p % grid[1] // 3) for p in receive}
        assert len(tiles) == len(receive) == -(-grid[0] // 2) * -(-grid[1] // 3)
        assert sorted(receive + leave) == list(range(grid[0] * grid[1]))
    assert len({tuple(receive) for receive, _ in chosen}) > 5
    assert chosen[3] == aten_matching.tiles(*grid, (2, 3), 3)


def test_tiles_let_three_quarters_leave():
    """The grid is that of the patches, behind the class token."""
    options = {"method": "tome", "r": 15, "span": "branch", "partition": (2, 2)}
    found = Recorder(options)
    with torch.no_grad():
        found.run(vit(), images())
    assert [(b.tokens_in, b.tokens_out) for b in found.reports[0].blocks] == [(17, 5)] * 2
    assert "r clamped from 15 to 12 by the 4 tokens that receive others, one in each tile" in str(found.reports[0])
    index, _, size = found.groups[0]
    # The class token by itself, then the first of each tile, with all that went into it.
    assert index[:, [0, 1, 3, 9, 11]].tolist() == [[0, 1, 2, 3, 4]] * 2
    assert size[:, 0].tolist() == [1.0, 1.0] and size.sum(1).tolist() == [17.0, 17.0]


def test_without_a_grid_every_second_token_receives():
    torch.manual_seed(0)
    x = torch.randn(2, 16, 32)
    report = mctf_compile.explain(Cross().eval(), *Cross().example(), r=4, span="branch", partition=[2, 2])
    assert {b.tokens_out for b in report.blocks} == {12}
    assert "the model does not tell the grid of these tokens, so every second one receives others" in str(report)
    assert x.shape[1] == report.blocks[0].tokens_in


def test_blocks_reuse_a_match():
    """One match in two blocks of three, of which the report tells."""
    model = vit(replace(DENSE, depth=3))
    found = Recorder({"method": "tome", "r": 5, "span": "branch", "match_every": 2})
    with torch.no_grad():
        got = found.run(model, images())
        x = model.embed(images()).flatten(2).transpose(1, 2)
        x = torch.cat([model.prefix.expand(2, -1, -1), x], 1)
        of = {}
        for i, block in enumerate(model.blocks):
            rows = []
            for image, row in enumerate(x):
                if i != 1:
                    of[image] = merged(row, row, 5)[2]
                groups, y = of[image], block.norm1(row)
                size = torch.tensor([float(len(g)) for g in groups])
                fused = attention_of_means(block, torch.stack([y[g].mean(0) for g in groups]), size)
                row = row + given_back(fused, groups)
                rows.append(row + block.mlp(block.norm2(row)))
            x = torch.stack(rows)
    torch.testing.assert_close(got, model.norm(x), atol=1e-5, rtol=1e-5)
    assert [block.note for block in found.reports[0].blocks] == [
        None,
        "as block 0 matched its tokens, 1 block before",
        None,
    ]
    assert len(found.groups) == 2


class Remixed(Blocks):
    """Two blocks whose tokens have the positions of one table, and between them, or not, a layer over the tokens."""

    def __init__(self, mixed: bool) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(16, 32))
        self.mix = nn.Linear(16, 16) if mixed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x) * self.table)
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        x = self.mix(x.mT).mT
        x = x + self.attend(self.norm3(x) * self.table)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


@pytest.mark.parametrize("mixed", [False, True])
def test_a_match_serves_its_residual_stream_alone(mixed):
    options = {"method": "tome", "r": 5, "span": "branch", "match_every": 2}
    report = mctf_compile.explain(Remixed(mixed).eval(), torch.randn(2, 16, 32), **options)
    assert [block.note for block in report.blocks] == [
        None,
        None if mixed else "as block 0 matched its tokens, 1 block before",
    ]


@pytest.mark.parametrize("name", ["mctf", "tome", "tofu"])
@pytest.mark.parametrize("seed", [None, 5])
def test_tiles_and_shared_matches_compile_to_what_is_rewritten(name, seed):
    options = {
        "method": name,
        "r": 0.5,
        "span": "branch",
        "partition": (2, 2),
        "partition_seed": seed,
        "match_every": 2,
    }
    options |= {"min_tokens": 1} if name == "mctf" else {}
    with torch.no_grad():
        expected = Recorder(options).run(vit(), images())
        torch._dynamo.reset()
        compiled = torch.compile(vit(), backend="mctf", options={**options, "inner": "aot_eager", "strict": True})
        torch.testing.assert_close(compiled(images()), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partition": (2, 2)}, "partition=(2, 2) has no effect without span='branch'."),
        ({"match_every": 2}, "match_every=2 has no effect without span='branch'."),
        ({"span": "branch", "partition": 2}, "partition=2 must be the rows and columns of a tile, as (2, 2), or None."),
        ({"span": "branch", "partition": (1, 1)}, "must be the rows and columns of a tile"),
        ({"span": "branch", "partition_seed": 1}, "partition_seed=1 has no effect without a partition."),
        ({"method": "random", "span": "branch", "partition": (2, 2)}, "'random' does not match tokens pair by pair"),
    ],
)
def test_a_wrong_partition_says_what_is_right(options, message):
    with pytest.raises(ConfigError) as raised:
        FusionConfig(**options)
    assert message in str(raised.value)


def test_padding_is_told_without_the_attention_that_a_branch_avoids():
    """The mask alone tells it, whether it is an argument of attention or a softmax reads logits that it has filled."""
    torch.manual_seed(0)
    models = [TinyViT(VitSpec(spelling=s, side="padding", grid=6)).double().eval() for s in ("sdpa", "softmax")]
    models[1].load_state_dict(models[0].state_dict())
    images, valid = models[0].example(16, 0)
    options = {"method": "tome", "r": 4, "span": "branch"}
    with torch.no_grad():
        works = [mctf_compile.explain(model, images.double(), valid, **options) for model in models]
        assert_fused_alike(*models, images.double(), valid, **options)
    assert [report.removed for report in works] == [12, 12]
    assert works[0].macs_after == works[1].macs_after
