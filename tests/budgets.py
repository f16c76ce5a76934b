"""How far a kernel may be from the exact result: as far as plain PyTorch in the same dtype is, twice over."""

from __future__ import annotations

import torch
from torch import Tensor


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def some_codes(outputs: int, channels: int, seed: int = 0) -> Tensor:
    """Weights of shift layers, int8 [O, C]."""
    return torch.randint(-15, 16, (outputs, channels), generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def within_budget(name: str, actual: Tensor, exact: Tensor, plain: Tensor, terms: Tensor | None = None) -> None:
    """Largest errors of ``actual`` and of ``plain``, which has its dtype, against ``exact`` in float64.

    One unit in the last place comes on top, of the largest of ``terms``: the sums of the absolute values of
    what adds up to ``exact`` (which stands in for them), and may cancel. A plain result can be exact by chance.
    """
    assert actual.dtype == plain.dtype, name
    assert actual.shape == exact.shape, name
    assert actual.isfinite().all(), name
    error, allowed = ((x.double() - exact).abs().max().item() for x in (actual, plain))
    last_place = torch.finfo(actual.dtype).eps * (exact if terms is None else terms).abs().max().item()
    assert error <= 2 * allowed + last_place, f"{name}: {error:.3g}, plain {allowed:.3g}, last place {last_place:.3g}"
