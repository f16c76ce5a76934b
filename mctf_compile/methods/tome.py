"""ToMe: token merging by the similarity of keys (Bolya et al., ICLR 2023)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from mctf_compile.methods.base import Choice, Evidence, Merging, Need, Site, register_method
from mctf_compile.methods.combining import combined, match
from mctf_compile.options.fields import one_of, option


@register_method
@dataclass(frozen=True)
class ToMe(Merging):
    """Matches keys, averaged over heads, from even to odd positions, after attention in every block.

    Within branches (``span="branch"``) it is ToMe-SD, which matches the tokens of the residual stream themselves.

    Options:
        pooling: ``size`` (the size-weighted mean), ``mean`` or ``mlerp``.
    """

    name: ClassVar[str] = "tome"
    source: ClassVar[str] = "Bolya et al., ICLR 2023, arXiv 2210.09461"
    site: ClassVar[Site] = Site.BETWEEN
    matches: ClassVar[bool] = True
    keeps_images_apart: ClassVar[bool] = True

    pooling: str = option("size", one_of("size", "mean", "mlerp"))

    @property
    def needs(self) -> Collection[Need]:  # type: ignore[override]  # it depends on an option
        return () if self.in_branch else (Need.KEYS,)

    def choose(self, evidence: Evidence, r: int) -> Choice:
        return combined(self.pooling, evidence, *match(evidence, evidence.metric, r))
