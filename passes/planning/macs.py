"""Multiply-accumulates of a graph, counted on what it executes; this project's operators say what theirs are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cache
from typing import Any, TypeVar

import sympy
import torch
from torch import SymInt, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.convert_frame import compile_lock
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import transform_subclass
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import mctf_compile.kernels  # noqa: F401  registers torch.ops.mctf
from mctf_compile.errors import PassError
from mctf_compile.kernels.library import macs_of, says_macs, shapes_of
from mctf_compile.passes.analysis.structure import Block
from mctf_compile.passes.axes import hint_of
from mctf_compile.passes.planning.counts import Counts
from mctf_compile.passes.planning.segments import SEGMENT, owners, segments
from mctf_compile.passes.subclasses import is_wrapper


def _attention_flops(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    flops: int = sdpa_flop_count(q, k, v)
    return flops


def _product_flops(a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    flops: int = 2 * a[0] * a[1] * b[1]
    return flops


# The counter of older releases does not know attention on the CPU, and none knows products of integers.
COUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._int_mm: _product_flops,
}


# A graph is counted before and after its rewrites, and its blocks are alike: most calls have been made before.
_calls: dict[Hashable, tuple[Any, Any]] = {}
CALLS = 10_000
# What a call is made on that its signature holds whole; a symbolic size, a wrapper or a generator is none of these.
PLAIN = {
    *(int, float, bool, complex, str, type(None)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
    *(torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, FakeTensor),
}

Part = TypeVar("Part")


def shown(macs: float) -> str:
    """Multiply-accumulates for people to read."""
    unit, name = next(((u, n) for u, n in ((1e9, "GMACs"), (1e6, "MMACs")) if macs >= u / 10), (1e3, "kMACs"))
    return f"{macs / unit:.3g} {name}"


def count_macs(gm: fx.GraphModule) -> int:
    """MACs of one run of ``gm`` on the shapes it was traced with (a symbolic size counts with its hint).

    Counts matrix products, convolutions and attention, as papers do; pointwise work is left out, and so is what
    no output depends on.
    """
    return sum(_flops_by_node(gm).values()) // 2


def macs_by_block(
    before: fx.GraphModule, after: fx.GraphModule | None, blocks: Sequence[Block]
) -> list[tuple[int, int] | None]:
    """MACs of each block in the graph in which it was found and in the rewritten one (the same where that is None).

    Counted from behind the residual stream that it reads to the one that it leaves; None where that is not known. What
    is in no block (embedding, head, layers between blocks) is the rest of ``count_macs``.
    """
    numbers, owner = segments(before.graph, blocks), owners(before.graph, blocks)
    dense = macs_by(before, lambda node: owner.get(numbers[node]))
    fused = dense if after is None else macs_by(after, lambda node: owner.get(node.meta.get(SEGMENT, -1)))
    known = set(owner.values())
    return [(dense[i], fused[i]) if i in known else None for i in range(len(blocks))]


def macs_by(
    gm: fx.GraphModule,
    part: Callable[[fx.Node], Part],
    counts: Counts | None = None,
    remaining: Sequence[int] = (),
) -> Counter[Part]:
    """MACs of each part of a graph; ``part`` says in which one a node is.

    ``counts``: whose last inputs are the tokens that its fusing blocks leave, with those as ``remaining``.
    """
    totals: Counter[Part] = Counter()
    for node, flops in (_flops_by_node(gm) if counts is None else _flops_by_counts(gm, counts)).items():
        totals[part(node)] += flops // 2 if counts is None else _evaluated([flops], counts)(remaining)
    return totals


def _flops_by_node(gm: fx.GraphModule) -> dict[fx.Node, int]:
    """Twice the MACs of each node."""
    # The counter hooks the modules of the whole process, which Dynamo would trace in another thread.
    with compile_lock, _without_data():
        inputs = [_concrete(n.meta.get("val")) for n in gm.graph.nodes if n.op == "placeholder"]
        return _counted(gm, inputs, _calls)


@cache
def _without_data() -> FakeTensorMode:
    """The one mode of all counts on plain sizes: what a call makes in one of them is good in the others."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def _flops_by_counts(gm: fx.GraphModule, counts: Counts) -> dict[fx.Node, sympy.Expr]:
    """The same of a graph whose last inputs are the tokens that its fusing blocks leave, in their symbols.

    Raises ``PassError`` where an operator takes those for plain numbers: the count would hold for one of each alone.
    """
    inputs = [n.meta.get("val") for n in gm.graph.nodes if n.op == "placeholder"]
    given = len(inputs) - len(counts.remaining)
    # Some operators compute the shapes of their results with plain numbers, and in Python with symbols.
    with compile_lock, enable_python_dispatcher(), counts.mode:
        found = _counted(gm, [*map(_concrete, inputs[:given]), *inputs[given:]], {})
    if any(counts.env.replace(size.node.expr).is_number for size in counts.remaining):
        raise PassError("work cannot be counted: an operator takes the number of tokens for a plain one")
    return {node: flops.node.expr if isinstance(flops, SymInt) else flops for node, flops in found.items()}


def _counted(gm: fx.GraphModule, inputs: Sequence[Any], calls: dict[Hashable, tuple[Any, Any]]) -> dict[fx.Node, Any]:
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter, torch.no_grad():
        run = _ByNode(gm, counter, calls)
        run.run(*inputs)
    return run.flops


def macs_by_counts(gm: fx.GraphModule, counts: Counts) -> Callable[[Sequence[int]], int]:
    """``count_macs`` of a graph as a function of the tokens that its fusing blocks leave, which are its last inputs.

    It is run once, on symbolic sizes.
    """
    return _evaluated(_flops_by_counts(gm, counts).values(), counts)


def work_by_counts(
    before: fx.GraphModule, after: fx.GraphModule, blocks: Sequence[Block], counts: Counts
) -> Callable[[Sequence[int]], tuple[int, list[int | None]]]:
    """As ``macs_by_counts``, of the graph as a whole and of each block: see ``macs_by_block``."""
    owner, flops = owners(before.graph, blocks), _flops_by_counts(after, counts)
    parts: dict[int, list[sympy.Expr]] = {index: [] for index in owner.values()}
    for node, count in flops.items():
        index = owner.get(node.meta.get(SEGMENT, -1))
        if index is not None:
            parts[index].append(count)
    total = _evaluated(flops.values(), counts)
    shares = [_evaluated(parts[i], counts) if i in parts else None for i in range(len(blocks))]
    return lambda remaining: (total(remaining), [share and share(remaining) for share in shares])


def _evaluated(flops: Iterable[sympy.Expr], counts: Counts) -> Callable[[Sequence[int]], int]:
    """MACs of some nodes together, as a function of the tokens that fusing blocks leave."""
    expression, symbols = sympy.Add(*flops), [size.node.expr for size in counts.remaining]

    def macs(remaining: Sequence[int]) -> int:
        return int(expression.xreplace(dict(zip(symbols, map(sympy.Integer, remaining), strict=True)))) // 2

    return macs


class _Numbers(fx.Interpreter):
    """Runs a graph on tensors without data; a number that is read from one is the one it was traced with."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.live: set[fx.Node] = set()
        for node in reversed(gm.graph.nodes):
            if node in self.live or node.is_impure():
                self.live.update((node, *node.all_input_nodes))

    def run_node(self, n: fx.Node) -> Any:
        if n not in self.live:
            return None
        if n.target in (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default):
            return hint_of(n.meta.get("val", 1))
        return super().run_node(n)


class _ByNode(_Numbers):
    """Notes what a counter counts at each node.

    ``calls``: twice the MACs and the results of calls that were made before, by their signatures; it gains others.
    """

    def __init__(self, gm: fx.GraphModule, counter: FlopCounterMode, calls: dict[Hashable, tuple[Any, Any]]) -> None:
        super().__init__(gm)
        self.counter, self.calls, self.flops = counter, calls, dict[fx.Node, Any]()

    def run_node(self, n: fx.Node) -> Any:
        self.counter.flop_counts.clear()
        result = super().run_node(n)
        self.flops[n] = self.counter.get_total_flops()
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = _signature(target, args, kwargs)
        if call in self.calls:
            flops, result = self.calls[call]
            self.counter.flop_counts["Global"][target] += flops
            return result
        if says_macs(target):
            self.counter.flop_counts["Global"][target] += 2 * macs_of(target, args, kwargs)
            result = shapes_of(target, args, kwargs)
        else:
            result = super().call_function(target, args, kwargs)
        if call is not None:
            if len(self.calls) == CALLS:
                self.calls.clear()
            self.calls[call] = self.counter.get_total_flops(), result
        return result


def _signature(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable | None:
    """What the count and the results of a call on tensors without data depend on; None where more than is seen."""
    if not isinstance(target, torch._ops.OpOverload):
        return None
    types, devices = list[type](), set[str]()

    def described(value: Any) -> Any:
        types.append(type(value))
        if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
            return value
        layout = *value.shape, *value.stride()
        types.extend(map(type, layout))
        devices.add(value.device.type)
        return value.dtype, value.device, layout

    call = fx.node.map_aggregate((args, kwargs), described)
    if not PLAIN.issuperset(types):
        return None
    known = filter(torch.amp.is_autocast_available, sorted(devices))
    autocast = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in known]
    # 1, 1.0 and True are equal, and their products have other dtypes.
    return target, call, tuple(types), tuple(autocast), torch.get_default_dtype()


def _concrete(value: Any) -> Any:
    if is_wrapper(value):
        return transform_subclass(value, lambda _, held: _concrete(held))
    if isinstance(value, torch.Tensor):
        shape = [hint_of(s) for s in value.shape]
        return torch.empty(shape, dtype=value.dtype, device=value.device)
    return hint_of(value)
