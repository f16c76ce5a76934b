"""What a measurement runs: a timm model with random weights, a batch of noise, and how they are run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mctf_compile.measuring.candidates import CANDIDATES
from mctf_compile.measuring.timm_models import input_size, make_model
from mctf_compile.options.fields import one_of

# Products of 8-bit integers, dense and fused.
IN_INT8 = tuple(name for name in CANDIDATES if CANDIDATES[name].target == "onnx-int8")
# On a CPU, max-autotune without freezing has nothing to tune.
ON_CPU = tuple(name for name in CANDIDATES if name not in ("max-autotune", *IN_INT8))
# Of these, what other runtimes do not run: they have no autocast.
BY_PYTORCH = tuple(name for name in ON_CPU if CANDIDATES[name].target is None)
ON_CUDA = ("eager", "inductor", "max-autotune", "mctf")


@dataclass(frozen=True)
class Workload:
    """A model, its input and its options, as plain values.

    ``r`` and ``options``: as for the backend. ``image_size``: None for the model's own. ``dtype``: ``float32``,
    ``bfloat16`` (weights and images) or ``autocast`` (float32 weights, bfloat16 where PyTorch casts). ``threads``:
    those of the CPU.
    """

    model: str
    r: Any = 16
    batch: int = 8
    image_size: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        one_of("float32", "bfloat16", "autocast")("dtype", self.dtype)

    @property
    def all_options(self) -> dict[str, Any]:
        return {"r": self.r, **self.options}

    @property
    def autocast(self) -> torch.dtype | None:
        return torch.bfloat16 if self.dtype == "autocast" else None

    def load(self) -> tuple[nn.Module, list[Tensor]]:
        """The model in eval mode and its images [B, C, H, W], the same each time; sets the number of threads."""
        torch.set_num_threads(self.threads)
        torch.manual_seed(0)
        model = make_model(self.model, self.image_size, False).eval()
        images = torch.randn(self.batch, *input_size(model, self.image_size))
        dtype = torch.bfloat16 if self.dtype == "bfloat16" else torch.float32
        return model.to(self.device, dtype), [images.to(self.device, dtype)]


@dataclass(frozen=True)
class BenchmarkRow:
    """One comparison.

    ``name``: that of its file of results. ``candidates``: those that run in turn in one process. ``isolated``: those
    whose first call and memory are measured in processes of their own.
    """

    name: str
    work: Workload
    candidates: tuple[str, ...] = ON_CPU
    isolated: tuple[str, ...] = ("eager", "inductor", "mctf")
