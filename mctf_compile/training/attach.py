"""Adding the learned parts of a method to a user's model, where optimizers, checkpoints and DDP see them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from mctf_compile.analysing import analyse, modules_around
from mctf_compile.config import FusionConfig
from mctf_compile.errors import ConfigError
from mctf_compile.methods.attached import Attached
from mctf_compile.methods.base import Reads
from mctf_compile.narrowing import node_of, present
from mctf_compile.passes.analysis.dataflow import Dataflow
from mctf_compile.passes.analysis.structure import Block
from mctf_compile.passes.subclasses import wrappers

aten = torch.ops.aten


def attach(
    model: nn.Module, *inputs: Any, method: str, kwargs: Mapping[str, Any] | None = None, **options: Any
) -> nn.Module:
    """Add a method's modules to ``model``, one per block that it acts on, and return ``model``.

    They become the submodule ``mctf_<method>`` (a ``ModuleDict`` by block number): their parameters are in
    ``model.parameters()`` and ``state_dict()``. Each reads the tokens in a hook before the module that reads
    the same ones; a model that runs without the backend computes what it did before. New modules are
    untrained: the backend says so once, until they have been trained or loaded.

    Args:
        model: any module with self-attention; blocks are found as the compiler finds them.
        inputs: example inputs; for a timm model they may be left out.
        method: ``dtem``, ``dynamicvit``, or a registered method that has modules.
        kwargs: example inputs that are given by name.
        options: the method's options, as for the backend.

    Raises:
        ConfigError: the method has no modules, the model has them already, no block was found to attach to, or
            example inputs are missing.
    """
    config = FusionConfig(method, **options)
    name = f"mctf_{method}"
    if config.method.reads is None:
        raise ConfigError(f"method {method!r} has nothing to attach.")
    check_free(model, name, f"method {method!r}")
    state = analyse(model, inputs, kwargs or {}, config)
    flow, added, module = Dataflow(present(state.normal).graph), dict[str, Attached](), None
    readers: set[nn.Module] = set()
    device = next((p.device for p in model.parameters()), None)
    chosen = {
        tower.blocks[i]
        for tower in present(state.towers)
        for i in config.method.acts_on(len(tower.blocks))
        if i < len(tower.blocks)
    }
    blocks = present(state.blocks)
    for i, block in enumerate(blocks):
        if i not in chosen or block.problem is not None:
            continue
        reader, width = reader_of(model, block, config.method.reads, flow)
        if reader in readers:
            # A module that runs twice in one graph has its module already.
            continue
        readers.add(reader)
        tokens = present(block.tokens)
        module = config.method.module(width, tokens.lead, tokens.tail, module).to(device)
        module.train(model.training)
        # A bound method, so that a copy of the model hooks up its own copy of the module.
        reader.register_forward_pre_hook(module.observe)
        added[str(i)] = module
    if not added:
        reasons = "; ".join(sorted({b.problem for b in blocks if b.problem})) or "it has no self-attention"
        raise ConfigError(f"method {method!r} found no block of this model to attach to: {reasons}.")
    model.add_module(name, nn.ModuleDict(added))
    for own in added.values():
        own.added_to(model)
    return model


def check_free(model: nn.Module, name: str, owner: str) -> None:
    """Raise ``ConfigError`` where no submodule ``name``, of ``owner``, can be added to a model."""
    if hasattr(model, name):
        raise ConfigError(f"this model has the modules of {owner} already, as {name!r}.")
    if isinstance(model, nn.Sequential):
        raise ConfigError("attach cannot add modules to an nn.Sequential, which would run them; wrap it in a module.")


def reader_of(model: nn.Module, block: Block, reads: Reads, flow: Dataflow) -> tuple[nn.Module, int]:
    """The module that takes what is to be read as its first argument, and the number of channels."""
    query, entry = block.attention.query, present(block.entry)
    between = [*flow.between(entry, query), query]
    if reads is Reads.STREAM:
        node = next(n for n in between if entry in n.all_input_nodes)
        read = entry
    else:
        node = next((n for n in reversed(between) if _is_linear(n)), query)
        read = node_of(node.args[0])
    return next(iter(modules_around(node, model)), model), read.meta["val"].shape[-1]


def _is_linear(node: fx.Node) -> bool:
    """Whether a node is a linear layer, be it that of a tensor subclass."""
    return node.target is aten.linear.default or (
        getattr(node.target, "__name__", "") == "linear" and bool(wrappers(node))
    )
