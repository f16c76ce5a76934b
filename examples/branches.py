"""Branches on fused tokens: a diffusion transformer, dense and with several options, timed one after the other.

Run ``python examples/branches.py --side 64`` for 4,096 tokens. Every candidate runs once in each round, so that what
else the machine does meets all alike; medians are shown.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import mctf_compile

WIDTH, HEADS = 384, 6
TILES = {"partition": (2, 2)}
CANDIDATES: dict[str, dict[str, Any]] = {
    "r=0.5": {"r": 0.5},
    "r=0.5, tiles": {"r": 0.5, **TILES},
    "r=0.5, tiles, one match for four blocks": {"r": 0.5, **TILES, "match_every": 4},
    "r=0.75, tiles, one match for four blocks": {"r": 0.75, **TILES, "match_every": 4},
    "r=0.5, tiles, attention and MLP": {"r": 0.5, **TILES, "branches": ("attention", "mlp")},
}


class Block(nn.Module):
    """Attention and an MLP, both modulated by a condition [B, C] (adaLN; Peebles & Xie, ICCV 2023)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(F.silu(condition))[:, None].chunk(6, -1)
        y = self.norms[0](x) * (1 + scale) + shift
        q, k, v = self.qkv(y).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + gate * self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + mlp_gate * self.mlp(self.norms[1](x) * (1 + mlp_scale) + mlp_shift)


class DiT(nn.Module):
    """Latents [B, 4, 2S, 2S] and a condition [B, C] -> what is to be taken from each patch, [B, S·S, 16]."""

    def __init__(self, side: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(4, WIDTH, 2, 2)
        self.position = nn.Parameter(0.02 * torch.randn(1, side * side, WIDTH))
        self.blocks = nn.ModuleList(Block(WIDTH, HEADS) for _ in range(depth))
        self.head = nn.Linear(WIDTH, 16)

    def forward(self, latents: Tensor, condition: Tensor) -> Tensor:
        """See the class."""
        x = self.embed(latents).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x, condition)
        return self.head(x)


def main() -> None:
    """Compile all candidates, time them in turn, and print what was saved and gained."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=32, help="patches a side (default: 32)")
    parser.add_argument("--depth", type=int, default=4, help="blocks (default: 4)")
    parser.add_argument("--rounds", type=int, default=10, help="runs of each candidate (default: 10)")
    parser.add_argument("--inner", default="inductor", help="what compiles the graphs (default: inductor)")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = DiT(args.side, args.depth).eval()
    inputs = torch.randn(1, 4, 2 * args.side, 2 * args.side), torch.randn(1, WIDTH)
    runs: dict[str, Any] = {"eager": model, f"dense {args.inner}": torch.compile(model, backend=args.inner)}
    ratios: dict[str, float] = {}
    for name, options in CANDIDATES.items():
        chosen = {"method": "tome", "span": "branch", **options}
        report = mctf_compile.explain(model, *inputs, **chosen)
        ratios[name] = report.macs_before / report.macs_after
        runs[name] = torch.compile(model, backend="mctf", options={**chosen, "inner": args.inner})
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        for _ in range(args.rounds + 1):
            for name, run in runs.items():
                start = time.perf_counter()
                run(*inputs)
                times[name].append(1e3 * (time.perf_counter() - start))
    # The first round compiles.
    medians = {name: statistics.median(of[1:]) for name, of in times.items()}
    dense = min(medians[name] for name in runs if name not in CANDIDATES)
    table = Table("", "MACs ratio", "ms", "speed-up", title=f"{args.side**2} tokens, {args.depth} blocks, one thread")
    for name, median in medians.items():
        ratio = f"{ratios[name]:.2f}" if name in ratios else ""
        table.add_row(name, ratio, f"{median:.0f}", f"{dense / median:.2f}" if name in ratios else "")
    Console().print(table)


if __name__ == "__main__":
    main()
