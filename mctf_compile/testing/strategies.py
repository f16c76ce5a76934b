"""Hypothesis strategies for Vision Transformers and fusion options. Needs the package hypothesis."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from mctf_compile.testing.models import HEADS, MLPS, NORMS, SPELLINGS, VitSpec


@st.composite
def vit_specs(draw: st.DrawFn, position: bool = False) -> VitSpec:
    """A small Vision Transformer; without position information unless ``position``."""
    prefix = draw(st.sampled_from((0, 1, 2, 5)))
    return VitSpec(
        depth=draw(st.integers(2, 4)),
        heads=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from((4, 8))),
        grid=draw(st.integers(3, 5)),
        prefix=prefix,
        suffix=draw(st.sampled_from((0, 0, 2))),
        spelling=draw(st.sampled_from(SPELLINGS)),
        norm=draw(st.sampled_from(NORMS)),
        mlp=draw(st.sampled_from(MLPS)),
        head=draw(st.sampled_from(HEADS if prefix else HEADS[1:])),
        layer_scale=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        position=position,
    )


def fusion_options(
    pooling: tuple[str, ...] = ("attention", "size", "mean", "max")
) -> st.SearchStrategy[dict[str, Any]]:
    """Options of the backend that fuse at least one token of the smallest models."""
    return st.fixed_dictionaries(
        {
            "r": st.one_of(st.integers(1, 5), st.sampled_from((0.2, 0.35)), st.just((2, 0.5))),
            "attention": st.sampled_from(("approx", "exact", "current")),
            "matching": st.sampled_from(("bidirectional", "one_way")),
            "pooling": st.sampled_from(pooling),
            "proportional": st.just(True),
            "min_tokens": st.integers(1, 4),
        }
    )
