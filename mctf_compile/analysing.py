"""What a user's model looks like to the compiler: for what changes the model before it is compiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from mctf_compile.capture import capture
from mctf_compile.config import FusionConfig
from mctf_compile.errors import ConfigError
from mctf_compile.narrowing import present
from mctf_compile.passes import ANALYSIS, State, run_passes
from mctf_compile.passes.analysis.normalize import fake_inputs


def analyse(model: nn.Module, inputs: Sequence[Any], kwargs: Mapping[str, Any], config: FusionConfig) -> State:
    """The analysis of the graph with the most blocks; the model is not run.

    Without inputs a timm model gets a blank image; raises ``ConfigError`` for others.
    """

    def analysed(gm: fx.GraphModule, given: Sequence[Any]) -> State:
        return run_passes(ANALYSIS, State(gm, fake_inputs(gm, given), config, given))

    with torch.no_grad():
        captured = capture(model, inputs if inputs or kwargs else _example(model), kwargs, analysed)
        return captured.largest(lambda state: len(present(state.blocks)))


def _example(model: nn.Module) -> tuple[Any, ...]:
    """Two blank images for a timm model."""
    size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    if size is None:
        raise ConfigError("this model needs example inputs, as in attach(model, images, method=...).")
    parameter = next(model.parameters())
    return (torch.zeros(2, *size, device=parameter.device, dtype=parameter.dtype),)


def modules_around(node: fx.Node, model: nn.Module) -> list[nn.Module]:
    """The modules of ``model`` that a node is computed in, the innermost first."""
    # Dynamo keys a call's modules by their identity, "@" and a number behind it for a repeated call.
    modules = {str(id(m)): m for m in model.modules()}
    keys = [key.partition("@")[0] for key in node.meta.get("nn_module_stack") or {}]
    return [modules[key] for key in reversed(keys) if key in modules]
