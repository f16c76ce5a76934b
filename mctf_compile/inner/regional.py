"""Compiling a graph region by region: blocks that do the same are compiled once, for every number of tokens."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import SymInt, Tensor, fx, nn
from torch._dynamo.convert_frame import compile_lock
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental import _config as config
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from mctf_compile.narrowing import present
from mctf_compile.passes.lowering.regions import Cut, Region, Symbol
from mctf_compile.passes.planning.counts import new_symbol
from mctf_compile.passes.planning.segments import SEGMENT
from mctf_compile.passes.subclasses import is_wrapper, make_up

# What it makes takes a list of operands, and may empty it: then nobody keeps in memory what is not read again.
RegionCompiler = Callable[[fx.GraphModule, Sequence[Any]], Callable[[list[Any]], Any]]
# Runs a region at an instance, on operands.
Run = Callable[[int, list[Any]], Any]


def compile_regions(
    cut: Cut, compiler: RegionCompiler, watched: Callable[[int, Run], Run] | None = None
) -> Callable[..., Any]:
    """A function that computes what a graph in regions does, with each compiled when it first runs.

    ``watched`` gives, for the number of a segment and what runs it, what is to be called in its place.
    """
    outer = cut.outer
    for i, region in enumerate(cut.regions):
        run = CompiledRegion(region, compiler).run
        for call in outer.find_nodes(op="call_module", target=f"region_{i}"):
            instance, *operands = call.args
            with outer.inserting_before(call):
                boxed = outer.call_function(_boxed, tuple(operands))
                called = run if watched is None else watched(call.meta[SEGMENT], run)
                call.replace_all_uses_with(outer.call_function(called, (instance, boxed)))
            outer.erase_node(call)
    held = _hold(outer, cut.root)
    return partial(fx.GraphModule(nn.Module(), outer).forward, *held)


def _boxed(*operands: Any) -> list[Any]:
    return list(operands)


def _hold(outer: fx.Graph, gm: fx.GraphModule) -> list[Any]:
    """Make the attributes that a graph reads its first inputs; returns them.

    A module is asked for each by name, in every call: that takes longer than all else between the regions.
    """
    held = []
    first = next(iter(outer.nodes))
    for node in outer.find_nodes(op="get_attr"):
        held.append(operator.attrgetter(node.target)(gm))
        with outer.inserting_before(first):
            node.replace_all_uses_with(outer.placeholder(f"held_{len(held)}"))
        outer.erase_node(node)
    return held


@dataclass
class _Version:
    """One compilation: the numbers for which it holds, as a condition over them, and what it makes of operands."""

    env: ShapeEnv
    condition: str | None
    run: Callable[[list[Any]], Any]

    def holds(self, numbers: Sequence[int]) -> bool:
        return self.condition is None or self.env.evaluate_guards_expression(self.condition, numbers)


class CompiledRegion:
    """A region, compiled for the operands that it meets.

    The numbers that differ between its instances are symbolic. Where Inductor finds that its code holds for
    some of them alone, it is compiled again for the others.
    """

    def __init__(self, region: Region, compiler: RegionCompiler) -> None:
        self.region, self.compiler = region, compiler
        # By what is known of an instance's operands beside their sizes.
        self._versions: dict[tuple[Any, ...], list[_Version]] = {}
        self._known: dict[tuple[Any, ...], Callable[[list[Any]], Any]] = {}

    def run(self, instance: int, operands: list[Any]) -> Any:
        """The results at one of the instances; ``operands``, the numbers first, may be empty then."""
        count = len(self.region.example_numbers)
        key = (instance, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *operands[:count])
        run = self._known.get(key)
        if run is None:
            with compile_lock:
                run = self._known[key] = self._version(operands[:count], operands[count:])
        return run(operands)

    def _version(self, numbers: Sequence[int], tensors: Sequence[Tensor]) -> Callable[[list[Any]], Any]:
        kind = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *map(_kind, tensors))
        versions = self._versions.setdefault(kind, [])
        for version in versions:
            if version.holds(numbers):
                return version.run
        # Numbers that may change are compiled for at the example's first, which r = 0 and r = 1 are not.
        attempts = [numbers] if versions or not self.region.adjustable else [self.region.example_numbers, numbers]
        for attempt in attempts:
            versions.append(self._compile(attempt, tensors))
            if versions[-1].holds(numbers):
                break
        return versions[-1].run

    def _compile(self, numbers: Sequence[int], tensors: Sequence[Tensor]) -> _Version:
        env = ShapeEnv(duck_shape=False)
        mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
        adjustable = self.region.adjustable
        # Code for any r holds for operands that are empty, or of one token.
        with config.patch(backed_size_oblivious=adjustable):  # type: ignore[attr-defined]  # it is put there at import
            symbols = [new_symbol(env, f"s{i}", n, adjustable) for i, n in enumerate(numbers)]
            with mode:
                fakes = [
                    _fake(x, [symbols[s.index] if isinstance(s, Symbol) else s for s in shape])
                    for x, shape in zip(tensors, self.region.shapes, strict=True)
                ]
            with tracing(TracingContext(mode)):
                run = self.compiler(self.region.body, [*symbols, *fakes])
            return _Version(env, env.produce_guards_expression(symbols) if symbols else None, run)


def _kind(x: Tensor) -> tuple[Any, ...]:
    """What a compilation takes for granted of an operand, beside its shape: dtype, gradient, layout and make-up."""
    return x.requires_grad, x.dtype, x.device, tuple(_layout(x)), *make_up(x)


def _layout(x: Tensor) -> list[tuple[int, int | None]]:
    """The dimensions from the innermost in memory, each with its stride where that leaves a gap; else None."""
    layout, dense = [], 1
    for d in sorted(range(x.dim()), key=lambda d: (x.stride(d), -d)):
        layout.append((d, None if x.shape[d] == 1 or x.stride(d) == dense else x.stride(d)))
        dense = dense if x.shape[d] == 1 else x.stride(d) * x.shape[d]
    return layout


def _fake(x: Tensor, shape: list[int | SymInt]) -> Tensor:
    """A fake tensor like ``x`` with sizes of ``shape``; its strides are those of ``x`` in terms of them.

    Call it under the fake mode. Subclasses that hold tensors are weights, whose sizes differ at no instance.
    """
    if is_wrapper(x):
        return present(detect_fake_mode()).from_tensor(x, static_shapes=True)
    strides: list[int | SymInt] = [0] * x.dim()
    step: int | SymInt = 1
    for d, gap in _layout(x):
        strides[d] = step if gap is None else gap
        step = strides[d] * shape[d]
    return torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device, requires_grad=x.requires_grad)
