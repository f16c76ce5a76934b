"""Operators that only move or regroup positions: reshape, permute, cat, slice, and the like."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import sympy
import torch
from torch import Tensor, fx

from mctf_compile.errors import Declined
from mctf_compile.narrowing import node_of, operator_of
from mctf_compile.passes.axes import Dim, Dims, Size, plain, product, size_of
from mctf_compile.passes.rules.base import Elements, rule, wrap
from mctf_compile.passes.rules.call import Call, Flow, Fused, V
from mctf_compile.passes.rules.pointwise import aligned

aten = torch.ops.aten


@rule(
    "reshape",
    "view",
    "_unsafe_view",
    "reshape_as",
    "view_as",
    reads="self shape size other",
    resized="shape",
    ignores=("other",),
    elements=Elements.REGROUPED,
)
def reshape(call: Call) -> Flow:
    source = call.dims_of(call.tensors()[0])
    out, cut = call.table.reshape(source, [size_of(s) for s in call.shape])
    return Flow(out, cut)


def number(value: int | fx.Node) -> Size:
    """An argument that is a number, as a size; a symbol of its own where nobody knows what it is."""
    known = value.meta.get("val") if isinstance(value, fx.Node) else value
    return size_of(known) if isinstance(known, (int, torch.SymInt)) else sympy.Dummy(integer=True)


@rule(
    "flatten.using_ints",
    "ravel",
    "unflatten.int",
    reads="self start_dim end_dim dim sizes",
    resized="shape",
    elements=Elements.REGROUPED,
)
def regroup(call: Call) -> Flow:
    return reshape(call)


@rule("transpose.int", "swapaxes", "swapdims", reads="self dim0 dim1 axis0 axis1", elements=Elements.REORDERED)
def transpose(call: Call) -> Flow:
    dims = list(call.dims("self"))
    names = ("dim0", "dim1") if "dim0" in call.args else ("axis0", "axis1")
    i, j = (call.args[name] for name in names)
    dims[i], dims[j] = dims[j], dims[i]
    return Flow(tuple(dims))


@rule("t", "mT", "mH", "numpy_T", "adjoint", reads="self", elements=Elements.REORDERED)
def transpose_last(call: Call) -> Flow:
    dims = call.dims("self")
    if call.node.target is aten.numpy_T.default:
        return Flow(dims[::-1])
    return Flow(dims[:-2] + dims[:-3:-1])


@rule("permute", reads="self dims", elements=Elements.REORDERED)
def permute(call: Call) -> Flow:
    dims = call.dims("self")
    return Flow(tuple(dims[d] for d in call.args["dims"]))


@rule(
    "movedim.int",
    "movedim.intlist",
    "moveaxis.int",
    "moveaxis.intlist",
    reads="self source destination",
    elements=Elements.REORDERED,
)
def movedim(call: Call) -> Flow:
    dims = call.dims("self")

    def listed(given: Any) -> list[int]:
        return [wrap(d, len(dims)) for d in (given if isinstance(given, (list, tuple)) else [given])]

    source, destination = listed(call.args["source"]), listed(call.args["destination"])
    order = [d for d in range(len(dims)) if d not in source]
    for d, s in sorted(zip(destination, source)):
        order.insert(d, s)
    return Flow(tuple(dims[d] for d in order))


@rule("squeeze", "squeeze.dim", "squeeze.dims", reads="self dim", elements=Elements.REGROUPED)
def squeeze(call: Call) -> Flow:
    value = node_of(call.node.args[0]).meta["val"]
    dims = call.dims("self")
    chosen = call.args.get("dim", range(len(dims)))
    chosen = [chosen] if isinstance(chosen, int) else chosen
    gone = {wrap(d, len(dims)) for d in chosen}
    return Flow(tuple(dim for d, dim in enumerate(dims) if d not in gone or value.shape[d] != 1))


@rule("unsqueeze", reads="self dim", elements=Elements.REGROUPED)
def unsqueeze(call: Call) -> Flow:
    dims = call.dims("self")
    d = wrap(call.args["dim"], len(dims) + 1)
    return Flow((*dims[:d], (), *dims[d:]))


@rule(
    "expand",
    "expand_as",
    "broadcast_to",
    reads="self size implicit other",
    resized="size",
    ignores=("other",),
    elements=Elements.REPEATED,
)
def expand(call: Call) -> Flow:
    """An expanded dimension repeats one position: a new axis, identified with what it later meets."""
    source = call.dims_of(call.tensors()[0])
    source = ((),) * (len(call.shape) - len(source)) + source
    return Flow(tuple(dim or call.table.fresh(size) for dim, size in zip(source, call.shape)))


@rule("repeat", "tile", reads="self repeats dims", elements=Elements.REPEATED)
def repeat(call: Call) -> Flow:
    """Tiling puts an axis of its own outside what it repeats."""
    source = call.dims("self")
    times = list(call.args["repeats"] if "repeats" in call.args else call.args["dims"])
    times = [1] * (len(call.shape) - len(times)) + times
    source = ((),) * (len(times) - len(source)) + source
    tiled = [call.table.fresh(number(time), "r") + dim for dim, time in zip(source, times)]
    return Flow(tuple(tiled), tuple(dim for dim, time in zip(source, times) if time != 1))


@rule("repeat_interleave.self_int", reads="self repeats dim output_size", elements=Elements.REPEATED)
def repeat_interleave(call: Call) -> Flow:
    dims, times, d = call.dims("self"), call.args["repeats"], call.args["dim"]
    if d is None:
        return Flow(call.table.fresh_dims(call.shape), dims)
    d = wrap(d, len(dims))
    return Flow((*dims[:d], dims[d] + call.table.fresh(number(times), "r"), *dims[d + 1 :]), (dims[d],))


@rule("view_as_complex", reads="self")
def as_complex(call: Call) -> Flow:
    dims = call.dims("self")
    return Flow(dims[:-1], dims[-1:])


@rule("view_as_real", reads="self")
def as_real(call: Call) -> Flow:
    return Flow((*call.dims("self"), call.table.fresh(2)))


@rule("constant_pad_nd", "pad", reads="self pad mode value", elements=Elements.SHIFTED)
def pad(call: Call) -> Flow:
    """Padded dimensions are new axes; the others stay."""
    dims = call.dims("self")
    width = list(call.args["pad"])
    padded = {len(dims) - 1 - i // 2 for i, amount in enumerate(width) if amount != 0}
    out = tuple(call.table.fresh(size) if d in padded else dim for d, (dim, size) in enumerate(zip(dims, call.shape)))
    return Flow(out, tuple(dims[d] for d in padded))


def select_prefix(call: Fused[V]) -> V:
    """Reading one protected token: its position is the same in every generation."""
    return at_prefix(call, "read")


def at_prefix(call: Fused[V], done: str) -> V:
    """An operator at one position of the token axis, as it is, where that is a protected token."""
    dim, index = call.wrapped("dim"), call.args["index"]
    place = call.place("self", dim)
    if place.before or place.after or not 0 <= index < max(place.lead, call.tokens.positional):
        raise Declined(f"position {index} of the token axis is {done}")
    value: V = call.emit()
    return value


@rule("select.int", reads="self dim index", fused=select_prefix, elements=Elements.TAKEN)
def select(call: Call) -> Flow:
    dims = call.dims("self")
    d = wrap(call.args["dim"], len(dims))
    index = call.args["index"]
    if isinstance(index, int) and index == 0:
        # A first position read by itself is a token of its own kind: a class token.
        call.table.cut(dims[d], (0, 1))
    return Flow(dims[:d] + dims[d + 1 :], (dims[d],))


def slice_parts(call: Fused[V]) -> V:
    """A slice that is the protected prefix, or all that follows it."""
    if call.args.get("step", 1) != 1:
        raise Declined("the token axis is sliced with a stride")
    found = bounds(call.call, call.node.meta["val"])
    if found is None:
        raise Declined("the token axis is sliced at places that depend on numbers")
    return call.result(part(call, *found))


def split_parts(call: Fused[V]) -> list[V]:
    """A split into protected prefix, body and suffix."""
    d = call.wrapped("dim")
    sizes = [size_of(value.shape[d]) for value in call.node.meta["val"]]
    edges = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    pieces = [part(call, start, stop) for start, stop in pairwise(edges)]
    return [call.result(piece, index=i) for i, piece in enumerate(pieces)]


def part(call: Fused[V], start: Size, stop: Size) -> Tensor:
    """Positions start:stop of the original token axis, where they hold all of the body or nothing of it."""
    piece: Tensor = torch.ops.aten.slice.Tensor(
        call.intensive("self").tensor, call.wrapped("dim"), *span(call, start, stop)
    )
    return piece


def span(call: Fused[V], start: Size, stop: Size) -> tuple[int, int]:
    """Where positions start:stop of the original token axis are, which hold all of the body or nothing of it."""
    dim = call.wrapped("dim")
    place = call.place("self", dim)
    x = call.intensive("self").tensor
    if place.before or place.after:
        raise Declined("the token axis is sliced together with other axes")
    total = place.lead + call.tokens.size + place.tail

    def now(position: Size) -> int | None:
        """A place before or behind the body, counted from the end that it is near to."""
        back = plain(total - position)
        if isinstance(position, int) and 0 <= position <= place.lead:
            return position
        return x.shape[dim] - back if isinstance(back, int) and 0 <= back <= place.tail else None

    first, last = now(start), now(stop)
    if first is None or last is None:
        raise Declined(f"tokens {start}:{stop} are sliced out of {total}")
    return first, last


END = 2**63 - 1


def bounds(call: Call, part: Tensor) -> tuple[Size, Size] | None:
    """The start and stop of a slice, non-negative and within the dimension; None where that depends on numbers.

    ``part``: a tensor of as many positions as the slice has.
    """
    dims = call.dims("self")
    d = wrap(call.args["dim"], len(dims))
    size, length = (size_of(x.shape[d]) for x in (call.args["self"].meta["val"], part))
    given = [call.args.get("start"), call.args.get("end")]
    start, stop = (default if v is None else number(v) for v, default in zip(given, (0, END)))
    if start is None or stop is None:
        return None
    if "length" in call.args:
        start = start + size if isinstance(start, int) and start < 0 else start
        stop = start + length
    if all(isinstance(v, int) for v in (start, stop, size)):
        start, stop = (min(max(v + size if v < 0 else v, 0), size) for v in (start, stop))
        return start, stop
    start, stop = (size if v == END else v + size if sympy.sympify(v).is_negative else v for v in (start, stop))
    # What is cut at the end for some sizes is no longer as long as from start to stop.
    return (plain(start), plain(stop)) if plain(stop - start) == length else None


@rule("slice.Tensor", "narrow", reads="self dim start end step length", fused=slice_parts, elements=Elements.TAKEN)
def slice_(call: Call) -> Flow:
    dims = call.dims("self")
    d = wrap(call.args["dim"], len(dims))
    found = bounds(call, call.node.meta["val"])
    if call.args.get("step", 1) != 1 or found is None:
        whole = call.args.get("step", 1) == 1 and size_of(call.shape[d]) == product(dims[d])
        new = dims[d] if whole else call.table.fresh(call.shape[d])
        return Flow((*dims[:d], new, *dims[d + 1 :]), () if whole else (dims[d],))
    start, stop = found
    call.table.cut(dims[d], (start, stop))
    held = call.table.slice(dims[d], start, stop)
    whole = held is not None and held == call.table.canonical(dims[d])
    held = call.table.fresh(call.shape[d]) if held is None else held
    # The length that narrow is given is not cut to that of fused tokens.
    untouched = whole and "length" not in call.args
    return Flow((*dims[:d], held, *dims[d + 1 :]), () if untouched else (dims[d],))


def write_prefix(call: Fused[V]) -> V:
    """Writing one protected token: its position is the same in every generation."""
    return at_prefix(call, "written to")


@rule("select_scatter", reads="self src dim index", fused=write_prefix)
def select_scatter(call: Call) -> Flow:
    """The first operand with the second at one position."""
    dims, source = call.dims("self"), call.dims("src")
    d = wrap(call.args["dim"], len(dims))
    if call.args["index"] == 0:
        call.table.cut(dims[d], (0, 1))
    others = dims[:d] + dims[d + 1 :]
    mixed = tuple(dim for a, b in zip(others, source) for dim in call.table.align(a, b))
    return Flow(dims, (*mixed, dims[d]))


def write_parts(call: Fused[V]) -> V:
    """Writing what is all of the tokens, or none of them but protected ones."""
    if call.args.get("step", 1) != 1:
        raise Declined("the token axis is written to with a stride")
    dim, found = call.wrapped("dim"), bounds(call.call, call.args["src"].meta["val"])
    place, held = call.place("self", dim), [p for p in call.places_of(call.args["src"]) if p.dim == dim]
    if found is None:
        raise Declined("the token axis is written to at places that depend on numbers")
    start, stop = found
    after = plain(place.lead + call.tokens.size + place.tail - stop)
    whole = all(isinstance(v, int) and v <= end for v, end in ((start, place.lead), (after, place.tail)))
    if whole != bool(held) or any(p.before or p.after or p.rest or p.lead != place.lead - start for p in held):
        raise Declined("what is written to the tokens numbers them otherwise than they do")
    x, source = call.intensive("self").tensor, call.intensive("src").tensor
    return call.result(torch.ops.aten.slice_scatter(x, source, dim, *span(call, start, stop)))


@rule("slice_scatter", reads="self src dim start end step", fused=write_parts)
def slice_scatter(call: Call) -> Flow:
    """The first operand with the second at some positions."""
    dims, source = call.dims("self"), call.dims("src")
    d = wrap(call.args["dim"], len(dims))
    found = bounds(call, call.args["src"].meta["val"])
    mixed = tuple(dim for i, (a, b) in enumerate(zip(dims, source)) if i != d for dim in call.table.align(a, b))
    if call.args.get("step", 1) == 1 and found is not None:
        start, stop = found
        call.table.cut(dims[d], (start, stop))
        held = call.table.slice(dims[d], start, stop)
        mixed += (source[d],) if held is None else call.table.align(held, source[d])
    else:
        mixed += (source[d],)
    return Flow(dims, (*mixed, dims[d]))


@rule(
    "split.Tensor",
    "split.sizes",
    "split",
    "split_with_sizes",
    "chunk",
    "tensor_split.sections",
    "tensor_split.indices",
    "unsafe_split.Tensor",
    "unsafe_split_with_sizes",
    "unsafe_chunk",
    reads="self split_size split_sizes chunks sections indices dim",
    fused=split_parts,
    elements=Elements.TAKEN,
)
def split(call: Call) -> Flow:
    dims = call.dims("self")
    d = wrap(call.args["dim"], len(dims))
    out: list[Dims] = []
    sizes = [size_of(value.shape[d]) for value in call.node.meta["val"]]
    edges = [plain(sum(sizes[:i])) for i in range(len(sizes) + 1)]
    call.table.cut(dims[d], edges)
    for size, start, stop in zip(sizes, edges, edges[1:]):
        held = call.table.slice(dims[d], start, stop)
        held = call.table.fresh(size) if held is None else held
        out.append((*dims[:d], held, *dims[d + 1 :]))
    return Flow(out, (dims[d],))


@rule("unbind.int", reads="self dim", elements=Elements.TAKEN)
def unbind(call: Call) -> Flow:
    dims = call.dims("self")
    d = wrap(call.args["dim"], len(dims))
    return Flow([dims[:d] + dims[d + 1 :]] * len(call.node.meta["val"]), (dims[d],))


def cat_parts(call: Fused[V]) -> V:
    """Concatenating along the token axis: prefix and body, each whole, make the fused axis again."""
    value: V = call.emit()
    return value


@rule("cat", "concat", "concatenate", reads="tensors dim", fused=cat_parts)
def cat(call: Call) -> Flow:
    return joined(call, list(call.args["tensors"]), wrap(call.args["dim"], len(call.shape)))


def joined(call: Call, nodes: Sequence[fx.Node], d: int) -> Flow:
    """Tensors one after another along dimension ``d``."""
    all_dims = [call.dims_of(n) for n in nodes]
    rank = len(call.shape)
    # Legacy: a one-dimensional empty tensor is skipped by cat.
    pairs = [(n, dims) for n, dims in zip(nodes, all_dims) if len(dims) == rank]
    out = list(pairs[0][1])
    mixed = tuple(dims[d] for _, dims in pairs)
    for _, dims in pairs[1:]:
        for i in range(rank):
            mixed += call.table.align(out[i], dims[i]) if i != d else ()
    out[d] = call.table.cat([(size_of(n.meta["val"].shape[d]), dims[d]) for n, dims in pairs])
    return Flow(tuple(out), mixed)


@rule("hstack", "vstack", "dstack", "column_stack", "row_stack", reads="tensors", fused=cat_parts)
def cat_by_name(call: Call) -> Flow:
    """``cat`` along the dimension that the name stands for; of what has too few, each in a layout of its own."""
    nodes, d = list(call.args["tensors"]), _NAMED[operator_of(call.node).overloadpacket.__name__]
    if any(len(call.dims_of(node)) <= max(d, 1) for node in nodes):
        return Flow(call.table.fresh_dims(call.shape), tuple(dim for node in nodes for dim in call.dims_of(node)))
    return joined(call, nodes, d)


_NAMED = {"vstack": 0, "row_stack": 0, "hstack": 1, "column_stack": 1, "dstack": 2}


@rule("stack", reads="tensors dim")
def stack(call: Call) -> Flow:
    first, *others = [call.dims_of(n) for n in call.args["tensors"]]
    d = wrap(call.args["dim"], len(call.shape))
    mixed = tuple(dim for dims in others for a, b in zip(first, dims) for dim in call.table.align(a, b))
    return Flow((*first[:d], call.table.fresh(call.shape[d]), *first[d:]), mixed)


@rule("tril", "triu", reads="self diagonal")
def triangle(call: Call) -> Flow:
    """What is kept depends on the row and the column."""
    dims = call.dims("self")
    return Flow(dims, dims[-2:])


@rule("index_select", reads="self dim index")
def index_select(call: Call) -> Flow:
    """Some positions of a dimension, in another order: those of the index."""
    dims, picked = call.dims("self"), call.dims("index")
    if not dims:
        return Flow(())
    d = wrap(call.args["dim"], len(dims))
    return Flow((*dims[:d], *(picked or ((),)), *dims[d + 1 :]), (dims[d],))


@rule("gather", reads="self dim index sparse_grad")
@rule("take_along_dim", reads="self indices dim")
def gather(call: Call) -> Flow:
    """A position of one dimension for each of the index; where that is shorter elsewhere, its first ones.

    ``take_along_dim`` spreads an index of size 1 instead.
    """
    index = call.args["index"] if "index" in call.args else call.args["indices"]
    dims, picked = call.dims("self"), call.dims_of(index)
    if call.args["dim"] is None:
        return Flow(call.table.fresh_dims(call.shape), dims + picked)
    if not dims or not picked:
        return Flow(dims or picked, dims + picked)
    d = wrap(call.args["dim"], len(dims))
    mixed: tuple[Dim, ...] = (dims[d],)
    out = list(picked)
    for i, (a, b) in enumerate(zip(dims, picked)):
        if i != d and a and product(b) != product(a) and (b or "index" in call.args):
            mixed += (a,)
        elif i != d:
            mixed += call.table.align(a, b)
            out[i] = a or b
    return Flow(tuple(out), mixed)


@rule("index.Tensor", reads="self indices")
def index(call: Call) -> Flow:
    """Positions of some dimensions for each of the indices together; these stand where those did, or first."""
    dims, indices = call.dims("self"), list(call.args["indices"])
    at = [d for d, given in enumerate(indices) if given is not None]
    if any(indices[d].meta["val"].dtype in (torch.bool, torch.uint8) for d in at):
        # How many there are is known when the graph runs.
        return Flow(call.table.fresh_dims(call.shape), tuple(dim for n in call.tensors() for dim in call.dims_of(n)))
    given = [call.dims_of(indices[d]) for d in at]
    met = aligned(call, given, max(map(len, given)))
    picked, first = cast(Dims, met.out), at[0] if at[-1] - at[0] == len(at) - 1 else 0
    kept = tuple(dim for d, dim in enumerate(dims) if d not in at)
    return Flow((*kept[:first], *picked, *kept[first:]), (*met.mixed, *(dims[d] for d in at)))
