"""The axis algebra: every dimension of every value is a product of named axes.

An axis is an ``Atom`` or the concatenation (``Cat``) of parts, and a dimension (``Dim``) is a tuple of
axes, outermost first, whose product is its size; a dimension of size 1 is the empty tuple. Atoms are
born where a value is (an input, a convolution, the output features of a linear), refined where a
reshape splits them, and identified where two operands are aligned. All of it follows from what the
operators do with positions; no number is ever taken for an axis because it looks like one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, count, pairwise
from typing import Any, TypeAlias

import sympy
import torch

Size: TypeAlias = sympy.Expr | int

# The name of axes that number the output features of a layer; no token is ever numbered by one.
FEATURES = "c"


@dataclass(frozen=True)
class Atom:
    """An axis with no inner structure (yet: ``AxisTable`` may refine it)."""

    id: int
    size: Size
    name: str

    def __repr__(self) -> str:
        return f"{self.name}{self.id}"


@dataclass(frozen=True)
class Cat:
    """The concatenation of ``parts``, each with its size: prefix ⊕ tokens, for one."""

    parts: tuple[tuple[Size, Dim], ...]

    @property
    def size(self) -> Size:
        return sum(size for size, _ in self.parts)

    def __repr__(self) -> str:
        return "(" + "⊕".join("·".join(map(repr, dim)) or "1" for _, dim in self.parts) + ")"


Axis = Atom | Cat
Dim = tuple[Axis, ...]
Dims = tuple[Dim, ...]


def hint_of(value: Any) -> Any:
    """A number as it is, a symbolic one by its value at tracing, without a guard; 2, or true, for one that has none."""
    if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value
    hint = 2 if value.node.hint is None else value.node.hint
    return bool(hint) if isinstance(value, torch.SymBool) else hint


def size_of(value: int | torch.SymInt) -> Size:
    """A tensor's size as a sympy expression (ints stay ints); installs no guard."""
    return plain(value.node.expr) if isinstance(value, torch.SymInt) else int(value)


def plain(size: Size) -> Size:
    """A size as an int, where it is a number that depends on nothing."""
    return int(size) if isinstance(size, int) or size.is_Integer else size


def size_at(size: Size, numbers: Mapping[sympy.Symbol, int]) -> int:
    """The number that a size is where its symbols have these values."""
    if isinstance(size, int):
        return size
    return int(size.xreplace({symbol: sympy.Integer(n) for symbol, n in numbers.items()}))


def product(axes: Iterable[Axis]) -> Size:
    """The size of axes that stand side by side; 1 for none."""
    result: Size = 1
    for axis in axes:
        result = result * axis.size
    return result


def quotient(a: Size, b: Size) -> Size | None:
    """A / b where b divides a for every value of the symbols, else None."""
    if b == 0:
        return None
    if isinstance(a, int) and isinstance(b, int):
        return a // b if a % b == 0 else None
    ratio = sympy.cancel(sympy.sympify(a) / b)
    _, denominator = ratio.as_numer_denom()
    return plain(ratio) if denominator == 1 and ratio.is_integer else None


def stretches_of(a: Dim, b: Dim) -> list[tuple[Dim, Dim]]:
    """Two products of axes, of one size, cut wherever both have a boundary at the same position."""
    found: list[tuple[Dim, Dim]] = []
    i = j = 0
    for m in range(1, len(a) + 1):
        n = next((n for n in range(j + 1, len(b) + 1) if product(a[i:m]) == product(b[j:n])), None)
        if n is not None:
            found.append((a[i:m], b[j:n]))
            i, j = m, n
    return found if (i, j) == (len(a), len(b)) else [(a, b)]


def atoms(dim: Dim) -> Iterable[Atom]:
    """Every atom inside a dimension."""
    for axis in dim:
        if isinstance(axis, Atom):
            yield axis
        else:
            for _, part in axis.parts:
                yield from atoms(part)


class AxisTable:
    """Births, refinements and identifications of the axes of one graph; ``clashes``: what could not be identified."""

    def __init__(self) -> None:
        self.clashes: list[Dim] = []
        self._ids = count()
        self._refined: dict[Atom, Dim] = {}

    def fresh(self, size: int | torch.SymInt | Size, name: str = "a") -> Dim:
        size = size_of(size) if isinstance(size, torch.SymInt) else size
        return () if size == 1 else (Atom(next(self._ids), size, name),)

    def fresh_dims(self, shape: Sequence[int | torch.SymInt], name: str = "a") -> Dims:
        return tuple(self.fresh(size, name) for size in shape)

    def canonical(self, dim: Dim) -> Dim:
        """``dim`` in the finest axes known by now."""
        result: list[Axis] = []
        for axis in dim:
            if isinstance(axis, Cat):
                result.append(self._cat_axis([(size, self.canonical(part)) for size, part in axis.parts]))
            elif axis in self._refined:
                refined = self.canonical(self._refined[axis])
                self._refined[axis] = refined
                result.extend(refined)
            else:
                result.append(axis)
        return tuple(result)

    def canonical_dims(self, dims: Dims) -> Dims:
        return tuple(map(self.canonical, dims))

    def _cat_axis(self, parts: Sequence[tuple[Size, Dim]]) -> Cat:
        flat: list[tuple[Size, Dim]] = []
        for size, part in parts:
            if len(part) == 1 and isinstance(part[0], Cat):
                flat.extend(part[0].parts)
            else:
                flat.append((size, part))
        return Cat(tuple(flat))

    def cat(self, parts: Sequence[tuple[Size, Dim]]) -> Dim:
        """The concatenation of ``parts``; one part alone is itself."""
        parts = [(size, self.canonical(part)) for size, part in parts if size != 0]
        return parts[0][1] if len(parts) == 1 else (self._cat_axis(parts),)

    def unify(self, a: Dim, b: Dim) -> bool:
        """Identify two aligned dimensions. False where their structures do not agree."""
        a, b = self.canonical(a), self.canonical(b)
        if a == b:
            return True
        if product(a) != product(b):
            return False
        for one, other in ((a, b), (b, a)):
            if len(one) == 1 and isinstance(one[0], Atom) and one[0] not in atoms(other):
                self._refined[one[0]] = other
                return True
        stretches = stretches_of(a, b)
        if len(stretches) > 1:
            return all(self.unify(*stretch) for stretch in stretches)
        if len(a) == len(b) == 1 and isinstance(a[0], Cat) and isinstance(b[0], Cat):
            same = [x[0] for x in a[0].parts] == [y[0] for y in b[0].parts]
            return same and all(self.unify(x[1], y[1]) for x, y in zip(a[0].parts, b[0].parts))
        return False

    def align(self, a: Dim, b: Dim) -> tuple[Dim, ...]:
        """Identify two dimensions whose positions meet one to one; one of size 1 is spread over the other.

        Returns both where their structures do not agree: then neither can be followed beyond this point. They are
        among ``clashes`` then.
        """
        if not a or not b or self.unify(a, b):
            return ()
        self.clashes += a, b
        return a, b

    def reshape(self, dims: Dims, sizes: Sequence[Size]) -> tuple[Dims, tuple[Dim, ...]]:
        """Distribute the axes of ``dims`` over new sizes, in row-major order.

        Returns the new dims, and the axes that no longer stand as a product (they were cut at a place
        that is no boundary of theirs); the dims that they went into are fresh.
        """
        queue = [axis for dim in dims for axis in self.canonical(dim)][::-1]
        result: list[Dim] = []
        for size in sizes:
            taken: list[Axis] = []
            need: Size = size
            while need != 1:
                if not queue:
                    return self._scrambled(dims, sizes)
                axis = queue.pop()
                rest = quotient(need, axis.size)
                if rest is not None:
                    taken.append(axis)
                    need = rest
                    continue
                inner = quotient(axis.size, need)
                if inner is None or isinstance(axis, Cat):
                    return self._scrambled(dims, sizes)
                outer, inner_axis = self.fresh(need, axis.name), self.fresh(inner, axis.name)
                self._refined[axis] = outer + inner_axis
                taken.extend(outer)
                queue.extend(inner_axis)
                need = 1
            result.append(tuple(taken))
        return tuple(result), ()

    def _scrambled(self, dims: Dims, sizes: Sequence[Size]) -> tuple[Dims, tuple[Dim, ...]]:
        """A reshape that cuts through axes: leading dims that agree stay, all others are new."""
        dims = self.canonical_dims(dims)
        agree = 0
        while agree < min(len(dims), len(sizes)) and product(dims[agree]) == sizes[agree]:
            agree += 1
        new = tuple(self.fresh(size) for size in sizes[agree:])
        return dims[:agree] + new, dims[agree:]

    def slice(self, dim: Dim, start: Size, stop: Size) -> Dim | None:
        """Positions start:stop of a dimension, where they are whole parts of a concatenation, else None."""
        dim = self.canonical(dim)
        if (start, stop) == (0, product(dim)):
            return dim
        if len(dim) != 1 or not isinstance(dim[0], Cat):
            return None
        edges = list(accumulate((size for size, _ in dim[0].parts), initial=0))
        if start not in edges or stop not in edges:
            return None
        parts = dim[0].parts[edges.index(start) : edges.index(stop)]
        return self.cat(parts) if parts else None

    def cut(self, dim: Dim, bounds: Sequence[Size]) -> None:
        """Refine a leaf dimension into parts at ``bounds`` (0 < b < size), so that slices have names.

        Features are cut as often as they are read in parts. Of tokens, all parts but the largest count as protected:
        a concatenation of them is cut no further. Nothing but features is cut into single positions: no axis would be
        left to tell it by, the images of a batch of two from anything else of which there are two.

        A dimension of any size is cut where the place is a number, counted from either end.
        """
        dim = self.canonical(dim)
        if len(dim) == 1 and isinstance(dim[0], Cat) and all(atom.name == FEATURES for atom in atoms(dim)):
            offset: Size = 0
            for size, part in dim[0].parts:
                self.cut(part, [plain(b - offset) for b in bounds])
                offset = offset + size
        if len(dim) == 1 and isinstance(dim[0], Atom):
            size = dim[0].size
            edges = [0, *_inside(bounds, size), size]
            alone = size == len(edges) - 1 and dim[0].name != FEATURES
            if len(edges) > 2 and not alone:
                parts = [(plain(b - a), self.fresh(plain(b - a), dim[0].name)) for a, b in pairwise(edges)]
                self._refined[dim[0]] = (Cat(tuple(parts)),)


def _inside(bounds: Sequence[Size], size: Size) -> list[Size]:
    """Those of some places that are within a dimension of this size whatever its symbols are, in order."""
    front = sorted({b for b in bounds if isinstance(b, int) and b > 0 and not (isinstance(size, int) and b >= size)})
    if isinstance(size, int):
        return list(front)
    back = {plain(size - b) for b in bounds if not isinstance(b, int)}
    return [*front, *(size - b for b in sorted((b for b in back if isinstance(b, int) and b > 0), reverse=True))]


@dataclass(frozen=True)
class Tokens:
    """A token axis: ``lead`` prefix positions, the ``body`` that may be fused, ``tail`` suffix positions.

    ``batch`` are the axes that number the images. ``positional`` prefix tokens are not protected (the user
    said so) and yet read by their position: whatever token stands there then is read.
    """

    body: Dim
    size: Size
    lead: int
    tail: int
    batch: Dim
    positional: int = 0

    @property
    def total(self) -> Size:
        return self.lead + self.size + self.tail


@dataclass(frozen=True)
class Place:
    """Where a token axis stands in a value: dimension, axes before and after it, and its ends.

    ``rest``: further dimensions that hold the inner axes of a body laid out as a grid, as in B,H,W,C.
    Fused tokens have no grid: they all stand in ``dim``, and those dimensions become 1.
    """

    dim: int
    before: Dim
    after: Dim
    lead: int
    tail: int
    rest: tuple[int, ...] = ()


def mentions(dims: Dims, tokens: Tokens) -> bool:
    """Whether any dimension has an axis of the token body, in whatever form."""
    body = set(atoms(tokens.body))
    return any(axis in body for dim in dims for axis in atoms(dim))


def has_batch(dims: Dims, tokens: Tokens) -> bool:
    """Whether the axes that number the images stand together in some dimension."""
    width = len(tokens.batch)
    return any(dim[i : i + width] == tokens.batch for dim in dims for i in range(len(dim) + 1))


def places(dims: Dims, tokens: Tokens) -> list[Place] | None:
    """Every place of the token axis in ``dims``, or None where it occurs in any other form as well."""
    inside = set(atoms(tokens.body))
    found: list[Place] = []
    d = 0
    while d < len(dims):
        if any(axis in inside for axis in atoms(dims[d])):
            place = _place(dims[d], d, tokens.body) or _grid(dims, d, tokens.body)
            if place is None or any(axis in inside for axis in atoms(place.before + place.after)):
                return None
            found.append(place)
            d = max(d, *place.rest) if place.rest else d
        d += 1
    return found


def _place(dim: Dim, d: int, body: Dim) -> Place | None:
    """The whole body within one dimension."""
    for i in range(len(dim)):
        if dim[i : i + len(body)] == body:
            return Place(d, dim[:i], dim[i + len(body) :], 0, 0)
        axis = dim[i]
        if isinstance(axis, Cat):
            ends = _ends(axis, body)
            if ends is not None:
                return Place(d, dim[:i], dim[i + 1 :], *ends)
    return None


def _grid(dims: Dims, first: int, body: Dim) -> Place | None:
    """The axes of the body over several dimensions, in their order and alone in each."""
    inside = set(atoms(body))
    unmatched, used = body, []
    for d in range(first, len(dims)):
        if not any(axis in inside for axis in atoms(dims[d])):
            continue
        if dims[d] != unmatched[: len(dims[d])]:
            return None
        used.append(d)
        unmatched = unmatched[len(dims[d]) :]
        if not unmatched:
            return Place(first, (), (), 0, 0, tuple(used[1:]))
    return None


def _ends(axis: Cat, body: Dim) -> tuple[int, int] | None:
    """The sizes before and after ``body`` in a concatenation that contains it once, as a whole."""
    inner = body[0].parts if len(body) == 1 and isinstance(body[0], Cat) else ((product(body), body),)
    for i in range(len(axis.parts) - len(inner) + 1):
        if axis.parts[i : i + len(inner)] == tuple(inner):
            before, after = axis.parts[:i], axis.parts[i + len(inner) :]
            inside = set(atoms(body))
            if any(a in inside for _, part in before + after for a in atoms(part)):
                return None
            return sum(s for s, _ in before), sum(s for s, _ in after)
    return None
