"""``kernels/on_device.py``: the operators as PyTorch's own checks see them."""

from __future__ import annotations

import pytest
import torch
from budgets import randn
from torch import Tensor

import mctf_compile.kernels.on_device  # noqa: F401  registers torch.ops.mctf.*_triton
from mctf_compile.kernels.attention.triton import importance

mctf = torch.ops.mctf
B, H, N, D, R = 2, 2, 9, 16, 3


def leaf(*shape: int, seed: int) -> Tensor:
    return randn(*shape, seed=seed).requires_grad_()


def calls() -> dict[str, tuple]:
    """Each operator with operands of a small fusion; what is differentiable takes gradients."""
    x, size = leaf(B, N, 12, seed=0), 1 + randn(B, N, seed=1).abs()
    q, k, v, fused = (leaf(B, H, n, D, seed=i) for i, n in enumerate((N, N, N, N - R), 2))
    bias, log_size, scale = leaf(1, H, N, N, seed=6), size.log(), D**-0.5
    received, lse = importance(q.detach(), k.detach(), log_size, bias.detach(), scale)
    criteria = received, size, R, 1, 0, 1.0, 20.0, 40.0, True
    matching = mctf.match(x.detach(), *criteria)
    index, weight, _ = mctf.group(received * size, size, *matching)
    return {
        "attention": (q, k, v, log_size, bias, scale),
        "importance": (q.detach(), k.detach(), log_size, bias.detach(), scale),
        "ahead": (q, k, fused, log_size, bias, scale, lse, index, weight, *matching),
        "match": (x.detach(), *criteria),
        "group": (received * size, size, *matching),
        "pool": (x, weight, *matching, 1),
        "unmerge": (fused, index, 2),
        "shift_linear": (x, torch.randint(-15, 16, (5, 12), dtype=torch.int8), leaf(5, seed=7)),
    }


@pytest.mark.parametrize("name", calls())
def test_schema_and_gradients(name: str) -> None:
    """That nothing is written to but results, and that gradients are registered as autograd wants them.

    The other checks of ``opcheck`` trace the operators, and the interpreter runs on memory alone: what compilers see
    of them is in ``test_kernel_choice.py``.
    """
    checks = "test_schema", "test_autograd_registration"
    found = torch.library.opcheck(getattr(mctf, f"{name}_triton").default, calls()[name], test_utils=checks)
    assert found == dict.fromkeys(checks, "SUCCESS")
