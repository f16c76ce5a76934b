"""Models whose weights are tensor subclasses with operators of their own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map

import mctf_compile
from mctf_compile import FusionConfig
from mctf_compile.testing import TinyViT, VitSpec

aten = torch.ops.aten

# Patches are copies of three, and similarity alone decides: what is fused are duplicates, and nothing may be lost.
OPTIONS = {"r": 4, "min_tokens": 1, "tau_info": 0, "tau_size": 0}
INNER = ("eager", "aot_eager", "inductor")


class Holds(Tensor):
    """A weight that another tensor is held for, with operators of its own below autograd."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> Holds:
        options = {"dtype": held.dtype, "device": held.device, "requires_grad": held.requires_grad}
        return Tensor._make_wrapper_subclass(cls, held.shape, **options)

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @classmethod
    def __tensor_unflatten__(cls, held: dict[str, Tensor], context: None, size: Any, stride: Any) -> Holds:
        return cls(held["held"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        args, kwargs = tree_map(lambda x: x.held if isinstance(x, Holds) else x, (args, kwargs or {}))
        result = func(*args, **kwargs)
        return cls(result) if func in (aten.detach.default, aten.clone.default) else result


class Halves(Holds):
    """Takes part in ``linear`` with half of itself, which none of its operators says."""

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.linear:
            x, weight, bias = (*args, None)[:3]
            return cls.linear(x, weight.held, bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @staticmethod
    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = F.linear(x, weight) * 0.5
        y += 0 if bias is None else bias
        return y


class Centres(Halves):
    """Takes the mean over all tokens off each."""

    @staticmethod
    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x - x.mean(-2, keepdim=True), weight, bias)


class Numbers(Halves):
    """Adds to each token where it stands."""

    @staticmethod
    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias) + 0.01 * torch.arange(x.shape[-2])[:, None]


class Insists(Halves):
    """Takes no other number of tokens than the model has."""

    @staticmethod
    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.dim() == 3 and x.shape[1] != 17:
            raise ValueError("17 tokens are due")
        return F.linear(x, weight, bias)


class Counts(Halves):
    """Changes with every call."""

    @staticmethod
    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight.mul_(0.5)
        return F.linear(x, weight, bias)


class Unlike(nn.Parameter):
    """A parameter that holds nothing, with a ``linear`` of its own: Dynamo looks into it."""

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.linear:
                return F.linear(args[0], args[1] * 2, *args[2:])
            return func(*args, **(kwargs or {}))


def model_of(kind: Callable[[Tensor], Tensor], grad: bool = False, every: bool = False, **spec: Any) -> TinyViT:
    """A model whose linear layers, or all layers, have weights of a kind."""
    torch.manual_seed(0)
    model = TinyViT(VitSpec(**spec)).eval()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if every or (isinstance(module, nn.Linear) and name == "weight"):
                setattr(module, name, nn.Parameter(kind(parameter.detach().clone()), requires_grad=grad))
    return model


def images_of(model: TinyViT) -> Tensor:
    return model.example(kinds=3, seed=0)[0]


def compiled(model: nn.Module, inner: str, **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(model, backend="mctf", options={**OPTIONS, "inner": inner, **options})


def explained(model: nn.Module, images: Tensor, **options: Any) -> mctf_compile.Report:
    torch._dynamo.reset()
    return mctf_compile.explain(model, images, **{**OPTIONS, **options})


def gradients(model: nn.Module, run: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    y = run(images)
    y.square().sum().backward()
    return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_loses_nothing(model: nn.Module, images: Tensor, inners: tuple[str, ...] = INNER, **bound: float) -> None:
    """Fewer tokens, and the dense model's results."""
    report = explained(model, images)
    assert report.fused and not report.unmerged and report.macs_after < report.macs_before
    assert [(b.tokens_in, b.tokens_out) for b in report.blocks] == [(17, 17), (17, 13), (13, 9)]
    with torch.no_grad():
        expected = model(images)
        for inner in inners:
            torch.testing.assert_close(compiled(model, inner)(images), expected, **(bound or {"rtol": 0, "atol": 2e-6}))


@pytest.fixture
def quantization() -> Any:
    """torchao's, imported where it is used: that takes seconds."""
    import torchao.quantization

    return torchao.quantization


def test_int8_weights_lose_nothing(quantization):
    model = model_of(lambda weight: weight)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert type(model.head.weight).__name__ == "Int8Tensor"
    assert_loses_nothing(model, images_of(model))


def test_activations_quantised_by_token_lose_what_rounding_does(quantization):
    """A step of int8 is a 127th of the largest channel, and a token may fall on another side of half a step."""
    model = model_of(lambda weight: weight)
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    images = images_of(model)
    with torch.no_grad():
        reach = model(images).abs().max().item()
    assert_loses_nothing(model, images, rtol=0, atol=reach / 127)


def test_what_is_fused_for_good_is_that_of_the_fused_model_run_eagerly(quantization):
    """On tokens that are all different; weights alone are quantised, so that little rounds otherwise."""
    model = model_of(lambda weight: weight)
    images = torch.randn_like(images_of(model))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with torch.no_grad():
        expected, dense = compiled(model, "eager")(images), model(images)
        assert (expected - dense).abs().max() > 1e-3
        for inner in INNER[1:]:
            torch.testing.assert_close(compiled(model, inner)(images), expected, rtol=0, atol=2e-6)


def test_one_scale_for_all_tokens_is_declined(quantization):
    model = model_of(lambda weight: weight)
    tensorwise = quantization.Int8DynamicActivationInt8WeightConfig(granularity=quantization.PerTensor())
    quantization.quantize_(model, tensorwise)
    report = explained(model, images_of(model))
    assert not report.fused and "linear of an Int8Tensor is not known to treat each token by itself" in report.reason
    with torch.no_grad():
        assert torch.equal(compiled(model, "eager")(images_of(model)), model(images_of(model)))


@pytest.mark.parametrize("kind", [Holds, Halves])
def test_wrappers_of_ones_own(kind):
    model = model_of(kind)
    assert_loses_nothing(model, images_of(model))


@pytest.mark.parametrize("spec", [{}, {"spelling": "mha"}, {"spelling": "softmax"}, {"mlp": "swiglu"}], ids=str)
def test_wrappers_in_every_layer_have_the_gradients_of_the_dense_model(spec):
    model = model_of(Holds, grad=True, every=True, **spec)
    images = images_of(model)
    assert explained(model, images).fused
    expected, expected_grads = gradients(model, model, images)
    for inner in INNER[:2]:
        y, grads = gradients(model, compiled(model, inner), images)
        torch.testing.assert_close(y, expected, rtol=0, atol=2e-6)
        assert grads.keys() == expected_grads.keys() and all(isinstance(grads[n], Tensor) for n in grads)
        for name, grad in expected_grads.items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=2e-5, msg=name)


def test_a_parameter_without_a_held_tensor():
    torch.manual_seed(0)
    model = TinyViT(VitSpec()).eval()
    for layer in (m for m in model.modules() if isinstance(m, nn.Linear)):
        layer.weight = Unlike(layer.weight.detach().clone())
    assert_loses_nothing(model, images_of(model))


def test_parametrized_into_a_wrapper():
    class Wrap(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return Halves(weight)

    torch.manual_seed(0)
    model = TinyViT(VitSpec()).eval()
    for layer in [m for m in model.modules() if type(m) is nn.Linear]:
        parametrize.register_parametrization(layer, "weight", Wrap())
    assert_loses_nothing(model, images_of(model), INNER[:2])


def test_an_input_that_is_a_wrapper():
    model = model_of(lambda weight: weight)
    assert_loses_nothing(model, Holds(images_of(model)), INNER[:2])


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Centres, "linear of a Centres is not known to treat each token by itself"),
        (Numbers, "linear of a Numbers is not known to treat each token by itself"),
        (Insists, "linear of an Insists does not run on other numbers of tokens: 17 tokens are due"),
        (Counts, "linear of a Counts writes into its operands"),
    ],
)
def test_what_is_not_token_by_token_stays_dense_and_says_so(kind, reason):
    images = images_of(model_of(kind))
    report = explained(model_of(kind, head="dense"), images)
    assert not report.fused and reason in report.reason
    with torch.no_grad():
        expected = model_of(kind, head="dense")(images)
        for inner in INNER[:2]:
            found = compiled(model_of(kind, head="dense"), inner)(images)
            assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", [Holds, Halves])
def test_autocast_casts_within_what_a_wrapper_does(kind):
    model = model_of(kind)
    images = images_of(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert explained(model, images).fused
        expected = model(images)
        assert expected.dtype is torch.bfloat16
        for inner in INNER[:2]:
            # Two steps of bfloat16.
            bound = 2 * torch.finfo(torch.bfloat16).eps * expected.abs().max().item()
            torch.testing.assert_close(compiled(model, inner)(images), expected, rtol=0, atol=bound)


def test_wrappers_of_one_make_up_are_compiled_apart():
    """PyTorch's cache tells them apart by what they hold."""
    for kind in (Holds, Halves):
        model = model_of(kind, depth=2)
        with torch.no_grad():
            found = compiled(model, "inductor", layers=[0, 1])(images_of(model))
            torch.testing.assert_close(found, model(images_of(model)), rtol=0, atol=2e-6)


def test_rewrite_and_attach_take_them():
    model = model_of(Holds)
    images = images_of(model)
    reports = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        fused, report = mctf_compile.rewrite(gm, inputs, FusionConfig("mctf", **OPTIONS))
        reports.append(report)
        return fused

    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend)(images), model(images), rtol=0, atol=2e-6)
    assert reports[0].fused
    attached = mctf_compile.attach(model, images, method="dtem")
    torch._dynamo.reset()
    assert mctf_compile.explain(attached, images, method="dtem", r=4, min_tokens=1).fused


@pytest.fixture
def mesh(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[Any]:
    """A mesh of this process alone."""
    distributed = torch.distributed
    if not distributed.is_available():
        pytest.skip("this PyTorch is built without torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        distributed.destroy_process_group()


def test_a_model_of_dtensors_stays_dense_and_says_so(mesh):
    from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor

    model = distribute_module(model_of(lambda weight: weight, spelling="softmax"), mesh)
    images = distribute_tensor(images_of(model), mesh, [Replicate()])
    report = explained(model, images)
    assert report.reason == "attention is a call of softmax of a DTensor, and what that does is the DTensor's own"
    with torch.no_grad():
        for inner in INNER[:2]:
            assert torch.equal(compiled(model, inner)(images).full_tensor(), model(images).full_tensor())


def test_layers_parallel_in_their_features_give_the_tokens_back(mesh):
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = model_of(lambda weight: weight)
    for block in model.blocks:
        parallelize_module(block.mlp, mesh, {"*": ColwiseParallel(output_layouts=Replicate())})
    images = images_of(model)
    report = explained(model, images)
    assert "from_local of a DTensor is not known to treat each token by itself" in report.reason
    assert report.macs_before == explained(model_of(lambda weight: weight), images).macs_before
    with torch.no_grad():
        for inner in INNER[:2]:
            assert torch.equal(compiled(model, inner)(images), model(images))


def test_fsdp2_fuses_between_its_hooks_and_explain_leaves_it_as_it_was(mesh):
    from torch.distributed.fsdp import fully_shard

    model = model_of(lambda weight: weight, grad=True)
    images = images_of(model)
    expected, expected_grads = gradients(model, model, images)
    fully_shard(model, mesh=mesh)
    report = explained(model, images)
    assert report.fused and [b.tokens_out for b in report.blocks] == [17, 13, 9]
    for run in (model, *map(partial(compiled, model), INNER[:2])):
        y, grads = gradients(model, run, images)
        torch.testing.assert_close(y, expected, rtol=0, atol=2e-6)
        for name, grad in expected_grads.items():
            torch.testing.assert_close(grads[name].full_tensor(), grad, rtol=1e-4, atol=2e-5, msg=name)


def test_fsdp2_of_every_block_stays_dense_and_explain_leaves_it_as_it_was(mesh):
    """Each block is a graph of its own, which gives the original tokens back at its end."""
    from torch.distributed.fsdp import fully_shard

    model = model_of(lambda weight: weight)
    images = images_of(model)
    with torch.no_grad():
        expected = model(images)
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert not explained(model, images).fused
        assert os.environ.get("MCTF_FAULTS") == "raise"
        for run in (model, *map(partial(compiled, model), INNER[:2])):
            torch.testing.assert_close(run(images), expected, rtol=0, atol=2e-6)
