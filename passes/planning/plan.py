"""Pass: decide which block fuses how many tokens, and where. Pure; nothing is rewritten yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import cast

import sympy
from torch import Tensor, fx

from mctf_compile.errors import ConfigError
from mctf_compile.methods import Count, Merging, Method, Need, Site, Tiles
from mctf_compile.methods.base import OF_CLASS_TOKEN
from mctf_compile.narrowing import present
from mctf_compile.options.schedule import ALONE, NOT_CHOSEN, PerBlock, Removal
from mctf_compile.passes.analysis.branches import Branch
from mctf_compile.passes.analysis.masks import mask_operands
from mctf_compile.passes.analysis.projections import Projection
from mctf_compile.passes.analysis.structure import Block, Mask, Tower
from mctf_compile.passes.analysis.token_axes import Axes
from mctf_compile.passes.axes import Dim, has_batch, mentions, places, product, size_at
from mctf_compile.passes.pipeline import State, graph_pass
from mctf_compile.passes.planning.segments import owners, segments
from mctf_compile.passes.rules import schema_arguments
from mctf_compile.passes.rules.attention import head_layout


@graph_pass("plan", requires=("blocks", "masks", "towers", "branches"), ensures=("plan",))
def run(state: State) -> None:
    method, requests = state.config.method, state.findings.r
    relaxed = any(o.state == "training" for o in present(state.observations))
    state.varies = any(
        _varies(b) and b.problem is None and not _why_fixed(b, state, relaxed) for b in state.blocks or ()
    )
    if state.counted and isinstance(method, Merging):
        method, requests = with_representative_r(method, state), None
    state.plan = make_plan(state, method, requests, relaxed, state.counted, representative=state.counted)


@dataclass(frozen=True)
class PlannedBlock:
    """One block of the plan: token counts (protected ones included) and why it does not fuse, if so.

    ``tokens``: those that it has in the dense graph, and ``keys`` those that attention has there.
    ``idle``: whether the method does nothing to them, and would not with no token to remove either.
    ``index``: its place among all blocks; ``tower`` and ``number``: its tower, its place in that, and ``depth`` how
    many blocks that has. ``lead`` and ``tail``: the protected tokens at the ends of its residual stream. ``branches``:
    what alone runs on fused tokens, where tokens stay fused in branches only; ``tiles``: where the tokens are that
    receive others, and ``match`` the block whose match serves this one, where those are not the usual.
    """

    index: int
    block: Block
    tokens_in: int | None
    tokens_out: int | None
    reason: str | None = None
    note: str | None = None
    lead: int = 0
    tail: int = 0
    tower: int = 0
    number: int = 0
    depth: int = 1
    # Keys before and after those of the residual stream's own tokens.
    first: int = 0
    last: int = 0
    tokens: int | None = None
    keys: int | None = None
    idle: bool = True
    branches: tuple[Branch, ...] = ()
    tiles: Tiles | None = None
    match: int | None = None

    @property
    def padded(self) -> bool:
        """Whether attention masks out padding, which never fuses with other tokens."""
        return self.block.mask is Mask.TOKENS

    @property
    def packed(self) -> tuple[int, ...]:
        """The runs of original tokens within which tokens fuse, where several images are packed into one sequence."""
        return self.block.packed if self.block.mask is Mask.PACKED else ()

    @property
    def removed(self) -> int:
        return 0 if self.reason is not None else present(self.tokens_in) - present(self.tokens_out)

    def own(self, of_keys: Tensor) -> Tensor:
        """What [B, N, ...] of the keys says of the residual stream's tokens, which other streams' may stand beside."""
        return of_keys[:, self.first : of_keys.shape[1] - self.last] if self.first or self.last else of_keys


@dataclass(frozen=True)
class Plan:
    """What the rewrite does, block by block."""

    method: Method
    blocks: list[PlannedBlock]
    # Modules are being trained: all tokens stay, and count as the method says.
    relaxed: bool = False
    projections: dict[fx.Node, Projection] = field(default_factory=dict)
    # The masks over single tokens, each with the values that alone tell which ones it masks out.
    masks: dict[fx.Node, frozenset[fx.Node]] = field(default_factory=dict)
    # And with those that together tell all of it.
    marks: dict[fx.Node, frozenset[fx.Node]] = field(default_factory=dict)

    @property
    def site(self) -> Site:
        return self.method.fuses_at

    @property
    def branch_of(self) -> dict[fx.Node, tuple[int, str]]:
        """The block and the kind of branch of each node that runs on fused tokens, where branches alone do."""
        return {n: (b.index, branch.kind) for b in self.fusing for branch in b.branches for n in branch.nodes}

    @property
    def fusing(self) -> list[PlannedBlock]:
        return [b for b in self.blocks if b.reason is None]


def make_plan(
    state: State,
    method: Method,
    requests: Sequence[int] | None = None,
    relaxed: bool = False,
    adjustable: bool = False,
    numbers: Mapping[sympy.Symbol, int] | None = None,
    representative: bool = False,
) -> Plan:
    """Schedule the reduction over the blocks of each tower.

    ``requests``: the tokens that each block is to remove, in the place of the method's ``r``. ``adjustable``: blocks
    take part that may remove tokens at another ``r`` or size, even where they are to remove none now. ``numbers``: the
    values of the symbols in sizes; None for those that the graph was captured with. ``representative``: see ``FEW``.
    ``state.findings`` has what an earlier rewrite found: blocks not worth fusing, with their reasons, and blocks that
    get the original tokens back before they run.
    Raises ``ConfigError`` where options of the method do not fit the blocks.
    """
    blocks, towers = present(state.blocks), present(state.towers)
    able = [b for b in blocks if b.problem is None]
    if Need.LEARNED in method.needs and able and all(b.learned is None for b in able):
        has_none = f"has no word of its modules in this graph ({method.hint})" if method.hint else None
        raise ConfigError(
            f"method {method.name!r} {has_none or 'needs modules that this model does not have'}; "
            f"mctf_compile.attach(model, method={method.name!r}) adds them before it is compiled."
        )
    _check_layers(method, blocks, towers)
    planned: dict[int, PlannedBlock] = {}
    for number, tower in enumerate(towers):
        own = method
        if requests is not None:
            own = replace(cast(Merging, method), r=[requests[i] for i in tower.blocks], target=None)
        planner = _TowerPlanner(state, own, number, tower, relaxed, adjustable, numbers, representative)
        planned.update((block.index, block) for block in map(planner.plan, range(len(tower.blocks))))
    ordered = [planned[i] for i in range(len(blocks))]
    return Plan(method, ordered, relaxed, masks=present(state.masks), marks=present(state.marks))


class _TowerPlanner:
    """Plans the blocks of one tower, in order; what they leave is what the next ones get."""

    def __init__(
        self,
        state: State,
        method: Method,
        number: int,
        tower: Tower,
        relaxed: bool,
        adjustable: bool,
        numbers: Mapping[sympy.Symbol, int] | None,
        representative: bool,
    ) -> None:
        self.state, self.relaxed, self.representative = state, relaxed, representative
        self.blocks, self.axes, self.findings = present(state.blocks), present(state.axes), state.findings
        self.method, self.number, self.tower, self.adjustable = method, number, tower, adjustable
        self.numbers = present(state.sizes).hints if numbers is None else numbers
        self.depth = len(tower.blocks)
        self.chosen = {i for i in method.acts_on(self.depth) if i < self.depth}
        # The unprotected tokens, by axis: the stages of a pyramid have some each.
        self.counts: dict[Dim, int] = {}
        self.entries: dict[fx.Node, int] = {}
        self.fusing: list[PlannedBlock] = []

    def plan(self, number: int) -> PlannedBlock:
        """The block at a place in the tower."""
        index = self.tower.blocks[number]
        block, findings = self.blocks[index], self.findings
        planned = PlannedBlock(index, block, None, None, tower=self.number, number=number, depth=self.depth)
        reason = block.problem or _why_fixed(block, self.state, self.relaxed)
        reason = reason or findings.declined.get(index) or _unsupported(block, self.axes)
        reason = reason or _left_out(block, self.method.modules) or _not_apart(block, self.method, self.relaxed)
        if reason is None and number in self.chosen:
            reason = _unmet(block, self.axes, self.method)
        wanted = self.method.branches if isinstance(self.method, Merging) else ()
        branches = tuple(b for b in present(self.state.branches)[index] if b.kind in wanted)
        if reason is None and not branches and self.method.fuses_at is Site.BRANCH:
            reason = f"no branch of the block ({', '.join(wanted)}) can run on fewer tokens by itself"
        if reason is not None:
            size = self._size(block, self.counts)
            return replace(planned, tokens_in=size, tokens_out=size, reason=reason, tokens=self._size(block, {}))
        entry, axis = present(block.entry), present(block.tokens)
        size = size_at(axis.size, self.numbers)
        (place,) = present(places(self.axes.of(entry), axis))
        if index in findings.uncut:
            self.counts[axis.body] = size
        body = self.counts.setdefault(axis.body, size)
        tokens, dense = place.lead + body + place.tail, place.lead + size + place.tail
        self.method.check_model(self.depth, dense)
        lead = place.lead if isinstance(self.method.protected, str) else self.method.protected
        # Padding may leave one token of either kind without a partner of its own, and so may every image of a pack.
        spare = 2 if planned.padded else (len(planned.packed) + 1) // 2
        tiles, untiled = self._tiles(block)
        receivers = None if tiles is None else tiles.receivers
        outcome = self._removal(number, Count(tokens, lead + place.tail, size + place.lead - lead, spare, receivers))
        reused = self._reused(number, block)
        if reused is not None and outcome.r:
            ago = number - reused.number
            note = f"as block {reused.number} matched its tokens, {ago} block{'s' * (ago > 1)} before"
            outcome = replace(outcome, r=reused.removed, note=note)
        idle = outcome.r == 0 and not outcome.acts
        if self.adjustable:
            reason = self._never_removes(number)
        elif idle:
            reason = outcome.note
        passing = self.method.fuses_at in (Site.AROUND, Site.BRANCH)
        if reason is None and entry in self.entries and self.method.fuses_at is not Site.BRANCH:
            reason = f"reads the same tokens as block {self.entries[entry]}, which fuses them"
        if reason is None:
            self.entries[entry] = number
            if not passing:
                self.counts[axis.body] = body - outcome.r
        remaining = tokens if reason is not None else tokens - outcome.r
        notes = [outcome.note, untiled, _exposed(block, self.method)]
        result = replace(
            planned,
            tokens_in=tokens,
            tokens_out=remaining,
            reason=reason,
            note="; ".join(n for n in notes if n) or None,
            lead=lead,
            tail=place.tail,
            first=axis.lead - place.lead,
            last=axis.tail - place.tail,
            tokens=dense,
            keys=axis.lead + size + axis.tail,
            idle=idle,
            branches=branches,
            tiles=tiles,
            match=index if reused is None else reused.index,
        )
        if reason is None:
            self.fusing.append(result)
        return result

    def _tiles(self, block: Block) -> tuple[Tiles | None, str | None]:
        """The tiles of a block's tokens, where the method asks for such; why there are none, if so."""
        method = self.method
        if not isinstance(method, Merging) or method.partition is None:
            return None, None
        sizes = [axis.size for axis in self.axes.table.canonical(present(block.tokens).body)]
        if len(sizes) != 2:
            return None, "the model does not tell the grid of these tokens, so every second one receives others"
        if not all(isinstance(size, int) for size in sizes):
            return None, "the grid of these tokens differs from call to call, so every second one receives others"
        if block.mask is Mask.TOKENS:
            return None, "padding may fill a tile, so every second token receives others"
        return Tiles(int(sizes[0]), int(sizes[1]), method.partition, method.partition_seed), None

    def _reused(self, number: int, block: Block) -> PlannedBlock | None:
        """The block on the same residual stream whose match serves this one too, if any."""
        every = self.method.match_every if isinstance(self.method, Merging) else 1
        matched = next((b for b in reversed(self.fusing) if b.match == b.index), None)
        if matched is None or sum(b.match == matched.index for b in self.fusing) >= every:
            return None
        streams, padded = self.tower.streams, block.mask is Mask.TOKENS
        alike = matched.block.tokens == block.tokens and matched.padded == padded
        return matched if alike and streams[matched.number] == streams[number] else None

    def _never_removes(self, number: int) -> str | None:
        """Why a block of a graph that serves several r, or several sizes, removes no token at any, if so."""
        if number not in self.chosen:
            return NOT_CHOSEN
        if self.state.adjustable or self.state.config.undecided:
            return None
        # A block that removes none of many removes none of fewer.
        outcome = self.state.config.method.removal(number, self.depth, Count(MANY, 0, MANY))
        return None if outcome.r or outcome.acts else outcome.note or NOT_CHOSEN

    def _removal(self, number: int, count: Count) -> Removal:
        if number not in self.chosen:
            alone = self.depth == 1 and self.method.layers is None
            return Removal(0, ALONE if alone else NOT_CHOSEN)
        outcome = self.method.removal(number, self.depth, count)
        if outcome.r >= count.free > 0:
            # The tokens that left need one that stands for them.
            return replace(outcome, r=count.free - 1, note="one unprotected token stays")
        if self.representative and outcome.r < FEW <= (count.free - 1) // 2:
            return replace(outcome, r=FEW)
        return outcome

    def _size(self, block: Block, counts: Mapping[Dim, int]) -> int | None:
        """The tokens that a block which does not fuse attends to, protected ones included, where that is a number.

        ``counts``: the unprotected ones, by axis, where some were fused before.
        """
        if block.tokens is not None and block.tokens.body in counts:
            return block.tokens.lead + counts[block.tokens.body] + block.tokens.tail
        size = product(self.axes.table.canonical(block.attention.key_axis))
        return size_at(size, self.numbers) if present(self.state.sizes).known(size) else None


def stretches(graph: fx.Graph, blocks: Sequence[PlannedBlock], streams: Mapping[int, int]) -> dict[int, int | None]:
    """By the number of a part of ``graph`` (see ``segments``) the stream on whose fused tokens it runs, if any.

    ``streams``: by block, the number of the stream whose tokens it fuses. A block that fuses none runs on what its
    tower has, and what lies between blocks, or behind the last, on what the block before it leaves.
    """
    found = [b.block for b in blocks]
    owner, of_tower = owners(graph, found), dict[int, int]()
    result: dict[int, int | None] = {}
    stream: int | None = None
    for number in range(max(segments(graph, found).values()) + 1):
        if number in owner:
            planned = blocks[owner[number]]
            if planned.index in streams:
                of_tower[planned.tower] = streams[planned.index]
            stream = of_tower.get(planned.tower)
        result[number] = stream
    return result


# More tokens than any block has.
MANY = 1 << 20
# So many tokens at least leave each block at the numbers that symbolic sizes are traced at, where it has them: code for
# none or one would hold for nothing else. What is removed in truth is planned at every call.
FEW = 2

# Why a decoder's queries stay as they are by default.
QUERIES = (
    "its tokens are a decoder's queries, which read another sequence by cross-attention; they fuse only where "
    "modules=... names them"
)


def _varies(block: Block) -> bool:
    """Whether a block has another number of tokens at another call."""
    return block.tokens is not None and not isinstance(block.tokens.size, int)


def _why_fixed(block: Block, state: State, relaxed: bool) -> str | None:
    """Why a block cannot fuse because its number of tokens varies, if so."""
    if not _varies(block):
        return None
    if not present(state.sizes).known(present(block.tokens).size):
        return "the number of tokens depends on the values of tensors, and not on the shapes of the inputs alone"
    if state.one_piece:
        return (
            "the number of tokens is symbolic, and a graph by itself fuses a fixed number (compile with dynamic=False)"
        )
    if relaxed:
        return "the number of tokens is symbolic, and training a method's modules needs a fixed one"
    return None


def tokens_remaining(
    state: State,
    method: Method | None = None,
    requests: Sequence[int] | None = None,
    numbers: Mapping[sympy.Symbol, int] | None = None,
) -> list[int]:
    """The tokens that each fusing block of an adjustable result leaves: its last inputs.

    ``method``, ``requests``, ``numbers``: as for ``make_plan``; those of the options where None.
    """
    return [present(b.tokens_out) for b in fusing_now(state, method, requests, numbers)]


def fusing_now(
    state: State,
    method: Method | None = None,
    requests: Sequence[int] | None = None,
    numbers: Mapping[sympy.Symbol, int] | None = None,
) -> list[PlannedBlock]:
    """The fusing blocks of an adjustable result, with the tokens that they have and leave; see ``tokens_remaining``."""
    blocks = make_plan(state, method or state.config.method, requests, adjustable=True, numbers=numbers).blocks
    return [blocks[b.index] for b in present(state.plan).fusing]


def with_representative_r(method: Merging, state: State) -> Merging:
    """The method with an ``r`` at which every block removes ``FEW`` tokens or more, where there are so many."""
    sizes, towers = present(state.sizes), present(state.towers)
    bodies = [b.tokens.size for b in present(state.blocks) if b.tokens is not None]
    counts = [size_at(size, sizes.hints) for size in bodies if sizes.known(size)]
    depth = max((len(tower.blocks) for tower in towers), default=0)
    most = max(min(counts, default=0) // (depth + 1), FEW)
    asked = method.r if isinstance(method.r, int) and method.r >= FEW else most
    return replace(method, r=min(asked, most), target=None, min_tokens=1)


def _check_layers(method: Method, blocks: Sequence[Block], towers: Sequence[Tower]) -> None:
    """Raise ``ConfigError`` for blocks that no tower has, or a list of ``r`` where towers differ in depth."""
    free = [
        t
        for t in towers
        if any(blocks[i].problem is None and not _left_out(blocks[i], method.modules) for i in t.blocks)
    ]
    depths = sorted({len(tower.blocks) for tower in free or towers})
    beyond = [i for i in method.layers or () if depths and i >= depths[-1]]
    if beyond:
        has = f"the model has {depths[-1]}" if len(towers) == 1 else f"the deepest of its towers has {depths[-1]}"
        raise ConfigError(f"layers={list(method.layers or ())}: block {beyond[0]} does not exist; {has}.")
    r = getattr(method, "r", None)
    if len(depths) > 1 and isinstance(r, PerBlock):
        named = ", ".join(f"{tower.module or 'one'} of {len(tower.blocks)} blocks" for tower in free)
        raise ConfigError(
            f"r is a list of {len(r)} entries, and the model has towers of several depths "
            f"({named}); give a number, or choose towers of one depth with modules=..."
        )


def _left_out(block: Block, modules: Sequence[str] | None) -> str | None:
    """Why the option ``modules`` leaves a block out, if it does: it names neither its module nor one around it.

    Without it a decoder's queries are left out.
    """
    if modules is None:
        return QUERIES if block.queries else None
    parts = (block.module or "").split(".")
    paths = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
    if any(fnmatchcase(path, pattern) for path in paths for pattern in modules):
        return None
    return f"not among the modules that may fuse ({', '.join(modules)})"


def _exposed(block: Block, method: Method) -> str | None:
    """What a user should know who leaves a prefix token unprotected that the model reads by its place."""
    if not present(block.tokens).positional:
        return None
    return f"protected={method.protected} lets prefix tokens be fused; position 0 may then hold another token"


def _not_apart(block: Block, method: Method, relaxed: bool) -> str | None:
    """Why images that are packed into one sequence would not stay apart, if so."""
    if block.mask is not Mask.PACKED:
        return None
    beside = method.fuses_at is Site.BRANCH
    if relaxed or beside or not method.keeps_images_apart:
        what = f"method {method.name!r}" + (" in training" if relaxed else " in branches" if beside else "")
        return f"several images are packed into one sequence, and {what} does not keep their tokens apart"
    return None


def _unmet(block: Block, axes: Axes, method: Method) -> str | None:
    """What a method needs of a block that it does not have."""
    tokens = present(block.tokens)
    (place,) = present(places(axes.of(present(block.entry)), tokens))
    lead = place.lead if isinstance(method.protected, str) else method.protected
    if OF_CLASS_TOKEN & set(method.needs) and not lead:
        hint = f" ({method.hint})" if method.hint else ""
        return f"method {method.name!r} reads the class token, and there is none before these tokens{hint}"
    if Need.LEARNED in method.needs and block.learned is None:
        return f"method {method.name!r} has no module at this block"
    learned = axes.of(present(block.learned)) if Need.LEARNED in method.needs else None
    if learned is not None and tokens.batch and not has_batch(learned, tokens):
        return f"the module of method {method.name!r} speaks of other images than those of this block"
    if learned is not None and len(places(learned, tokens) or ()) != 1:
        return f"the module of method {method.name!r} does not tell the tokens of this block apart"
    return None


def _unsupported(block: Block, axes: Axes) -> str | None:
    """Attention that the fused operators do not compute."""
    attention = block.attention
    if block.mask is Mask.GIVEN:
        return (
            "the attention mask is an input of the graph with a number for every pair of tokens, so that whether it "
            "masks padding or pairs cannot be read; padding='assume' says that it is padding"
        )
    if block.mask is Mask.PAIRS:
        return "attention is masked by pairs of tokens (causal or block by block), which cannot be fused"
    meet = {attention.node, *mask_operands(attention).values()}
    if any(mentions(axes.clashes_of(node), present(block.tokens)) for node in meet):
        return "queries, keys, values and mask are put together of parts that do not line up, so no token is followed"
    if attention.weights is not None:
        return None
    if schema_arguments(attention.node).get("is_causal"):
        return "causal attention needs the order of the original tokens"
    if head_layout(axes.of(attention.query), present(block.tokens)) is None:
        return "attention numbers its images otherwise than the residual stream does (windows or frames)"
    return None
