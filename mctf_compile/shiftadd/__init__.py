"""ShiftAddViT (You et al., NeurIPS 2023): weights that are powers of two, binary linear attention, two experts."""

from mctf_compile.shiftadd.attached import Expert, Local, Router, attach, balance
from mctf_compile.shiftadd.shift import PowerOfTwo, ShiftLinear, pack, shift

__all__ = ["Expert", "Local", "PowerOfTwo", "Router", "ShiftLinear", "attach", "balance", "pack", "shift"]
