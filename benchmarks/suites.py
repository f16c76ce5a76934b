"""The workloads that are measured, as tables."""

from __future__ import annotations

from pathlib import Path

from mctf_compile.measuring.workload import BY_PYTORCH, IN_INT8, ON_CUDA, BenchmarkRow, Workload

# Where results are kept.
FOLDER = Path(__file__).parent / "results"

CPU = [
    BenchmarkRow("deit_s", Workload("deit_small_patch16_224")),
    BenchmarkRow("deit_t", Workload("deit_tiny_patch16_224")),
    BenchmarkRow("vit_b", Workload("vit_base_patch16_224")),
    BenchmarkRow("deit_s-batch1", Workload("deit_small_patch16_224", batch=1)),
    # 47 of 577 tokens are what 16 are of 197.
    BenchmarkRow("vit_s-384", Workload("vit_small_patch16_384", r=47, batch=4, image_size=384)),
    BenchmarkRow("deit_s-fast", Workload("deit_small_patch16_224", r="fast")),
    BenchmarkRow("deit_s-2threads", Workload("deit_small_patch16_224", threads=2)),
    BenchmarkRow("deit_s-autocast", Workload("deit_small_patch16_224", dtype="autocast"), BY_PYTORCH),
    BenchmarkRow("deit_s-int8", Workload("deit_small_patch16_224"), IN_INT8, IN_INT8),
    BenchmarkRow("vit_m-gap", Workload("vit_medium_patch16_gap_240")),
]

# As many tokens of 24 blocks as 16 are of 12.
LARGE = {"vit_large_patch16_224": 8, "vit_large_patch16_384": 23}


def _on_cuda(name: str, model: str, r: int | str, batch: int) -> BenchmarkRow:
    options = {"inductor": {"mode": "max-autotune"}}
    return BenchmarkRow(
        f"cuda-{name}",
        Workload(model, r, batch, dtype="bfloat16", device="cuda", options=options),
        ON_CUDA,
        ("eager", "max-autotune", "mctf"),
    )


CUDA = [
    *(_on_cuda(f"deit_s-batch{n}", "deit_small_patch16_224", 16, n) for n in (1, 32, 256)),
    _on_cuda("deit_s-fast", "deit_small_patch16_224", "fast", 256),
    *(_on_cuda(f"deit_b-batch{n}", "deit_base_patch16_224", 16, n) for n in (1, 32, 256)),
    *(_on_cuda(f"vit_l-{model[-3:]}-batch{n}", model, r, n) for model, r in LARGE.items() for n in (1, 32, 256)),
]

# Seconds, and nothing compiled: whether all of this works, not how fast anything is.
UNCOMPILED = {"inner": "eager", "kernels": "aten"}
QUICK = [
    BenchmarkRow("quick", Workload("test_vit", r=8, batch=2, options=UNCOMPILED), ("eager", "mctf"), ("mctf",)),
    BenchmarkRow("quick-batch1", Workload("test_vit", r=4, batch=1, options=UNCOMPILED), ("eager", "mctf"), ()),
]

SUITES = {"cpu": CPU, "cuda": CUDA, "quick": QUICK}
