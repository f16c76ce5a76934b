"""Growing a program on tokens operator by operator: every step is run as it is drawn, and kept where it is sound."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mctf_compile.testing.operators import Choose
from mctf_compile.testing.programs import Held, Kinds, Leave, Line, Program, Ref, Region, Step, fill, refs
from mctf_compile.testing.soundness import distance
from mctf_compile.testing.spellings import PACKS, PADDINGS, PAIRS, SYMMETRIC

aten = torch.ops.aten

# How far a result may be from what another order of the same sums gives, relative to the largest entry.
ROUNDING = {
    torch.float64: 1e-15,
    torch.float32: 1e-7,
    torch.float16: 3e-4,
    torch.bfloat16: 2e-3,
    torch.complex64: 1e-7,
    torch.complex128: 1e-15,
}
# A value that rounding changes by more says nothing.
UNSTABLE = 0.03
# Of the differences that rounding was seen to make, what a rewrite may make.
SLACK = 30
LARGEST = 1 << 16
MASKS = frozenset((*PADDINGS, *SYMMETRIC, *PACKS, *PAIRS))


class Rejected(Exception):
    """What was drawn cannot be part of the program."""


@dataclass
class Run:
    """One execution of the program as it grows: the values, and the noise that rounding is imitated with."""

    values: dict[Ref, Any]
    noise: torch.Generator | None = None

    def step(self, step: Step) -> Any:
        args, kwargs = fill((step.args, step.kwargs), self.values.__getitem__)
        before = {x.untyped_storage()._cdata for x in self.values.values() if isinstance(x, Tensor)}
        result = step.target(*args, **kwargs)
        if self.noise is None or not isinstance(result, Tensor) or result.untyped_storage()._cdata in before:
            return result
        if step.target in MASKS:
            # Its numbers are exact, and of any size.
            return result
        return self.rounded(result)

    def rounded(self, x: Tensor) -> Tensor:
        """``x``, each entry off by what another order of operations might give."""
        if x.dtype not in ROUNDING or not x.numel() or not x.isfinite().any():
            return x
        scale = x[x.isfinite()].abs().amax() * ROUNDING[x.dtype]
        return x + (torch.randn(x.shape, generator=self.noise) * scale).to(x.dtype)


class Grower:
    """A program in the making, with its values in several executions: as they are, and with other roundings.

    By one other rounding alone the position of a maximum among copies is now and then the same.

    ``choose`` takes one of a sequence of options, the plainest first.
    """

    def __init__(self, choose: Choose, kinds: Kinds, gradients: bool) -> None:
        self.choose, self.kinds, self.gradients = choose, kinds, gradients
        self.inputs: list[Held] = []
        self.held: list[Held] = []
        self.lines: list[Line] = []
        self.run = Run({})
        self.others = [Run({}, torch.Generator().manual_seed(seed)) for seed in range(3)]
        self._numbers = 0

    def chance(self, percent: int) -> bool:
        return int(self.choose(range(100))) >= 100 - percent

    # Values.

    def value(self, ref: Ref) -> Tensor:
        value: Tensor = self.run.values[ref]
        return value

    def hold(self, shape: Sequence[int], dtype: torch.dtype, scale: float = 1.0, parameter: bool = False) -> Ref:
        """A new tensor of the program's own; equal for tokens of one kind, along dimensions that number them."""
        ref = Ref(f"self.t{len(self.held)}")
        return self._add(self.held, Held(ref, tuple(shape), dtype, self._number(), scale, parameter))

    def given(self, name: str, shape: Sequence[int], dtype: torch.dtype, apart: bool = False) -> Ref:
        """A new input; ``apart``: see ``Held``."""
        return self._add(self.inputs, Held(Ref(name), tuple(shape), dtype, self._number(), apart=apart))

    def _add(self, among: list[Held], held: Held) -> Ref:
        among.append(held)
        for run in (self.run, *self.others):
            tensor = held.tensor(self.kinds)
            run.values[held.ref] = nn.Parameter(tensor) if held.parameter else tensor
        return held.ref

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers

    # Steps.

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Ref:
        """Add a step, and its result to the values. Raises ``Rejected`` where rounding decides over it."""
        ref = self.step(target, *args, **kwargs)
        self.check(ref)
        return ref

    def step(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Ref:
        """Add a step whose result is not read before others have made something of it that rounding does not change."""
        step = Step(Ref(f"v{self._number()}"), target, args, kwargs)
        try:
            for run in (self.run, *self.others):
                run.values[step.ref] = run.step(step)
        except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError) as error:
            raise Rejected(str(error)) from error
        self.lines.append(step)
        return step.ref

    def check(self, ref: Ref) -> None:
        """Raises ``Rejected`` for a value that is no tensor, large, or changed by rounding."""
        a, others = self.run.values[ref], [run.values[ref] for run in self.others]
        if isinstance(a, (list, tuple)):
            return
        if not isinstance(a, Tensor) or not 0 < a.numel() <= LARGEST or any(a.shape != b.shape for b in others):
            raise Rejected("no tensor that can be compared")
        if not all(distance(a, b) < UNSTABLE for b in others):
            raise Rejected("rounding decides over it")

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Steps that are taken back where one of them is rejected."""
        lines, held, inputs = len(self.lines), len(self.held), len(self.inputs)
        known = set(self.run.values)
        try:
            yield
        except Rejected:
            del self.lines[lines:], self.held[held:], self.inputs[inputs:]
            for ref in set(self.run.values) - known:
                for run in (self.run, *self.others):
                    run.values.pop(ref, None)

    @contextmanager
    def region(self, region: Region | None) -> Iterator[None]:
        """The steps within run in ``region``."""
        if region is None:
            yield
            return
        self.lines.append(region)
        with region.context():
            yield
        if self.lines[-1] is region:
            self.lines.pop()
        else:
            self.lines.append(Leave())

    def replay(self, start: int, stop: int, names: dict[Ref, Ref]) -> dict[Ref, Ref]:
        """Run the lines ``start:stop`` once more on other values; returns what each of their values is now."""
        names = dict(names)
        with ExitStack() as contexts:
            open_: list[ExitStack] = []
            for line in self.lines[start:stop]:
                if isinstance(line, Step):
                    step = line.renamed(names)
                    names[line.ref] = self(step.target, *step.args, **step.kwargs)
                    continue
                self.lines.append(line)
                if isinstance(line, Region):
                    open_.append(contexts.enter_context(ExitStack()))
                    open_[-1].enter_context(line.context())
                else:
                    open_.pop().close()
        return names

    def program(self, more: Sequence[Ref] = ()) -> Program:
        """What has grown; it returns ``more``, and every value that nothing reads."""
        read = {ref for line in self.lines if isinstance(line, Step) for ref in refs((line.args, line.kwargs))}
        made = [line.ref for line in self.lines if isinstance(line, Step)]
        leaves = [ref for ref in made if ref not in read and isinstance(self.run.values[ref], Tensor)]
        outputs = tuple(dict.fromkeys((*more, *leaves)))
        apart = max((distance(self.run.values[r], run.values[r]) for r in outputs for run in self.others), default=0.0)
        floor = max((_floor(self.run.values[r]) for r in outputs), default=0.0)
        return Program(
            self.kinds,
            tuple(self.inputs),
            tuple(self.held),
            tuple(self.lines),
            outputs,
            float(f"{max(SLACK * apart, floor):.1e}"),
            self.gradients,
        )


def _floor(x: Tensor) -> float:
    """The least tolerance for a result of a dtype."""
    return {torch.float64: 1e-9, torch.float16: 1e-2, torch.bfloat16: 5e-2}.get(x.dtype, 1e-4)
