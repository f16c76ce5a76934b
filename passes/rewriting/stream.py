"""Generations of a token stream: what each fusion did, and how values move between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from mctf_compile.errors import Declined
from mctf_compile.kernels.pooling.aten import combine, index_of
from mctf_compile.methods import Combine
from mctf_compile.narrowing import present
from mctf_compile.passes.axes import Dim, Dims, Place, Tokens, mentions, places, product


@dataclass(frozen=True)
class Value:
    """A tensor of the rewritten graph.

    ``generation`` counts the fusions that its tokens have been through (0: the original tokens).
    ``weights_dim`` is the dimension along which it holds attention weights, each that of all copies of a
    token together; None for ordinary values, which are those of one copy. ``returned``: the streams whose fused
    tokens were given back to compute it: it tells what they were, and not what they had been before.
    """

    tensor: Tensor
    dims: Dims
    stream: Stream | None = None
    generation: int = 0
    weights_dim: int | None = None
    returned: frozenset[Stream] = frozenset()


@dataclass(frozen=True)
class Fusion:
    """One fusion over a token axis with ``lead`` and ``tail`` protected tokens: old N -> new M.

    ``weight`` [B, N] are the normalised pooling weights of ``Combine.MEAN``, else None. ``conserves``:
    whether the sizes still add up to the number of original tokens; ``whole_to_itself``: see ``Relaxed``.
    ``padding``: values of the program each of which alone tells padding from tokens that it was not fused with, or
    that count for it where ``mixed``: see ``Choice``. ``back`` [B, N]: what an old token is multiplied by where it is
    given back, None for 1; nothing is left of one with 0.
    """

    keep: Tensor
    gone: Tensor
    into: Tensor
    index: Tensor
    weight: Tensor | None
    size: Tensor
    lead: int
    tail: int
    combine: Combine = Combine.MEAN
    conserves: bool = True
    whole_to_itself: bool = False
    padding: frozenset[fx.Node] = frozenset()
    mixed: bool = False
    back: Tensor | None = None

    @property
    def stays(self) -> Tensor:
        """Bool [B, N]: the old tokens that are among the new ones."""
        return torch.zeros_like(self.index, dtype=torch.bool).scatter(1, self.keep, True)

    def pool(self, x: Tensor, dim: int, mask: bool = False) -> Tensor:
        """[B, ..., N, ...] -> [B, ..., M, ...] along ``dim``; booleans and integers are those of the kept tokens.

        ``mask``: minus infinity may be among the values of padding, however little that weighs.
        """
        averages = x.is_floating_point() or x.is_complex()
        if self.combine is Combine.DROP or not averages or (mask and self.mixed):
            pooled: Tensor = torch.ops.mctf.keep(x, self.keep, dim)
        else:
            pooled = torch.ops.mctf.pool(x, self.weight, self.keep, self.gone, self.into, dim)
        return pooled

    def then(self, later: Fusion) -> Fusion:
        """This fusion and a later one that combines tokens in the same way, as one: a mean of means is a mean."""
        return replace(
            later,
            keep=self.keep.gather(1, later.keep),
            gone=torch.cat([self.gone, self.keep.gather(1, later.gone)], 1),
            into=torch.cat([later.index.gather(1, self.into), later.into], 1),
            index=later.index.gather(1, self.index),
            weight=None if self.weight is None else self.weight * present(later.weight).gather(1, self.index),
            conserves=self.conserves and later.conserves,
            mixed=self.mixed or later.mixed,
        )

    def with_ends(self, lead: int, tail: int) -> Fusion:
        """The same fusion of an axis that has other protected tokens around the same body."""
        if (lead, tail) == (self.lead, self.tail):
            return self
        n, m = self.index.shape[1], self.keep.shape[1]
        shift = lead - self.lead

        def ends(body: Tensor, last: int) -> Tensor:
            parts = [torch.arange(lead, device=body.device).expand(body.shape[0], -1), body + shift]
            # In a call on nothing blocks would differ by its numbers.
            if tail:
                parts.append(torch.arange(last, last + tail, device=body.device).expand(body.shape[0], -1))
            return torch.cat(parts, 1)

        def ones(body: Tensor) -> Tensor:
            return torch.cat([body.new_ones(body.shape[0], lead), body, body.new_ones(body.shape[0], tail)], 1)

        body_n, body_m = slice(self.lead, n - self.tail), slice(self.lead, m - self.tail)
        new_n, new_m = n - self.tail + shift, m - self.tail + shift
        return replace(
            self,
            keep=ends(self.keep[:, body_m], new_n),
            gone=self.gone + shift,
            into=self.into + shift,
            index=ends(self.index[:, body_n], new_m),
            weight=None if self.weight is None else ones(self.weight[:, body_n]),
            size=ones(self.size[:, body_m]),
            back=None if self.back is None else ones(self.back[:, body_n]),
            lead=lead,
            tail=tail,
        )


@dataclass(eq=False)
class Stream:
    """One residual stream and the fusions that its tokens go through. Streams over one token axis are still two."""

    tokens: Tokens
    fusions: list[Fusion] = field(default_factory=list)
    # [B, N] sizes of the original tokens, by the protected ones at their ends.
    _ones: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    # int64 [B, N]: the run of tokens that each original token is in, by the lengths of a pack's runs.
    _images: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    _ends: dict[tuple[int, int, int], Fusion] = field(default_factory=dict)
    _through: dict[tuple[int, int, int, int], Fusion] = field(default_factory=dict)
    _maps: dict[tuple[int, int, int, int], Tensor] = field(default_factory=dict)
    _log_sizes: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)

    def fusion(self, generation: int, lead: int, tail: int) -> Fusion:
        """The fusion that made ``generation`` (from 1), over an axis with these ends."""
        key = (generation, lead, tail)
        if key not in self._ends:
            self._ends[key] = self.fusions[generation - 1].with_ends(lead, tail)
        return self._ends[key]

    def through(self, old: int, new: int, lead: int, tail: int) -> Fusion:
        """The fusions from one generation to a later one as one; all combine tokens in the same way."""
        key = (old, new, lead, tail)
        if key not in self._through:
            last = self.fusion(new, lead, tail)
            self._through[key] = last if new == old + 1 else self.through(old, new - 1, lead, tail).then(last)
        return self._through[key]

    def conserves(self, generation: int) -> bool:
        """Whether the sizes in a generation add up to the number of original tokens."""
        return all(f.conserves for f in self.fusions[:generation])

    def body(self, generation: int) -> int:
        """The number of unprotected tokens in a generation."""
        if generation == 0:
            if isinstance(self.tokens.size, int):
                return self.tokens.size
            (lead, tail), ones = next(iter(self._ones.items()))
            return ones.shape[1] - lead - tail
        fusion = self.fusions[generation - 1]
        return fusion.keep.shape[1] - fusion.lead - fusion.tail

    def begin(self, ones: Tensor, lead: int, tail: int) -> None:
        """Give the original tokens their sizes: [B, N] of 1, over an axis with these ends."""
        self._ones[lead, tail] = ones

    def image(self, generation: int, packed: tuple[int, ...], padding: frozenset[fx.Node]) -> Tensor:
        """int64 [B, M]: which of the runs ``packed`` of original tokens each token of a generation is of.

        ``padding``: the masks that tell. Raises ``Declined`` where an earlier fusion did not keep the runs apart.
        """
        if any(not padding & fusion.padding for fusion in self.fusions[:generation]):
            raise Declined("tokens of several images that are packed into one sequence were fused before")
        if packed not in self._images:
            ones = next(iter(self._ones.values()))[:, :1].long()
            parts = [ones.expand(-1, size) * number for number, size in enumerate(packed)]
            self._images[packed] = torch.cat(parts, 1)
        found = self._images[packed]
        for fusion in self.fusions[:generation]:
            found = found.gather(1, fusion.keep)
        return found

    def size(self, generation: int, lead: int, tail: int) -> Tensor:
        """[B, N] sizes of the tokens of a generation, over an axis with these ends."""
        if generation:
            return self.fusion(generation, lead, tail).size
        if (lead, tail) not in self._ones:
            (first, last), ones = next(iter(self._ones.items()))
            self._ones[lead, tail] = ones.new_ones(ones.shape[0], ones.shape[1] - first - last + lead + tail)
        return self._ones[lead, tail]

    def log_size(self, generation: int, lead: int, tail: int) -> Tensor:
        key = (generation, lead, tail)
        if key not in self._log_sizes:
            self._log_sizes[key] = self.size(generation, lead, tail).log()
        return self._log_sizes[key]

    def map(self, new: int, old: int, lead: int, tail: int) -> Tensor:
        """int64 [B, N_old]: the position in generation ``new`` of every token of generation ``old``."""
        key = (new, old, lead, tail)
        if key not in self._maps:
            last = self.fusion(new, lead, tail).index
            self._maps[key] = last if new == old + 1 else last.gather(1, self.map(new - 1, old, lead, tail))
        return self._maps[key]

    def stays(self, new: int, lead: int, tail: int) -> Tensor | None:
        """Bool [B, N]: the original tokens that no fusion up to ``new`` has dropped; None where that is all."""
        return self._through_all(new, 0, lead, tail, lambda f: f.stays if f.combine is Combine.DROP else None)

    def back(self, new: int, old: int, lead: int, tail: int) -> Tensor | None:
        """[B, N_old]: what the tokens of ``old`` are multiplied by where they are given back; None for 1."""
        return self._through_all(new, old, lead, tail, lambda f: f.back)

    def _through_all(
        self, new: int, old: int, lead: int, tail: int, of: Callable[[Fusion], Tensor | None]
    ) -> Tensor | None:
        """The product of what the fusions from ``old`` to ``new`` say of their tokens, for those of ``old``."""
        found: Tensor | None = None
        for generation in range(old + 1, new + 1):
            own = of(self.fusion(generation, lead, tail))
            if own is not None:
                if generation > old + 1:
                    own = own.gather(1, self.map(generation - 1, old, lead, tail))
                found = own if found is None else found * own
        return found

    def raise_to(self, value: Value, generation: int, agrees: Callable[[Fusion], bool] | None = None) -> Value:
        """Fuse an older value up to ``generation`` through the maps, with the tokens' own weights.

        A value that has no mean comes with ``agrees``, which says whether the members of each token have equal ones;
        it goes through no other fusion but one that drops tokens. Weights of all copies together are summed.

        Fusions that combine tokens in the same way are one to it, so that blocks which read tables over the original
        tokens do the same, however many fusions came before them.
        """
        summed = value.weights_dim
        while value.generation < generation:
            old, new = value.generation, generation
            if len({f.combine for f in self.fusions[old:new]}) > 1:
                new = old + 1

            def pool(x: Tensor, dim: int, place: Place, old: int = old, new: int = new) -> Tensor:
                fusion = self.through(old, new, place.lead, place.tail)
                if place.dim == summed:
                    return combine(x, fusion.keep, fusion.gone, fusion.into, dim, "sum")
                return fusion.pool(x, dim, agrees is not None)

            mixed = [f for f in self.fusions[old:new] if f.combine is not Combine.DROP]
            if agrees is not None and not all(map(agrees, mixed)):
                what = "mask" if value.tensor.is_floating_point() else f"value of {value.tensor.dtype}"
                raise Declined(f"tokens that were fused may differ in a {what}, which has no mean")
            tensor = self._each_place(value, pool)
            value = Value(tensor, value.dims, self, new, summed)
        return value

    def pooled_map(self, weights: Value) -> Value:
        """Attention weights of one generation for the next: columns summed, rows by their maxima."""
        generation = weights.generation + 1

        def pool(x: Tensor, dim: int, place: Place) -> Tensor:
            f = self.fusion(generation, place.lead, place.tail)
            how = "sum" if place.dim == weights.weights_dim else "amax"
            return combine(x, f.keep, f.gone, f.into, dim, how)

        keys_first = sorted(self.places(weights.dims), key=lambda p: p.dim != weights.weights_dim)
        return Value(self._each_place(weights, pool, keys_first), weights.dims, self, generation, weights.weights_dim)

    def lower_to(self, value: Value, generation: int) -> Value:
        """Give a younger value's tokens back as they were in ``generation``: every member its group's value."""
        if value.generation <= generation:
            return value

        def unmerge(x: Tensor, dim: int, place: Place) -> Tensor:
            index = self.map(value.generation, generation, place.lead, place.tail)
            given_back: Tensor = torch.ops.mctf.unmerge(x, index, dim)
            back = self.back(value.generation, generation, place.lead, place.tail)
            if back is None:
                return given_back
            shape = [1] * x.dim()
            shape[0], shape[dim] = back.shape
            back = back.view(shape).to(x.dtype)
            return (given_back * back).where(back != 0, given_back.new_zeros(()))

        tensor = self._each_place(value, unmerge)
        if generation == 0:
            for place in self.places(value.dims):
                tensor = _regrid(tensor, place, value.dims)
        return Value(tensor, value.dims, self if generation else None, generation)

    def put_back(self, value: Value, entry: Value) -> Value:
        """The tokens of ``value`` in their places among those of ``entry``, from which they were chosen."""
        (place,) = self.places(value.dims)
        fusion = self.fusion(value.generation, place.lead, place.tail)
        # Where the others would come from does not matter: they are taken from the entry.
        index = index_of(fusion.keep, fusion.gone, torch.zeros_like(fusion.gone))
        tensor = self._each_place(value, lambda x, dim, _: torch.ops.mctf.unmerge(x, index, dim))
        known = Value(tensor, value.dims, self, entry.generation)
        off_grid = self._off_grid(entry).tensor
        tensor = torch.where(self.factor(fusion.stays, known, place), tensor, off_grid)
        return replace(entry, tensor=tensor if entry.generation else _regrid(tensor, place, value.dims))

    def intensive(self, value: Value) -> Value:
        """Turn attention weights into those of one copy of each token."""
        if value.weights_dim is None:
            return value
        place = next(p for p in self.places(value.dims) if p.dim == value.weights_dim)
        size = self.fusion(value.generation, place.lead, place.tail).size
        tensor = (value.tensor / self.factor(size, value, place)).to(value.tensor.dtype)
        return Value(tensor, value.dims, self, value.generation)

    def extensive(self, value: Value, dim: int) -> Value:
        """Turn weights of one copy of each token at ``dim`` into those of all its copies together."""
        if not value.generation:
            return replace(value, weights_dim=dim)
        place = next(p for p in self.places(value.dims) if p.dim == dim)
        size = self.fusion(value.generation, place.lead, place.tail).size
        tensor = (value.tensor * self.factor(size, value, place)).to(value.tensor.dtype)
        return replace(value, tensor=tensor, weights_dim=dim)

    def places(self, dims: Dims) -> list[Place]:
        found = places(dims, self.tokens)
        if found is None:
            raise Declined("the token axis stands in a form that cannot be fused")
        return found

    def batch_dims(self, dims: Dims) -> list[int]:
        """The dimensions that hold the images, alone or with other axes."""
        width = len(self.tokens.batch)
        inside = [any(dim[i : i + width] == self.tokens.batch for i in range(len(dim))) for dim in dims]
        return [d for d, holds in enumerate(inside) if holds and width]

    def batch_dim(self, dims: Dims) -> int | None:
        """The dimension that holds the images, where it holds nothing else."""
        return next((d for d, dim in enumerate(dims) if self.tokens.batch and dim == self.tokens.batch), None)

    def factor(self, per_token: Tensor, value: Value, place: Place) -> Tensor:
        """[B, M] as a factor for ``value``: the images and the tokens at their places, 1 elsewhere."""
        shape, joined, batch, token = self._pieces(value, place)
        full = [1] * len(shape)
        full[token] = per_token.shape[1]
        if batch is None:
            if self.tokens.batch:
                raise Declined("a value without the batch axis meets fused tokens")
        else:
            full[batch] = per_token.shape[0]
            if batch > token:
                per_token = per_token.transpose(0, 1)
        result = per_token.reshape(full)
        if joined == [1] * len(value.dims):
            return result
        # A dimension that is a product must be filled before its factors are joined.
        expand: list[int] = []
        target: list[int] = []
        i = 0
        for d, count in enumerate(joined):
            together = range(i, i + count)
            whole = batch in together or token in together
            expand.extend(shape[j] if count > 1 and whole else full[j] for j in together)
            target.append(value.tensor.shape[d] if whole and count > 1 else (full[i] if count == 1 else 1))
            i += count
        return result.expand(expand).reshape(target)

    def canonical(self, value: Value, place: Place) -> Tensor:
        """``value`` as [B, M, C]: the images, the tokens, everything else."""
        value = self._off_grid(value)
        shape, _, batch, token = self._pieces(value, place)
        x = value.tensor.reshape(shape)
        rest = [i for i in range(len(shape)) if i not in (batch, token)]
        if batch is None:
            return x.permute([token, *rest]).reshape(1, x.shape[token], -1)
        x = x.permute([batch, token, *rest])
        return x if len(rest) == 1 else x.reshape(x.shape[0], x.shape[1], -1)

    def _each_place(
        self, value: Value, function: Callable[[Tensor, int, Place], Tensor], order: list[Place] | None = None
    ) -> Tensor:
        """Apply ``function`` to [B, ..., tokens, ...] at every place of the token axis, one after another."""
        tensor = self._off_grid(value).tensor
        for place in order or self.places(value.dims):
            current = Value(tensor, value.dims, value.stream, value.generation)
            shape, joined, batch, token = self._pieces(current, place)
            if batch is None and self.tokens.batch:
                raise Declined("a value without the batch axis meets fused tokens")
            x = tensor if joined == [1] * len(value.dims) else tensor.reshape(shape)
            if batch is None:
                x = function(x.unsqueeze(0), token + 1, place).squeeze(0)
            elif batch == 0:
                x = function(x, token, place)
            else:
                x = function(x.movedim(batch, 0), token + (token < batch), place).movedim(0, batch)
            if joined != [1] * len(value.dims):
                i, target = 0, []
                for count in joined:
                    size = 1
                    for j in range(i, i + count):
                        size = size * x.shape[j]
                    target.append(size)
                    i += count
                x = x.reshape(target)
            tensor = x
        return tensor

    def _off_grid(self, value: Value) -> Value:
        """A value of the original tokens with the axes of each grid in one dimension, and 1 in the others."""
        if value.generation:
            return value
        tensor = value.tensor
        for place in self.places(value.dims):
            if place.rest:
                d, width = place.dim, len(place.rest)
                tensor = tensor.movedim(place.rest, tuple(range(d + 1, d + 1 + width))).flatten(d, d + width)
                for other in place.rest:
                    tensor = tensor.unsqueeze(other)
        return replace(value, tensor=tensor)

    def _pieces(self, value: Value, place: Place) -> tuple[list[Any], list[int], int | None, int]:
        """``value``'s shape with images and tokens in dimensions of their own.

        Returns the shape, how many of its entries each dimension became, and the entries of the images
        (None where there are none) and of the tokens.
        """
        shape: list[Any] = []
        joined: list[int] = []
        batch = token = None
        images = self.tokens.batch
        for d, dim in enumerate(value.dims):
            size = value.tensor.shape[d]
            start = len(shape)
            cuts: list[tuple[int, int, str]] = []
            for i in range(len(dim) - len(images) + 1):
                if images and dim[i : i + len(images)] == images and batch is None:
                    cuts.append((i, i + len(images), "batch"))
                    break
            if d == place.dim:
                width = len(dim) - len(place.before) - len(place.after)
                cuts.append((len(place.before), len(place.before) + width, "token"))
            if not cuts or (len(cuts) == 1 and cuts[0][:2] == (0, len(dim))):
                if cuts:
                    batch, token = (start, token) if cuts[0][2] == "batch" else (batch, start)
                shape.append(size)
                joined.append(1)
                continue
            sizes: list[tuple[Any, str | None]] = []
            position = 0
            # The tokens of another place stand beside the images: of the two, those have the size that is known.
            twice = d != place.dim and mentions((dim,), self.tokens)

            def beside(axes: Dim, twice: bool = twice) -> int | None:
                return None if twice and mentions((axes,), self.tokens) else _static(axes)

            for a, b, kind in sorted(cuts):
                if a > position:
                    sizes.append((beside(dim[position:a]), None))
                count = _static(images) if twice else None
                if kind == "token":
                    count = self.body(value.generation) + place.lead + place.tail
                sizes.append((count, kind))
                position = b
            if position < len(dim):
                sizes.append((beside(dim[position:]), None))
            known = 1
            for s, _ in sizes:
                known = known * s if s is not None else known
            for s, held in sizes:
                if held == "batch":
                    batch = len(shape)
                if held == "token":
                    token = len(shape)
                shape.append(size // known if s is None else s)
            joined.append(len(sizes))
        if token is None:
            raise Declined("the token axis stands in a form that cannot be fused")
        return shape, joined, batch, token


def _regrid(tensor: Tensor, place: Place, dims: Dims) -> Tensor:
    """The inverse of ``Stream._off_grid`` at one place."""
    if not place.rest:
        return tensor
    d, width = place.dim, len(place.rest)
    sizes = [product(dims[i]) for i in (d, *place.rest)]
    if not all(isinstance(size, int) for size in sizes):
        raise Declined("the tokens lie in a grid whose rows and columns are symbolic")
    tensor = tensor.squeeze(place.rest).unflatten(d, sizes)
    return tensor.movedim(tuple(range(d + 1, d + 1 + width)), place.rest)


def _static(axes: Dim) -> int:
    """The size of axes that stand beside images or tokens in one dimension."""
    size = 1
    for axis in axes:
        if not isinstance(axis.size, int):
            raise Declined("two symbolic sizes share a dimension with the token axis")
        size *= axis.size
    return size
