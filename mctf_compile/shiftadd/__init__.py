"""ShiftAddViT: linear layers whose weights are powers of two (You et al., NeurIPS 2023, arXiv 2306.06446)."""

from mctf_compile.shiftadd.shift import PowerOfTwo, ShiftLinear, pack, shift

__all__ = ["PowerOfTwo", "ShiftLinear", "pack", "shift"]
