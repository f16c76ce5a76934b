"""What each kernel has to move and to compute, and so the least time that it takes.

Floors, not measurements: a kernel's bytes pass once to or from memory, at the measured rate of a copy, and its
products run at the measured rate of large ones, whichever takes longer. What stays in caches is not counted.
``python -m mctf_compile.kernels.roofline`` prints the table of kernels/README.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

# One H100, bfloat16: matrix products as large ones reach them, and a copy, read and written.
FLOPS_PER_SECOND = 800e12
BYTES_PER_SECOND = 3.0e12
VALUE, EXACT, INDEX = 2, 4, 8
# Up to this many keys the logits of ``importance`` are computed once, by programs of so many queries.
AT_ONCE, QUERIES = 256, 32


@dataclass(frozen=True)
class Cost:
    """Floating-point operations (a multiplication and an addition are two) and bytes moved."""

    flops: float
    bytes: float

    @property
    def floor(self) -> float:
        """Seconds."""
        return max(self.flops / FLOPS_PER_SECOND, self.bytes / BYTES_PER_SECOND)


@dataclass(frozen=True)
class BlockShape:
    """A block of a ViT that fuses r of N tokens one step ahead of its attention; batch B, C channels, heads of 64."""

    model: str
    channels: int
    tokens: int
    batch: int

    @property
    def heads(self) -> int:
        return self.channels // 64

    @property
    def removed(self) -> int:
        """R = 16 at 197 tokens, and the same share of more."""
        return 16 * self.tokens // 197

    @property
    def remaining(self) -> int:
        return self.tokens - self.removed

    def rows(self, tokens: int) -> int:
        """Bytes of the residual stream, or of all heads of q, k, v or o, at ``tokens`` tokens."""
        return VALUE * self.batch * tokens * self.channels

    @property
    def product(self) -> int:
        """Operations of Q Kᵀ, or of A V, over all heads."""
        return 2 * self.batch * self.tokens**2 * self.channels

    @property
    def per_head(self) -> int:
        """Bytes of a log-sum-exp."""
        return EXACT * self.batch * self.heads * self.tokens

    @property
    def matching(self) -> int:
        """Bytes of keep, gone and into."""
        return INDEX * self.batch * (self.tokens + self.removed)

    def attention(self) -> Cost:
        """q, k, v in, o out; sizes, log-sum-exp."""
        sizes = EXACT * self.batch * self.tokens
        return Cost(2 * self.product, 4 * self.rows(self.tokens) + self.per_head + sizes)

    def importance(self) -> Cost:
        """Up to 256 keys, one look at q and k, and a sum for each tile of queries; beyond, two looks."""
        once = self.tokens <= AT_ONCE
        sums = -(-self.tokens // QUERIES) if once else 1
        looks = 1 if once else 2
        sizes, a = looks * EXACT * self.batch * self.tokens, EXACT * self.batch * self.tokens
        moved = looks * (2 * self.rows(self.tokens) + self.per_head) + 2 * sums * self.per_head + sizes + a
        return Cost(looks * self.product, moved)

    def match(self) -> Cost:
        """Cosines of half the tokens with the other half; the scores are written once and read twice, in float32."""
        half = self.tokens // 2
        scores = self.batch * (self.tokens - half) * half
        criteria = 2 * EXACT * self.batch * self.tokens
        return Cost(2 * scores * self.channels, self.rows(self.tokens) + criteria + 3 * EXACT * scores + self.matching)

    def pool(self) -> Cost:
        """``group`` and ``pool``: the map, the weights and the sizes, then the tokens."""
        sizes = EXACT * self.batch * (2 * self.tokens + self.remaining)
        made = (INDEX + EXACT) * self.batch * self.tokens
        used = EXACT * self.batch * self.tokens + self.matching
        return Cost(0, sizes + made + used + self.matching + self.rows(self.tokens) + self.rows(self.remaining))

    def ahead(self) -> Cost:
        """q, k of the old tokens, v of the new ones; rows written and read again; the new rows out."""
        added = 2 * self.batch * self.remaining * self.removed * self.channels
        steering = (INDEX + 2 * EXACT) * self.batch * self.tokens + self.matching
        moved = 4 * self.rows(self.tokens) + 2 * self.rows(self.remaining) + self.per_head + steering
        return Cost(2 * self.product + added, moved)

    def unmerge(self) -> Cost:
        """Rows of the new tokens in, of the old ones out; the map."""
        index = INDEX * self.batch * self.tokens
        return Cost(0, self.rows(self.remaining) + self.rows(self.tokens) + index)

    def linear(self, tokens: int, inside: int, outside: int) -> Cost:
        """A projection from ``inside`` to ``outside`` times C channels; its bias and activation are free."""
        c = self.channels
        moved = self.rows(tokens) * (inside + outside) + VALUE * inside * outside * c**2
        return Cost(2 * self.batch * tokens * inside * outside * c**2, moved)

    def rest(self, old: int, new: int) -> list[Cost]:
        """Norms, projections, residual additions and the MLP: q, k of ``old`` tokens, all else of ``new`` ones."""
        c = [self.linear(old, 1, 2), self.linear(new, 1, 1), self.linear(new, 1, 1)]
        mlp = [self.linear(new, 1, 4), self.linear(new, 4, 1)]
        norms = [Cost(0, 2 * self.rows(n)) for n in ((old, new, new) if old != new else (new, new))]
        return [*c, *mlp, *norms, *(Cost(0, 3 * self.rows(new)) for _ in range(2))]

    @cached_property
    def dense(self) -> float:
        """The floor of the block without fusion, in seconds."""
        return sum(cost.floor for cost in [*self.rest(self.tokens, self.tokens), self.attention()])

    @cached_property
    def fused(self) -> float:
        """The floor of the block with it, in seconds."""
        own = self.importance(), self.match(), self.pool(), self.ahead()
        return sum(cost.floor for cost in [*self.rest(self.tokens, self.remaining), *own])

    def kernels(self) -> dict[str, tuple[Cost, float]]:
        """What each kernel costs, and the floor of the block in which it is a share."""
        return {
            "attention": (self.attention(), self.dense),
            "importance": (self.importance(), self.fused),
            "match": (self.match(), self.fused),
            "group, pool": (self.pool(), self.fused),
            "ahead": (self.ahead(), self.fused),
            "unmerge": (self.unmerge(), self.fused),
        }


BLOCKS = [
    BlockShape(model, channels, tokens, batch)
    for model, channels in (("DeiT-S", 384), ("ViT-L", 1024))
    for tokens in (197, 577, 1025)
    for batch in (256, 32)
]


def table() -> str:
    """One row for each block and kernel, in Markdown."""
    lines = [
        "| model | N → M | batch | kernel | GFLOP | MB | floor, µs | share of the block |",
        "|---|---|---:|---|---:|---:|---:|---:|",
    ]
    for block in BLOCKS:
        where = f"{block.model} | {block.tokens} → {block.remaining} | {block.batch}"
        for name, (cost, whole) in block.kernels().items():
            figures = f"{cost.flops / 1e9:.2f} | {cost.bytes / 1e6:.1f} | {cost.floor * 1e6:.1f}"
            lines.append(f"| {where} | {name} | {figures} | {cost.floor / whole:.1%} |")
        lines.append(f"| {where} | *the block, dense* | | | {block.dense * 1e6:.1f} | |")
        lines.append(f"| {where} | *the block, fused* | | | {block.fused * 1e6:.1f} | |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
