"""Selection, token by token."""

import torch
from torch import Tensor


def select(score: Tensor, count: int, lead: int, tail: int) -> tuple[Tensor, Tensor]:
    """The reference of ``torch.ops.mctf.select``; see there."""
    n = score.shape[1]
    kept, leaving = [], []
    for row in score.tolist():
        order = sorted(range(lead, n - tail), key=lambda i: -row[i])
        kept.append([*range(lead), *order[:count], *range(n - tail, n)])
        leaving.append(order[count:])
    return torch.tensor(kept), torch.tensor(leaving, dtype=torch.long).reshape(len(kept), -1)


def nearest(x: Tensor, keep: Tensor, gone: Tensor, lead: int, tail: int) -> Tensor:
    """The reference of ``torch.ops.mctf.nearest``; see there."""
    into = torch.zeros_like(gone)
    for b in range(len(x)):
        for i, old in enumerate(gone[b]):
            similar = {
                new: torch.cosine_similarity(x[b, old].double(), x[b, keep[b, new]].double(), 0).item()
                for new in range(lead, keep.shape[1] - tail)
            }
            into[b, i] = max(similar, key=similar.__getitem__)
    return into
