"""Blocks that do the same are compiled once, and what runs is what each block says."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import mctf_compile
from mctf_compile.inner.regional import CompiledRegion
from mctf_compile.methods import Combine
from mctf_compile.passes.rewriting.stream import Fusion
from mctf_compile.testing import TinyViT, VitSpec

IMAGES = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


@pytest.fixture
def compilations(monkeypatch) -> list[tuple[int, int]]:
    """Of each region that is compiled: its instances, and how many numbers are symbolic."""
    made = []
    compile_one = CompiledRegion._compile

    def noted(self, numbers, tensors):
        made.append((self.region.instances, len(numbers)))
        return compile_one(self, numbers, tensors)

    monkeypatch.setattr(CompiledRegion, "_compile", noted)
    return made


def vit(depth: int = 6, **options) -> nn.Module:
    torch.manual_seed(1)
    return timm.create_model("vit_tiny_patch16_224", img_size=48, patch_size=8, depth=depth, **options).eval()


def run(model: nn.Module, *inputs: torch.Tensor, inner: str = "aot_eager", dynamic: bool = False, **options):
    torch._dynamo.reset()
    return torch.compile(model, backend="mctf", options={"inner": inner, **options}, dynamic=dynamic)(*inputs)


@pytest.mark.parametrize("r", [2, 3, [0, 2, 5, 3, 2, 4]], ids=str)
def test_blocks_that_fuse_are_one_region(compilations, r):
    model = vit()
    with torch.no_grad():
        got = run(model, IMAGES, r=r)
        assert torch.equal(got, run(model, IMAGES, inner="eager", r=r))
    # Patches and the dense first block; five blocks of their own token counts; the head.
    assert [instances for instances, _ in compilations] == [1, 5, 1]


@pytest.mark.parametrize("side", ["bias", "rope", "rope_patches"])
@pytest.mark.parametrize("method", ["mctf", "tome"])
def test_blocks_that_read_tables_over_the_original_tokens_are_one_region(compilations, side, method):
    """Each pools its table through all the fusions before it, and does so in one step."""
    made = []
    for depth in (7, 8):
        model = TinyViT(VitSpec(depth=depth, grid=5, suffix=int(side == "rope_patches"), side=side)).eval()
        inputs = model.example(2, 1)
        compilations.clear()
        with torch.no_grad():
            got = run(model, *inputs, method=method, r=1)
            torch.testing.assert_close(got, run(model, *inputs, inner="eager", method=method, r=1), rtol=0, atol=1e-5)
        made.append([instances for instances, _ in compilations])
    assert len(made[1]) == len(made[0]) and max(made[1]) == max(made[0]) + 1


def matching(images: int, n: int, r: int, lead: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Some matching over ``n`` tokens, the first ``lead`` of which stay."""
    order = torch.stack([torch.cat([torch.arange(lead), lead + torch.randperm(n - lead)]) for _ in range(images)])
    keep, gone = order[:, : n - r], order[:, n - r :]
    return keep, gone, torch.randint(lead, n - r, gone.shape)


@pytest.mark.parametrize("combine", list(Combine), ids=lambda c: c.name)
def test_fusions_in_a_row_are_one_fusion(combine):
    torch.manual_seed(0)
    sizes = [(20, 5), (15, 1), (14, 4)]
    fusions = []
    for n, r in sizes:
        keep, gone, into = matching(3, n, r, lead=1)
        raw, ones = torch.rand(3, n).double(), torch.ones(3, n).double()
        index, weight, size = torch.ops.mctf.group(raw, ones, keep, gone, into)
        weight = weight if combine is Combine.MEAN else None
        fusions.append(Fusion(keep, gone, into, index, weight, size, 1, 0, combine))
    x = torch.randn(3, 2, 20, 4, dtype=torch.float64)
    expected, index = x, torch.arange(20).expand(3, -1)
    for fusion in fusions:
        expected, index = fusion.pool(expected, 2), fusion.index.gather(1, index)
    together = fusions[0].then(fusions[1]).then(fusions[2])
    torch.testing.assert_close(together.pool(x, 2), expected)
    assert torch.equal(together.index, index) and together.size is fusions[2].size
    members = x > 0
    for fusion in fusions:
        members = fusion.pool(members, 2)
    assert torch.equal(together.pool(x > 0, 2), members)


def test_depth_costs_no_compilation(compilations):
    with torch.no_grad():
        run(vit(3), IMAGES, r=1)
        shallow = len(compilations)
        run(vit(9), IMAGES, r=1)
    assert len(compilations) == 2 * shallow


def test_a_block_of_another_width_is_a_region_of_its_own(compilations):
    model = vit()
    model.blocks[3].mlp.fc1, model.blocks[3].mlp.fc2 = nn.Linear(192, 100), nn.Linear(100, 192)
    with torch.no_grad():
        got = run(model, IMAGES, r=2)
        assert torch.equal(got, run(model, IMAGES, inner="eager", r=2))
    assert [instances for instances, _ in compilations] == [1, 4, 1, 1]


def test_sizes_that_no_site_changes_stay_numbers(compilations):
    with torch.no_grad():
        run(vit(), IMAGES, r=2)
    assert [numbers for _, numbers in compilations if numbers == 0] == [0, 0]
    # Tokens before and after; images, heads and channels are plain numbers.
    assert max(numbers for _, numbers in compilations) == 2


@pytest.mark.parametrize("method", ["tome", "evit", "idlevit", "random"])
def test_other_methods_are_cut_alike(method):
    model = vit()
    with torch.no_grad():
        torch.manual_seed(0)
        got = run(model, IMAGES, method=method)
        torch.manual_seed(0)
        expected = run(model, IMAGES, inner="eager", method=method)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_gradients_go_through_the_regions():
    model = vit(4)

    def gradients(inner: str) -> list[torch.Tensor]:
        model.zero_grad()
        run(model, IMAGES, inner=inner, r=3).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    for got, expected in zip(gradients("aot_eager"), gradients("eager"), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_the_same_graph_serves_gradients_and_none():
    model = vit(4)
    compiled = torch.compile(model, backend="mctf", options={"inner": "aot_eager", "r": 3}, dynamic=False)
    with torch.no_grad():
        expected = compiled(IMAGES)
    with torch.inference_mode():
        inferred = compiled(IMAGES)
    trained = compiled(IMAGES)
    trained.sum().backward()
    torch.testing.assert_close(trained, expected)
    torch.testing.assert_close(inferred, expected)
    assert all(p.grad is not None for p in model.parameters())


def test_a_symbolic_batch_is_one_more_number():
    images = torch.randn(5, 3, 48, 48)
    with torch.no_grad():
        one_by_one = torch.compile(vit(), backend="mctf", options={"inner": "eager", "r": 3}, dynamic=False)
        expected = torch.cat([one_by_one(image[None]) for image in images])
        torch._dynamo.reset()
        compiled = torch.compile(vit(), backend="mctf", options={"inner": "aot_eager", "r": 3}, dynamic=True)
        for batch in (2, 3, 5):
            torch.testing.assert_close(compiled(images[:batch]), expected[:batch], rtol=1e-4, atol=1e-5)


def test_a_grid_detour_between_blocks_is_sound():
    model = TinyViT(VitSpec(heads=1, grid=3, norm="post", extra="grid")).eval()
    inputs = model.example(2, 1)
    with torch.no_grad():
        assert mctf_compile.explain(model, *inputs, method="tome", r=1).unmerged
        got = run(model, *inputs, method="tome", r=1)
        torch.testing.assert_close(got, run(model, *inputs, inner="eager", method="tome", r=1), rtol=0, atol=1e-5)


def test_tokens_are_let_go_of_when_a_block_has_read_them(monkeypatch):
    """The residual stream that a block was given is in nobody's hands when the block is done."""
    run_one, alive = CompiledRegion.run, []

    def watched(self, instance, operands):
        streams = [weakref.ref(x) for x in operands if isinstance(x, torch.Tensor) and x.dim() == 3 and x.shape[1] > 1]
        results = run_one(self, instance, operands)
        if self.region.instances > 1:
            alive.append([ref() is not None for ref in streams])
        return results

    monkeypatch.setattr(CompiledRegion, "run", watched)
    with torch.no_grad():
        model = torch.compile(vit(depth=3), backend="mctf", options={"r": 2})
        # The first call holds the operands that it compiles for.
        model(IMAGES)
        alive.clear()
        model(IMAGES)
    assert alive == [[False], [False]]


PROGRAM = """
import torch, timm
from torch._dynamo.utils import counters
for torch._inductor.config.freezing in (False, True):
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3).eval()
    with torch.no_grad():
        torch.compile(model, backend="mctf", options={"r": 1, "min_tokens": 1})(torch.ones(1, 3, 32, 32))
    print(counters["inductor"]["fxgraph_cache_miss"], counters["aot_autograd"]["autograd_cache_hit"])
"""


def test_a_second_process_finds_everything_in_the_caches(tmp_path: Path):
    """With free weights and with frozen ones."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    runs = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        runs.append([tuple(map(int, line.split())) for line in done.stdout.splitlines()])
    assert [len(run) for run in runs] == [2, 2]
    for (made, _), (missed, found) in zip(*runs):
        assert made > 0 and missed == 0 and found == made
