"""Hypothesis strategies for Vision Transformers and fusion options. Needs the package hypothesis."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from mctf_compile.testing.models import (
    EXTRAS,
    HEADS,
    LAYOUTS,
    MEETINGS,
    MLPS,
    NORMS,
    OPEN,
    SIDES,
    SKIPS,
    SPELLINGS,
    VitSpec,
)


@st.composite
def vit_specs(draw: st.DrawFn, position: bool = False, extras: tuple[str, ...] = EXTRAS) -> VitSpec:
    """A small Vision Transformer; without position information unless ``position``.

    ``extras``: the layers of other kinds to choose from; all but ``"grid"`` keep the tokens fused throughout.

    The first of each choice is the plainest, so that an example shrinks towards a plain model.
    """
    layout = draw(st.sampled_from(LAYOUTS))
    extra_tokens = layout in ("bnc", "nbc")
    prefix = draw(st.sampled_from((0, 1, 2, 5))) if extra_tokens else 0
    spelling = draw(st.sampled_from(SPELLINGS))
    sides = [side for side in SIDES if spelling in OPEN or side in ("none", "scale")]
    # Only attention that is spelled out can mix a second map into its own.
    sides = [side for side in sides if side != "gate" or spelling in ("softmax", "einsum", "talking")]
    side = draw(st.sampled_from(sides))
    heads = [head for head in HEADS if prefix or head not in ("cls", "class_attention")]
    if side == "padding":
        # What is read off padding means nothing.
        heads = [head for head in heads if head in ("cls", "mean", "dense")]
    norm = draw(st.sampled_from(NORMS if layout != "bchw" else ("pre", "post")))
    return VitSpec(
        depth=draw(st.sampled_from((2, 3, 3))),
        heads=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from((4, 8))),
        grid=draw(st.integers(3, 5)),
        prefix=prefix,
        suffix=draw(st.sampled_from((0, 0, 2))) if extra_tokens else 0,
        spelling=spelling,
        norm=norm,
        mlp=draw(st.sampled_from(MLPS)),
        # A dense output sees where every token went, a mean how much each counts.
        head=draw(st.sampled_from((*heads, "mean", "dense", "dense"))),
        layout=layout,
        side=side,
        skip=draw(st.sampled_from(SKIPS)),
        extra=draw(st.sampled_from(("none", *extras) if side != "padding" else ("none",))),
        layer_scale=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        inplace=draw(st.booleans()),
        position=position,
    )


# Heads that give one vector for an image.
VECTORS = ("cls", "mean", "max", "map", "class_attention", "weights", "spread")


@st.composite
def tower_specs(draw: st.DrawFn) -> tuple[VitSpec, VitSpec | None, str]:
    """What ``TinyTowers`` takes."""
    meet = draw(st.sampled_from(MEETINGS))
    specs = st.builds(lambda spec: replace(spec, side="none" if spec.side == "padding" else spec.side), vit_specs())
    first = draw(specs)
    second = draw(st.one_of(st.none(), specs))
    if meet == "cross":
        first, second = (spec and replace(spec, head="dense") for spec in (first, second))
    elif meet == "product":
        first, second = (
            spec and (spec if spec.head in VECTORS else replace(spec, head="mean")) for spec in (first, second)
        )
    return first, second, meet


@st.composite
def resizable_specs(draw: st.DrawFn) -> VitSpec:
    """A Vision Transformer that takes images of any size."""
    spec = draw(vit_specs(extras=("linear_attention", "cross_covariance")))
    layout = spec.layout if spec.layout in ("bnc", "nbc") else "bnc"
    return replace(spec, layout=layout, side="none", norm=draw(st.sampled_from(NORMS)))


SPANS = ("rest", "rest", "branch")
REQUESTS = st.one_of(st.integers(1, 5), st.sampled_from((0.2, 0.35)), st.just((2, 0.5)))


def fusion_options(
    pooling: tuple[str, ...] = ("attention", "size", "mean", "max", "mlerp"),
    spans: tuple[str, ...] = SPANS,
) -> st.SearchStrategy[dict[str, Any]]:
    """Options of the method ``mctf`` that fuse at least one token of the smallest models."""
    options = st.fixed_dictionaries(
        {
            "r": REQUESTS,
            "attention": st.sampled_from(("approx", "exact", "current")),
            "matching": st.sampled_from(("bidirectional", "one_way")),
            "pooling": st.sampled_from(pooling),
            "proportional": st.just(True),
            "min_tokens": st.integers(1, 4),
            # Similarity alone, mostly: only then are exact duplicates sure to be fused first.
            "tau_info": st.sampled_from((0, 0, 0, 20)),
            "tau_size": st.sampled_from((0, 0, 0, 40)),
        }
    )
    return st.builds(_spanning, options, st.sampled_from(spans), BRANCHING)


BRANCHING = st.fixed_dictionaries(
    {
        "branches": st.sampled_from((("attention",), ("attention", "mlp"), ("mlp",), ("attention", "cross", "mlp"))),
        "partition": st.sampled_from((None, (2, 2), (2, 3))),
        "partition_seed": st.sampled_from((None, 0, 1)),
        "match_every": st.sampled_from((1, 1, 2)),
        # What the first block does wrong leaves no duplicates for the next ones to fuse.
        "layers": st.sampled_from((None, (0,))),
    }
)


def _spanning(options: dict[str, Any], span: str, branching: dict[str, Any]) -> dict[str, Any]:
    """Options of a method that removes a number of tokens, for all that follows or for branches alone."""
    if span == "rest":
        return options
    if options.get("attention") == "current":
        # It fuses after a block.
        options = {**options, "attention": "approx"}
    if options.get("method") in ("pitome", "random"):
        # They match no pairs.
        branching = {**branching, "partition": None}
    if branching["partition"] is None:
        branching = without_tiles(branching)
    return {**options, **branching, "span": span}


def without_tiles(options: dict[str, Any]) -> dict[str, Any]:
    """Options under which every second token receives others, whatever the grid."""
    return {name: value for name, value in options.items() if not name.startswith("partition")}


def method_options() -> st.SearchStrategy[dict[str, Any]]:
    """Options of the methods that need no training, mostly of ``mctf``: it has the most, and makes the most of them."""
    rates = st.sampled_from((0.5, 0.7, 0.9))
    others: dict[str, dict[str, st.SearchStrategy[Any]]] = {
        "tome": {"r": REQUESTS, "pooling": st.sampled_from(("size", "mean", "mlerp"))},
        "tofu": {
            "r": REQUESTS,
            "prune_layers": st.integers(0, 2),
            "combine": st.sampled_from(("mlerp", "average")),
            "weighted": st.booleans(),
        },
        "pitome": {"r": REQUESTS, "margin": st.sampled_from((0.9, 0.3))},
        "evit": {
            "keep_rate": rates,
            "fuse_token": st.booleans(),
            "score": st.sampled_from(("class_attention", "mean_attention")),
        },
        "idlevit": {"keep_ratio": rates},
        "random": {"r": REQUESTS},
    }
    drawn = {name: st.fixed_dictionaries({"method": st.just(name), **options}) for name, options in others.items()}
    for name in ("tome", "tofu", "pitome", "random"):
        drawn[name] = st.builds(_spanning, drawn[name], st.sampled_from(SPANS), BRANCHING)
    return st.sampled_from((*["mctf"] * 10, *others)).flatmap(lambda name: drawn.get(name, fusion_options()))
