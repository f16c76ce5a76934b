"""The contract of a pass, and the loop that runs them."""

from __future__ import annotations

import logging
import os
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import fx

from mctf_compile.config import FusionConfig
from mctf_compile.errors import ConfigError, PassError, UnsupportedGraph
from mctf_compile.narrowing import present

if TYPE_CHECKING:
    from mctf_compile.options.schedule import Target
    from mctf_compile.passes.analysis.branches import Branch
    from mctf_compile.passes.analysis.observations import Observation
    from mctf_compile.passes.analysis.sizes import Sizes
    from mctf_compile.passes.analysis.structure import Block, Tower
    from mctf_compile.passes.analysis.token_axes import Axes
    from mctf_compile.passes.lowering.regions import Cut
    from mctf_compile.passes.planning.costs import Clock
    from mctf_compile.passes.planning.counts import Counts
    from mctf_compile.passes.planning.plan import Plan
    from mctf_compile.passes.rewriting.rewriter import FusedOutput, Unmerge


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Findings:
    """What was learned of a rewritten graph that only the plan can act on.

    ``declined``: blocks that are not worth fusing, with the reason. ``uncut``: blocks that get the
    original tokens back, because an operator between them and the block before needs those. ``r``: what each block
    is to remove to meet a target, and ``met`` what that meets.
    """

    declined: dict[int, str] = field(default_factory=dict)
    uncut: frozenset[int] = frozenset()
    r: tuple[int, ...] | None = None
    met: str | None = None


@dataclass
class State:
    """What flows through the passes: each reads what earlier ones have set, and sets its own."""

    gm: fx.GraphModule
    inputs: Sequence[Any]
    config: FusionConfig
    # The tensors that Dynamo passes for the graph's inputs, where it does.
    examples: Sequence[Any] = ()
    # Whether the result is to take the tokens that each block leaves as further inputs.
    adjustable: bool = False
    # Whether the lowered graph is to stay in one piece.
    one_piece: bool = False
    # Whether the budget is yet to be decided, on an adjustable result; and what times that, where it must be run.
    undecided: bool = False
    clock: Callable[[State], Clock] | None = None
    counts: Counts | None = None
    normal: fx.GraphModule | None = None
    observations: list[Observation] | None = None
    sizes: Sizes | None = None
    axes: Axes | None = None
    blocks: list[Block] | None = None
    # By block the branches of its residual stream, where the method acts in them.
    branches: list[tuple[Branch, ...]] | None = None
    masks: dict[fx.Node, frozenset[fx.Node]] | None = None
    marks: dict[fx.Node, frozenset[fx.Node]] | None = None
    # The positions of the inputs that are masks over pairs, and taken for padding.
    assumed: tuple[int, ...] = ()
    towers: list[Tower] | None = None
    findings: Findings = Findings()
    # Whether a block that fuses has another number of tokens at another call; then, too, the result takes such inputs.
    varies: bool = False
    plan: Plan | None = None
    # The rewritten graph, in operators whose work can be counted.
    result: fx.GraphModule | None = None
    unmerges: list[Unmerge] = field(default_factory=list)
    # The outputs that keep their fused tokens.
    kept_fused: tuple[FusedOutput, ...] = ()
    # Multiply-accumulates of each branch that runs on fused tokens, by block and kind, before and after.
    branch_macs: dict[tuple[int, str], tuple[int, int]] = field(default_factory=dict)
    # The same with its kernels; then with what is computed of frozen weights alone; then in pieces.
    lowered: fx.GraphModule | None = None
    remarks: list[str] = field(default_factory=list)
    frozen: fx.GraphModule | None = None
    cut: Cut | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    # Where the graph is written after each pass, if it is.
    dumps: Path | None = None

    @property
    def counted(self) -> bool:
        """Whether what each block leaves is an input of the rewritten graph."""
        return self.adjustable or self.undecided or self.varies

    @property
    def unsolved(self) -> Target | None:
        """The target that ``r`` is yet to be found for."""
        return None if self.findings.r is not None else getattr(self.config.method, "solved_for", None)

    @property
    def current(self) -> fx.GraphModule:
        """The graph as far as it has come."""
        return self.frozen or self.lowered or self.result or self.normal or self.gm


# What a pass does; see ``graph_pass`` for what it returns.
Run: TypeAlias = Callable[[State], "str | None"]


@dataclass(frozen=True)
class Pass:
    """A named step with what must be set before it and what it sets."""

    name: str
    requires: tuple[str, ...]
    ensures: tuple[str, ...]
    run: Run


def graph_pass(name: str, *, requires: tuple[str, ...], ensures: tuple[str, ...] = ()) -> Callable[[Run], Pass]:
    """Make a function on ``State`` a pass with a contract, checked on every run.

    The function may return the name of an earlier pass to go back to, having changed ``findings``.
    """
    return lambda function: Pass(name, requires, ensures, function)


def run_passes(passes: Sequence[Pass], state: State) -> State:
    """Run ``passes`` in order; stops early once a plan fuses nothing.

    With ``MCTF_DEBUG=dir`` the graph after each pass goes to ``dir/graph_N/NN-name.txt``, both numbered from 0.
    Raises ``PassError`` that names the passes already run; ``ConfigError`` and ``UnsupportedGraph`` as they are.
    """
    done: list[str] = []
    names = [step.name for step in passes]
    number = 0
    while number < len(passes):
        step = passes[number]
        back = _run_one(step, state, done)
        done.append(step.name)
        _dump(step.name, state)
        if state.plan is not None and not state.plan.fusing:
            break
        number = number + 1 if back is None else names.index(back)
    return state


def _run_one(step: Pass, state: State, done: list[str]) -> str | None:
    """Run one pass under its contract, timed."""
    missing = [name for name in step.requires if getattr(state, name) is None]
    if missing:
        raise PassError(f"pass {step.name} needs {', '.join(missing)}; passes run: {', '.join(done) or 'none'}")
    start = time.perf_counter()
    try:
        back = step.run(state)
    except (ConfigError, PassError, UnsupportedGraph):
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise PassError(
            f"pass {step.name} failed after {', '.join(done) or 'no other pass'}: {error!r} "
            f"(line {place.lineno} of {place.filename})"
        ) from error
    unset = [name for name in step.ensures if getattr(state, name) is None]
    if unset:
        raise PassError(f"pass {step.name} did not set {', '.join(unset)}")
    seconds = time.perf_counter() - start
    state.seconds[step.name] = state.seconds.get(step.name, 0.0) + seconds
    log.debug(
        "pass %s: %.3f s, %d nodes%s",
        step.name,
        seconds,
        len(state.current.graph.nodes),
        "" if back is None else f"; back to {back}",
    )
    return back


def _dump(name: str, state: State) -> None:
    """Write the graph after a pass, where ``MCTF_DEBUG`` names a folder."""
    folder = os.environ.get("MCTF_DEBUG")
    if not folder:
        return
    state.dumps = state.dumps or _numbered(Path(folder))
    lines = [
        f"# {state.config}",
        *(
            f"# block {b.index}: {b.tokens_in} -> {b.tokens_out} {b.reason or ''}"
            for b in (state.plan.blocks if state.plan else [])
        ),
    ]
    for node in state.current.graph.nodes:
        dims = state.axes.dims.get(node) if state.axes and state.result is None else None
        shown = f"  # {present(state.axes).of(node)}" if isinstance(dims, tuple) else ""
        lines.append(f"{node.format_node()}{shown}" if node.op != "output" else f"return {node.args[0]}")
    number = len(list(state.dumps.iterdir()))
    (state.dumps / f"{number:02}-{name}.txt").write_text("\n".join(lines) + "\n")


def _numbered(folder: Path) -> Path:
    """A new folder in ``folder`` for one graph: that of the first number that no graph has, in any process."""
    for number in count():
        path = folder / f"graph_{number}"
        with suppress(FileExistsError):
            path.mkdir(parents=True)
            return path
    raise AssertionError("the numbers end")
