"""The C++ kernels as operators ``torch.ops.mctf.*_cpp``, declared here and implemented where they are built.

They take operands of any strides, and have no gradients.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from mctf_compile.kernels.library import LIBRARY, declare
from mctf_compile.kernels.pooling.op import group_shapes, pool_shapes

KNOWN = (torch.float32, torch.bfloat16)


def attention_supported(q: Tensor, k: Tensor, v: Tensor | None, bias: Tensor | None, dropout_p: float = 0.0) -> bool:
    """Whether attention's kernels take these operands: float32 or bfloat16, without dropout."""
    same = q.dtype == k.dtype and (v is None or v.dtype == q.dtype)
    return same and q.dtype in KNOWN and (bias is None or bias.dtype in KNOWN) and not dropout_p


def match_supported(x: Tensor, kind: Tensor | None) -> bool:
    """Whether the matching's kernel takes these operands: tokens of float32 or bfloat16 that are all of one kind."""
    return x.dtype in KNOWN and kind is None


def group_supported(raw: Tensor, size: Tensor) -> bool:
    """Whether the kernel of grouping takes these operands: weights and sizes in float32."""
    return raw.dtype == size.dtype == torch.float32


def pool_supported(x: Tensor, weight: Tensor | None, dim: int) -> bool:
    """Whether pooling's kernel takes these operands: means, over [B, N, C] or [B, P, N, C], of float32 or bfloat16."""
    rows = dim in (1, 2) and dim == x.dim() - 2
    return rows and x.dtype in KNOWN and weight is not None and weight.dtype == torch.float32


def shift_supported(x: Tensor, codes: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel of shift layers takes these operands: tokens of float32 or bfloat16, codes with no gaps."""
    same = bias is None or bias.dtype == x.dtype
    return x.dtype in KNOWN and same and 2 <= x.dim() <= 4 and codes.dim() == 2 and 1 in codes.stride()


def _token_major(v: Tensor, n: int | torch.SymInt) -> Tensor:
    """Empty [B, H, N, D] laid out [B, N, H, D]."""
    return v.new_empty(v.shape[0], n, v.shape[1], v.shape[3]).transpose(1, 2)


# ``mctf::attention`` without dropout.
@declare("attention_cpp(Tensor q, Tensor k, Tensor v, Tensor? log_size, Tensor? bias, float scale) -> Tensor")
def attention(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    """Empty [B, H, Nq, Dv], laid out [B, Nq, H, Dv]."""
    return _token_major(v, q.shape[2])


# The importance of ``mctf::importance``, the log-sum-exp [B, H, Nq], and the map's first rows, normalised: as many as
# there is ``room`` for, in weights of each head.
@declare(
    "importance_cpp(Tensor q, Tensor k, Tensor? log_size, Tensor? bias, float scale, int room) "
    "-> (Tensor, Tensor, Tensor)"
)
def importance(
    q: Tensor, k: Tensor, log_size: Tensor | None, bias: Tensor | None, scale: float, room: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty float32 [B, Nk], [B, H, Nq] and [B, H, rows, Nk], the rows being those that ``room`` holds."""
    batch, heads, queries, _ = q.shape
    rows = torch.sym_min(queries, room // k.shape[2]) if room else 0
    shapes = (batch, k.shape[2]), (batch, heads, queries), (batch, heads, rows, k.shape[2])
    received, lse, first = (q.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return received, lse, first


# ``mctf::ahead`` without dropout; lse and map: what ``importance_cpp`` gave for the same operands. Where that is the
# whole map, q and k are not needed.
@declare(
    "ahead_cpp(Tensor? q, Tensor? k, Tensor v, Tensor? log_size, Tensor? bias, float scale, Tensor lse, Tensor map, "
    "Tensor index, Tensor weight) -> Tensor"
)
def ahead(q: Tensor | None, k: Tensor | None, v: Tensor, *_: object) -> Tensor:
    """Empty [B, H, M, D], laid out [B, M, H, D]."""
    return _token_major(v, v.shape[2])


# ``mctf::match`` without kinds; importance and sizes in float32. By the tokens that are left, not by those that go: the
# sizes of results are then numbers of the graph's own, and not differences of such, whose views Inductor copies.
@declare(
    "match_cpp(Tensor x, Tensor? importance, Tensor size, SymInt remaining, int lead, int tail, float tau_sim, "
    "float tau_info, float tau_size, bool bidirectional) -> (Tensor, Tensor, Tensor)"
)
def match(
    x: Tensor, importance: Tensor | None, size: Tensor, remaining: int | torch.SymInt, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty int64 keep [B, remaining], gone and into [B, N - remaining]."""
    shapes = (x.shape[0], remaining), (x.shape[0], x.shape[1] - remaining), (x.shape[0], x.shape[1] - remaining)
    keep, gone, into = (x.new_empty(shape, dtype=torch.long) for shape in shapes)
    return keep, gone, into


# ``mctf::group``, and ``mctf::pool`` by weights, of tokens at the last dimension but one of three or four.
declare("group_cpp(Tensor raw, Tensor size, Tensor keep, Tensor gone, Tensor into) -> (Tensor, Tensor, Tensor)")(
    group_shapes
)
declare("pool_cpp(Tensor x, Tensor weight, Tensor keep, Tensor gone, Tensor into, int dim) -> Tensor")(pool_shapes)


# A linear layer whose weights are those of the codes, which lie row by row or, faster, channel by channel; x has two to
# four dimensions.
@declare("shift_linear_cpp(Tensor x, Tensor codes, Tensor? bias) -> Tensor")
def shift_linear(x: Tensor, codes: Tensor, bias: Tensor | None) -> Tensor:
    """Empty [..., O] of x [..., C] and codes [O, C]."""
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _no_gradient(ctx: Any, *grads: Tensor) -> NoReturn:
    raise RuntimeError(
        "The C++ kernels of mctf_compile have no gradient: compile the model where gradients are "
        "recorded (without torch.no_grad), or with kernels='aten'."
    )


for _name in ("attention_cpp", "importance_cpp", "ahead_cpp", "group_cpp", "pool_cpp", "shift_linear_cpp"):
    torch.library.register_autograd(f"mctf::{_name}", _no_gradient, lib=LIBRARY)
