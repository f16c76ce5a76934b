"""``python -m benchmarks.gpu``: the Triton kernels on this GPU, checked, then timed against their floors; then models.

Nothing is timed that was not found right. Without a GPU ``--device cpu --tiny`` runs the checks under Triton's
interpreter (``TRITON_INTERPRET=1``) on small shapes, which shows that this script works and no more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mctf_compile.kernels  # noqa: F401  registers torch.ops.mctf
from benchmarks.suites import FOLDER
from mctf_compile.cli.console import FAILURE, INTERRUPTED
from mctf_compile.kernels.ahead.reference import ahead as ahead_reference
from mctf_compile.kernels.attention import reference as attention
from mctf_compile.kernels.matching import aten
from mctf_compile.kernels.roofline import BLOCKS, BlockShape
from mctf_compile.measuring.machine import machine

mctf = torch.ops.mctf
FIRST = 1


@dataclass(frozen=True)
class Case:
    """One kernel on one set of operands: what runs, what it must equal, and the same in ATen.

    ``name`` is the kernel's in the roofline, but for those that are checked and not timed: they are part of others.
    """

    name: str
    run: Callable[[], Sequence[Tensor]]
    exact: Callable[[], Sequence[Tensor]]
    plain: Callable[[], Sequence[Tensor]]


TINY = [BlockShape("tiny", 128, 37, 2)]
# Rounding that is no error, where that of ATen happens to be next to nothing.
ULPS = 4


def cases(block: BlockShape, device: str, dtype: torch.dtype) -> list[Case]:
    """Every kernel on random operands of ``block``."""
    from mctf_compile.kernels.matching import triton

    generator = torch.Generator(device).manual_seed(0)
    b, n, h, d, r = block.batch, block.tokens, block.heads, 64, max(block.removed, 2)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    q, k, v = random(b, n, 3, h, d).to(dtype).permute(2, 0, 3, 1, 4)
    x, size = random(b, n, h * d).to(dtype), random(b, n).abs() + 1
    log_size, scale = size.log(), d**-0.5
    importance, weights, norm = mctf.importance(q, k, log_size, None, scale)
    args = x, importance, size, r, FIRST, 0, 1.0, 20.0, 40.0, True
    keep, gone, into = mctf.match_triton(*args)
    index, weight, _ = mctf.group(importance * size, size, keep, gone, into)
    fused = random(b, h, n - r, d).to(dtype)
    _, lse = mctf.importance_triton(q, k, log_size, None, scale)
    matching = keep, gone, into
    codes = torch.randint(-15, 16, (4 * h * d, h * d), generator=generator, device=device).to(torch.int8)
    bias = random(4 * h * d).to(dtype)

    criteria = importance, size, FIRST, 0, 1.0, 20.0, 40.0

    def assigned() -> Sequence[Tensor]:
        # Of the kernel's own scores: rounded otherwise, a near-tie may fall otherwise.
        return aten.assign(triton.scores(x, *criteria), n, r, FIRST, 0, True)

    def relative(scores: Tensor) -> list[Tensor]:
        """They are scores up to a factor for each image."""
        return [scores / scores.amax((1, 2), keepdim=True)]

    def grouped_and_pooled(group: Callable, pool: Callable, raw: Tensor, sizes: Tensor, tokens: Tensor) -> list[Tensor]:
        index, weight, size = group(raw, sizes, *matching)
        return [index, weight, size, pool(tokens, weight, *matching, 1)]

    def shifted(tokens: Tensor, bias: Tensor) -> list[Tensor]:
        return [torch.nn.functional.linear(tokens, mctf.powers(codes, tokens.dtype), bias)]

    def doubled(*tensors: Tensor) -> list[Tensor]:
        return [t.double() if t.is_floating_point() else t for t in tensors]

    map64 = lambda: attention.probabilities(q, k, log_size, None, scale)
    return [
        Case(
            "attention",
            lambda: mctf.attention_triton(q, k, v, log_size, None, scale)[:1],
            lambda: [attention.attention(*doubled(q, k, v), log_size, None, scale)],
            lambda: [mctf.attention(q, k, v, log_size, None, scale, 0.0)],
        ),
        Case(
            "importance",
            lambda: mctf.importance_triton(q, k, log_size, None, scale)[:1],
            lambda: [map64().mean((1, 2))],
            lambda: [mctf.importance(q, k, log_size, None, scale)[0]],
        ),
        Case(
            "ahead",
            lambda: mctf.ahead_triton(q, k, fused, log_size, None, scale, lse, index, weight, *matching)[:1],
            lambda: [ahead_reference(map64(), fused.double(), weight, *matching)],
            lambda: [mctf.ahead(weights, norm, fused, index, weight, *matching, 0.0)],
        ),
        Case(
            "scores",
            lambda: relative(triton.scores(x, *criteria)),
            lambda: relative(aten.scores(x.double(), *doubled(*criteria[:2]), *criteria[2:], None)),
            lambda: relative(aten.scores(x, *criteria, None)),
        ),
        Case("match", lambda: mctf.match_triton(*args), assigned, assigned),
        Case(
            "group, pool",
            lambda: grouped_and_pooled(mctf.group_triton, mctf.pool_triton, importance * size, size, x),
            lambda: grouped_and_pooled(mctf.group, mctf.pool, *doubled(importance * size, size, x)),
            lambda: grouped_and_pooled(mctf.group, mctf.pool, importance * size, size, x),
        ),
        Case(
            "unmerge",
            lambda: [mctf.unmerge_triton(x[:, : n - r], index, 1)],
            lambda: [mctf.unmerge(x[:, : n - r], index, 1)],
            lambda: [mctf.unmerge(x[:, : n - r], index, 1)],
        ),
        Case(
            "shift_linear",
            lambda: [mctf.shift_linear_triton(x, codes, bias)],
            lambda: shifted(*doubled(x, bias)),
            lambda: shifted(x, bias),
        ),
    ]


def wrong(case: Case) -> str | None:
    """What is not right of a kernel's results, or None.

    Positions must be the same; of numbers the largest error must be within twice that of ATen in the same precision,
    both against float64.
    """
    for got, exact, plain in zip(case.run(), case.exact(), case.plain()):
        if not got.is_floating_point():
            if not torch.equal(got, exact):
                return f"{(got != exact).sum()} of {got.numel()} positions differ"
            continue
        error, budget = ((t.double() - exact.double()).abs().max().item() for t in (got, plain))
        rounding = ULPS * torch.finfo(got.dtype).eps * exact.abs().max().item()
        if not error <= 2 * budget + rounding:
            return f"an error of {error:.2e} where ATen has {budget:.2e}"
    return None


def milliseconds(run: Callable[[], Any], device: str) -> float:
    """The median time of a call, caches of the GPU flushed between two."""
    if device == "cuda":
        from triton.testing import do_bench

        return do_bench(run, return_mode="median")
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def measure_kernels(block: BlockShape, device: str, dtype: torch.dtype) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of one block, each printed, and what failed."""
    rows, failed = [], []
    where = {"model": block.model, "tokens": block.tokens, "batch": block.batch}
    title = f"{block.model} N={block.tokens} B={block.batch}"
    with torch.no_grad():
        for case in cases(block, device, dtype):
            problem = wrong(case)
            if problem is not None:
                failed.append(f"{title} {case.name}: {problem}; not timed")
                print(failed[-1], file=sys.stderr)
            elif case.name in block.kernels():
                taken, floor = milliseconds(case.run, device), 1e3 * block.kernels()[case.name][0].floor
                rows.append({**where, "kernel": case.name, "ms": taken, "floor_ms": floor, "of_floor": floor / taken})
                print(f"{title} {case.name}: {taken:.3f} ms, floor {floor:.3f} ms ({floor / taken:.0%})", flush=True)
    return rows, failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see that the script works")
    parser.add_argument("--kernels-only", action="store_true", help="leave the models out")
    parser.add_argument("--output", type=Path, default=FOLDER, metavar="DIR", help="folder of results")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device is available; no check has run", file=sys.stderr)
        return FAILURE
    import mctf_compile.kernels.on_device  # noqa: F401  registers torch.ops.mctf.*_triton

    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    rows, failed = [], []
    try:
        for block in TINY if args.tiny else BLOCKS:
            measured, problems = measure_kernels(block, args.device, dtype)
            rows += measured
            failed += problems
    except KeyboardInterrupt:
        print("interrupted; nothing is written", file=sys.stderr)
        return INTERRUPTED
    folder = args.output / "kernels"
    folder.mkdir(parents=True, exist_ok=True)
    kept = {"machine": machine(args.device), "dtype": str(dtype)[6:], "rows": rows, "failed": failed}
    (folder / f"{args.device}.json").write_text(json.dumps(kept, indent=1) + "\n")
    if failed or args.kernels_only or args.device == "cpu":
        return FAILURE if failed else 0
    from benchmarks.__main__ import run

    return run("cuda", None, 15, args.output)


if __name__ == "__main__":
    sys.exit(main())
