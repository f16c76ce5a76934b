"""Matrix products. A contraction over fused tokens weights each by its size, once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from mctf_compile.errors import Declined
from mctf_compile.passes.axes import Dim, Dims
from mctf_compile.passes.rules.base import Call, Flow, rule

if TYPE_CHECKING:
    from mctf_compile.passes.fused_call import FusedCall
    from mctf_compile.passes.fusion import Value

aten = torch.ops.aten


def operands(names: Iterable[str]) -> tuple[str, str]:
    """The names of the two factors among an operator's arguments."""
    if "batch1" in names:
        return "batch1", "batch2"
    return ("mat1", "mat2") if "mat1" in names else ("self", "mat2" if "mat2" in names else "other")


def contracted(call: FusedCall) -> Value:
    """Σ_t s_t x_t y_t. Attention weights hold the sizes already: they are the mass of all copies."""
    left, right = operands(call.args)
    x, y = call.value(left), call.value(right)
    if "batch1" in call.args or "mat1" in call.args:
        raise Declined("a matrix product with an added operand contracts the token axis")
    inner_x, inner_y = len(call.dims(left)) - 1, max(len(call.dims(right)) - 2, 0)
    place_x, place_y = call.place(left, inner_x), call.place(right, inner_y)
    if place_x.before or place_x.after or (place_x.lead, place_x.tail) != (place_y.lead, place_y.tail):
        raise Declined("a matrix product contracts the token axis together with other axes")
    if x.mass == inner_x and y.mass is None:
        return call.result(call.target(x.tensor, y.tensor))
    if y.mass == inner_y and x.mass is None:
        return call.result(call.target(x.tensor, y.tensor))
    x, y = call.intensive(left), call.intensive(right)
    weighted = y.tensor * call.sizes_like(right, place_y).to(y.tensor.dtype)
    return call.result(call.target(x.tensor, weighted))


@rule(aten.matmul, aten.bmm, aten.mm, aten.baddbmm, aten.addmm, fused=contracted)
def matmul(call: Call) -> Flow:
    left, right = (call.dims(name) for name in operands(call.args))
    x = left if len(left) > 1 else ((), *left)
    y = right if len(right) > 1 else (*right, ())
    agree = call.table.unify(x[-1], y[-2])
    batch: list[Dim] = []
    for i in range(max(len(x), len(y)) - 2, 0, -1):
        a = x[-2 - i] if i <= len(x) - 2 else ()
        b = y[-2 - i] if i <= len(y) - 2 else ()
        if a and b:
            agree &= call.table.unify(a, b)
        batch.append(a or b)
    out: Dims = (*batch, *((x[-2],) if len(left) > 1 else ()), *((y[-1],) if len(right) > 1 else ()))
    return Flow(out, (x[-1], y[-2]) if agree else (*x, *y))


def contracted_einsum(call: FusedCall) -> Value:
    """An einsum that contracts the token axis of two operands, by the same rule as a matrix product."""
    terms, out = letters(call.args["equation"])
    nodes = list(call.args["tensors"])
    values = [call.lifted(node) for node in nodes]
    inner = set()
    for term, node in zip(terms, nodes):
        for place in call.places_of(node):
            if place.before or place.after:
                raise Declined("an einsum meets the token axis inside a product of axes")
            if term[place.dim] not in out:
                inner.add(term[place.dim])
    if len(values) != 2 or len(inner) != 1:
        raise Declined("an einsum contracts token axes in a way that is not a matrix product")
    (letter,) = inner
    mass = [v.mass is not None and term[v.mass] == letter for v, term in zip(values, terms)]
    if any(v.mass is not None and not m for v, m in zip(values, mass)) or all(mass):
        raise Declined("an einsum meets attention weights along another axis than theirs")
    tensors = [value.tensor for value in values]
    if not any(mass):
        d = terms[1].index(letter)
        place = next((p for p in call.places_of(nodes[1]) if p.dim == d), None)
        if place is None:
            raise Declined("an einsum contracts the token axis with another axis")
        tensors[1] = tensors[1] * call.sizes_of(nodes[1], place).to(tensors[1].dtype)
    return call.result(call.target(call.args["equation"], tensors))


def letters(equation: str) -> tuple[list[str], str]:
    """The index letters of an einsum's operands and of its result."""
    left, _, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if "->" not in equation:
        joined = left.replace(",", "")
        right = "".join(sorted(c for c in set(joined) if joined.count(c) == 1))
    return terms, right


@rule(aten.einsum, fused=contracted_einsum)
def einsum(call: Call) -> Flow:
    terms, out = letters(call.args["equation"])
    nodes = list(call.args["tensors"])
    everything = tuple(dim for node in nodes for dim in call.dims_of(node))
    if "..." in call.args["equation"] or any(len(set(term)) < len(term) for term in terms):
        return Flow(call.table.fresh_dims(call.shape), everything)
    axes: dict[str, Dim] = {}
    agree = True
    for term, node in zip(terms, nodes):
        for letter, dim in zip(term, call.dims_of(node)):
            if axes.get(letter):
                agree &= not dim or call.table.unify(axes[letter], dim)
            else:
                axes[letter] = dim
    mixed = tuple(dim for letter, dim in axes.items() if letter not in out)
    return Flow(tuple(axes[letter] for letter in out), mixed if agree else everything)
