"""Matrix products. A contraction over fused tokens weights each by its size, once."""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence

import torch
from torch import fx

from mctf_compile.errors import Declined
from mctf_compile.passes.axes import Dim, Dims
from mctf_compile.passes.rules.base import rule
from mctf_compile.passes.rules.call import Arguments, Call, Flow, Fused, V


def factor_names(names: Iterable[str]) -> tuple[str, str]:
    """The names of the two factors among an operator's arguments."""
    if "batch1" in names:
        return "batch1", "batch2"
    if "mat1" in names:
        return "mat1", "mat2"
    return "self", next(name for name in ("mat2", "other", "vec") if name in names)


def contracted(call: Fused[V]) -> V:
    """Σ_t s_t x_t y_t. Attention weights hold the sizes already: each is that of all copies."""
    left, right = factor_names(call.args)
    # Of tokens that are fused in one factor alone, what they are multiplied by in the other is summed.
    x = call.operand_value(call.args[left], len(call.dims(left)) - 1)
    y = call.operand_value(call.args[right], max(len(call.dims(right)) - 2, 0))
    if any(len(call.dims(name)) == 1 < len(v.dims) for name, v in ((left, x), (right, y))):
        raise Declined("a product with a vector over the tokens has an entry for each of the original ones")
    inner_x, inner_y = len(x.dims) - 1, max(len(y.dims) - 2, 0)
    place_x, place_y = call.place_in(x, inner_x), call.place_in(y, inner_y)
    if place_x.before or place_x.after or (place_x.lead, place_x.tail) != (place_y.lead, place_y.tail):
        raise Declined("a matrix product contracts the token axis together with other axes")
    # Of two maps of weights, neither says how many copies a token has.
    if (x.weights_dim, y.weights_dim) not in ((inner_x, None), (None, inner_y)):
        x, y = call.intensive(left), call.intensive(right)
        y = call.weighted(y, place_y)
    tensors = [x.tensor.to(y.tensor.dtype), y.tensor]
    if "self" in (left, right):
        return call.result(call.target(*tensors).to(call.dtype))
    factors = {name: call.args[name] for name in ("beta", "alpha")}
    added = call.intensive("self").tensor.to(y.tensor.dtype)
    return call.result(call.target(added, *tensors, **factors).to(call.dtype))


def factors(arguments: Arguments) -> list[fx.Node]:
    """The two operands of a product."""
    return [arguments[name] for name in factor_names(arguments)]


@rule("_int_mm", reads="self mat2")
@rule("matmul", "linalg_matmul", reads="self other", fused=contracted, broadcasts=True, layer=True, factors=factors)
@rule("bmm", "baddbmm", reads="self mat2 batch1 batch2 beta alpha", fused=contracted, layer=True, factors=factors)
@rule("mm", "mv", "addmm", reads="self mat1 mat2 vec beta alpha", fused=contracted, layer=True)
def matmul(call: Call) -> Flow:
    left, right = (call.dims(name) for name in factor_names(call.args))
    x = left if len(left) > 1 else ((), *left)
    y = right if len(right) > 1 else (*right, ())
    mixed = (x[-1], y[-2], *call.table.align(x[-1], y[-2]))
    batch: list[Dim] = []
    for i in range(max(len(x), len(y)) - 2, 0, -1):
        a = x[-2 - i] if i <= len(x) - 2 else ()
        b = y[-2 - i] if i <= len(y) - 2 else ()
        mixed += call.table.align(a, b)
        batch.append(a or b)
    out: Dims = (*batch, *((x[-2],) if len(left) > 1 else ()), *((y[-1],) if len(right) > 1 else ()))
    if "beta" in call.args:
        for a, b in zip(reversed(call.dims("self")), reversed(out)):
            mixed += call.table.align(a, b)
    return Flow(out, mixed)


def contracted_einsum(call: Fused[V]) -> V:
    """An einsum that contracts the token axis of two operands, by the same rule as a matrix product."""
    nodes = factors_of_sum(call.args)
    values = [call.operand_value(node) for node in nodes]
    if call.dtype is torch.bool:
        raise Declined("a product of truth values is summed over the tokens")
    equation = equation_of(call.args, [len(value.dims) for value in values])
    terms, out = letters(equation, [len(value.dims) for value in values])
    inner = set()
    for term, value in zip(terms, values):
        for place in call.places_in(value):
            if place.before or place.after or place.rest:
                raise Declined("an einsum meets the token axis inside a product of axes")
            if term[place.dim] not in out:
                inner.add(term[place.dim])
    if len(values) != 2 or len(inner) != 1:
        raise Declined("an einsum contracts token axes in a way that is not a matrix product")
    images = {term[d] for term, value in zip(terms, values) for d in call.image_dims(value)}
    if len(images) > 1:
        raise Declined("an einsum lets the images of a batch meet one another")
    (letter,) = inner
    if not all(letter in term for term in terms):
        raise Declined("an einsum sums one of its operands over the tokens before it multiplies")
    if not any(v.weights_dim is not None for v in values):
        summed = [call.operand_value(node, term.index(letter)) for node, term in zip(nodes, terms)]
        values = summed if sum(v.weights_dim is not None for v in summed) == 1 else values
    along = [v.weights_dim is not None and term[v.weights_dim] == letter for v, term in zip(values, terms)]
    if any(v.weights_dim is not None and not a for v, a in zip(values, along)) or all(along):
        raise Declined("an einsum meets attention weights along another axis than theirs")
    tensors = [value.tensor for value in values]
    if not any(along):
        tensors[1] = call.weighted(values[1], call.place_in(values[1], terms[1].index(letter))).tensor
        tensors[0] = tensors[0].to(tensors[1].dtype)
    return call.result(torch.ops.aten.einsum(equation, tensors).to(call.dtype))


def letters(equation: str, ranks: Sequence[int] = ()) -> tuple[list[str], str]:
    """The index letters of an einsum's operands and of its result; an ellipsis as letters of its own."""
    left, _, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if "->" not in equation:
        joined = left.replace(",", "").replace("...", "")
        right = "..." * ("..." in left) + "".join(sorted(c for c in set(joined) if joined.count(c) == 1))
    if "..." in left:
        free = [c for c in string.ascii_letters if c not in equation]
        hidden = [rank - len(term) + 3 if "..." in term else 0 for term, rank in zip(terms, ranks)]
        names = "".join(free[: max(hidden, default=0)])
        terms = [term.replace("...", names[len(names) - n :]) for term, n in zip(terms, hidden)]
        right = right.replace("...", names)
    return terms, right


def equation_of(arguments: Arguments, ranks: Sequence[int]) -> str:
    """What an einsum or ``tensordot`` computes, as the equation of an einsum."""
    if "equation" in arguments:
        return str(arguments["equation"])
    x, y = string.ascii_lowercase[: ranks[0]], list(string.ascii_uppercase[: ranks[1]])
    gone = set()
    for i, j in zip(arguments["dims_self"], arguments["dims_other"]):
        y[j] = x[i]
        gone.add(x[i])
    return f"{x},{''.join(y)}->{''.join(c for c in (*x, *y) if c not in gone)}"


def factors_of_sum(arguments: Arguments) -> list[fx.Node]:
    """The operands of an einsum or ``tensordot``."""
    return list(arguments["tensors"]) if "tensors" in arguments else [arguments["self"], arguments["other"]]


def two_factors(arguments: Arguments) -> list[fx.Node]:
    """The two operands of an einsum; none where it has more."""
    tensors = factors_of_sum(arguments)
    return tensors if len(tensors) == 2 else []


@rule("einsum", reads="equation tensors path", fused=contracted_einsum, layer=True, factors=two_factors)
@rule("tensordot", reads="self other dims_self dims_other", fused=contracted_einsum, layer=True, factors=two_factors)
def einsum(call: Call) -> Flow:
    nodes = factors_of_sum(call.args)
    ranks = [len(call.dims_of(node)) for node in nodes]
    terms, out = letters(equation_of(call.args, ranks), ranks)
    if any(len(set(term)) < len(term) for term in terms):
        return Flow(call.table.fresh_dims(call.shape), tuple(dim for node in nodes for dim in call.dims_of(node)))
    axes: dict[str, Dim] = {}
    mixed: tuple[Dim, ...] = ()
    for term, node in zip(terms, nodes):
        for letter, dim in zip(term, call.dims_of(node)):
            mixed += call.table.align(axes.get(letter, ()), dim)
            axes[letter] = axes.get(letter) or dim
    mixed += tuple(dim for letter, dim in axes.items() if letter not in out)
    return Flow(tuple(axes[letter] for letter in out), mixed)
