"""How long each block takes, dense and fused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from mctf_compile.capture import capture
from mctf_compile.compiler import reparameterized, run_pipeline
from mctf_compile.config import FusionConfig
from mctf_compile.inner.block_clock import BlockClock, Measured, NotTimed
from mctf_compile.passes import State
from mctf_compile.report import Report

__all__ = ["BlockTimes", "NotTimed", "block_times"]


@dataclass(frozen=True)
class BlockTimes:
    """What was measured of one model.

    Attributes:
        report: what was fused.
        dense, fused: seconds of a call, by block of the report and in all.
        rounds: of how many calls of each they are the medians.
        inner: what compiled the blocks.
    """

    report: Report
    dense: Measured
    fused: Measured
    rounds: int
    inner: str


def block_times(
    model: Callable[..., Any],
    *inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    rounds: int = 9,
    progress: Callable[[int], None] = lambda done: None,
    **options: Any,
) -> BlockTimes:
    """Measure each block of a model, dense and fused in turn, compiled by the option ``inner``.

    Each block is compiled apart from its neighbours, as the backend does with blocks that are alike; what Inductor
    would fuse across their ends it does not fuse here. With graph breaks, the graph with the most
    multiply-accumulates is measured.

    Args:
        model: any module or function, in the mode in which it is to be measured.
        inputs: with data.
        kwargs: those that are given by name.
        rounds: timed calls of each.
        progress: called with the number of rounds done.
        options: as for the backend.

    Raises:
        NotTimed: nothing fuses, or the graph cannot be cut at its blocks.
        ConfigError: an option is wrong, or inputs have no data.
        MctfError: Dynamo captures nothing of the model.
    """
    config = FusionConfig.from_options(options)

    def take(gm: fx.GraphModule, given: Sequence[Any]) -> tuple[State, Report]:
        return run_pipeline(reparameterized(gm, given, config), given, config, one_piece=True)

    state, report = capture(model, inputs, kwargs or {}, take).largest(lambda found: found[1].macs_before)
    if not report.fused:
        raise NotTimed(f"nothing fuses: {report.reason}")
    dense, fused = BlockClock(state).measure(rounds, progress)
    return BlockTimes(report, dense, fused, rounds, config.lowering.inner)
