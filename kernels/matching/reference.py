"""MCTF's matching, image by image and token by token, in the paper's symbols."""

import torch
from torch import Tensor

from mctf_compile.kernels.library import working_dtype


def scores(x: Tensor, a: Tensor | None, s: Tensor, tau_sim: float, tau_info: float, tau_size: float) -> Tensor:
    """The multi-criteria score W of every pair of one image's tokens.

    ``x`` [N, C], ``a`` [N] or None, ``s`` [N] -> [N, N]; a temperature of 0 leaves its criterion out.
    Source: Lee et al., CVPR 2024, section 3.2, eq. 4-6.
    """
    dtype = working_dtype(x.dtype)
    x, s = x.to(dtype), s.to(dtype)
    w = torch.ones(len(x), len(x), dtype=dtype)
    if tau_sim:
        cosine = torch.nn.functional.cosine_similarity(x[:, None], x[None, :], dim=-1)
        w = w * ((cosine + 1) / 2).clamp(min=0) ** (1 / tau_sim)
    for criterion, tau in ((a, tau_info), (s, tau_size)):
        if tau and criterion is not None:
            inverse = 1 / criterion.to(dtype)
            inverse = inverse / inverse.max()
            w = w * (inverse[:, None] * inverse[None, :]) ** (1 / tau)
    return w


def match(
    x: Tensor,
    a: Tensor | None,
    s: Tensor,
    r: int,
    lead: int,
    tail: int,
    tau_sim: float,
    tau_info: float,
    tau_size: float,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The reference of ``torch.ops.mctf.match``; see there. Loops over images and tokens."""
    images = [
        match_image(
            scores(x[b], None if a is None else a[b], s[b], tau_sim, tau_info, tau_size),
            r,
            lead,
            tail,
            bidirectional,
        )
        for b in range(len(x))
    ]
    keep, gone, into = (torch.tensor(rows, dtype=torch.long).reshape(len(x), -1) for rows in zip(*images))
    return keep, gone, into


def match_image(w: Tensor, r: int, lead: int, tail: int, bidirectional: bool) -> tuple[list[int], list[int], list[int]]:
    """Match one image's tokens by their scores ``w`` [N, N]: (keep, gone, into) as lists."""
    n = len(w)
    if not r:
        return list(range(n)), [], []
    protected = {*range(lead), *range(n - tail, n)}
    alpha, beta = list(range(0, n, 2)), list(range(1, n, 2))

    def score(i: int, j: int) -> float:
        return float("-inf") if i in protected or j in protected else w[i, j].item()

    r1 = r // 2 if bidirectional else r
    target: dict[int, int] = {}
    best = {i: max(beta, key=lambda j: score(i, j)) for i in alpha} if beta else {}
    order = sorted(best, key=lambda i: -score(i, best[i])) if best else alpha
    target.update({i: best[i] for i in order[:r1]})
    kept_alpha = sorted(order[r1:]) if protected else order[r1:]
    kept_beta = beta
    if bidirectional:
        best = {j: max(kept_alpha, key=lambda i: score(i, j)) for j in beta}
        order = sorted(beta, key=lambda j: -score(best[j], j))
        target.update({j: best[j] for j in order[: r - r1]})
        kept_beta = order[r - r1 :]

    keep = kept_alpha + kept_beta
    front = sorted(i for i in keep if i < lead)
    back = sorted(i for i in keep if i >= n - tail)
    keep = front + [i for i in keep if i not in protected] + back

    def destination(i: int) -> int:
        return destination(target[i]) if i in target else keep.index(i)

    return keep, list(target), [destination(i) for i in target]


def match_tiles(
    x: Tensor,
    a: Tensor | None,
    s: Tensor,
    r: int,
    lead: int,
    tail: int,
    height: int,
    width: int,
    tile: tuple[int, int],
    places: dict[tuple[int, int], tuple[int, int]],
    taus: tuple[float, float, float],
) -> tuple[Tensor, Tensor, Tensor]:
    """The reference of ``torch.ops.mctf.match_tiles``, from the ``places`` that receive in the tiles; see there.

    ``places``: by the row and the column of a tile, a row and a column in it; the first one where it has none.
    """
    receive = []
    for i in range(0, height, tile[0]):
        for j in range(0, width, tile[1]):
            row, column = places.get((i // tile[0], j // tile[1]), (0, 0))
            receive.append(lead + (i + row) * width + j + column)
    receive.sort()
    leave = [i for i in range(lead, lead + height * width) if i not in receive]
    images = []
    for b in range(len(x)):
        w = scores(x[b], None if a is None else a[b], s[b], *taus)
        best = {i: receive[int(w[i, receive].argmax())] for i in leave}
        order = sorted((-w[i, best[i]].item(), i) for i in leave)
        gone = [i for _, i in order[:r]]
        keep = [*range(lead), *(i for i in leave if i not in gone), *receive, *range(len(w) - tail, len(w))]
        images.append((keep, gone, [keep.index(best[i]) for i in gone]))
    keeps, leaving, into = (torch.tensor(rows, dtype=torch.long).reshape(len(x), -1) for rows in zip(*images))
    return keeps, leaving, into
