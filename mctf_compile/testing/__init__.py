"""Tools to test rewrites: models and inputs for Hypothesis, and the properties that must hold.

    from mctf_compile.testing import assert_rewrite_sound
    assert_rewrite_sound(my_model, images, r=16)

``mctf fuzz`` runs the same over models and options that it makes up (``mctf_compile.testing.fuzz``; needs the
package hypothesis, as do the strategies in ``mctf_compile.testing.strategies``).
"""

from mctf_compile.testing.models import TinyViT, VitSpec, repeated_patches
from mctf_compile.testing.soundness import Recorder, Soundness, assert_rewrite_sound, check_rewrite

__all__ = [
    "Recorder",
    "Soundness",
    "TinyViT",
    "VitSpec",
    "assert_rewrite_sound",
    "check_rewrite",
    "repeated_patches",
]
