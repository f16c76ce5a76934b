"""The rewrite as a pass of another backend's, and what of it caches keep."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import mctf_compile
from mctf_compile import ConfigError, MctfPass
from mctf_compile.testing import TinyViT, VitSpec

OPTIONS = {"r": 3, "min_tokens": 1, "kernels": "aten"}


@cache
def vit() -> TinyViT:
    torch.manual_seed(0)
    model = TinyViT(VitSpec(depth=2, position=True)).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


@cache
def images() -> Tensor:
    return vit().example(kinds=16, seed=0)[0]


@cache
def expected() -> Tensor:
    torch._dynamo.reset()
    with torch.no_grad():
        result: Tensor = torch.compile(vit(), backend="mctf", options={**OPTIONS, "inner": "eager"})(images())
        assert not torch.allclose(result, vit()(images()), rtol=1e-4, atol=1e-4)
    return result


def test_a_graph_is_fused_in_place() -> None:
    with torch.no_grad():
        program = torch.export.export(vit(), (images(),)).module()
        fusion = MctfPass(**OPTIONS)
        fusion(program.graph)
        program.graph.lint()
        program.recompile()
        torch.testing.assert_close(program(images()), expected())
    assert [report.removed for report in fusion.reports] == [3]


def test_inductor_runs_it_and_a_warm_start_finds_what_it_made() -> None:
    fusion, artifacts = MctfPass(**OPTIONS), b""
    with torch.no_grad(), torch._inductor.config.patch(pre_grad_custom_pass=fusion):
        for warm in (False, True):
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            # Each time in an empty cache, as on another machine; what the first one made is carried to the second.
            with torch._inductor.utils.fresh_cache():
                if warm:
                    torch.compiler.load_cache_artifacts(artifacts)
                result = torch.compile(vit())(images())
                found = torch.compiler.save_cache_artifacts()
            torch.testing.assert_close(result, expected(), rtol=1e-4, atol=1e-4)
            assert torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"] == warm
            if not warm:
                assert found is not None
                artifacts, _ = found
    # What came from the cache was not fused again.
    assert [report.removed for report in fusion.reports] == [3]


def test_mctf_can_be_the_default_backend() -> None:
    torch._dynamo.reset()
    torch.compiler.set_default_backend("mctf")
    try:
        with torch.no_grad():
            result = torch.compile(vit(), options={**OPTIONS, "inner": "eager"})(images())
    finally:
        torch.compiler.set_default_backend(None)
    torch.testing.assert_close(result, expected())


def test_the_uuid_is_that_of_the_options_and_of_nothing_else() -> None:
    text = f"import mctf_compile; print(mctf_compile.MctfPass(**{OPTIONS}).uuid())"
    other = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True).stdout.strip()
    assert other == MctfPass(**OPTIONS).uuid()
    different = [MctfPass(**{**OPTIONS, **changed}).uuid() for changed in ({"r": 4}, {"tau_sim": 2.0}, {"r": [0, 3]})]
    assert len({other, *different}) == 4


def test_copies_of_a_configuration_report_to_the_same_place() -> None:
    fusion = MctfPass(**OPTIONS)
    copied = copy.deepcopy(fusion)
    with torch.no_grad():
        copied(torch.export.export(vit(), (images(),)).module().graph)
    assert [report.removed for report in fusion.reports] == [3]
    assert copy.deepcopy(copied) is fusion
    again = pickle.loads(pickle.dumps(fusion))
    assert again.uuid() == fusion.uuid() and not again.reports


def test_what_cannot_be_fused_stays_as_it_is() -> None:
    program = torch.export.export(nn.Linear(3, 3), (torch.ones(2, 3),)).module()
    before = str(program.graph)
    fusion = MctfPass()
    fusion(program.graph)
    assert str(program.graph) == before and not fusion.reports[0].fused
    # Without shapes nothing is known of a graph.
    fusion(torch.fx.symbolic_trace(nn.Linear(3, 3)).graph)
    assert len(fusion.reports) == 1


def test_options_of_the_backend_alone_are_refused() -> None:
    with pytest.raises(ConfigError, match="dynamic_r=True is for backend='mctf'"):
        mctf_compile.MctfPass(dynamic_r=True)
