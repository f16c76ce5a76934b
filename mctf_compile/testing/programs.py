"""Programs on tokens, operator by operator: data that can be run, captured as a graph, and printed."""

from __future__ import annotations

import inspect
import linecache
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from mctf_compile.testing.operators import made


@dataclass(frozen=True)
class Ref:
    """A value of a program by its name: an input, a parameter or table, or what a step returned."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Kinds:
    """What each token of an axis is a copy of; ``lead`` extra ones stand before the others, and ``tail`` after them."""

    of: tuple[int, ...]
    lead: int = 0
    tail: int = 0

    @property
    def total(self) -> int:
        return len(self.of)

    @property
    def body(self) -> int:
        return self.total - self.lead - self.tail

    def apart(self) -> Kinds:
        """As many tokens, no two of which are alike."""
        return replace(self, of=tuple(range(self.total)))


@dataclass(frozen=True)
class Held:
    """A tensor that a program is made with: equal for tokens of one kind, along every dimension that numbers them.

    ``apart``: each token has its own numbers, whatever its kind.
    """

    ref: Ref
    shape: tuple[int, ...]
    dtype: torch.dtype
    seed: int
    scale: float = 1.0
    parameter: bool = False
    apart: bool = False

    def code(self, kinds: Kinds) -> str:
        """An expression over ``made`` and ``KINDS``."""
        bounds = {kinds.body: f"[{kinds.lead}:{kinds.lead + kinds.body}]", kinds.total: ""} if not self.apart else {}
        made = tuple(max(kinds.of) + 1 if size in bounds else size for size in self.shape)
        picks = (f".index_select({d}, KINDS{bounds[size]})" for d, size in enumerate(self.shape) if size in bounds)
        times = f" * {self.scale}" if self.scale != 1.0 else ""
        return f"made({made}, {self.dtype}, {self.seed}){''.join(picks)}{times}"

    def tensor(self, kinds: Kinds) -> Tensor:
        if self.apart:
            return made(self.shape, self.dtype, self.seed)
        x = made(
            tuple(max(kinds.of) + 1 if s in (kinds.body, kinds.total) else s for s in self.shape), self.dtype, self.seed
        )
        of = torch.tensor(kinds.of)
        for d, size in enumerate(self.shape):
            if size in (kinds.body, kinds.total):
                x = x.index_select(d, of if size == kinds.total else of[kinds.lead : kinds.lead + kinds.body])
        return x * self.scale if self.scale != 1.0 else x


@dataclass(frozen=True)
class Step:
    """``ref = target(*args, **kwargs)``, with a ``Ref`` for each value."""

    ref: Ref
    target: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.target is operator.getitem:
            return f"{self.ref} = {self.args[0]}[{self.args[1]}]"
        name = f"torch.ops.{self.target}" if isinstance(self.target, OpOverload) else self.target.__name__
        shown = [*map(text, self.args), *(f"{key}={text(value)}" for key, value in self.kwargs.items())]
        return f"{self.ref} = {name.replace('torch.ops.aten.', 'aten.')}({', '.join(shown)})"

    def renamed(self, names: dict[Ref, Ref]) -> Step:
        args, kwargs = fill((self.args, self.kwargs), lambda ref: names.get(ref, ref))
        return replace(self, ref=names.get(self.ref, self.ref), args=args, kwargs=kwargs)


@dataclass(frozen=True)
class Region:
    """A context that the following steps run in, up to its ``Leave``: autocast, or no gradients."""

    autocast: torch.dtype | None = None
    enabled: bool = True

    def context(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return torch.no_grad()
        return torch.autocast("cpu", self.autocast, enabled=self.enabled)

    def __str__(self) -> str:
        if self.autocast is None:
            return "with torch.no_grad():"
        return f'with torch.autocast("cpu", {self.autocast}{"" if self.enabled else ", enabled=False"}):'


@dataclass(frozen=True)
class Leave:
    """The end of the innermost region."""


Line = Step | Region | Leave


def fill(value: Any, by: Callable[[Any], Any], kind: type = Ref) -> Any:
    """Arguments with something else in the place of each ``Ref``, or whatever is of a ``kind``."""
    if isinstance(value, kind):
        return by(value)
    if isinstance(value, dict):
        return {name: fill(v, by, kind) for name, v in value.items()}
    return type(value)(fill(v, by, kind) for v in value) if isinstance(value, (list, tuple)) else value


def refs(value: Any) -> Iterator[Ref]:
    """Every ``Ref`` among some arguments."""
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for v in value.values() if isinstance(value, dict) else value:
            yield from refs(v)


def text(value: Any) -> str:
    """An argument as source."""
    if isinstance(value, (list, tuple)):
        shown = ", ".join(map(text, value))
        return f"[{shown}]" if isinstance(value, list) else f"({shown}{',' * (len(value) == 1)})"
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return f'float("{value}")'
    if isinstance(value, (Ref, torch.dtype, torch.memory_format)):
        return str(value)
    return f'torch.device("{value}")' if isinstance(value, torch.device) else repr(value)


_numbers = count()


@dataclass(frozen=True)
class Program:
    """Inputs, held tensors, lines, and what is returned.

    ``kinds``: what its tokens are copies of. ``tolerance``: how far apart, relative
    to the largest entry, outputs may be that were computed in another order. ``gradients``: whether they are recorded.
    """

    kinds: Kinds
    inputs: tuple[Held, ...]
    held: tuple[Held, ...]
    lines: tuple[Line, ...]
    outputs: tuple[Ref, ...]
    tolerance: float = 1e-4
    gradients: bool = False

    @property
    def steps(self) -> list[Step]:
        return [line for line in self.lines if isinstance(line, Step)]

    @property
    def regions(self) -> list[Region]:
        return [line for line in self.lines if isinstance(line, Region)]

    def source(self, name: str = "Program") -> str:
        """A module of Python: what it needs, a class of that name, and its ``inputs``."""
        functions = dict.fromkeys(
            s.target for s in self.steps if not isinstance(s.target, OpOverload) and s.target is not operator.getitem
        )
        return "\n".join(
            [
                "import torch",
                "from torch import nn",
                "from torch.nn import functional as F",
                "",
                "from mctf_compile.testing.operators import made",
                "",
                "aten = torch.ops.aten",
                "# Tokens of one kind are copies of each other.",
                f"KINDS = torch.tensor({list(self.kinds.of)})",
                *(f"\n\n{_definition(function)}" for function in functions),
                "",
                "",
                f"class {name}(nn.Module):",
                "    def __init__(self):",
                "        super().__init__()",
                *(
                    f"        {held.ref} = nn.{'Parameter' if held.parameter else 'Buffer'}({held.code(self.kinds)})"
                    for held in self.held
                ),
                "",
                f"    def forward(self, {', '.join(str(held.ref) for held in self.inputs)}):",
                *_indented(self.lines),
                f"        return {', '.join(map(str, self.outputs))}{',' * (len(self.outputs) == 1)}",
                "",
                "",
                f"inputs = [{', '.join(held.code(self.kinds) for held in self.inputs)}]",
                "",
            ]
        )

    def replaced(self, by: Callable[[Any], Any]) -> Program:
        """The program with other targets: ``by`` says which for each."""
        lines = (replace(line, target=by(line.target)) if isinstance(line, Step) else line for line in self.lines)
        return replace(self, lines=tuple(lines))

    def retyped(self, dtypes: Mapping[torch.dtype, torch.dtype]) -> Program:
        """The program in other dtypes: what it is given, what it holds, and what its steps name."""

        def other(dtype: torch.dtype) -> torch.dtype:
            return dtypes.get(dtype, dtype)

        lines: list[Line] = []
        for line in self.lines:
            if isinstance(line, Step):
                args, kwargs = fill((line.args, line.kwargs), other, torch.dtype)
                line = replace(line, args=args, kwargs=kwargs)
            lines.append(line)
        inputs, held = (tuple(replace(h, dtype=other(h.dtype)) for h in of) for of in (self.inputs, self.held))
        return replace(self, inputs=inputs, held=held, lines=tuple(lines))

    def with_copies(self) -> Program:
        """The program with an equal tensor of its own for every reader of one that it holds."""
        by_ref = {held.ref: held for held in self.held}
        copies: list[Held] = []

        def copy(ref: Ref) -> Ref:
            if ref not in by_ref:
                return ref
            copies.append(replace(by_ref[ref], ref=Ref(f"{ref}_{len(copies)}")))
            return copies[-1].ref

        lines: list[Line] = []
        for line in self.lines:
            if isinstance(line, Step):
                args, kwargs = fill((line.args, line.kwargs), copy)
                line = replace(line, args=args, kwargs=kwargs)
            lines.append(line)
        return replace(self, lines=tuple(lines), held=tuple(copies))

    def without_regions(self) -> Program:
        """The program without its regions of autocast and of ``no_grad``."""
        return replace(self, lines=tuple(self.steps))

    def make(self) -> tuple[nn.Module, list[Tensor]]:
        """The module and its inputs, made from the source."""
        source, name = self.source(), f"<program {next(_numbers)}>"
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        space: dict[str, Any] = {"__name__": "mctf_compile.testing.made_up"}
        exec(compile(source, name, "exec"), space)
        return space["Program"]().eval(), space["inputs"]

    def graph(self, module: nn.Module, as_inputs: bool = False) -> fx.GraphModule:
        """The program as a graph like Dynamo's.

        What it holds are attributes of ``module``, or, where they are ``as_inputs``, more inputs (see ``held_by``).
        """
        graph = fx.Graph()
        values: dict[Ref, fx.Node] = {held.ref: graph.placeholder(str(held.ref)) for held in self.inputs}
        for held in self.held:
            name = held.ref.name.removeprefix("self.")
            values[held.ref] = graph.placeholder(f"held_{name}") if as_inputs else graph.get_attr(name)
        leaves: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        for line in self.lines:
            if isinstance(line, Step):
                args, kwargs = fill((line.args, line.kwargs), values.__getitem__)
                values[line.ref] = graph.call_function(line.target, args, kwargs)
            elif isinstance(line, Leave):
                graph.call_function(*leaves.pop())
            elif line.autocast is None:
                before = all(target is not torch._C._set_grad_enabled for target, _ in leaves)
                graph.call_function(torch._C._set_grad_enabled, (False,))
                leaves.append((torch._C._set_grad_enabled, (before,)))
            else:
                given = ("cpu", line.autocast, line.enabled, True)
                entered = graph.call_function(torch.amp.autocast_mode._enter_autocast, given)
                leaves.append((torch.amp.autocast_mode._exit_autocast, (entered,)))
        graph.output(tuple(values[ref] for ref in self.outputs))
        return fx.GraphModule(module, graph)

    def held_by(self, module: nn.Module) -> list[Tensor]:
        """What such a graph takes after the inputs."""
        return [getattr(module, held.ref.name.removeprefix("self.")) for held in self.held]


def _definition(function: Callable[..., Any]) -> str:
    """The source of a function, without what annotates it."""
    annotations = r"(: (Tensor|int|float|list\[int\]|torch\.dtype)( \| None)?)|( -> Tensor)"
    return re.sub(annotations, "", inspect.getsource(function)).rstrip()


def _indented(lines: Iterable[Line]) -> list[str]:
    """The lines of a function's body, regions indented."""
    shown, depth = [], 2
    for line in lines:
        if isinstance(line, Leave):
            depth -= 1
            continue
        shown.append("    " * depth + str(line))
        depth += isinstance(line, Region)
    return shown
