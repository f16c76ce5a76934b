"""``mctf::powers``: the weights that codes of a sign and an exponent stand for."""

import torch
from torch import Tensor

from mctf_compile.kernels.library import composite
from mctf_compile.kernels.shift import aten

# The exponents of weights are from -LEAST to 0: four bits beside the sign.
LEAST = 14


def _shapes(codes: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


@composite("powers(Tensor codes, ScalarType dtype) -> Tensor", _shapes)
def powers(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights ±2^p.

    Args:
        codes: int8, any shape: ±(p + 15) for the exponents p from -14 to 0, and 0 for a weight of 0.
        dtype: float32, bfloat16, float16 or float64; all have these numbers.

    Returns:
        The weights, in that dtype; exactly. They have no gradient.

    Source: You et al., ShiftAddViT, NeurIPS 2023 (arXiv 2306.06446).
    """
    return aten.powers(codes, dtype)
