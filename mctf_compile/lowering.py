"""From a rewritten graph to a callable: the inner compiler, block by block where that saves compilations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from mctf_compile.config import FusionConfig
from mctf_compile.kernels.library import sources_digest
from mctf_compile.regional import Compiler, compile_regions


def lower(gm: fx.GraphModule, inputs: Sequence[Any], config: FusionConfig) -> Callable[..., Any]:
    """``gm``, compiled by ``inner`` for these inputs."""
    compiler = inner_compiler(config)
    by_region = None if _stays_whole(config, inputs) else compile_regions(gm, compiler)
    return by_region or compiler(gm, inputs)


def lower_counted(gm: fx.GraphModule, config: FusionConfig) -> Callable[..., Any]:
    """``gm``, whose last inputs are token counts, compiled for any of them."""
    by_region = None if config.lowering.inner == "eager" else compile_regions(gm, inner_compiler(config))
    return by_region or gm.forward


def _stays_whole(config: FusionConfig, inputs: Sequence[Any]) -> bool:
    """Whether the inner compiler is to see the graph in one piece.

    Freezing folds each block's own weights into its code, and CUDA graphs record one set of addresses; with an
    interpreter there is nothing to share.
    """
    if config.lowering.inner == "eager":
        return True
    patches = inductor_patches(config)
    on_cuda = any(isinstance(x, torch.Tensor) and x.is_cuda for x in inputs)
    return _set(patches, "freezing") or (on_cuda and _set(patches, "triton.cudagraphs"))


def _set(patches: Mapping[str, Any], name: str) -> bool:
    from torch._inductor import config

    return bool(patches.get(name, config.get_config_copy().get(name)))


def inner_compiler(config: FusionConfig) -> Compiler:
    """The compiler named by ``inner``, with the Inductor patches applied."""
    if config.lowering.inner == "inductor":
        from torch._inductor.compile_fx import compile_fx

        patches = inductor_patches(config)

        def compile_inner(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            # PyTorch's caches know an operator by its name; what one opens up into is ours to tell them.
            tag = f"{torch.compiler.config.cache_key_tag} mctf {sources_digest()}"
            with torch.compiler.config.patch(cache_key_tag=tag):
                return compile_fx(gm, inputs, config_patches=patches or None)

        return compile_inner
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend(config.lowering.inner)


def inductor_patches(config: FusionConfig) -> dict[str, Any]:
    """The Inductor options, those of a mode among them."""
    patches = dict(config.lowering.inductor)
    mode = patches.pop("mode", None)
    if mode is None:
        return patches
    from torch._inductor import list_mode_options

    return {**list_mode_options(mode), **patches}
