"""Programs on tokens that Hypothesis grows from the rule table, and what must hold when they are fused.

    from mctf_compile.testing.graphs import graph_cases

A program starts with tokens of a few kinds, of which each has many exact copies, and goes on with blocks of
attention and with whatever has a rule in between. Nothing in it tells two copies apart, so fusing them loses
nothing: the fused program must compute what the program does. Needs the package hypothesis.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mctf_compile.errors import ConfigError, PassError
from mctf_compile.passes.rewriting.rewriter import LOSES, UNPAID
from mctf_compile.report import Report
from mctf_compile.testing.moves import FEATURES, Builder
from mctf_compile.testing.programs import Program
from mctf_compile.testing.soundness import (
    DUPLICATE,
    ONLY_SIMILARITY,
    Recorder,
    Soundness,
    broken,
    compiled_otherwise,
    distance,
    too_exact,
    unequal,
)
from mctf_compile.testing.spellings import PAIRS, SPELLINGS, sdpa
from mctf_compile.testing.strategies import fusion_options, without_tiles

# How far apart two spellings of one attention may be in float64.
ALIKE = 1e-6


@dataclass(frozen=True)
class GraphCase:
    """A program, how it is fused, and what is asked of it.

    ``way``: ``graph``, the program as a graph that is made here, in which copies are fused; ``compiled``, the same by
    ``torch.compile`` with the backend ``mctf``; ``rounding``, a program with regions of autocast, which must round when
    it is fused too; ``spelling``, tokens of which none is a copy, whose attention must fuse like
    ``scaled_dot_product_attention`` however it is written; ``tables``, such tokens again, which must fuse alike whether
    one table serves several readers or each has an equal one. ``as_inputs``: what the program holds are inputs of its
    graph, one for all readers, as under Dynamo, and not attributes.
    """

    grown: Program
    options: dict[str, Any]
    way: str = "graph"
    as_inputs: bool = False

    def check(self) -> Soundness:
        """What fusing tokens does to the program. Raises what the program, its capture or the rewrite raises."""
        ways = {
            "graph": self._check_graph,
            "compiled": self._check_compiled,
            "rounding": self._check_rounding,
            "spelling": self._check_alike,
            "tables": self._check_alike,
        }
        with torch.set_grad_enabled(self.grown.gradients):
            try:
                return ways[self.way]()
            except ConfigError as error:
                # How many blocks a tower has is found out by the rewrite.
                return _dense(str(error))
            except PassError as error:
                if self._runs_without_data():
                    raise
                return _dense(f"PyTorch does not trace the program: {error}")

    def program(self) -> str:
        """A program that fails as this case does."""
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        head = f"    with torch.set_grad_enabled({self.grown.gradients}):"
        checks = {
            "graph": ("assert_rewrite_sound", f", tolerance={self.grown.tolerance}"),
            "compiled": ("assert_compiled_alike", ""),
            "rounding": ("assert_rounded_alike", ""),
            "spelling": ("assert_fused_alike", ""),
            "tables": ("assert_fused_alike", ""),
        }
        check, tolerance = checks[self.way]
        graph, plain = self._two_forms() if check == "assert_fused_alike" else (self.grown, None)
        if self.way == "rounding":
            plain = self.grown.without_regions()
        modules = "Program()" if plain is None else "Program(), Plain()"
        return "\n".join(
            [
                graph.source(),
                *(() if plain is None else ("", plain.source("Plain").partition("\n\n\n")[2])),
                'if __name__ == "__main__":',
                f"    from mctf_compile.testing.soundness import {check}",
                "",
                head,
                f"        {check}({modules}, *inputs{tolerance}{options})",
            ]
        )

    def _runs_without_data(self) -> bool:
        """Whether PyTorch gives all results of the program their shapes, as any compiler asks it to."""
        module, inputs = self.grown.make()
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            try:
                module(*map(mode.from_tensor, inputs))
            except (RuntimeError, ValueError, TypeError):
                return False
        return True

    def _check_graph(self) -> Soundness:
        return self._compare()[0]

    def _compare(self) -> tuple[Soundness, list[Tensor], list[Tensor]]:
        """What is found, and what the program returns dense and fused: its outputs, and what became of its inputs."""
        module, inputs = self.grown.make()
        dense, given = ([x.clone() for x in inputs] for _ in range(2))
        recorder = Recorder(dict(self.options), masks=any(step.target in PAIRS for step in self.grown.steps))
        plain = [*_run(module, dense), *dense]
        fused = [*self._fused(recorder, self.grown, module, given), *given]
        problems, error = broken(plain, fused, recorder), None
        if not recorder.reports[0].fused:
            problems += unequal(plain, fused, "nothing was fused, and yet the output is not the dense one")
        elif not problems and recorder.groups and recorder.largest_gap <= DUPLICATE:
            error = max(map(distance, plain, fused))
            if not error <= self.grown.tolerance:
                problems.append(f"fusing duplicates changed the output by {error:.2e} of its largest entry")
        return Soundness(recorder.reports, problems, 0.0, error), plain, fused

    def _fused(self, recorder: Recorder, program: Program, module: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
        """The outputs of a program whose tokens are fused."""
        given = [*inputs, *(program.held_by(module) if self.as_inputs else ())]
        return _run(recorder(program.graph(module, self.as_inputs), given), given)

    def _check_rounding(self) -> Soundness:
        found, plain, fused = self._compare()
        module, inputs = self.grown.without_regions().make()
        try:
            exact = [*_run(module, inputs), *inputs]
        except RuntimeError:
            # Operands of one dtype in a region, of two without.
            return found
        if not found.problems:
            found.problems.extend(too_exact(plain, fused, exact))
        return found

    def _check_compiled(self) -> Soundness:
        """As a graph, and by the backend: with the same result, and with r=0 with the dense one, bit for bit."""
        found, plain, fused = self._compare()
        module, inputs = self.grown.make()
        options = {**self.options, "strict": found.report.fused}
        found.problems.extend(compiled_otherwise(module, inputs, fused, plain, **options))
        return found

    def _check_alike(self) -> Soundness:
        runs = []
        for program in self._two_forms():
            module, inputs = program.make()
            try:
                module(*(x.clone() for x in inputs))
            except RuntimeError:
                # What an operator makes of integers is of the default dtype, and meets float64 here.
                return self._check_graph()
            recorder = Recorder(dict(self.options))
            runs.append((recorder, self._fused(recorder, program, module, inputs)))
        (recorder, one), (other, plain) = runs
        reports = recorder.reports[0], other.reports[0]
        declined = [block.reason or "" for report in reports for block in report.blocks]
        nonlinear = self.options.get("pooling") in ("max", "mlerp") and any(report.unmerged for report in reports)
        if nonlinear or any(reason.startswith((LOSES, UNPAID)) for reason in declined):
            # What attention costs depends on its spelling, and so does what pays; and where tokens come back within
            # attention, a maximum over its map is taken in one spelling and over its results in another.
            return self._check_graph()
        problems = recorder.miscounted() + other.miscounted()
        form = {"spelling": "attention in another spelling", "tables": "one table for several readers"}[self.way]
        if recorder.reports[0].removed != other.reports[0].removed:
            problems.append(f"{form} removes other numbers of tokens")
        elif not max(map(distance, plain, one)) <= ALIKE:
            problems.append(f"{form} fuses other tokens")
        return Soundness(recorder.reports, problems, 0.0, None)

    def _two_forms(self) -> tuple[Program, Program]:
        """The program on tokens that are no copies, and another that computes the same."""
        graph = self._apart()
        return graph, plainly(graph) if self.way == "spelling" else graph.with_copies()

    def _apart(self) -> Program:
        """The program on tokens of which none is a copy, in float64: then nothing is decided by rounding."""
        wide = self.grown.retyped({torch.float32: torch.float64})
        return replace(wide, kinds=wide.kinds.apart())


def _dense(reason: str) -> Soundness:
    """What is found of a program that is not rewritten."""
    return Soundness([Report([], lambda: (0, 0), reason=reason)], [], 0.0, None)


def _run(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The results; operators that draw numbers draw the same in every run."""
    torch.manual_seed(0)
    return list(function(*inputs))


def plainly(program: Program) -> Program:
    """The program with ``scaled_dot_product_attention`` throughout."""
    return program.replaced(lambda target: sdpa if target in SPELLINGS else target)


@st.composite
def graph_cases(draw: st.DrawFn, features: Collection[str] = FEATURES) -> GraphCase:
    """Programs that hold some of ``features``, with options under which copies are fused first."""
    builder = Builder(lambda options: draw(st.sampled_from(options)), features)
    builder.grow()
    program, options = builder.program(), draw(fusion_options(("size", "attention", "mean", "max", "mlerp")))
    options |= {"r": draw(st.sampled_from((2, 1, 3, 4))), "min_tokens": 1}
    way = draw(st.sampled_from(("graph",) * 20 + ("spelling",) * 4 + ("compiled",)))
    if builder.returns and builder.tables:
        way = draw(st.sampled_from(("tables", "graph")))
    if way == "spelling" and (builder.came_back or all(s.target not in SPELLINGS for s in program.steps)):
        # Rounding decides which of several copies are fused.
        way = "graph"
    if way == "spelling" and (builder.pack or builder.pairs):
        # A constant mask is not read off every spelling.
        way = "graph"
    if way == "tables" and builder.by_keys:
        # Given as an input it may be padding, and padding is kept apart by the very mask that tells it.
        way = "graph"
    if way in ("spelling", "tables") and program.regions:
        # In low precision rounding decides which tokens are the most alike.
        way = "graph"
    if way == "graph" and any(region.autocast for region in program.regions):
        way = "rounding"
    if way not in ("spelling", "tables"):
        options |= ONLY_SIMILARITY
    if draw(st.integers(0, 5)) == 5:
        options = {"method": "tome", "r": options["r"]}
    elif not builder.returns and draw(st.booleans()):
        options["layers"] = [0, 1]
    if way == "tables":
        # The positions of one table have one grid, which any of its readers tells to all.
        options = without_tiles(options)
    # The backend reads the values of a module's own tensors: masks among them are seen through.
    return GraphCase(program, options, way, way == "tables" or (way != "compiled" and draw(st.booleans())))
