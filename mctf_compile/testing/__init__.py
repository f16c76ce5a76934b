"""Tools to test rewrites: models and inputs for Hypothesis, and the properties that must hold.

    from mctf_compile.testing import assert_rewrite_sound
    assert_rewrite_sound(my_model, images, r=16)
"""

from mctf_compile.testing.models import TinyViT, VitSpec, repeated_patches
from mctf_compile.testing.soundness import Recorder, assert_rewrite_sound

__all__ = ["Recorder", "TinyViT", "VitSpec", "assert_rewrite_sound", "repeated_patches"]
