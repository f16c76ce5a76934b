"""From a rewritten graph to a callable: the inner compiler, block by block where that saves compilations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from mctf_compile.config import FusionConfig
from mctf_compile.inner.regional import RegionCompiler, compile_regions
from mctf_compile.kernels.library import sources_digest
from mctf_compile.passes.lowering.autocast import devices_of, keep_autocast_out
from mctf_compile.passes.lowering.freezing import freeze

Compiler = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


def lower(gm: fx.GraphModule, inputs: Sequence[Any], config: FusionConfig) -> Callable[..., Any]:
    """``gm``, compiled by ``inner`` for these inputs."""
    by_region = None if _stays_whole(config, inputs) else _by_region(gm, config)
    return by_region or inner_compiler(config)(_under_autocast(gm), inputs)


def lower_counted(gm: fx.GraphModule, config: FusionConfig) -> Callable[..., Any]:
    """``gm``, whose last inputs are token counts, compiled for any of them."""
    by_region = None if config.lowering.inner == "eager" else _by_region(gm, config)
    return by_region or _under_autocast(gm).forward


def _under_autocast(gm: fx.GraphModule) -> fx.GraphModule:
    keep_autocast_out(gm, devices_of(gm.graph.nodes))
    return gm


def _stays_whole(config: FusionConfig, inputs: Sequence[Any]) -> bool:
    """Whether the inner compiler is to see the graph in one piece.

    CUDA graphs record one set of addresses; with an interpreter there is nothing to share.
    """
    if config.lowering.inner == "eager":
        return True
    on_cuda = any(isinstance(x, torch.Tensor) and x.is_cuda for x in inputs)
    return on_cuda and _set(config, "triton.cudagraphs")


def _by_region(gm: fx.GraphModule, config: FusionConfig) -> Callable[..., Any] | None:
    """``gm`` compiled by region. Weights are operands to one, so that freezing them is not left to Inductor."""
    if not _set(config, "freezing") or torch.is_grad_enabled():
        return compile_regions(gm, _region_compiler(config))
    return compile_regions(freeze(gm), _region_compiler(config, freezing=False))


def _region_compiler(config: FusionConfig, **others: Any) -> RegionCompiler:
    """The inner compiler for regions."""
    compiler = inner_compiler(config, **others)
    if config.lowering.inner == "inductor":
        from torch._dynamo.utils import GmWrapper

        return lambda gm, inputs: compiler(GmWrapper(gm, lambda operands: operands), inputs)

    def compile_region(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[[list[Any]], Any]:
        run = compiler(gm, inputs)

        def boxed(operands: list[Any]) -> Any:
            return run(*operands)

        return boxed

    return compile_region


def _set(config: FusionConfig, name: str) -> bool:
    """Whether Inductor is told so, by the options or by its own configuration."""
    from torch._inductor import config as inductor

    return bool(inductor_patches(config).get(name, inductor.get_config_copy().get(name)))


def inner_compiler(config: FusionConfig, **others: Any) -> Compiler:
    """The compiler named by ``inner``, with the Inductor patches applied, and ``others`` in the place of some."""
    if config.lowering.inner == "inductor":
        from torch._inductor.compile_fx import compile_fx

        patches = {**inductor_patches(config), **others}

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
