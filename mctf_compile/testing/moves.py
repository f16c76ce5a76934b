"""The moves that make a program on tokens grow: blocks of attention, and whatever has a rule in between."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.nn import functional as F

from mctf_compile.narrowing import present
from mctf_compile.passes.rules import find_rule
from mctf_compile.testing.growing import Grower, Rejected
from mctf_compile.testing.operators import Choose, Given, Made, OperatorCall, draw_call, ruled_operators
from mctf_compile.testing.programs import Kinds, Program, Ref, Region
from mctf_compile.testing.spellings import (
    BROADCASTING,
    PACKS,
    PADDINGS,
    PAIRS,
    SPELLINGS,
    SYMMETRIC,
    boolean,
    grouped,
)

aten = torch.ops.aten
BATCH, WIDTH, HEADS = 2, 8, 2
# The tokens of a text beside the image's, and the numbers of heads where several share keys and values.
WORDS = 3
MANY_HEADS, SHARED_HEADS = 4, (1, 2)
# So wide that a few tokens less are worth what it takes to give them back.
HIDDEN = 256

# What a program may hold beside plain blocks; leaving some out looks for other faults.
FEATURES = (
    "operators",
    "integers",
    "feedback",
    "tables",
    "bias",
    "padding",
    "streams",
    "calls",
    "grid",
    "returns",
    "regions",
    "writes",
    "layouts",
    "grouped",
    "joint",
    "packed",
    "pairs",
)


# What truth values are made for, most of all.
COUNTING = (
    (aten.sum.dim_IntList, aten.sum.default),
    (aten.any.dim, aten.all.dim, aten.any.default, aten.all.default),
    (aten.count_nonzero.dim_IntList, aten.cumsum.default, aten.prod.dim_int),
)


@dataclass
class Stream:
    """A residual stream: [B, N, C] in one of four layouts."""

    ref: Ref
    layout: str = "bnc"


class Builder:
    """Moves that make a program grow; ``choose`` takes one of a sequence of options, the plainest first."""

    def __init__(self, choose: Choose, features: Collection[str] = FEATURES) -> None:
        self.choose, self.features = choose, frozenset(features)
        self.grid = choose(((4, 4), (3, 6), (6, 3)))
        size = self.grid[0] * self.grid[1]
        # Tokens come back in the middle, on the grid, and are fused again.
        self.returns = "returns" in features and choose((False, False, True))
        self.periodic = periodic = self.returns or ("grid" in features and choose((False, True)))
        lead = tail = 0
        self.layout = "bnc"
        if "layouts" in features:
            self.layout = choose(("bnc", "bnc", "bnc", "nbc", "bhwc", "bchw"))
        # Several images in one sequence; and whether tokens see all others but not themselves.
        packed = "packed" in features and not periodic and choose((False,) * 4 + (True,))
        self.pairs = "pairs" in features and not packed and choose((False,) * 8 + (True,))
        if self.layout in ("bnc", "nbc") and not (periodic or packed):
            lead = choose((0, 1, 2, 5))
            tail = choose((0, 0, 1))
        # The lengths of the images.
        self.pack: list[int] = []
        if packed:
            body, self.pack = self._packed(size)
        else:
            body = self._periodic() if periodic else [choose((0, 1, 2)) for _ in range(size)]
        ends = range(max(body) + 1, max(body) + 1 + lead + tail)
        kinds = [*ends[:lead], *body, *ends[lead:]]
        # The kinds are numbered from 0 without gaps.
        numbers = {kind: i for i, kind in enumerate(dict.fromkeys(kinds))}
        gradients = "regions" in features and choose(range(4)) == 3
        self.g = Grower(choose, Kinds(tuple(numbers[k] for k in kinds), lead, tail), gradients)
        self.dtype = choose((torch.float32, torch.float64))
        self.pool: list[Ref] = []
        self.torn: set[Ref] = set()
        # Whether all tokens are there again at some place, those that were fused as copies of each other.
        self.came_back = False
        self.blocks = 0
        self.tables: list[Ref] = []
        self.streams: list[Stream] = []
        self.calls: list[tuple[int, int, Ref, Ref]] = []

    def _periodic(self) -> list[int]:
        """Kinds that a shift of the grid by three rows or columns (or, of 4×4, along its diagonal) leaves."""
        rows, columns = self.grid
        if rows == columns:
            return [(i + j) % 2 for i in range(rows) for j in range(columns)]
        pattern = [self.choose((0, 1, 2)) for _ in range(3)]
        return [pattern[(i if rows == 6 else j) % 3] for i in range(rows) for j in range(columns)]

    def _packed(self, size: int) -> tuple[list[int], list[int]]:
        """The kinds of several images in one sequence, and the lengths of these.

        Tokens of one kind in two images stay copies where as many of each kind are in one as in the other.
        """
        if self.choose((True, True, False)):
            half = [self.choose((0, 1, 2)) for _ in range(size // 2)]
            turn = self.choose(range(4))
            return [*half, *half[turn:], *half[:turn]], [size // 2] * 2
        lengths = self.choose(([size - 5, 5], [size // 2] * 2, [4, 5, size - 9]))
        return [3 * i + self.choose((0, 1, 2)) for i, n in enumerate(lengths) for _ in range(n)], list(lengths)

    def has(self, feature: str, percent: int) -> bool:
        return feature in self.features and self.g.chance(percent)

    @contextmanager
    def _attempt(self) -> Iterator[None]:
        """A move that leaves nothing where one of its steps is rejected."""
        known = len(self.pool)
        done = False
        with self.g.attempt():
            yield
            done = True
        if not done:
            del self.pool[known:]

    # The whole.

    def grow(self) -> None:
        """Make all the moves of one program."""
        with torch.set_grad_enabled(self.g.gradients):
            self._begin()
            if self.returns:
                # The first block does not fuse by default, and what the last before the grid fuses comes back at once.
                for _ in range(self.choose((3, 4))):
                    self.move(alone=True)
                for stream in self.streams:
                    before = stream.ref
                    while stream.ref is before and self.g.chance(90):
                        self._on_grid(stream, alone=True)
            for _ in range(self.choose((2, 2, 3) if len(self.streams) == 1 else (1, 2))):
                self.move(alone=self.returns)

    def _begin(self) -> None:
        names = ["x", "y"] if self.has("streams", 25) else ["x"]
        for name in names:
            ref = self.g.given(name, (BATCH, self.g.kinds.total, WIDTH), self.dtype)
            self.streams.append(Stream(self._from_tokens(ref), self.layout))
            self.pool.append(ref)
        if "tables" in self.features:
            for shape in ((self.g.kinds.total, 1), (self.g.kinds.total, WIDTH)):
                if self.g.chance(50):
                    self.tables.append(self.g.hold(shape, self.dtype))
        # Which tokens take part, and whether copies of a token that does may be padding.
        self.valid, self.uneven = None, False
        if not (self.pack or self.pairs) and self.has("padding", 15):
            self.uneven = self.choose((False, True))
            self.valid = self._padding()
        self.mask: Ref | None = None
        # Whether a bias is the same for all queries, as padding is.
        self.by_keys = False
        self.text: Ref | None = None
        if not (self.pack or self.pairs) and self.has("joint", 20):
            self.text = self.g.given("text", (BATCH, WORDS, WIDTH), self.dtype)
            self.text_first = self.choose((True, False))

    def move(self, alone: bool = False) -> None:
        """A block, and what may come after it where it is not ``alone``."""
        for stream in self.streams:
            # In low precision rounding decides which tokens are alike, where the comparison is of tables.
            region = self._region() if not self.returns and self.has("regions", 15) else None
            start, before = len(self.g.lines), stream.ref
            with self._attempt():
                with self.g.region(region):
                    if self.calls and self.has("calls", 35):
                        self._call(stream)
                    else:
                        # What one misread mask does shows behind the next attention, if fusing pays there.
                        self._block(stream, wide=alone or bool(self.pack) or self.pairs)
                self.calls.append((start, len(self.g.lines), before, stream.ref))
                self._offer(stream.ref)
            if alone:
                continue
            if self.has("integers", 40):
                self._all_of(stream)
            for _ in range(self.g.choose((1, 2, 3, 4)) if "operators" in self.features else 0):
                self._operator()
            if self.has("feedback", 40):
                self._feedback(stream)
            if self.has("grid", 50 if self.periodic else 10):
                self._on_grid(stream)

    def program(self) -> Program:
        return self.g.program([stream.ref for stream in self.streams])

    # Streams.

    def _from_tokens(self, x: Ref) -> Ref:
        if self.layout == "nbc":
            return self.g(aten.transpose.int, x, 0, 1)
        if self.layout == "bhwc":
            return self.g(aten.reshape.default, x, [BATCH, *self.grid, WIDTH])
        if self.layout == "bchw":
            return self.g(aten.unflatten.int, self.g(aten.transpose.int, x, 1, 2), 2, list(self.grid))
        return x

    def _to_tokens(self, x: Ref) -> Ref:
        if self.layout == "nbc":
            return self.g(aten.transpose.int, x, 0, 1)
        if self.layout == "bhwc":
            return self.g(aten.flatten.using_ints, x, 1, 2)
        if self.layout == "bchw":
            return self.g(aten.transpose.int, self.g(aten.flatten.using_ints, x, 2), 1, 2)
        return x

    def _set(self, stream: Stream, ref: Ref) -> None:
        """``ref`` is the stream from now on. Raises ``Rejected`` where it tells copies apart, or kinds no longer."""
        self._check_tokens(ref)
        stream.ref = ref

    def _check_tokens(self, ref: Ref) -> None:
        x, kinds = self.g.value(ref).double(), self.g.kinds
        if self.layout == "nbc":
            x = x.transpose(0, 1)
        elif self.layout == "bhwc":
            x = x.flatten(1, 2)
        elif self.layout == "bchw":
            x = x.flatten(2).transpose(1, 2)
        if x.shape != (BATCH, kinds.total, WIDTH):
            raise Rejected("another shape than the stream's")
        copies_apart(x, kinds.of)

    # Moves.

    def _linear(self, x: Ref, wide: int) -> Ref:
        width = self.g.value(x).shape[-1]
        scale = 0.5 if width < HIDDEN else 0.1
        dtype = self.g.value(x).dtype if not torch.is_autocast_enabled("cpu") else self.dtype
        weight = self.g.hold((wide, width), dtype, scale, parameter=True)
        bias = self.g.hold((wide,), dtype, 0.3, parameter=True) if self.g.chance(30) else None
        return self.g(aten.linear.default, x, weight, bias)

    def _block(self, stream: Stream, wide: bool) -> None:
        """Attention and its residual connection, and an MLP and its own: always where it is ``wide``, else at times."""
        g = self.g
        y = self._to_tokens(stream.ref)
        if g.chance(50):
            y = g(aten.layer_norm.default, y, [WIDTH])
        how = self._projection()
        operands, text = self._operands(y, how), self.text if g.chance(75) else None
        if text is not None:
            words = self._operands(g(aten.layer_norm.default, text, [WIDTH]), how)
            pairs = [(w, x) if self.text_first else (x, w) for w, x in zip(words, operands)]
            operands = tuple(g(aten.cat.default, list(pair), -2) for pair in pairs)
        a = self._attend(*operands)
        if text is not None:
            a, of_text = self._parts(a)
            text = g(aten.add.Tensor, text, self._linear(of_text, WIDTH))
        x = self._add(stream.ref, self._linear(a, WIDTH))
        if wide or g.chance(50):
            y = self._linear(self._to_tokens(x), HIDDEN)
            y = self._linear(g(g.choose((aten.gelu.default, aten.relu.default, aten.silu.default)), y), WIDTH)
            x = self._add(x, y)
        self._set(stream, x)
        self.text = self.text if text is None else text
        self.blocks += 1

    def _parts(self, a: Ref) -> tuple[Ref, Ref]:
        """What joint attention gives the image, and what it gives the text."""
        n, start = self.g.kinds.total, WORDS if self.text_first else 0
        image = self.g(aten.slice.Tensor, a, 1, start, start + n)
        start = 0 if self.text_first else n
        return image, self.g(aten.slice.Tensor, a, 1, start, start + WORDS)

    def _attend(self, q: Ref, k: Ref, v: Ref) -> Ref:
        """[B, N, C] from operands [B, H, N, D] or [B, N, C], with what meets them there."""
        g, shape, n = self.g, self.g.value(q).shape, self.g.kinds.total
        joint = shape[-2] != n
        tables = [t for t in self.tables if g.value(t).shape[-1] in (1, shape[-1]) and not joint]
        if tables and g.chance(90 if self.returns else 70):
            table = g.choose(tables)
            q, k = g(aten.mul.Tensor, q, table), g(aten.mul.Tensor, k, table)
        bias, valid = [], None
        if self.valid is not None:
            valid = self.valid if not joint else self._with_words(self.valid)
            spelling = g.choose(PADDINGS if self.uneven else (*PADDINGS, *SYMMETRIC))
            keys = g(aten.unsqueeze.default, valid, 1)
            keys = g(aten.unsqueeze.default, keys, 1) if len(shape) == 4 else keys
            bias = [keys if spelling is boolean else g(spelling, keys, g.value(q).dtype)]
            valid = valid if spelling in SYMMETRIC else None
        elif (self.pack and g.chance(85)) or self.pairs:
            bias = [self._constant_mask(g.value(q).dtype)]
        elif not joint and self.has("bias", 20):
            by_head = [(shape[1], n, n), (1, shape[1], 1, n)] if len(shape) > 3 else []
            table = g.choose([(n, n), (1, n), *by_head])
            self.by_keys = self.by_keys or table[-2] == 1
            bias = [g.hold(table, g.value(q).dtype)]
        k, v, spellings = self._for_all_heads(q, k, v)
        a = g(g.choose(spellings), q, k, v, *bias)
        a = a if len(shape) == 3 else g(aten.flatten.using_ints, g(aten.transpose.int, a, 1, 2), 2)
        if valid is None:
            return a
        # What a query of padding sees that sees nothing is up to the operator.
        lost = g(aten.bitwise_not.default, g(aten.unsqueeze.default, valid, 2))
        return g(aten.masked_fill.Scalar, a, lost, 0.0)

    def _constant_mask(self, dtype: torch.dtype) -> Ref:
        """[N, N]: who sees whom; that of an earlier block, where there is one, or at times a new one for a pack."""
        g, known = self.g, self.mask
        if known is None or known not in g.run.values or (self.pack and g.chance(30)):
            known = g(g.choose(PACKS), self.pack, dtype) if self.pack else g(g.choose(PAIRS), g.kinds.total, dtype)
        self.mask = known
        return known

    def _with_words(self, valid: Ref) -> Ref:
        """Which of the tokens of both streams take part: all of the text's."""
        words = self.g(aten.new_ones.default, valid, [BATCH, WORDS])
        return self.g(aten.cat.default, [words, valid] if self.text_first else [valid, words], 1)

    def _for_all_heads(self, q: Ref, k: Ref, v: Ref) -> tuple[Ref, Ref, tuple[Any, ...]]:
        """Keys and values for the heads of the queries, and the spellings of attention that take them."""
        g, shape = self.g, self.g.value(k).shape
        if len(shape) == 3 or shape[1] == g.value(q).shape[1]:
            return k, v, SPELLINGS
        times = MANY_HEADS // shape[1]
        how = g.choose(("interleaved", "expanded", "enable_gqa", *(("broadcast",) if shape[1] == 1 else ())))
        if how == "enable_gqa":
            return k, v, (grouped,)
        if how == "broadcast":
            return k, v, BROADCASTING
        if how == "interleaved":
            k, v = (g(aten.repeat_interleave.self_int, t, times, 1) for t in (k, v))
        else:
            sizes = [-1, -1, times, -1, -1]
            k, v = (g(aten.expand.default, g(aten.unsqueeze.default, t, 2), sizes) for t in (k, v))
            k, v = (g(aten.flatten.using_ints, t, 1, 2) for t in (k, v))
        return k, v, SPELLINGS

    def _add(self, x: Ref, y: Ref) -> Ref:
        y = self._from_tokens(y)
        pair = (y, x) if self.g.chance(30) else (x, y)
        if self.has("writes", 15):
            return self.g(aten.add_.Tensor, self.g(aten.clone.default, pair[0]), pair[1])
        return self.g(aten.add.Tensor, *pair)

    def _projection(self) -> str:
        """A way to make queries, keys and values."""
        ways = ("one head", "one head, chunk", "permute", "chunk", "separate")
        how: str = self.g.choose((*ways, *(f"grouped, {n}" for n in SHARED_HEADS if "grouped" in self.features)))
        return how

    def _operands(self, y: Ref, how: str) -> tuple[Ref, ...]:
        """Query, key and value [B, H, N, D] or [B, N, C], projected and taken apart in one of several ways."""
        g, n, d = self.g, self.g.value(y).shape[1], WIDTH // HEADS
        if how.startswith("grouped"):
            d, shared = WIDTH // MANY_HEADS, int(how[-1])
            three = [self._linear(y, heads * d) for heads in (MANY_HEADS, shared, shared)]
            return tuple(g(aten.transpose.int, g(aten.unflatten.int, t, 2, [-1, d]), 1, 2) for t in three)
        if how == "permute":
            y = g(aten.unflatten.int, self._linear(y, 3 * WIDTH), 2, [3, HEADS, d])
            parts = g(aten.unbind.int, g(aten.permute.default, y, [2, 0, 3, 1, 4]))
            return tuple(g(operator.getitem, parts, i) for i in range(3))
        if how.endswith("chunk"):
            parts = g(aten.chunk.default, self._linear(y, 3 * WIDTH), 3, -1)
            three = [g(operator.getitem, parts, i) for i in range(3)]
        else:
            three = [self._linear(y, WIDTH) for _ in range(3)]
        if how.startswith("one head"):
            return tuple(three)
        return tuple(g(aten.transpose.int, g(aten.reshape.default, t, [BATCH, n, HEADS, d]), 1, 2) for t in three)

    def _padding(self) -> Ref | None:
        """Bool [B, N]: the tokens that take part, alike for those of one kind unless ``uneven``.

        None where an image would have none.
        """
        ref = self.g.given("valid", (BATCH, self.g.kinds.total), torch.bool, apart=self.uneven)
        if not self.g.value(ref).any(1).all():
            ones = self.g.value(ref).fill_(True)
            for run in self.g.others:
                run.values[ref].copy_(ones)
            del self.g.inputs[-1]
            return None
        return ref

    def _call(self, stream: Stream) -> None:
        """A block that was there before once more, with the same weights."""
        start, stop, before, after = self.g.choose(self.calls)
        names = self.g.replay(start, stop, {before: stream.ref})
        self._set(stream, names[after])
        self.blocks += 1

    def _region(self) -> Region:
        plain = (Region(torch.bfloat16), Region(torch.bfloat16, enabled=False), Region(torch.float16))
        region: Region = self.g.choose((Region(), *plain) if self.g.gradients else plain)
        return region

    def _all_of(self, stream: Stream) -> None:
        """Whole numbers or truth values made of the tokens, and maybe what they come to."""
        g, x = self.g, stream.ref
        channels = -3 if self.layout == "bchw" else -1
        how = g.choose(("gt", "lt", "int", "argmax", "norm"))
        with self._attempt():
            if how == "int":
                x = g(aten.to.dtype, g(aten.mul.Scalar, x, 4), g.choose((torch.int64, torch.int32)))
            elif how == "argmax":
                x = g(aten.argmax.default, x, channels, g.chance(50))
            elif how == "norm":
                x = g(aten.gt.Scalar, g(aten.linalg_vector_norm.default, x, 2, [channels], True), 3)
            else:
                x = g(getattr(aten, how).Scalar, x, g.choose((0, 0.5, -1)))
            self._offer(x)
            if g.chance(50):
                self._operator(g.choose((COUNTING, families()["reductions"])), [x])

    def _operator(self, rules: Sequence[Sequence[OpOverload]] = (), among: Sequence[Ref] = ()) -> None:
        """Some operator with a rule (of ``rules``, where those are given), on values that are there."""
        g, known = self.g, len(self.pool)
        for _ in range(4):
            kinds = ("pointwise",) * 3 + ("reductions",) * 4 + ("layout",) * 3 + tuple(families())
            target = g.choose(g.choose(rules or families()[g.choose(kinds)]))
            region = self._region() if self.has("regions", 10) else None
            with self._attempt(), g.region(region):
                self._apply(target, among or self.pool[-4:][::-1])
            if len(self.pool) > known:
                break

    def _apply(self, target: OpOverload, among: Sequence[Ref]) -> None:
        """Add an operator whose first operand is one of ``among``."""
        g = self.g
        first = g.choose(among)
        others = [] if first in self.torn else [r for r in self.pool[::-1] if r not in self.torn and r != first][:3]
        given = [first, *others]
        if target is aten.mode.default and g.value(first).is_floating_point():
            # Rounding decides which copies are equal, and so which number is the most frequent.
            raise Rejected("it counts equal numbers, and these are rounded")
        call = draw_call(target, [g.value(ref) for ref in given], g.choose)
        if call is None:
            raise Rejected("the arguments do not fit")
        args, kwargs = call.filled(given, self._made)
        target = self._written(target, call) or target
        if target is not call.target:
            args = (g(aten.clone.default, args[0]), *args[1:])
        result = g.step(target, *args, **kwargs)
        if isinstance(g.value(result), Tensor):
            self._keep(target, result)
            return
        before = len(self.pool)
        for i in range(len(g.value(result))):
            with self._attempt():
                self._keep(target, g.step(operator.getitem, result, i))
        if len(self.pool) == before:
            raise Rejected("none of its results can be told")

    def _written(self, target: OpOverload, call: OperatorCall) -> OpOverload | None:
        """The form of an operator that writes into its first operand."""
        if not call.args or not isinstance(call.args[0], Given) or not self.has("writes", 15):
            return None
        packet = getattr(aten, target._schema.name.removeprefix("aten::") + "_", None)
        return getattr(packet, target._overloadname, None)

    def _made(self, made: Made) -> Ref:
        return self.g.hold(made.shape, made.dtype, 0.5 if made.dtype.is_floating_point else 1.0)

    def _keep(self, target: OpOverload, part: Ref) -> None:
        """Add a result to the values, or what can be told of one that chance or rounding decides over."""
        g = self.g
        if target.overloadpacket in RANDOM:
            part = g(aten.full_like.default, part, 0.5)
        try:
            g.check(part)
        except Rejected:
            x = g.value(part)
            if not isinstance(x, Tensor) or x.dtype is not torch.int64 or "integers" not in self.features:
                raise
            # Of several copies any may be the one that is meant.
            table = g.hold((g.kinds.total, 3), self.dtype)
            part = g(aten.embedding.default, table, part)
        if g.value(part).dtype in (torch.int64, torch.bool) and "integers" not in self.features:
            raise Rejected("no whole numbers are asked for")
        self._offer(part)

    def _offer(self, part: Ref) -> None:
        """Let other moves read a value."""
        g = self.g
        self.pool.append(part)
        try:
            of, lead = g.kinds.of, g.kinds.lead
            kinds = {g.kinds.body: of[lead : lead + g.kinds.body], g.kinds.total: of}
            # Whole numbers that an operator gave a history have no views with one.
            value = g.value(part).detach()
            for d, size in enumerate(value.shape):
                if size in kinds:
                    copies_apart(value.movedim(d, 1 if value.dim() > 1 else 0), kinds[size], False)
        except Rejected:
            self.torn.add(part)

    def _feedback(self, stream: Stream) -> None:
        """What was made of the tokens flows back into the residual stream."""
        g = self.g
        with self._attempt():
            v = g.choose([r for r in self.pool[::-1] if r not in self.torn][:6])
            v = self._as_floats(v)
            v = self._like_stream(stream, v)
            how = g.choose(("add", "scale", "where"))
            if how == "add":
                y = g(aten.add.Tensor, stream.ref, g(aten.tanh.default, v))
            elif how == "scale":
                y = g(aten.mul.Tensor, stream.ref, g(aten.sigmoid.default, v))
            else:
                half = g(aten.mul.Scalar, stream.ref, 0.5)
                y = g(aten.where.self, g(aten.gt.Scalar, v, 0.1), stream.ref, half)
            if g.value(y).dtype != self.dtype:
                y = g(aten.to.dtype, y, self.dtype)
            self._set(stream, y)
            self._offer(y)

    def _as_floats(self, v: Ref) -> Ref:
        x = self.g.value(v)
        if x.dtype.is_complex:
            v = self.g(aten.view_as_real.default, self.g(aten.resolve_conj.default, v))
            x = self.g.value(v)
        return v if x.dtype == self.dtype else self.g(aten.to.dtype, v, self.dtype)

    def _like_stream(self, stream: Stream, v: Ref) -> Ref:
        """``v`` where it broadcasts against the stream, else a reduction of it that does."""
        g, shape = self.g, self.g.value(stream.ref).shape
        x = g.value(v)
        try:
            if torch.broadcast_shapes(x.shape, shape) == shape and g.chance(80):
                return v
        except RuntimeError:
            pass
        if x.dim() == 0:
            return v
        images = [d for d, size in enumerate(x.shape) if size == BATCH][:1]
        gone = [d for d in range(x.dim()) if d not in images]
        if gone:
            reduce = g.choose(
                (
                    aten.mean.dim,
                    aten.sum.dim_IntList,
                    aten.amax.default,
                    aten.logsumexp.default,
                    aten.linalg_vector_norm.default,
                    aten.var.correction,
                )
            )
            if reduce is aten.linalg_vector_norm.default:
                v = g(reduce, v, 2, gone)
            else:
                v = g(reduce, v, gone)
        if not images:
            return v
        where = stream_batch(self.layout)
        return g(aten.reshape.default, v, [BATCH if d == where else 1 for d in range(len(shape))])

    def _on_grid(self, stream: Stream, alone: bool = False) -> None:
        """Something on the grid of tokens, which needs all of them; ``alone``, nothing of the stream goes around it."""
        g = self.g
        with self._attempt():
            x = self._to_tokens(stream.ref)
            n = g.kinds.total
            if g.kinds.lead or g.kinds.tail:
                ends = [g(aten.slice.Tensor, x, 1, 0, g.kinds.lead), g(aten.slice.Tensor, x, 1, n - g.kinds.tail, n)]
                x = g(aten.slice.Tensor, x, 1, g.kinds.lead, n - g.kinds.tail)
            x = g(aten.reshape.default, g(aten.transpose.int, x, 1, 2), [BATCH, WIDTH, *self.grid])
            how = g.choose(("conv", "roll", "flip") if alone else ("conv", "roll", "flip", "shuffle"))
            if how == "conv":
                x = g(aten.pad.default, x, [1, 1, 1, 1], "circular")
                weight = g.hold((WIDTH, 1, 3, 3), self.dtype, 0.5, parameter=True)
                x = g(aten.conv2d.default, x, weight, None, [1, 1], [0, 0], [1, 1], WIDTH)
            elif how == "roll":
                x = g(aten.roll.default, x, [1, 1], [2, 3])
            elif how == "flip":
                x = g(aten.flip.default, x, [2, 3])
            else:
                x = g(aten.channel_shuffle.default, x, 2)
            x = g(aten.transpose.int, g(aten.flatten.using_ints, x, 2), 1, 2)
            if g.kinds.lead or g.kinds.tail:
                x = g(aten.cat.default, [ends[0], x, ends[1]], 1)
            x = self._from_tokens(x)
            if not alone and g.chance(50):
                x = g(aten.add.Tensor, stream.ref, x)
            self._set(stream, x)
            self.came_back = True
            self._offer(x)


def stream_batch(layout: str) -> int:
    """The dimension of the images in a layout."""
    return 1 if layout == "nbc" else 0


def copies_apart(x: Tensor, kinds: Sequence[int], distinct: bool = True) -> None:
    """Raises ``Rejected`` where copies among the tokens of x [B, N, ...] differ, or other tokens point the same way."""
    kind = torch.tensor(kinds)
    if x.dim() == 1:
        x = x[None]
    x = x.flatten(2) if x.dim() > 2 else x[..., None]
    x = torch.view_as_real(x.resolve_conj()).flatten(2) if x.dtype.is_complex else x
    x = x.double()
    first = torch.stack([(kind == k).nonzero()[0, 0] for k in kind])
    scale = x[x.isfinite()].abs().amax() if x.isfinite().any() else 1.0
    same = (x == x[:, first]) | (x.isnan() & x[:, first].isnan())
    if not torch.where(same, 0.0, (x - x[:, first]).abs()).nan_to_num(1.0).amax() <= 1e-5 * scale:
        raise Rejected("copies are told apart")
    if distinct:
        cosine = F.cosine_similarity(x[:, :, None], x[:, None], dim=-1)
        if not (cosine[:, kind[:, None] != kind] < 0.999).all():
            raise Rejected("other tokens are nearly copies")


RANDOM = {
    aten.rand_like,
    aten.randn_like,
    aten.bernoulli,
    aten.dropout,
    aten.feature_dropout,
    aten.alpha_dropout,
    aten.empty_like,
    aten.new_empty,
}


@cache
def families() -> dict[str, tuple[tuple[OpOverload, ...], ...]]:
    """The operators that have a rule: by the module of their rules, those of one rule together."""
    found: dict[str, dict[Any, list[OpOverload]]] = {}
    for target in drawn_operators():
        axes = present(find_rule(target)).axes
        found.setdefault(axes.__module__.rpartition(".")[2], {}).setdefault(axes, []).append(target)
    return {module: tuple(map(tuple, by_rule.values())) for module, by_rule in found.items()}


# What cannot be part of a captured graph, since numbers in a tensor decide over a shape or a number.
NOT_CAPTURED = {
    aten.where.default,
    aten.equal.default,
    aten.repeat_interleave.Tensor,
    aten.repeat_interleave.self_Tensor,
    aten.narrow.Tensor,
    aten.tensor_split.tensor_indices_or_sections,
}


@cache
def drawn_operators() -> tuple[OpOverload, ...]:
    """The operators that have a rule and can be part of a graph."""
    return tuple(t for t in ruled_operators() if not t._schema.is_mutable and t not in NOT_CAPTURED)
