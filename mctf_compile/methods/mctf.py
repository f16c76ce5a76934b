"""MCTF: multi-criteria token fusion with one-step-ahead attention (Lee et al., CVPR 2024)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from mctf_compile.errors import ConfigError
from mctf_compile.methods.base import Choice, Combine, Evidence, Merging, Need, Site, register_method
from mctf_compile.methods.combining import combined, match
from mctf_compile.options.fields import integer, one_of, option, temperature

SITES = {"approx": Site.AHEAD, "exact": Site.BEFORE, "current": Site.AFTER}


@register_method
@dataclass(frozen=True)
class MCTF(Merging):
    """Matches by similarity, informativeness and size (section 3.2), one step ahead of attention (3.4).

    Within branches (``span="branch"``) there is no informativeness: it would take the very attention map over all
    tokens that the branch does without. ``attention="exact"`` makes one all the same.

    Options:
        attention: ``approx`` (one step ahead, pooled map), ``exact`` (one step ahead, recomputed on the
            fused tokens), ``current`` (the block's own map, fused after the block).
        matching: ``bidirectional`` or ``one_way``.
        pooling: weights of the tokens that are fused: ``attention`` (informativeness times size),
            ``size``, ``mean``; or ``max``; or ``mlerp`` (the mean with the largest norm).
        tau_sim, tau_info, tau_size: temperatures of the criteria; 0 turns a criterion off.
    """

    name: ClassVar[str] = "mctf"
    source: ClassVar[str] = "Lee et al., CVPR 2024, arXiv 2403.10030"
    matches: ClassVar[bool] = True
    keeps_images_apart: ClassVar[bool] = True

    attention: str = option("approx", one_of("approx", "exact", "current"))
    matching: str = option("bidirectional", one_of("bidirectional", "one_way"))
    pooling: str = option("attention", one_of("attention", "size", "mean", "max", "mlerp"))
    tau_sim: float = option(1.0, temperature)
    tau_info: float = option(20.0, temperature)
    tau_size: float = option(40.0, temperature)
    min_tokens: int = option(10, integer(1))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.in_branch and self.attention == "current":
            raise ConfigError(
                "attention='current' fuses after a block, and span='branch' within it; leave one of them out."
            )

    @property
    def site(self) -> Site:  # type: ignore[override]  # it depends on an option
        return SITES[self.attention]

    @property
    def needs(self) -> Collection[Need]:  # type: ignore[override]  # it depends on options
        return () if self.in_branch and self.attention != "exact" else (Need.IMPORTANCE,)

    def default_layers(self, depth: int) -> range:
        # What is lost in a branch is lost there alone.
        return range(0 if self.in_branch else 1, depth)

    def choose(self, evidence: Evidence, r: int) -> Choice:
        taus = (self.tau_sim, self.tau_info, self.tau_size)
        keep, gone, into = match(evidence, evidence.x, r, taus, self.matching == "bidirectional")
        if self.pooling == "max":
            return Choice(keep, gone, into, combine=Combine.MAX)
        if self.pooling != "attention":
            return combined(self.pooling, evidence, keep, gone, into)
        importance = evidence.importance
        return Choice(keep, gone, into, evidence.size if importance is None else importance * evidence.size)
