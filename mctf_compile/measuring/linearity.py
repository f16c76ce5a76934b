"""How far each block is from linear, by which ToFu prunes in some and merges in others (Kim et al., WACV 2024)."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.bar import Bar
from rich.console import JustifyMethod
from rich.table import Table
from torch import Tensor, fx, nn

from mctf_compile.config import FusionConfig
from mctf_compile.errors import ConfigError, MctfError, UnsupportedGraph
from mctf_compile.narrowing import present
from mctf_compile.options.fields import integer, one_of
from mctf_compile.passes import ANALYSIS, State, run_passes
from mctf_compile.passes.analysis.dataflow import Dataflow
from mctf_compile.passes.analysis.normalize import fake_inputs
from mctf_compile.passes.analysis.structure import Block
from mctf_compile.passes.axes import Dim, Dims, product
from mctf_compile.passes.planning.macs import count_macs


@dataclass(frozen=True)
class Linearity:
    """The functional linearity of one block.

    ``value``: 1 where the block is affine, towards 0 the more its output strays while its input goes straight
    from one image to another; the mean over pairs of images. ``reason`` says why there is none, else None.
    """

    index: int
    value: float | None
    reason: str | None = None


def linearity(model: nn.Module, *inputs: Any, steps: int = 10, part: str = "block") -> list[Linearity]:
    """Measure how far from linear each block of a model is: Kim et al., WACV 2024, arXiv 2312.01026.

    1. Capture the model with Dynamo, find its blocks, and run it once; X1 of a block is the residual stream that
       enters it for an image, X2 that for another image of the batch (each image is paired with the one before
       it, the first with the last).
    2. Run the block f alone on X(t) = (1 - t) X1 + t X2 for t = 0, 1/steps, ..., 1.
    3. FL = ||f(X2) - f(X1)|| / sum over t of ||f(X(t + 1/steps)) - f(X(t))||, with norms over tokens and channels.

    Whatever else the block reads (a mask, a bias, a gate) stays that of the image of X1. A block ends where its
    residual stream does: at the sum after its MLP, before a norm that follows.

    Args:
        model: in eval mode and of float32 or wider; found and captured as by ``explain``.
        inputs: of a batch of at least 2; images of the kind that the model is for tell more than noise.
        steps: parts that the way from X1 to X2 is cut into.
        part: ``block``, or ``mlp`` for what comes after attention alone.

    Returns:
        One entry per self-attention, in order of execution; with graph breaks, those of the graph with the most
        multiply-accumulates.

    Raises:
        ConfigError: the batch is of one image, the model trains, or ``steps`` or ``part`` is wrong.
        UnsupportedGraph: the compiler cannot follow the model.
        MctfError: Dynamo captures nothing of it.
    """
    integer(2)("steps", steps)
    one_of("block", "mlp")("part", part)
    if model.training:
        raise ConfigError("linearity needs a model without dropout: call model.eval() first.")
    runs: list[_Run] = []
    refused: list[UnsupportedGraph] = []

    def capture(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        state = State(gm, fake_inputs(gm, example_inputs), FusionConfig(), example_inputs)
        try:
            run_passes(ANALYSIS, state)
        except UnsupportedGraph as error:
            refused.append(error)
            return gm.forward
        runs.append(_Run(state, part))
        return runs[-1].run

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=capture, dynamic=False)(*inputs)
        torch._dynamo.reset()
        if not runs:
            raise (
                refused[0]
                if refused
                else MctfError(
                    "Dynamo captured no graph of this model: it runs no tensor operation that can be compiled."
                )
            )
        return max(runs, key=lambda run: count_macs(present(run.state.normal))).measure(steps)


def proposal(values: Sequence[float | None]) -> int:
    """How many first blocks ToFu should prune in, by the linearity of all; entries may be None.

    The blocks are split in two where the squared deviations from each group's mean sum to the least. 0 where the
    first ones are not the less linear.
    """
    known = [(index, value) for index, value in enumerate(values) if value is not None]

    def groups(split: int) -> tuple[list[float], list[float]]:
        return [v for _, v in known[:split]], [v for _, v in known[split:]]

    def deviation(split: int) -> float:
        return sum(len(group) * statistics.pvariance(group) for group in groups(split))

    if len(known) < 2:
        return 0
    best = min(range(1, len(known)), key=deviation)
    first, second = map(statistics.mean, groups(best))
    return known[best][0] if first < second else 0


def table(found: Iterable[Linearity]) -> Table:
    """The linearity of each block as a rich table."""
    result = Table()
    columns: tuple[tuple[str, JustifyMethod], ...] = (("block", "right"), ("FL", "right"), ("", "left"))
    for name, justify in columns:
        result.add_column(name, justify=justify)
    for block in found:
        if block.value is None:
            result.add_row(str(block.index), "", block.reason)
        else:
            result.add_row(str(block.index), f"{block.value:.4f}", Bar(1, 0, block.value, width=30))
    return result


@dataclass(frozen=True)
class _Section:
    """The nodes on the ways from a residual stream to a later one, as a function of its own.

    ``operands``: the nodes whose values it takes, the residual stream first; ``dims`` are those of the stream, and
    of the result.
    """

    function: fx.GraphModule
    operands: list[fx.Node]
    dims: Dims
    batch: Dim


class _Run(fx.Interpreter):
    """Runs the normalised graph, and keeps what its blocks take to be run alone."""

    def __init__(self, state: State, part: str) -> None:
        super().__init__(present(state.normal))
        self.state = state
        flow = Dataflow(present(state.normal).graph)
        self.sections = [_section(block, part, state, flow) for block in present(state.blocks)]
        self.wanted = {node for s in self.sections if isinstance(s, _Section) for node in s.operands}
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            self.values[n] = value
        return value

    def measure(self, steps: int) -> list[Linearity]:
        """The linearity of each block on the values of the last run."""
        results = [
            s if isinstance(s, str) else _measure(s, [self.values[node] for node in s.operands], steps)
            for s in self.sections
        ]
        return [Linearity(i, None, r) if isinstance(r, str) else Linearity(i, r) for i, r in enumerate(results)]


def _section(block: Block, part: str, state: State, flow: Dataflow) -> _Section | str:
    """What is to be measured of a block, or why nothing is."""
    if block.problem is not None:
        return block.problem
    first, last = present(block.entry if part == "block" else block.middle), present(block.exit)
    if first is last:
        return "no MLP follows the attention"
    inside = [*flow.between(first, last), last]
    sources = [source for node in inside for source in node.all_input_nodes]
    operands = list(dict.fromkeys([first, *(n for n in sources if n not in inside)]))
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in operands}
    for node in inside:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[last])
    function, dims = fx.GraphModule(present(state.normal), graph), present(state.axes).of(first)
    return _Section(function, operands, dims, present(block.tokens).batch)


def _measure(section: _Section, values: Sequence[Any], steps: int) -> float | str:
    """The mean functional linearity over the pairs of images whose outputs differ, or why there is none."""
    if not section.batch:
        raise ConfigError("linearity compares images with one another: give a batch of at least 2.")
    x, *others = values
    place, sizes = _place(section.dims, section.batch)
    other = x.unflatten(place, sizes).roll(1, place + 1).flatten(place, place + 2)

    def output(t: float) -> Tensor:
        """f(X(t)) as float64 [B, ...]."""
        # lerp keeps the strides of x, on which views in the block rely, and gives x itself between equal images.
        y = section.function(torch.lerp(x, other, t), *others)
        flat: Tensor = y.unflatten(place, sizes).movedim(place + 1, 0).flatten(1).double()
        return flat

    start = end = output(0.0)
    path = torch.zeros_like(start[:, 0])
    for step in range(1, steps + 1):
        before, end = end, output(step / steps)
        path += (end - before).norm(dim=1)
    if not path.isfinite().all():
        return "its output is not finite"
    differ = path > 0
    if not differ.any():
        return "its output is the same for all images"
    return float(((end - start).norm(dim=1)[differ] / path[differ]).mean())


def _place(dims: Dims, batch: Dim) -> tuple[int, tuple[int, int, int]]:
    """The dimension that holds the batch axes, and the sizes before, of and after them in it."""
    return next(
        (d, (product(dim[:i]), product(batch), product(dim[i + len(batch) :])))
        for d, dim in enumerate(dims)
        for i in range(len(dim))
        if dim[i : i + len(batch)] == batch
    )
