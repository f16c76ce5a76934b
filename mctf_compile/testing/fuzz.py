"""Fuzzing of rewrites: models, programs, inputs and options made up by Hypothesis, until one is unsound."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mctf_compile import shiftadd
from mctf_compile.errors import ConfigError, cause_of
from mctf_compile.testing.graphs import graph_cases
from mctf_compile.testing.models import TinyTowers, TinyViT, VitSpec, repeated_patches
from mctf_compile.testing.soundness import Soundness, check_rewrite, check_sizes
from mctf_compile.testing.strategies import method_options, resizable_specs, tower_specs, vit_specs, without_tiles

# After so many examples Hypothesis tries each with one part put in the place of another, five times; drawn anew, they
# differ by more.
RUN = 10


def _as_arguments(options: Mapping[str, Any]) -> str:
    """Options as they are given in a call."""
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


class Case(Protocol):
    """What the fuzzer tries."""

    def check(self) -> Soundness:
        """What its rewrite was found to do; raises what the model or the rewrite raises."""

    def program(self) -> str:
        """A program that fails as this case does."""


@dataclass(frozen=True)
class SpecCase:
    """A generated model, what it is given, and how it is fused."""

    spec: VitSpec
    options: dict[str, Any]
    kinds: int
    seed: int

    def check(self) -> Soundness:
        torch.manual_seed(self.seed)
        model = TinyViT(self.spec).eval()
        with torch.no_grad():
            return check_rewrite(model, *model.example(self.kinds, self.seed), **self.options)

    def program(self) -> str:
        options = _as_arguments(self.options)
        return "\n".join(
            [
                "import torch",
                "from mctf_compile.testing import TinyViT, VitSpec, assert_rewrite_sound",
                "",
                f"torch.manual_seed({self.seed})",
                f"model = TinyViT({self.spec}).eval()",
                "with torch.no_grad():",
                f"    assert_rewrite_sound(model, *model.example({self.kinds}, {self.seed}), {options})",
            ]
        )


@dataclass(frozen=True)
class ShiftAddCase:
    """A generated model with the parts of ShiftAddViT, as ``with_shiftadd`` makes them."""

    spec: VitSpec
    packed: bool
    attention: bool
    experts: bool
    options: dict[str, Any]
    kinds: int
    seed: int

    def check(self) -> Soundness:
        torch.manual_seed(self.seed)
        model = TinyViT(self.spec).eval()
        inputs = model.example(self.kinds, self.seed)
        changed, inputs, own = with_shiftadd(
            model, inputs, self.packed, self.attention, self.experts, local=self.spec.position
        )
        with torch.no_grad():
            return check_rewrite(changed, *inputs, **self.options, **own)

    def program(self) -> str:
        options = _as_arguments(self.options)
        return "\n".join(
            [
                "import torch",
                "from mctf_compile.testing import TinyViT, VitSpec, assert_rewrite_sound",
                "from mctf_compile.testing.fuzz import with_shiftadd",
                "",
                f"torch.manual_seed({self.seed})",
                f"model = TinyViT({self.spec}).eval()",
                f"inputs = model.example({self.kinds}, {self.seed})",
                "model, inputs, own = with_shiftadd(",
                f"    model, inputs, {self.packed}, {self.attention}, {self.experts}, local={self.spec.position}",
                ")",
                "with torch.no_grad():",
                f"    assert_rewrite_sound(model, *inputs, {options}, **own)",
            ]
        )


def with_shiftadd(
    model: nn.Module, inputs: tuple[Tensor, ...], packed: bool, attention: bool, experts: bool, local: bool
) -> tuple[nn.Module, tuple[Tensor, ...], dict[str, Any]]:
    """A model with shift layers and, where it can have them, binary attention and experts; with inputs and options.

    All is in float64: whether a channel is above a mean, and which expert is the first, is then no matter of rounding.

    Args:
        model: of the generator; it is changed.
        inputs: its inputs.
        packed: hold the weights of shift layers as codes.
        attention: let attention be linear.
        experts: give MLPs a second expert.
        local: let the convolution of values see neighbours, by which positions can be told apart.
    """
    model, inputs = model.double(), tuple(x.double() if x.is_floating_point() else x for x in inputs)
    own: dict[str, Any] = {}
    with warnings.catch_warnings(), suppress(ConfigError):
        # Of parts that stay as they are.
        warnings.simplefilter("ignore")
        if attention or experts:
            shiftadd.attach(model, *inputs, attention=attention, experts=experts)
            own = {"reparameterize": "shiftadd"}
    # As if they had been trained.
    model.train().eval()
    for module in model.modules():
        if isinstance(module, shiftadd.Router):
            nn.init.normal_(module.route.weight)
        elif isinstance(module, shiftadd.Local):
            center = module.weight.shape[-1] // 2
            seen = module.weight.data if local else module.weight.data[..., center, center]
            seen.normal_()
    with suppress(ConfigError):
        shiftadd.shift(model, *inputs)
        if packed:
            shiftadd.pack(model)
    return model, inputs, own


@dataclass(frozen=True)
class TowersCase:
    """Two generated models in one graph, or one that runs twice."""

    first: VitSpec
    second: VitSpec | None
    meet: str
    options: dict[str, Any]
    kinds: int
    seed: int

    def check(self) -> Soundness:
        torch.manual_seed(self.seed)
        model = TinyTowers(self.first, self.second, self.meet).eval()
        with torch.no_grad():
            return check_rewrite(model, *model.example(self.kinds, self.seed), **self.options)

    def program(self) -> str:
        options = _as_arguments(self.options)
        return "\n".join(
            [
                "import torch",
                "from mctf_compile.testing import TinyTowers, VitSpec, assert_rewrite_sound",
                "",
                f"torch.manual_seed({self.seed})",
                f"model = TinyTowers({self.first}, {self.second}, {self.meet!r}).eval()",
                "with torch.no_grad():",
                f"    assert_rewrite_sound(model, *model.example({self.kinds}, {self.seed}), {options})",
            ]
        )


@dataclass(frozen=True)
class SizesCase:
    """A generated model that is compiled once for images of two sizes, and for each of them alone."""

    spec: VitSpec
    sizes: tuple[tuple[int, int], ...]
    options: dict[str, Any]
    seed: int

    def check(self) -> Soundness:
        torch.manual_seed(self.seed)
        with torch.no_grad():
            return check_sizes(TinyViT(self.spec).eval(), self._images(), **self.options)

    def _images(self) -> list[Tensor]:
        """Images of patches that are all different: which tokens are the most alike is no matter of rounding."""
        return [
            repeated_patches(2, max(size), 99, self.seed)[..., : 4 * size[0], : 4 * size[1]].contiguous()
            for size in self.sizes
        ]

    def program(self) -> str:
        options = _as_arguments(self.options)
        images = ", ".join(f"torch.randn(2, 3, {4 * rows}, {4 * columns})" for rows, columns in self.sizes)
        return "\n".join(
            [
                "import torch",
                "from mctf_compile.testing import TinyViT, VitSpec",
                "from mctf_compile.testing.soundness import check_sizes",
                "",
                f"torch.manual_seed({self.seed})",
                f"model = TinyViT({self.spec}).eval()",
                "with torch.no_grad():",
                f"    found = check_sizes(model, [{images}], {options})",
                "assert not found.problems, found.problems",
            ]
        )


@dataclass(frozen=True)
class ModelCase:
    """A given model with generated options."""

    name: str
    model: nn.Module
    inputs: tuple[Tensor, ...]
    options: dict[str, Any]

    def check(self) -> Soundness:
        with torch.no_grad():
            return check_rewrite(self.model, *self.inputs, **self.options)

    def program(self) -> str:
        options = _as_arguments(self.options)
        shapes = ", ".join(f"torch.randn({tuple(x.shape)})" for x in self.inputs)
        return "\n".join(
            [
                "import timm, torch",
                "from mctf_compile.testing import assert_rewrite_sound",
                "",
                f"model = timm.create_model({self.name!r}).eval()",
                "with torch.no_grad():",
                f"    assert_rewrite_sound(model, {shapes}, {options})",
            ]
        )


@dataclass
class Outcome:
    """What a run of the fuzzer saw: ``failure`` is the smallest unsound case with its problem, or None.

    ``counts``: examples, those that fused tokens, and those to which the duplicate-token theorem applied.
    """

    counts: Counter[str] = field(default_factory=Counter)
    failure: tuple[Case, str] | None = None


def cases(what: str = "both") -> st.SearchStrategy[Case]:
    """Cases of the strategies named: ``models``, ``graphs``, or ``both``, five programs to every model.

    ``shiftadd``: models with the parts of ShiftAddViT alone.
    """
    strategies: dict[str, st.SearchStrategy[Case]] = {
        "models": _models(),
        "graphs": graph_cases(),
        "shiftadd": shiftadd_cases(),
    }
    if what in strategies:
        return strategies[what]
    return st.sampled_from(("graphs",) * 5 + ("models",)).flatmap(strategies.__getitem__)


def spec_cases() -> st.SearchStrategy[Case]:
    """Generated models; one in three can tell positions apart, which the duplicate-token theorem cannot judge."""
    kinds, seeds = _kinds_and_seeds()
    return st.builds(
        SpecCase,
        st.sampled_from((False, False, True)).flatmap(vit_specs),
        method_options(),
        kinds,
        seeds,
    )


def _kinds_and_seeds() -> tuple[st.SearchStrategy[int], st.SearchStrategy[int]]:
    """One kind of patch alone hides how tokens are weighted, and where they went."""
    return st.sampled_from((1, 2, 2, 3, 3)), st.integers(0, 999)


def _models() -> st.SearchStrategy[Case]:
    """Generated models, some with two towers, and few that are called with several sizes of image."""
    kinds, seeds = _kinds_and_seeds()
    towers = st.builds(lambda towers, *rest: TowersCase(*towers, *rest), tower_specs(), method_options(), kinds, seeds)
    # Tiles are those of a grid that is known when a model is compiled.
    options = method_options().map(without_tiles)
    sizes = st.builds(SizesCase, resizable_specs(), st.sampled_from(SIZES), options, seeds)
    strategies: dict[str, st.SearchStrategy[Case]] = {
        "alone": spec_cases(),
        "towers": towers,
        "shiftadd": shiftadd_cases(),
        "sizes": sizes,
    }
    kinds_of_case = ("alone",) * 8 + ("towers",) * 3 + ("shiftadd", "sizes")
    return st.sampled_from(kinds_of_case).flatmap(strategies.__getitem__)


def shiftadd_cases() -> st.SearchStrategy[Case]:
    """Generated models with the parts of ShiftAddViT."""
    kinds, seeds = _kinds_and_seeds()
    specs = st.sampled_from((False, False, True)).flatmap(vit_specs)
    flags = (st.booleans() for _ in range(3))
    return st.builds(ShiftAddCase, specs, *flags, method_options(), kinds, seeds)


# Rows and columns of patches.
SIZES = (((3, 4), (5, 3)), ((4, 6), (3, 3)), ((3, 5), (6, 5)))


def model_cases(name: str, model: nn.Module, inputs: tuple[Tensor, ...]) -> st.SearchStrategy[ModelCase]:
    """One model with generated options."""
    return st.builds(ModelCase, st.just(name), st.just(model), st.just(inputs), method_options())


def fuzz(
    strategy: st.SearchStrategy,
    examples: int,
    seed: int,
    progress: Callable[[int], None] = lambda done: None,
    shrink: bool = True,
) -> Outcome:
    """Check up to ``examples`` cases, of which no two are alike; stops at the first unsound one and shrinks it.

    Args:
        strategy: of cases.
        examples: how many to try; fewer where the strategy has no more.
        seed: makes the run repeatable.
        progress: called with the number of examples tried.
        shrink: look for the smallest case that fails too.

    Raises what interrupts it; an exception in a model or a rewrite is a failure of its case.
    """
    outcome, checked, seeds = Outcome(), set[str](), random.Random(seed)
    counts = outcome.counts
    phases = [Phase.generate, Phase.shrink] if shrink else [Phase.generate]

    def check(case: Case) -> None:
        # The plainest case opens every run of Hypothesis, which repeats an unsound one, too.
        program, shrinking = case.program(), outcome.failure is not None
        if program in checked or (counts["examples"] == examples and not shrinking):
            return
        if not shrinking:
            counts["examples"] += 1
            progress(counts["examples"])
        try:
            found = case.check()
        except Exception as error:
            cause = cause_of(error)
            outcome.failure = case, f"{type(cause).__name__}: {cause}"
            raise
        if not shrinking:
            counts["fused"] += any(report.fused for report in found.reports)
            counts["duplicates"] += found.duplicates is not None
        if found.problems:
            outcome.failure = case, "; ".join(found.problems)
            raise AssertionError(outcome.failure[1])
        checked.add(program)

    def run() -> None:
        """One run of Hypothesis."""
        drawn = given(strategy)(check)
        limits = settings(
            max_examples=RUN,
            deadline=None,
            database=None,
            phases=phases,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        )
        hypothesis.seed(seeds.getrandbits(64))(limits(drawn))()

    more = True
    while more and counts["examples"] < examples:
        before = counts["examples"]
        try:
            run()
        except Exception:
            if outcome.failure is None:
                raise
        more = outcome.failure is None and counts["examples"] > before
    return outcome
