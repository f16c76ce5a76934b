"""Which kernel runs an operator, and that compilers see the launches; nothing runs on a device here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import fx, nn
from torch._functorch.aot_autograd import aot_module_simplified
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._subclasses.fake_tensor import FakeTensorMode

import mctf_compile
from mctf_compile import ConfigError
from mctf_compile.compiler import rewrite, run_pipeline
from mctf_compile.config import FusionConfig
from mctf_compile.inner.regional import CompiledRegion
from mctf_compile.kernels.device import architecture, dot_precision
from mctf_compile.passes.lowering import cpp as cpp_kernels
from mctf_compile.passes.lowering import triton as triton_kernels
from mctf_compile.passes.lowering.choose_kernels import kernel_family
from mctf_compile.passes.lowering.regions import Symbol, split

pytest.importorskip("triton", reason="Triton is optional, and these tests are about it")
aten = torch.ops.aten
LAUNCH = torch.ops.higher_order.triton_kernel_wrapper_functional


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


@pytest.fixture
def any_device(monkeypatch):
    """Kernels are chosen on the CPU too, and analysed as for an H100; what is only traced need not run."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    monkeypatch.setattr(triton_kernels, "problem", lambda device: None)
    monkeypatch.setattr(driver, "_active", SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32)))


def vit(dtype: torch.dtype = torch.float32) -> nn.Module:
    model = timm.create_model("vit_tiny_patch16_224", img_size=48, patch_size=8, depth=3)
    return model.eval().to(dtype)


def on(device: str, model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The model with parameters that have no data, as if they lay on ``device``."""
    with mode:
        for module in model.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=device)))
    return model


def targets(gm: fx.GraphModule) -> Counter[str]:
    return Counter(str(n.target).split(".")[1] for n in gm.graph.nodes if str(n.target).startswith("mctf."))


def look(function: Callable, device: str = "cpu", dtype: torch.dtype = torch.float32):
    """What ``function`` says of the captured graph and its inputs."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model, said = on(device, vit(dtype), mode), []

    def backend(gm, inputs):
        said.append(function(gm, inputs))
        return gm.forward

    with mode:
        torch.compile(model, backend=backend, dynamic=False)(torch.empty(2, 3, 48, 48, dtype=dtype, device=device))
    return said[0]


TWO_BLOCKS = {"importance": 2, "ahead": 2, "match": 2, "group": 2, "pool": 2}
ON_TRITON = {f"{name}_triton": count for name, count in TWO_BLOCKS.items()}


NO_CUDA = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="this PyTorch has no CUDA devices, not even fake ones"
)


@NO_CUDA
@pytest.mark.parametrize(("kernels", "expected"), [("auto", ON_TRITON), ("triton", ON_TRITON), ("aten", TWO_BLOCKS)])
def test_auto_takes_triton_on_a_gpu(kernels, expected):
    def chosen(gm, inputs):
        return targets(rewrite(gm, inputs, FusionConfig(r=4, kernels=kernels))[0])

    with torch.no_grad():
        assert look(chosen, "cuda") == expected


@pytest.mark.parametrize(("device", "family"), [("cuda", "triton"), ("xpu", "triton"), ("cpu", "cpp"), ("mps", "aten")])
def test_auto_takes_what_is_written_for_the_device(device, family):
    assert kernel_family("auto", torch.device(device)) == family
    assert kernel_family("aten", torch.device(device)) == "aten"


def test_products_are_computed_as_the_device_has_them():
    assert architecture(torch.device("xpu")) == "xpu"
    assert [dot_precision(arch) for arch in ("xpu", "gfx942", "sm_90")] == ["ieee", "ieee", "tf32x3"]


ON_CPP = {f"{name}_cpp": count for name, count in TWO_BLOCKS.items()}
IN_TRAINING = {**TWO_BLOCKS, "match": 0, "match_cpp": 2}


@pytest.mark.parametrize("kernels", ["auto", "cpp"])
@pytest.mark.parametrize(
    ("gradients", "expected"), [(False, ON_CPP), (True, IN_TRAINING)], ids=["inference", "training"]
)
def test_auto_takes_cpp_on_the_cpu(kernels, gradients, expected):
    """What has a gradient is left to ATen where that is wanted."""
    with torch.set_grad_enabled(gradients):
        gm, report = look(lambda gm, inputs: rewrite(gm, inputs, FusionConfig(r=4, kernels=kernels)))
    assert targets(gm) == Counter(expected)
    said = [remark for remark in report.remarks if "stays ATen: the C++ kernel has no gradient" in remark]
    assert len(said) == (6 if gradients and kernels == "cpp" else 0)


@pytest.mark.parametrize("pooling", ["attention", "mlerp"])
def test_the_tokens_of_a_block_are_fused_once(pooling):
    """What its norm reads and what its output is added to are the same tokens."""

    def added_to(gm, inputs):
        graph = rewrite(gm, inputs, FusionConfig(r=4, pooling=pooling, layers=[2]))[0].graph
        (pool,) = graph.find_nodes(op="call_function", target=torch.ops.mctf.pool_cpp.default)
        fused = pool if pooling == "attention" else next(n for n in pool.users if n.target is aten.mul.Tensor)
        return {str(n.target) for n in fused.users}

    with torch.no_grad():
        assert look(added_to) == {"aten.layer_norm.default", "aten.add.Tensor"}


def test_auto_takes_aten_where_nothing_can_be_built(monkeypatch):
    monkeypatch.setattr(cpp_kernels, "problem", lambda device: "there is no compiler")
    with torch.no_grad():
        gm, report = look(lambda gm, inputs: rewrite(gm, inputs, FusionConfig(r=4)))
        assert targets(gm) == TWO_BLOCKS and "kernels are ATen: there is no compiler" in report.remarks
        with pytest.raises(ConfigError, match="kernels='cpp': there is no compiler; use 'auto' or 'aten'"):
            mctf_compile.explain(vit(), torch.zeros(1, 3, 48, 48), r=4, kernels="cpp")


def test_cpp_leaves_float64_to_aten():
    with torch.no_grad():
        gm, report = look(lambda gm, inputs: rewrite(gm, inputs, FusionConfig(r=4, kernels="cpp")), dtype=torch.float64)
    assert targets(gm) == TWO_BLOCKS
    assert len(report.remarks) == 8 and all("the kernel does not take its operands" in r for r in report.remarks)


def test_triton_on_the_cpu_is_an_error():
    with pytest.raises(ConfigError, match="kernels='triton': the model is on cpu; use 'auto' or 'aten'"):
        mctf_compile.explain(vit(), torch.zeros(1, 3, 48, 48), r=4, kernels="triton")


def test_what_stays_aten_though_triton_was_asked_for_is_said(any_device):
    gm, report = look(lambda gm, inputs: rewrite(gm, inputs, FusionConfig(r=4, kernels="triton")), dtype=torch.float64)
    assert targets(gm) == TWO_BLOCKS
    assert len(report.remarks) == 8 and all("stays ATen" in remark for remark in report.remarks)


def test_work_is_counted_whatever_the_kernels(any_device):
    def macs(gm, inputs):
        reports = [rewrite(gm, inputs, FusionConfig(r=4, kernels=kernels))[1] for kernels in ("triton", "aten")]
        return [(report.macs_before, report.macs_after) for report in reports]

    on_triton, on_aten = look(macs)
    assert on_triton == on_aten and on_aten[1] < on_aten[0]


def test_the_map_is_in_no_tensor(any_device):
    """Of the 37 x 37 attention weights, and what is computed from them, nothing is left."""

    def largest(gm, inputs):
        shapes = {}
        for kernels in ("triton", "aten"):
            graph = rewrite(gm, inputs, FusionConfig(r=4, kernels=kernels, layers=[1, 2]))[0].graph
            values = [v for n in graph.nodes for v in torch.utils._pytree.tree_leaves(n.meta.get("val"))]
            shapes[kernels] = {tuple(v.shape) for v in values if isinstance(v, torch.Tensor)}
        return shapes

    shapes = look(largest)
    assert (2, 3, 37, 37) in shapes["aten"] and (2, 3, 37, 37) not in shapes["triton"]


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_compilers_see_the_launches(any_device, training):
    """AOTAutograd finds no opaque call, forward and backward."""

    def traced(gm, inputs):
        new = rewrite(gm, inputs, FusionConfig(r=4, kernels="triton"))[0]
        graphs = []

        def keep(graph, *_, **__):
            graphs.append(graph)
            return graph.forward

        def partition(joint, *args, **kwargs):
            graphs.append(joint)
            return torch._functorch.partitioners.default_partition(joint, *args, **kwargs)

        with tracing(TracingContext(detect_fake_mode(inputs))):
            aot_module_simplified(new, inputs, fw_compiler=keep, bw_compiler=keep, partition_fn=partition)
        return [(targets(g), sum(n.target is LAUNCH for n in g.graph.nodes)) for g in graphs]

    with torch.set_grad_enabled(training):
        (calls, launches), *_ = look(traced)
    assert not calls
    # Of each block: informativeness in two looks, scores, assignment, grouping, pooling, A' V in two; and for
    # gradients those of A' V (queries, keys, groups) and of pooling.
    assert launches == (2 * (8 + 4) if training else 2 * 8)


@pytest.mark.parametrize(("dtype", "launches"), [(torch.float32, 8), (torch.bfloat16, 7)], ids=str)
def test_launches_keep_token_counts_symbolic(any_device, dtype, launches):
    """One compilation of a block serves any near numbers of tokens; no kernel asks for a number."""

    def block(gm, inputs):
        state = run_pipeline(gm, inputs, FusionConfig(r=4, kernels="triton"), adjustable=True)[0]
        assert targets(state.lowered) == ON_TRITON
        return max(split(state.lowered).regions, key=lambda region: region.instances)

    with torch.no_grad():
        region = look(block, dtype=dtype)
    graphs = []

    def compiler(gm, inputs):
        return aot_module_simplified(gm, inputs, fw_compiler=lambda graph, _: graphs.append(graph) or graph.forward)

    numbers = dict(enumerate(region.example_numbers))
    # Of the block's operands the sizes alone are not in the model's dtype.
    tensors = [
        torch.empty(
            [numbers[s.index] if isinstance(s, Symbol) else s for s in shape],
            dtype=torch.float32 if shape == [2, Symbol(0)] else dtype,
        )
        for shape in region.shapes
    ]
    with torch.no_grad():
        version = CompiledRegion(region, compiler)._compile(region.example_numbers, tensors)
    assert sum(n.target is LAUNCH for n in graphs[0].graph.nodes) == launches
    assert region.instances == 2 and len(numbers) == 2
    # What one program holds of either side of a matching is a power of two.
    assert all(version.holds([tokens, r]) for tokens in (36, 50, 64) for r in (2, 5, 16)), version.condition
