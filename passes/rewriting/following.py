"""What a reduction did to the original tokens, as tensors of the rewritten graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mctf_compile.methods import Evidence
from mctf_compile.passes.axes import Place
from mctf_compile.passes.planning.plan import PlannedBlock
from mctf_compile.passes.rewriting.stream import Stream

# What a method may judge tokens by, one number each.
JUDGED_BY = ("importance", "class_attention", "class_logits")


@dataclass(frozen=True)
class Reduction:
    """The reduction at a block that made a generation of its tokens: K tokens before it, M after it."""

    block: PlannedBlock
    stream: Stream
    generation: int
    place: Place
    evidence: Evidence

    def followed(self) -> dict[str, Tensor]:
        """What ``mctf_compile.BlockTrace`` has of the N original tokens, by the names that it has there."""
        tensors = {
            "source": self._map(self.generation),
            "before": self._map(self.generation - 1),
            "dropped": self._dropped(),
            "size": self.stream.fusion(self.generation, self.place.lead, self.place.tail).size,
        }
        judged = {name: getattr(self.evidence, name) for name in JUDGED_BY}
        return tensors | {name: score for name, score in judged.items() if score is not None}

    def _map(self, generation: int) -> Tensor:
        """int64 [B, N]: where each original token is in a generation."""
        if generation:
            return self.stream.map(generation, 0, self.place.lead, self.place.tail)
        first = self.stream.fusion(1, self.place.lead, self.place.tail).index
        return torch.arange(first.shape[1], device=first.device).expand_as(first)

    def _dropped(self) -> Tensor:
        """Bool [B, N]: the original tokens that no token holds any more."""
        stays = self.stream.stays(self.generation, self.place.lead, self.place.tail)
        return torch.zeros_like(self._map(0), dtype=torch.bool) if stays is None else ~stays
