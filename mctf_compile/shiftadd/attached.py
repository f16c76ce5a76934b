"""What ShiftAddViT learns beside a model's own weights, added to the model as modules."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from mctf_compile.analysing import analyse
from mctf_compile.config import FusionConfig
from mctf_compile.errors import ConfigError
from mctf_compile.methods.attached import Attached
from mctf_compile.methods.base import Reads
from mctf_compile.narrowing import present
from mctf_compile.passes.analysis.dataflow import Dataflow
from mctf_compile.passes.analysis.structure import Block
from mctf_compile.passes.analysis.token_axes import Axes
from mctf_compile.passes.reparameterizing.shiftadd import EXPERT, LOCAL, ROUTER, Heads, heads_of, mlps_of
from mctf_compile.shiftadd.shift import layer_of, shifted
from mctf_compile.training.attach import check_free, reader_of
from mctf_compile.training.losses import balance as balance_loss

NAME = "mctf_shiftadd"


class Local(Attached):
    """The depthwise convolution of a block's values on their grid, zero at first.

    Args:
        channels: H·D of the values.
        kernel: K, odd.
    """

    method = LOCAL

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, 1, kernel, kernel))

    def forward(self, x: Tensor) -> Tensor:
        """The weight [H·D, 1, K, K], whatever the tokens are."""
        return self.weight


class Router(Attached):
    """Which of two experts each token takes, the model's own MLP (0) or that of powers of two (1).

    ``logits`` [B, N, 2] are those of the last call in training, for the loss (``mctf_compile.shiftadd.balance``).
    """

    method = ROUTER

    def __init__(self, width: int) -> None:
        super().__init__()
        self.route = nn.Linear(width, 2)
        self.logits: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, 2]."""
        logits: Tensor = self.route(x)
        if self.training:
            self.logits = logits
        return logits


class Expert(Attached):
    """A copy of a linear layer of an MLP, whose weights are powers of two."""

    method = EXPERT

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = shifted(copy.deepcopy(layer))

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., O]."""
        out: Tensor = self.layer(x)
        return out

    def observe_result(self, layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        """The hook behind the layer: hands on what it gives, with what this one makes of the same tokens beside it."""
        if not torch.compiler.is_compiling():
            return None
        result: Tensor = torch.ops.mctf.observe(out, self(args[0]), self.method, self.state)
        return result


def attach(
    model: nn.Module,
    *inputs: Any,
    attention: bool = True,
    experts: bool = True,
    kernel: int = 3,
    kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Add to ``model`` what ``reparameterize="shiftadd"`` learns beside its own weights, and return ``model``.

    Of each block that the compiler finds: a depthwise convolution of the values, for attention on binary queries and
    keys; and for the MLP a router, and a second expert whose weights are powers of two, at first those nearest to the
    MLP's own. They become the submodule ``mctf_shiftadd``; a model that runs without the backend's option computes
    what it did before.

    Args:
        model: any module with self-attention.
        inputs: example inputs; for a timm model they may be left out.
        attention: whether attention becomes linear.
        experts: whether MLPs get a second expert.
        kernel: rows and columns of the convolution, an odd number.
        kwargs: example inputs that are given by name.

    Raises:
        ConfigError: no block has attention that can become linear (the reason names a grid that is missing, a mask),
            or an MLP of linear layers; the model has these modules already; ``kernel`` is even.

    Source: You et al., NeurIPS 2023 (arXiv 2306.06446).
    """
    if not (attention or experts):
        raise ConfigError("attention=False and experts=False leave nothing to attach.")
    if isinstance(kernel, bool) or not isinstance(kernel, int) or kernel < 1 or kernel % 2 == 0:
        raise ConfigError(f"kernel={kernel!r} must be an odd number from 1 on.")
    check_free(model, NAME, "ShiftAddViT")
    state = analyse(model, inputs, kwargs or {}, FusionConfig("none"))
    graph, blocks, axes = present(state.normal).graph, present(state.blocks), present(state.axes)
    flow = Dataflow(graph)
    added: dict[str, nn.ModuleDict] = {}
    without: list[str] = []
    readers: set[nn.Module] = set()
    for i, (block, mlps) in enumerate(zip(blocks, mlps_of(graph, blocks, axes))):
        parts, name = nn.ModuleDict(), block.module or f"block {i}"
        reason = _attach_local(parts, model, block, axes, flow, kernel, readers) if attention else None
        if reason is not None:
            without.append(f"the attention of {name} stays as it is: {reason}")
        reason = _attach_experts(parts, model, block, mlps, readers) if experts else None
        if reason is not None:
            without.append(f"the MLP of {name} stays as it is: {reason}")
        if parts:
            added[str(i)] = parts
    if not added:
        reasons = "; ".join(dict.fromkeys(without)) or "it has no self-attention"
        raise ConfigError(f"ShiftAddViT found no block of this model to attach to: {reasons}.")
    for line in without:
        warnings.warn(f"mctf: {line}", stacklevel=2)
    model.add_module(NAME, nn.ModuleDict(added).train(model.training))
    return model


def _attach_local(
    parts: nn.ModuleDict,
    model: nn.Module,
    block: Block,
    axes: Axes,
    flow: Dataflow,
    kernel: int,
    readers: set[nn.Module],
) -> str | None:
    """Add the convolution of a block's values; says why where it does not."""
    heads = heads_of(block, axes)
    if not isinstance(heads, Heads):
        return heads
    reader, _ = reader_of(model, block, Reads.PROJECTION, flow)
    if reader is model:
        return "no module of the model reads its tokens"
    if reader not in readers:
        readers.add(reader)
        value = block.attention.value.meta["val"]
        parts["local"] = local = Local(heads.channels, kernel).to(value.device, value.dtype)
        reader.register_forward_pre_hook(local.observe)
    return None


def _attach_experts(
    parts: nn.ModuleDict, model: nn.Module, block: Block, mlps: Sequence[Collection[fx.Node]], readers: set[nn.Module]
) -> str | None:
    """Add a router and a second expert to each MLP of a block; says why where there is none to add to."""
    found = [[layer for node in sorted(mlp) if (layer := layer_of(node, model)) is not None] for mlp in mlps]
    if not any(found):
        return block.problem or "no linear layers (nn.Linear) of the model lead from its residual stream back to it"
    mixtures = nn.ModuleList()
    for layers in found:
        # A module that runs twice in one graph has its expert already.
        layers = [layer for layer in dict.fromkeys(layers) if layer not in readers]
        if not layers:
            continue
        readers.update(layers)
        first = layers[0].weight
        router, experts = Router(first.shape[1]).to(first.device, first.dtype), [Expert(layer) for layer in layers]
        mixtures.append(nn.ModuleDict({"router": router, "experts": nn.ModuleList(experts)}))
        layers[0].register_forward_pre_hook(router.observe)
        for layer, expert in zip(layers, experts):
            layer.register_forward_hook(expert.observe_result)
    if mixtures:
        parts["mixtures"] = mixtures
    return None


def balance(model: nn.Module, latency: Sequence[float] = (1.0, 1.0)) -> Tensor:
    """The balance loss of all routers of ``model`` in their last call in training: a scalar, their mean.

    Add it to the loss of the task, times 0.01 in the paper. ``latency``: what a token takes in the dense expert and in
    that of powers of two, in any unit: the slower one is to get fewer tokens. See :func:`mctf_compile.losses.balance`.

    Raises ``ConfigError`` where the model has no routers, or none has run in training.
    """
    routers = [m for m in model.modules() if isinstance(m, Router)]
    logits = [router.logits for router in routers if router.logits is not None]
    if not logits:
        what = "no router of this model has run in training" if routers else "this model has no routers"
        raise ConfigError(f"{what}; mctf_compile.shiftadd.attach(model, images) adds them.")
    return torch.stack([balance_loss(each, latency) for each in logits]).mean()
