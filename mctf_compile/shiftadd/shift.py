"""Shift layers in the place of a model's linear layers: to train, and packed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import mctf_compile.kernels  # noqa: F401  registers torch.ops.mctf
from mctf_compile.analysing import analyse, modules_around
from mctf_compile.config import FusionConfig
from mctf_compile.errors import ConfigError
from mctf_compile.kernels.shift.op import LEAST
from mctf_compile.narrowing import present
from mctf_compile.options.fields import one_of
from mctf_compile.passes.analysis.dataflow import Dataflow
from mctf_compile.passes.reparameterizing.shiftadd import mlps_of

aten = torch.ops.aten


class PowerOfTwo(nn.Module):
    """A parametrization of weights as sign · 2^p, p the nearest whole number to log2 |w| from -14 to 0.

    The gradient of a weight is that of its power of two (straight-through).

    Source: You et al., NeurIPS 2023 (arXiv 2306.06446).
    """

    def forward(self, weight: Tensor) -> Tensor:
        """[O, C] -> [O, C]."""
        return weight + (powers_of_two(weight) - weight).detach()

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What is trained begins with the weights as they are."""
        return weight


class ShiftLinear(nn.Module):
    """A linear layer whose weights are a byte each: a sign and an exponent. It is not trained.

    Args:
        weight: [O, C], of which the nearest powers of two are taken.
        bias: [O], or None.
    """

    codes: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        # Channel by channel in memory, as products read them.
        self.register_buffer("codes", codes_of(weight).t().contiguous().t())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., O]."""
        return F.linear(x, torch.ops.mctf.powers(self.codes, x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def exponents(weight: Tensor) -> Tensor:
    """The exponents p of the powers of two that stand for weights; float32, whole."""
    return weight.detach().to(torch.float32).abs().log2().round().clamp(-LEAST, 0)


def powers_of_two(weight: Tensor) -> Tensor:
    """Sign · 2^p, shaped as ``weight`` and of its dtype; 0 for 0."""
    return (weight.detach().sign() * exponents(weight).exp2()).to(weight.dtype)


def codes_of(weight: Tensor) -> Tensor:
    """The int8 codes of weights that ``torch.ops.mctf.powers`` takes."""
    return (weight.detach().sign() * (exponents(weight) + LEAST + 1)).to(torch.int8)


def shift(model: nn.Module, *inputs: Any, layers: str = "all", kwargs: Mapping[str, Any] | None = None) -> nn.Module:
    """Make linear layers in the blocks of ``model`` shift layers, and return ``model``.

    Blocks of attention and MLP are found as the compiler finds them; embedding and head stay as they are. The model
    then computes with powers of two, compiled or not, and trains what it had: ``state_dict`` has the trained weights
    as ``<layer>.parametrizations.weight.original``.

    A transform of the model, and no option of the backend: what is trained, saved and run without it is the same.

    Args:
        model: any module with self-attention.
        inputs: example inputs; for a timm model they may be left out.
        layers: which of a block: ``attention``, ``mlp``, or ``all``.
        kwargs: example inputs that are given by name.

    Raises ``ConfigError`` where no block has such a layer that is a module of its own, or has shift layers already.
    """
    one_of("all", "attention", "mlp")("layers", layers)
    state = analyse(model, inputs, kwargs or {}, FusionConfig("none"))
    graph, blocks = present(state.normal).graph, present(state.blocks)
    flow, found = Dataflow(graph), dict[nn.Linear, None]()
    for block, mlps in zip(blocks, mlps_of(graph, blocks, present(state.axes))):
        in_mlps = {node for mlp in mlps for node in mlp}
        if block.entry is not None and block.exit is not None:
            last = present(block.middle) if layers == "attention" else block.exit
            nodes = {*flow.between(block.entry, last), *in_mlps}
            wanted = {"all": nodes, "attention": nodes - in_mlps, "mlp": in_mlps}[layers]
            found.update((layer, None) for node in sorted(wanted) if (layer := layer_of(node, model)) is not None)
    if not found:
        where = "no block" if layers == "all" else f"the {'MLP' if layers == 'mlp' else layers} of no block"
        raise ConfigError(f"{where} of this model has a linear layer (nn.Linear) that could be a shift layer.")
    for layer in found:
        shifted(layer)
    return model


def shifted(layer: nn.Module) -> nn.Module:
    """A linear layer as a shift layer, itself."""
    parametrize.register_parametrization(layer, "weight", PowerOfTwo())
    return layer


def layer_of(node: fx.Node, model: nn.Module) -> nn.Linear | None:
    """The linear layer that a node computes, where that is a module with a weight of its own."""
    if node.target is not aten.linear.default:
        return None
    inner = next(iter(modules_around(node, model)), None)
    return inner if isinstance(inner, nn.Linear) and type(inner) is nn.Linear else None


# Where a module keeps what is to run before and after it: modules that were attached read what it reads.
HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


def pack(model: nn.Module) -> nn.Module:
    """Put a ``ShiftLinear`` in the place of every shift layer of ``model``, and return ``model``.

    It computes the same, from a quarter of the bytes, and has the hooks of the layer.

    Raises ``ConfigError`` where there is none.
    """
    found = False
    for name, layer in list(model.named_modules()):
        parts = getattr(layer, "parametrizations", {})
        if isinstance(layer, nn.Linear) and "weight" in parts and isinstance(parts["weight"][0], PowerOfTwo):
            packed = ShiftLinear(layer.weight, layer.bias)
            for hooks in HOOKS:
                getattr(packed, hooks).update(getattr(layer, hooks))
            model.set_submodule(name, packed)
            found = True
    if not found:
        raise ConfigError("this model has no shift layers; mctf_compile.shiftadd.shift(model, images) makes them.")
    return model
