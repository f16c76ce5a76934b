"""MCTF: multi-criteria token fusion with one-step-ahead attention (Lee et al., CVPR 2024)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mctf_compile.methods.base import Choice, Evidence, Method, Site, register_method

if TYPE_CHECKING:
    from mctf_compile.config import FusionConfig

SITES = {"approx": Site.AHEAD, "exact": Site.BEFORE, "current": Site.AFTER}


def choose(evidence: Evidence, r: int, lead: int, tail: int, config: FusionConfig) -> Choice:
    """Match by similarity, informativeness and size (section 3.2); pool by informativeness times size."""
    x, size, importance = evidence.x, evidence.size, evidence.importance
    keep, gone, into = torch.ops.mctf.match(
        x, importance, size, r, lead, tail,
        config.tau_sim, config.tau_info, config.tau_size, config.matching == "bidirectional",
        evidence.padding,
    )
    weight = {
        "attention": importance * size,
        "size": size,
        "mean": torch.ones_like(size),
        "max": torch.ones_like(size),
    }[config.pooling]
    return Choice(keep, gone, into, weight, config.pooling == "max")


MCTF = register_method(
    Method(
        name="mctf",
        source="Lee et al., CVPR 2024, arXiv 2403.10030",
        layers=lambda depth: range(1, depth),
        site=lambda config: SITES[config.attention],
        choose=choose,
    )
)
