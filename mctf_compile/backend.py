"""The backend that ``torch.compile(model, backend="mctf")`` finds by its entry point."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from mctf_compile.assumed import Checked
from mctf_compile.compat import GraphBreak, break_behind, resumed_at, unwrapped
from mctf_compile.compiler import dense, fuse_or_decline, reparameterized
from mctf_compile.config import FusionConfig
from mctf_compile.dynamic import Adjustable
from mctf_compile.errors import MctfError
from mctf_compile.inner.lowering import compile_lowered, inner_compiler
from mctf_compile.narrowing import present
from mctf_compile.outputs import Noted
from mctf_compile.passes.analysis.blocks import GIVEN
from mctf_compile.recompiling import last_size
from mctf_compile.report import Report


def mctf(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    name: str | None = None,
) -> Callable[..., Any]:
    """Fuse tokens in a captured graph and compile the result with the inner compiler.

    Args:
        gm: the graph from Dynamo.
        example_inputs: its inputs.
        options: see ``FusionConfig``.
        mode: an Inductor mode, as ``options["inductor"]["mode"]``.
        name: accepted for compatibility with ``torch.compile``.

    Returns:
        The compiled callable. A graph in which nothing can be fused goes to the inner compiler unchanged,
        with one warning that gives the reason.

    Raises:
        ConfigError: before anything is compiled.
        NothingFusedError: with ``strict=True``.
    """
    try:
        return _compiled(gm, example_inputs, options, FusionConfig.from_options(options, mode))
    except MctfError as error:
        raise unwrapped(error) from error.__cause__


def _compiled(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Mapping[str, Any] | None, config: FusionConfig
) -> Callable[..., Any]:
    gm = reparameterized(gm, example_inputs, config)
    state, report = fuse_or_decline(gm, example_inputs, config, config.lowering.dynamic_r)
    for remark in report.remarks:
        warnings.warn(f"mctf: {remark}", stacklevel=2)
    if config.method.active or config.lowering.dynamic_r:
        if _split_by_ddp(gm):
            warnings.warn(SPLIT_BY_DDP, stacklevel=2)
        else:
            for line in _said_of_breaks(report, break_behind(gm), resumed_at()):
                warnings.warn(f"mctf: {line}", stacklevel=2)
    if report.reason is not None:
        return inner_compiler(config)(dense(gm, state), example_inputs)
    last = last_size(gm, example_inputs)
    if last is not None:
        warnings.warn(f"mctf: {last}", stacklevel=2)
    found = present(state)
    run = compile_lowered(found)
    if found.counts is not None:
        run = Adjustable(found, run, gm.forward, options if config.lowering.dynamic_r else None)
    if found.assumed:
        run = Checked(run, found.assumed)
    return Noted(run, found.kept_fused) if found.kept_fused else run


def _said_of_breaks(report: Report, behind: GraphBreak | None, before: str | None) -> list[str]:
    """Why a graph stays dense, if it does, and the graph break that it ends in, or goes on behind, if any.

    Nothing is said of a graph without attention that goes on behind a break: the one before it has named that.
    """
    why = [] if report.reason is None else [f"the graph stays dense: {report.reason}"]
    if all(block.reason == GIVEN for block in report.blocks):
        at = behind or before
        if behind is None and before is not None and not report.blocks:
            return []
        return why if at is None else [f"{line}; {PIECE.format(at)}" for line in why]
    return why if behind is None else [*why, IN_PIECES.format(behind)]


PIECE = "it is a piece of a model that a graph break cuts at {}"
IN_PIECES = (
    "Dynamo cuts the model by a graph break at {}, and tokens are given back there; without the break they fuse "
    "throughout."
)
SPLIT_BY_DDP = (
    "mctf: DistributedDataParallel cuts the model into a graph per gradient bucket, and every cut gives the "
    "tokens back; set torch._dynamo.config.optimize_ddp = False to fuse them throughout."
)


def _split_by_ddp(gm: fx.GraphModule) -> bool:
    """Whether Dynamo's DDPOptimizer made this graph of a larger one."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return "DDPOptimizer" in str(getattr(reason, "reason", ""))
