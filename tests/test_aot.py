"""Every Triton kernel, compiled for devices that are not here: what it needs of them, and that nothing spills.

A table entry launches kernels on tensors without memory; what was launched is compiled, for every target.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from aot import CUOBJDUMP, TARGETS, recorded, spilled
from torch import Tensor

from mctf_compile.kernels.ahead import triton as ahead
from mctf_compile.kernels.attention import triton as attention
from mctf_compile.kernels.attention import triton_backward as gradients
from mctf_compile.kernels.device import Launch
from mctf_compile.kernels.matching import triton as matching
from mctf_compile.kernels.pooling import triton as pooling
from mctf_compile.kernels.shift import triton as shift
from mctf_compile.kernels.unmerge import triton as unmerge

MODULES = (attention, gradients, ahead, matching, pooling, shift)
B, H, R = 2, 3, 16


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attend(width: int, dtype: torch.dtype, n: int) -> None:
    """Attention and importance, with sizes and with a bias that has a gradient, then with neither."""
    q, k, v = empty(B, n, 3, H, width, dtype=dtype).permute(2, 0, 3, 1, 4)
    for terms in ((empty(B, n), empty(1, H, n, n, dtype=dtype)), (None, None)):
        o, lse = attention.attention_forward(q, k, v, *terms, 0.125)
        gradients.attention_backward(o, q, k, v, *terms, 0.125, o, lse, terms[1] is not None)
        attention.importance(q, k, *terms, 0.125)


def attend_ahead(width: int, dtype: torch.dtype, n: int) -> None:
    q, k, _ = empty(B, n, 3, H, width, dtype=dtype).permute(2, 0, 3, 1, 4)
    v = empty(B, n - R, H, width, dtype=dtype).transpose(1, 2)
    terms = empty(B, n), empty(1, H, n, n, dtype=dtype)
    left = empty(B, R, dtype=torch.long)
    fusion_map = empty(B, n, dtype=torch.long), empty(B, n), empty(B, n - R, dtype=torch.long), left, left
    lse = empty(B, H, n)
    y, rows = ahead.ahead_forward(q, k, v, *terms, 0.125, lse, *fusion_map)
    ahead.ahead_backward(y, q, k, v, *terms, 0.125, lse, *fusion_map, rows, True)


def match(n: int, dtype: torch.dtype, lead: int = 1) -> None:
    """All criteria both ways, with padding; and similarity alone, one way."""
    x, size, kind = empty(B, n, 384, dtype=dtype), empty(B, n), empty(B, n, dtype=torch.bool)
    matching.match(x, size, size, n // 4, lead, 0, 1.0, 20.0, 40.0, True, kind)
    matching.match(x, None, size, n // 4, lead, 0, 2.0, 0.0, 0.0, False)


def pool(channels: int, dtype: torch.dtype) -> None:
    """Grouping; pooling and unmerging with their gradients; tokens between other dimensions, as in a mask."""
    n, left = 197, empty(B, R, dtype=torch.long)
    keep, index, weight = empty(B, n - R, dtype=torch.long), empty(B, n, dtype=torch.long), empty(B, n)
    pooling.group(weight, weight, keep, left, left)
    for x, dim in ((empty(B, n, channels, dtype=dtype), 1), (empty(B, H, n, channels, dtype=dtype), 2)):
        y = pooling.pool(x, weight, keep, left, left, dim)
        pooling.pool_backward(y, weight, keep, left, left, dim)
        unmerge.unmerge_backward(unmerge.unmerge(y, index, dim), index, n - R, dim)


def multiply_codes(dtype: torch.dtype) -> None:
    codes = empty(1536, 384, dtype=torch.int8)
    shift.shift_linear(empty(B, 197, 384, dtype=dtype), codes, empty(1536, dtype=dtype))
    shift.shift_linear(empty(B, 197, 384, dtype=dtype), codes, None)


def with_tf32(launch: Callable[[], None]) -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        launch()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


# The heuristics tell padded widths up to 64, 128 and 256 apart, two and four bytes, and 256 keys from more.
SIZES = [*((width, torch.bfloat16) for width in (64, 128, 256)), *((width, torch.float32) for width in (64, 128))]
TABLE: dict[str, Callable[[], None]] = {
    **{
        f"attention-N{n}-D{width}-{str(dtype)[6:]}": partial(attend, width, dtype, n)
        for width, dtype in SIZES
        for n in ((197, 577) if dtype is torch.bfloat16 and width <= 128 else (577,))
    },
    **{f"ahead-D{width}-{str(dtype)[6:]}": partial(attend_ahead, width, dtype, 197) for width, dtype in SIZES},
    # One program per image for up to 16, 32, ... 256 tokens a side, and tiles beyond.
    **{
        f"match-N{n}-{str(dtype)[6:]}": partial(match, n, dtype)
        for n in (31, 63, 127, 197, 500, 1025)
        for dtype in (torch.bfloat16, torch.float32)
    },
    "match-N197-unprotected": partial(match, 197, torch.bfloat16, 0),
    **{
        f"pool-C{c}-{str(dtype)[6:]}": partial(pool, c, dtype)
        for c in (1, 16, 64, 384)
        for dtype in (torch.bfloat16, torch.float32)
    },
    **{f"shift-{str(dtype)[6:]}": partial(multiply_codes, dtype) for dtype in (torch.bfloat16, torch.float32)},
    "attention-N577-D128-tf32": partial(with_tf32, partial(attend, 128, torch.float32, 577)),
    "ahead-D64-tf32": partial(with_tf32, partial(attend_ahead, 64, torch.float32, 197)),
}


ARCHITECTURES = [
    pytest.param(
        arch,
        marks=pytest.mark.skipif(
            arch.startswith("sm") and not CUOBJDUMP.exists(), reason="this triton comes without cuobjdump"
        ),
    )
    for arch in TARGETS
]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", TABLE)
def test_compiles_within_the_target(name: str, arch: str) -> None:
    with recorded(*MODULES, arch=arch) as launches:
        TABLE[name]()
    assert launches
    target, shared = TARGETS[arch]
    too_much = []
    for launched in {launched.key: launched for launched in launches}.values():
        compiled = launched.compile(target)
        if compiled.metadata.shared > shared or spilled(compiled):
            too_much.append(f"{launched}: {compiled.metadata.shared} bytes shared, {spilled(compiled)} spilled")
    assert not too_much, "\n".join(too_much)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_too_large_a_tile_is_seen(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "forward_launch", lambda *_: Launch(128, 128, 4, 2))
    q = empty(B, H, 577, 256, dtype=torch.bfloat16)
    with recorded(*MODULES, arch=arch) as launches:
        attention.attention_forward(q, q, q, None, None, 0.125)
    compiled = launches[0].compile(TARGETS[arch][0])
    assert spilled(compiled) > 0
