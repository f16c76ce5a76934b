"""A reduction method of one's own: keep the tokens of the largest norm."""

from dataclasses import dataclass
from typing import ClassVar

import timm
import torch

import mctf_compile
from mctf_compile import Choice, Combine, Merging, Site


@mctf_compile.register_method
@dataclass(frozen=True)
class Longest(Merging):
    """Drops the tokens of the smallest norm; ``Merging`` brings the options ``r``, ``layers`` and the like."""

    name: ClassVar[str] = "longest"
    source: ClassVar[str] = "an example"
    site: ClassVar[Site] = Site.BETWEEN
    sized: ClassVar[bool] = False

    def choose(self, evidence, r):
        score = evidence.x.norm(dim=-1)  # [B, N]
        count = score.shape[1] - evidence.lead - evidence.tail - r
        keep, gone = torch.ops.mctf.select(score, count, evidence.lead, evidence.tail)
        return Choice(keep, gone, None, combine=Combine.DROP)


if __name__ == "__main__":
    model = timm.create_model("deit_tiny_patch16_224").eval()
    images = torch.randn(2, 3, 224, 224)
    fast = torch.compile(model, backend="mctf", options={"method": "longest", "r": 12, "inner": "eager"})
    with torch.no_grad():
        print(fast(images).shape)
    print(mctf_compile.explain(model, images, method="longest", r=12).summary)
