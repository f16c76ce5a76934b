"""Products with weights of a byte each, in Triton: what is read of memory is the codes."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from mctf_compile.kernels.device import architecture, dot_precision

FLOATING = (torch.float32, torch.bfloat16, torch.float16)
ROWS, COLUMNS = 64, 64


def supported(x: Tensor, codes: Tensor) -> bool:
    """Whether ``shift_linear`` takes these operands: tokens of at most 32 bits."""
    return x.dtype in FLOATING and x.dim() > 1 and codes.dim() == 2


@triton.jit
def _shift_linear(
    x, codes, bias, out, m, n, k, stride_m, stride_k, stride_code, stride_channel,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    column = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    total = tl.zeros([BM, BN], tl.float32)
    for start in range(0, k, BK):
        channel = start + tl.arange(0, BK)
        inside = channel < k
        rows = tl.load(
            x + row[:, None] * stride_m + channel[None, :] * stride_k, (row < m)[:, None] & inside[None, :], 0
        )  # fmt: skip
        code = tl.load(
            codes + column[None, :] * stride_code + channel[:, None] * stride_channel,
            inside[:, None] & (column < n)[None, :],
            0,
        ).to(tl.int32)
        # The exponent of a float32 begins at its 24th bit, with 127 for 2^0: nothing is rounded.
        size = ((tl.abs(code) + 112) << 23).to(tl.float32, bitcast=True)
        weight = tl.where(code == 0, 0.0, tl.where(code < 0, -size, size)).to(rows.dtype)
        total += tl.dot(rows, weight, input_precision=PRECISION)
    if bias is not None:
        total += tl.load(bias + column, column < n, 0).to(tl.float32)[None, :]
    tl.store(out + row[:, None] * n + column[None, :], total, (row < m)[:, None] & (column < n)[None, :])


def shift_linear(x: Tensor, codes: Tensor, bias: Tensor | None) -> Tensor:
    """X W^T + bias with the weights that ``codes`` stand for; summed in float32 and rounded once.

    Args:
        x: [..., C] of what ``supported`` admits.
        codes: int8 [O, C], as for ``torch.ops.mctf.powers``.
        bias: [O], or None.

    Returns:
        [..., O] in the dtype of ``x``.
    """
    rows, channels, outputs = x.reshape(-1, x.shape[-1]), x.shape[-1], codes.shape[0]
    m = math.prod(x.shape[:-1])
    bias = None if bias is None else bias.contiguous()
    out = x.new_empty(*x.shape[:-1], outputs)
    wrap_triton(_shift_linear)[triton.cdiv(m, ROWS), triton.cdiv(outputs, COLUMNS)](
        rows, codes, bias, out, m, outputs, channels, *rows.stride(), *codes.stride(),
        BM=ROWS, BN=COLUMNS, BK=32 if x.dtype is torch.float32 else 64, PRECISION=dot_precision(architecture(x.device)),
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return out
