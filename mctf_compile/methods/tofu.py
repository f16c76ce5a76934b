"""ToFu: prune in early blocks, merge in late ones, and keep the norm (Kim et al., WACV 2024)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from mctf_compile.methods.base import Choice, Combine, Evidence, Merging, Need, Site, register_method
from mctf_compile.methods.combining import combined, match
from mctf_compile.options.fields import flag, integer, one_of, option


@register_method
@dataclass(frozen=True)
class ToFu(Merging):
    """ToMe's matching; the first blocks drop what the later ones merge.

    Early blocks are far from linear, so that a mean of two tokens is no input that they know; ``mctf
    linearity`` measures it. A token that is dropped counts no more, and its match stays what it is.

    Options:
        prune_layers: the first blocks, which drop; None for half of them.
        combine: ``mlerp`` (the mean with the largest norm) or ``average``.
        weighted: whether means are weighted by size.
    """

    name: ClassVar[str] = "tofu"
    source: ClassVar[str] = "Kim et al., WACV 2024, arXiv 2312.01026"
    site: ClassVar[Site] = Site.BETWEEN
    matches: ClassVar[bool] = True
    keeps_images_apart: ClassVar[bool] = True

    prune_layers: int | None = option(None, integer(0, None))
    combine: str = option("mlerp", one_of("mlerp", "average"))
    weighted: bool = option(False, flag)

    @property
    def needs(self) -> Collection[Need]:  # type: ignore[override]  # it depends on an option
        return () if self.in_branch else (Need.KEYS,)

    def choose(self, evidence: Evidence, r: int) -> Choice:
        matched = match(evidence, evidence.metric, r)
        first = evidence.depth // 2 if self.prune_layers is None else self.prune_layers
        if evidence.index < first:
            return Choice(*matched, combine=Combine.DROP)
        how = "mlerp" if self.combine == "mlerp" else "mean"
        return combined("size" if self.weighted and how == "mean" else how, evidence, *matched, sized=self.weighted)
