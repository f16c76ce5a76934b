"""The contract of a pass, and the loop that runs them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import fx

from mctf_compile.config import FusionConfig
from mctf_compile.errors import ConfigError, PassError
from mctf_compile.passes.blocks import Block
from mctf_compile.passes.plan import Plan
from mctf_compile.passes.rewrite import Unmerge
from mctf_compile.passes.token_axes import Axes


@dataclass
class State:
    """What flows through the passes: each reads what earlier ones have set, and sets its own."""

    gm: fx.GraphModule
    inputs: Sequence[Any]
    config: FusionConfig
    normal: fx.GraphModule | None = None
    axes: Axes | None = None
    blocks: list[Block] | None = None
    plan: Plan | None = None
    result: fx.GraphModule | None = None
    unmerges: list[Unmerge] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def current(self) -> fx.GraphModule:
        """The graph as far as it has come."""
        return self.result or self.normal or self.gm


@dataclass(frozen=True)
class Pass:
    """A named step with what must be set before it and what it sets."""

    name: str
    requires: tuple[str, ...]
    ensures: tuple[str, ...]
    run: Callable[[State], None]


def graph_pass(*, requires: tuple[str, ...], ensures: tuple[str, ...] = ()) -> Callable[[Callable], Pass]:
    """Make a function on ``State`` a pass with a contract, checked on every run."""
    return lambda function: Pass(function.__name__, requires, ensures, function)


def run_passes(passes: Sequence[Pass], state: State) -> State:
    """Run ``passes`` in order; stops early once a plan fuses nothing.

    With ``MCTF_DEBUG=dir`` the graph after each pass goes to ``dir/NN-name.txt``.
    Raises ``PassError`` that names the passes already run, ``ConfigError`` as it is.
    """
    done: list[str] = []
    for number, step in enumerate(passes):
        missing = [name for name in step.requires if getattr(state, name) is None]
        if missing:
            raise PassError(f"pass {step.name} needs {', '.join(missing)}; passes run: {', '.join(done) or 'none'}")
        start = time.perf_counter()
        try:
            step.run(state)
        except (ConfigError, PassError):
            raise
        except Exception as error:
            raise PassError(f"pass {step.name} failed after {', '.join(done) or 'no other pass'}: {error!r}") from error
        unset = [name for name in step.ensures if getattr(state, name) is None]
        if unset:
            raise PassError(f"pass {step.name} did not set {', '.join(unset)}")
        done.append(step.name)
        state.seconds[step.name] = time.perf_counter() - start
        _dump(number, step.name, state)
        if state.plan is not None and not state.plan.fusing:
            break
    return state


def _dump(number: int, name: str, state: State) -> None:
    folder = os.environ.get("MCTF_DEBUG")
    if not folder:
        return
    lines = [f"# {state.config}", *(f"# block {b.index}: {b.tokens_in} -> {b.tokens_out} {b.reason or ''}"
             for b in (state.plan.blocks if state.plan else []))]
    for node in state.current.graph.nodes:
        dims = state.axes.dims.get(node) if state.axes and state.result is None else None
        shown = f"  # {state.axes.of(node)}" if isinstance(dims, tuple) else ""
        lines.append(f"{node.format_node()}{shown}" if node.op != "output" else f"return {node.args[0]}")
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / f"{number}-{name}.txt").write_text("\n".join(lines) + "\n")
