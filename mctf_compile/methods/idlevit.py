"""IdleViT: tokens idle for a block and may come back; none is lost (Xu et al., 2023)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from mctf_compile.methods.base import Choice, Count, Evidence, Method, Need, Site, register_method
from mctf_compile.methods.combining import highest
from mctf_compile.narrowing import present
from mctf_compile.options.fields import option, share
from mctf_compile.options.schedule import Removal


@register_method
@dataclass(frozen=True)
class IdleViT(Method):
    """Runs each of the later blocks on the patches that its class token asks for; the others pass it by.

    Training takes the same compact path: the paper's masked one computes the same output and gradients.

    Options:
        keep_ratio: ρ; the blocks that select keep ρ, then ρ², then ρ³ of all patches, a third of them each.
    """

    name: ClassVar[str] = "idlevit"
    source: ClassVar[str] = "Xu et al., 2023, arXiv 2310.05654"
    site: ClassVar[Site] = Site.AROUND
    needs: ClassVar[Collection[Need]] = (Need.CLASS_LOGITS,)
    sized: ClassVar[bool] = False

    keep_ratio: float = option(0.5, share)

    def default_layers(self, depth: int) -> Collection[int]:
        return range(max(depth // 4, 1), depth)

    def removal(self, index: int, depth: int, count: Count) -> Removal:
        chosen = self.acts_on(depth)
        stage = 1 + chosen.index(index) * 3 // len(chosen)
        kept = int(count.free * self.keep_ratio**stage)
        idle = count.free - kept
        return Removal(idle, f"{idle} tokens idle") if idle else Removal(0, "keeps all tokens")

    def choose(self, evidence: Evidence, r: int) -> Choice:
        return highest(present(evidence.class_logits), evidence, r)
