"""Pass: decide which block fuses how many tokens, and where. Pure; nothing is rewritten yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import fx

from mctf_compile.config import FusionConfig
from mctf_compile.errors import ConfigError
from mctf_compile.methods import Method, Site, get_method
from mctf_compile.passes.axes import Dim, places, product
from mctf_compile.passes.blocks import Block
from mctf_compile.passes.masks import Mask
from mctf_compile.passes.projections import Projection
from mctf_compile.passes.rules import schema_arguments
from mctf_compile.passes.rules.attention import head_layout
from mctf_compile.passes.token_axes import Axes
from mctf_compile.schedule import removal


@dataclass(frozen=True)
class PlannedBlock:
    """One block of the plan: token counts (protected ones included) and why it does not fuse, if so."""

    index: int
    block: Block
    tokens_in: int | None
    tokens_out: int | None
    reason: str | None = None
    note: str | None = None
    lead: int = 0
    tail: int = 0

    @property
    def padded(self) -> bool:
        """Whether attention masks out padding, which never fuses with other tokens."""
        return self.block.mask is Mask.TOKENS

    @property
    def removed(self) -> int:
        return 0 if self.reason is not None else self.tokens_in - self.tokens_out


@dataclass(frozen=True)
class Plan:
    """What the rewrite does, block by block."""

    config: FusionConfig
    method: Method
    site: Site
    blocks: list[PlannedBlock]
    projections: dict[fx.Node, Projection] = field(default_factory=dict)

    @property
    def fusing(self) -> list[PlannedBlock]:
        return [b for b in self.blocks if b.reason is None]


def make_plan(
    blocks: list[Block],
    axes: Axes,
    config: FusionConfig,
    declined: Mapping[int, str] = MappingProxyType({}),
    whole: frozenset[int] = frozenset(),
) -> Plan:
    """Schedule the reduction over the blocks.

    ``declined`` and ``whole`` are what an earlier rewrite found: blocks not worth fusing, with their
    reasons, and blocks that get the original tokens back before they run.
    Raises ``ConfigError`` where ``r`` or ``layers`` do not fit the number of blocks.
    """
    method = get_method(config.method)
    site = method.site(config)
    depth = len(blocks)
    requests = config.schedule.per_block(depth) if depth else []
    chosen = _layers(config, method, depth)
    counts: dict[Dim, int] = {}
    entries: dict[fx.Node, int] = {}
    planned = []
    for i, block in enumerate(blocks):
        reason = block.problem or declined.get(i) or _unsupported(block, axes)
        if reason is not None:
            size = _static_size(block, axes)
            planned.append(PlannedBlock(i, block, size, size, reason))
            continue
        (place,) = places(axes.of(block.entry), block.tokens)
        if i in whole:
            counts[block.tokens.body] = block.tokens.size
        body = counts.setdefault(block.tokens.body, block.tokens.size)
        tokens = place.lead + body + place.tail
        lead = place.lead if config.protected == "auto" else config.protected
        # Padding may leave one token of either kind without a partner of its own.
        spare = 2 if block.mask is Mask.TOKENS else 0
        outcome = removal(requests[i], tokens, lead + place.tail, config.min_tokens, spare)
        if i not in chosen:
            reason = "not among the layers that fuse"
        elif block.entry in entries:
            reason = f"reads the same tokens as block {entries[block.entry]}, which fuses them"
        elif requests[i] == 0:
            reason = "r is 0 for this block"
        elif outcome.r == 0:
            reason = outcome.note or f"r={requests[i]} of {tokens} tokens rounds to 0"
        if reason is None:
            entries[block.entry] = i
            counts[block.tokens.body] = body - outcome.r
        left = tokens if reason is not None else tokens - outcome.r
        notes = [outcome.note, _exposed(block, config)]
        note = "; ".join(n for n in notes if n) or None
        planned.append(PlannedBlock(i, block, tokens, left, reason, note, lead, place.tail))
    return Plan(config, method, site, planned)


def _exposed(block: Block, config: FusionConfig) -> str | None:
    """What a user should know who leaves a prefix token unprotected that the model reads by its place."""
    if not block.tokens.positional:
        return None
    return f"protected={config.protected} lets prefix tokens be fused; position 0 may then hold another token"


def _layers(config: FusionConfig, method: Method, depth: int) -> set[int]:
    if config.layers is not None:
        beyond = [i for i in config.layers if i >= depth]
        if beyond and depth:
            raise ConfigError(f"layers={list(config.layers)}: block {beyond[0]} does not exist; the model has {depth}.")
        return set(config.layers)
    preset = config.schedule.layers(depth)
    return set(method.layers(depth)) if preset is None else set(preset)


def _unsupported(block: Block, axes: Axes) -> str | None:
    """Attention that the fused operators do not compute."""
    site = block.attention
    if block.mask is Mask.PAIRS:
        return "attention is masked by pairs of tokens (causal or block by block), which cannot be fused"
    if site.weights is not None:
        return None
    args = schema_arguments(site.node)
    if args.get("is_causal"):
        return "causal attention needs the order of the original tokens"
    if args.get("enable_gqa"):
        return "grouped-query attention is not fused"
    if head_layout(axes.of(site.query), block.tokens) is None:
        return "attention numbers its images otherwise than the residual stream does (windows or frames)"
    return None


def _static_size(block: Block, axes: Axes) -> int | None:
    size = product(axes.table.canonical(block.attention.key_axis))
    return size if isinstance(size, int) else None
