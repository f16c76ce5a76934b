"""Pass: decide which block fuses how many tokens, and where. Pure; nothing is rewritten yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from torch import fx

from mctf_compile.errors import ConfigError
from mctf_compile.methods import Count, Merging, Method, Need, Site
from mctf_compile.methods.base import OF_CLASS_TOKEN
from mctf_compile.options.schedule import NOT_CHOSEN, Removal
from mctf_compile.passes.analysis.projections import Projection
from mctf_compile.passes.analysis.structure import Block, Mask
from mctf_compile.passes.analysis.token_axes import Axes
from mctf_compile.passes.axes import Dim, places, product
from mctf_compile.passes.pipeline import State, graph_pass
from mctf_compile.passes.rules import schema_arguments
from mctf_compile.passes.rules.attention import head_layout


@graph_pass("plan", requires=("blocks",), ensures=("plan",))
def run(state: State) -> None:
    findings, method = state.findings, state.method
    counted = state.adjustable or state.unsettled
    if counted:
        method = typical(method, state.blocks)
    state.plan = make_plan(state.blocks, state.axes, method, findings.declined, findings.whole,
                           any(o.state == "training" for o in state.observations), counted)


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

    method: Method
    blocks: list[PlannedBlock]
    # Modules are being trained: all tokens stay, and count as the method says.
    relaxed: bool = False
    projections: dict[fx.Node, Projection] = field(default_factory=dict)

    @property
    def site(self) -> Site:
        return self.method.site

    @property
    def fusing(self) -> list[PlannedBlock]:
        return [b for b in self.blocks if b.reason is None]


def make_plan(
    blocks: list[Block],
    axes: Axes,
    method: Method,
    declined: Mapping[int, str] = MappingProxyType({}),
    whole: frozenset[int] = frozenset(),
    relaxed: bool = False,
    adjustable: bool = False,
) -> Plan:
    """Schedule the reduction over the blocks.

    ``declined`` and ``whole`` are what an earlier rewrite found: blocks not worth fusing, with their
    reasons, and blocks that get the original tokens back before they run. ``adjustable``: blocks among the layers of
    the method take part even where they are to remove no token now.
    Raises ``ConfigError`` where options of the method do not fit the blocks.
    """
    depth = len(blocks)
    chosen = _layers(method, depth)
    able = [b for b in blocks if b.problem is None]
    if Need.LEARNED in method.needs and able and all(b.learned is None for b in able):
        raise ConfigError(f"method {method.name!r} needs modules that this model does not have; "
                          f"mctf_compile.attach(model, method={method.name!r}) adds them before it is compiled.")
    counts: dict[Dim, int] = {}
    entries: dict[fx.Node, int] = {}
    planned = []
    for i, block in enumerate(blocks):
        reason = block.problem or declined.get(i) or _unsupported(block, axes)
        if reason is None and i in chosen:
            reason = _unmet(block, axes, method)
        if reason is not None:
            size = _size(block, axes, counts)
            planned.append(PlannedBlock(i, block, size, size, reason))
            continue
        (place,) = places(axes.of(block.entry), block.tokens)
        if i in whole:
            counts[block.tokens.body] = block.tokens.size
        body = counts.setdefault(block.tokens.body, block.tokens.size)
        tokens = place.lead + body + place.tail
        lead = place.lead if method.protected == "auto" else method.protected
        # Padding may leave one token of either kind without a partner of its own.
        spare = 2 if block.mask is Mask.TOKENS else 0
        count = Count(tokens, lead + place.tail, block.tokens.size + place.lead - lead, spare)
        outcome = Removal(0, NOT_CHOSEN)
        if i in chosen:
            outcome = method.removal(i, depth, count)
            if outcome.r >= count.free > 0:
                # The tokens that left need one that stands for them.
                outcome = replace(outcome, r=count.free - 1, note="one unprotected token stays")
        if outcome.r == 0 and not outcome.acts and not (adjustable and i in chosen):
            reason = outcome.note
        elif block.entry in entries:
            reason = f"reads the same tokens as block {entries[block.entry]}, which fuses them"
        if reason is None:
            entries[block.entry] = i
            if method.site is not Site.AROUND:
                counts[block.tokens.body] = body - outcome.r
        left = tokens if reason is not None else tokens - outcome.r
        notes = [outcome.note, _exposed(block, method)]
        note = "; ".join(n for n in notes if n) or None
        planned.append(PlannedBlock(i, block, tokens, left, reason, note, lead, place.tail))
    return Plan(method, planned, relaxed)


def plan_for(state: State, method: Method) -> list[PlannedBlock]:
    """The blocks as ``method`` would have them, where those of the plan are adjustable."""
    declined, whole = state.findings.declined, state.findings.whole
    return make_plan(state.blocks, state.axes, method, declined, whole, adjustable=True).blocks


def tokens_left(state: State, method: Method) -> list[int]:
    """The tokens that each fusing block of an adjustable result leaves under ``method``: its last inputs."""
    blocks = plan_for(state, method)
    return [blocks[b.index].tokens_out for b in state.plan.fusing]


def typical(method: Merging, blocks: list[Block]) -> Merging:
    """The method with an ``r`` at which every block removes two tokens or more, where there are so many.

    Symbolic sizes are traced at such numbers: code for none or one token would hold for nothing else.
    """
    counts = [b.tokens.size for b in blocks if b.tokens is not None and isinstance(b.tokens.size, int)]
    most = max(min(counts, default=0) // (len(blocks) + 1), 2)
    asked = method.r if isinstance(method.r, int) and method.r >= 2 else most
    return replace(method, r=min(asked, most), target=None, min_tokens=1)


def _exposed(block: Block, method: Method) -> str | None:
    """What a user should know who leaves a prefix token unprotected that the model reads by its place."""
    if not block.tokens.positional:
        return None
    return f"protected={method.protected} lets prefix tokens be fused; position 0 may then hold another token"


def _layers(method: Method, depth: int) -> list[int]:
    chosen = method.acts_on(depth)
    beyond = [i for i in chosen if i >= depth]
    if method.layers is not None and beyond and depth:
        raise ConfigError(f"layers={list(method.layers)}: block {beyond[0]} does not exist; the model has {depth}.")
    return chosen


def _unmet(block: Block, axes: Axes, method: Method) -> str | None:
    """What a method needs of a block that it does not have."""
    lead = block.tokens.lead if method.protected == "auto" else method.protected
    if OF_CLASS_TOKEN & set(method.needs) and not lead:
        hint = f" ({method.hint})" if method.hint else ""
        return f"method {method.name!r} reads the class token, and there is none before these tokens{hint}"
    if Need.LEARNED in method.needs and block.learned is None:
        return f"method {method.name!r} has no module at this block"
    if Need.LEARNED in method.needs and len(places(axes.of(block.learned), block.tokens) or ()) != 1:
        return f"the module of method {method.name!r} does not tell the tokens of this block apart"
    return None


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


def _size(block: Block, axes: Axes, counts: Mapping[Dim, int]) -> int | None:
    """The tokens that a block which does not fuse attends to, protected ones included, where that is a number."""
    if block.tokens is not None and block.tokens.body in counts:
        return block.tokens.lead + counts[block.tokens.body] + block.tokens.tail
    size = product(axes.table.canonical(block.attention.key_axis))
    return size if isinstance(size, int) else None
