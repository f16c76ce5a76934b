"""Which original token went where: the reductions of a model, followed on real inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn

from mctf_compile.backend import mctf
from mctf_compile.compiler import reparameterized, run_pipeline
from mctf_compile.config import FusionConfig
from mctf_compile.dynamic import backends
from mctf_compile.errors import ConfigError, MctfError, cause_of
from mctf_compile.narrowing import present
from mctf_compile.options.schedule import AUTO
from mctf_compile.passes import State
from mctf_compile.passes.axes import Cat, places
from mctf_compile.passes.planning.plan import PlannedBlock
from mctf_compile.passes.rewriting.following import JUDGED_BY
from mctf_compile.passes.rewriting.rewriter import rewrite_graph
from mctf_compile.report import BlockReport, Report


@dataclass(frozen=True)
class BlockTrace:
    """What one block did to the tokens of B images.

    N original tokens of the block's token axis, K before the block and M after it; protected ones (class and register
    tokens) are counted everywhere. Methods that give the tokens back after the block have M within it. All tensors
    are on the model's device and need no gradient.

    Attributes:
        block: its entry in the report.
        graph: the graph that it is in, 0-based: more than one where the model has graph breaks, and each of them gives
            the original tokens back.
        source: int64 [B, N], the position after the block of the token that each original one is part of; of one that
            was dropped, that which stands for it.
        before: int64 [B, N], the same for the tokens before the block.
        size: floating [B, M], how many original tokens each one counts for; ones for methods without sizes.
        dropped: bool [B, N], original tokens whose values no token holds any more.
        importance: floating [B, K], what the method judges the tokens before the block by, where that is one number for
            each; else None.
        judged_by: what that number is: ``importance`` (MCTF's informativeness: the mean attention received, which
            sums to 1), ``class_attention``, ``class_logits``, or None.
        first, grid: the original tokens from ``first`` on are patches that lie as ``grid`` has it: (rows, columns), or
            (frames, rows, columns) for a video; (their number,) where the graph does not tell.
    """

    block: BlockReport
    graph: int
    source: Tensor
    before: Tensor
    size: Tensor
    dropped: Tensor
    importance: Tensor | None
    judged_by: str | None
    first: int
    grid: tuple[int, ...]

    @property
    def index(self) -> int:
        """The number of the block in its graph, as in the report."""
        return self.block.index

    @property
    def spread_importance(self) -> Tensor | None:
        """``importance`` [B, N] at each original token: that of the token that it was part of before the block."""
        return None if self.importance is None else self.importance.gather(1, self.before)


@dataclass(frozen=True)
class Trace:
    """What a model did to the tokens of its inputs.

    Attributes:
        blocks: those that reduced tokens, in the order of execution.
        reports: one for each graph of the model, with its other blocks and their reasons.
        output: what the model returned.
    """

    blocks: list[BlockTrace]
    reports: list[Report]
    output: Any

    @property
    def report(self) -> Report:
        """That of the graph with the most multiply-accumulates."""
        return max(self.reports, key=lambda r: r.macs_before)


def trace(model: Callable[..., Any], *inputs: Any, kwargs: Mapping[str, Any] | None = None, **options: Any) -> Trace:
    """Run a model with its tokens reduced, and follow every original token through all blocks.

    The model runs once, without gradients, in its present mode. It is rewritten as ``torch.compile`` would have it and
    interpreted operator by operator in ATen; nothing is compiled, and what was compiled before stays. Rounding differs
    from that of compiled kernels, so that of two nearly equal pairs of tokens another may be fused.

    Args:
        model: a module or function, or what ``torch.compile(..., backend="mctf")`` made of one, whose options are taken
            (``r`` as ``set_r`` left it).
        inputs: its inputs.
        kwargs: those that are given by name.
        options: as for the backend; they take precedence over those of a compiled model.

    Raises:
        ConfigError: a wrong option, or a model that another backend has compiled.
        MctfError: no graph can be captured.
        NothingFusedError: with ``strict=True``.
    """
    config = FusionConfig.from_options(_for_interpreting({**_options(model), **options}))
    follower = _Follower(config)
    with torch.no_grad():
        output = run_under(follower, model, *inputs, **(kwargs or {}))
    if not follower.reports:
        raise MctfError("Dynamo captured no graph of this model: it runs no tensor operation that can be compiled.")
    return Trace(follower.blocks, follower.reports, output)


def run_under(backend: Callable[..., Any], model: Callable[..., Any], *inputs: Any, **kwargs: Any) -> Any:
    """What ``model`` returns when ``backend`` compiles its graphs; models compiled before stay compiled.

    Dynamo keeps what it compiles with the code that it compiled, so the model is called from code of its own. Where
    it breaks the graph, it compiles the model's own code too: then everything is reset, as much as ever is kept.

    Raises what the backend raises, and what the model raises.
    """
    function, graphs = _plain(model), 0

    def counted(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        compiled: Callable[..., Any] = backend(gm, example_inputs)
        return compiled

    def call(*inputs: Any, **kwargs: Any) -> Any:
        return function(*inputs, **kwargs)

    own = FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)
    try:
        return torch.compile(own, backend=counted, dynamic=False)(*inputs, **kwargs)
    except Exception as error:
        cause = cause_of(error)
        raise cause from (None if cause is error else error)
    finally:
        if graphs > 1:
            torch._dynamo.reset()


class _Follower:
    """A backend that interprets the rewritten graph, and keeps what became of the tokens."""

    def __init__(self, config: FusionConfig) -> None:
        self.config = config
        self.reports: list[Report] = []
        self.blocks: list[BlockTrace] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        gm = reparameterized(gm, example_inputs, self.config)
        state, report = run_pipeline(gm, example_inputs, self.config)
        number = len(self.reports)
        self.reports.append(report)
        if not report.fused:
            return gm.forward
        followed = rewrite_graph(
            present(state.normal), state.inputs, present(state.axes), present(state.plan), followed=True
        ).graph

        def run(*inputs: Any) -> Any:
            outputs, found = fx.Interpreter(followed).run(*inputs)
            self.blocks.extend(_block(state, report, number, index, tensors) for index, tensors in found.items())
            return outputs

        return run


def _block(state: State, report: Report, graph: int, index: int, tensors: Mapping[str, Tensor]) -> BlockTrace:
    judged_by = next((name for name in JUDGED_BY if name in tensors), None)
    source, before, size, dropped = (tensors[name] for name in ("source", "before", "size", "dropped"))
    first, grid = _patches(state, present(state.plan).blocks[index])
    return BlockTrace(
        report.blocks[index],
        graph,
        source,
        before,
        size,
        dropped,
        importance=None if judged_by is None else tensors[judged_by],
        judged_by=judged_by,
        first=first,
        grid=grid,
    )


def _patches(state: State, planned: PlannedBlock) -> tuple[int, tuple[int, ...]]:
    """The first patch among the original tokens of a block, and how the patches lie, as far as the axes tell."""
    tokens = present(planned.block.tokens)
    (place,) = present(places(present(state.axes).of(present(planned.block.entry)), tokens))
    first, body = place.lead, tokens.body
    if len(body) == 1 and isinstance(body[0], Cat):
        # Prefix tokens that are not protected are part of the body.
        sizes = [size for size, _ in body[0].parts]
        largest = sizes.index(max(sizes))
        first, body = first + sum(sizes[:largest]), body[0].parts[largest][1]
    return first, tuple(axis.size for axis in body)


def _options(model: Any) -> dict[str, Any]:
    """The options that a model was compiled with; none for one that was not."""
    found = list(backends(model))
    if not found:
        return {}
    for backend in found:
        if getattr(backend, "compiler_fn", None) is mctf:
            return dict(backend.kwargs.get("options") or {})
    raise ConfigError(
        'the model was compiled by another backend than "mctf"; give the model itself, or what '
        'torch.compile(model, backend="mctf") made of it.'
    )


def _for_interpreting(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options for a graph of ATen alone that is interpreted, at the ``r`` that is set now."""
    kept = {name: value for name, value in options.items() if name not in ("inductor", "dynamic_r")}
    if options.get("dynamic_r") and kept.get("r", AUTO) != AUTO:
        # It was set since for a model that was compiled for a target.
        kept.pop("target", None)
    return {**kept, "inner": "eager", "kernels": "aten"}


def _plain(model: Any) -> Callable[..., Any]:
    """A model as it was before ``torch.compile``."""
    plain: Callable[..., Any]
    if isinstance(model, nn.Module):
        model = getattr(model, "_orig_mod", model)
        # What Module.compile compiles, and what it left in place.
        plain = model._call_impl if getattr(model, "_compiled_call_impl", None) is not None else model
    else:
        plain = getattr(model, "_torchdynamo_orig_callable", model)
    return plain
