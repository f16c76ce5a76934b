"""From a lowered graph to a callable: the inner compiler, block by block where the graph is cut so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import fx

from mctf_compile.config import FusionConfig
from mctf_compile.inner.regional import RegionCompiler, compile_regions
from mctf_compile.kernels.library import sources_digest
from mctf_compile.narrowing import present
from mctf_compile.passes import State
from mctf_compile.passes.lowering.autocast import devices_of, keep_autocast_out
from mctf_compile.passes.subclasses import is_wrapper

Compiler = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


def compile_lowered(state: State) -> Callable[..., Any]:
    """What the passes made, compiled; it takes the graph's inputs, and then the token counts where it has such."""
    if state.cut is not None:
        return compile_regions(state.cut, region_compiler(state))
    lowered = present(state.lowered)
    keep_autocast_out(lowered, devices_of(lowered.graph.nodes))
    if state.counts is not None:
        return lowered.forward
    return inner_compiler(state.config)(lowered, state.examples)


def region_compiler(state: State) -> RegionCompiler:
    """The inner compiler for regions. It freezes nothing itself: weights are operands to a region."""
    compiler = inner_compiler(state.config, **({} if state.frozen is None else {"freezing": False}))
    if state.config.lowering.inner == "inductor":
        from torch._dynamo.utils import GmWrapper

        return lambda gm, inputs: compiler(cast(fx.GraphModule, GmWrapper(gm, lambda operands: operands)), inputs)

    def compile_region(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[[list[Any]], Any]:
        run = compiler(gm, inputs)

        def boxed(operands: list[Any]) -> Any:
            return run(*operands)

        return boxed

    return compile_region


def inner_compiler(config: FusionConfig, **others: Any) -> Compiler:
    """The compiler named by ``inner``, with the Inductor patches applied, and ``others`` in the place of some."""
    if config.lowering.inner == "inductor":
        from torch._functorch import config as functorch
        from torch._inductor.compile_fx import compile_fx

        patches = {**config.lowering.patches(), **others}

        def compile_inner(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            # PyTorch's caches know an operator by its name; what one opens up into is ours to tell them.
            tag = f"{torch.compiler.config.cache_key_tag} mctf {sources_digest()}"
            # AOTAutograd's does not know wrappers of one make-up by their class: one would get another's graph.
            cached = functorch.enable_autograd_cache and not any(map(is_wrapper, inputs))
            tagged = torch.compiler.config.patch(cache_key_tag=tag)  # type: ignore[attr-defined]  # it is put there at import
            with tagged, functorch.patch(enable_autograd_cache=cached):
                return cast(Callable[..., Any], compile_fx(gm, inputs, config_patches=patches or None))

        return compile_inner
    from torch._dynamo.backends.registry import lookup_backend

    return cast(Compiler, lookup_backend(config.lowering.inner))
