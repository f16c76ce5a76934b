"""Tools to test rewrites: models and inputs for Hypothesis, and the properties that must hold.

    from mctf_compile.testing import assert_rewrite_sound
    assert_rewrite_sound(my_model, images, r=16)

The strategies need the package hypothesis: ``vit_specs`` and ``method_options`` make up models and options,
``graph_cases`` makes up programs that grow operator by operator from the rule table, each with what must hold for it:

    from hypothesis import given
    from mctf_compile.testing import graph_cases

    @given(graph_cases())
    def test_rewrites_are_sound(case):
        assert not case.check().problems, case.program()

``mctf fuzz`` runs both (``mctf_compile.testing.fuzz``).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mctf_compile.testing.models import TinyTowers, TinyViT, VitSpec, repeated_patches
from mctf_compile.testing.soundness import Recorder, Soundness, assert_rewrite_sound, check_rewrite

if TYPE_CHECKING:
    from mctf_compile.testing.graphs import GraphCase, graph_cases
    from mctf_compile.testing.strategies import method_options, vit_specs

__all__ = [
    "GraphCase",
    "Recorder",
    "Soundness",
    "TinyTowers",
    "TinyViT",
    "VitSpec",
    "assert_rewrite_sound",
    "check_rewrite",
    "graph_cases",
    "method_options",
    "repeated_patches",
    "vit_specs",
]

# What needs the package hypothesis, by the module that has it.
_STRATEGIES = {
    "GraphCase": "graphs",
    "graph_cases": "graphs",
    "method_options": "strategies",
    "vit_specs": "strategies",
}


def __getattr__(name: str) -> Any:
    if name not in _STRATEGIES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_STRATEGIES[name]}"), name)
