"""Codes to weights in ATen, which Inductor fuses with what reads them."""

import torch
from torch import Tensor


def powers(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """``torch.ops.mctf.powers``; see there."""
    # The exponent of a float32 begins at its 24th bit, with 127 for 2^0: nothing is rounded.
    bits = (codes.abs().to(torch.int32) + 112) << 23
    return torch.where(codes == 0, 0.0, bits.view(torch.float32).copysign(codes)).to(dtype)
