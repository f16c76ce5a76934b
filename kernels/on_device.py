"""The Triton kernels as operators ``torch.ops.mctf.*_triton``, with gradients; imported where Triton is used.

``triton_op`` lets AOTAutograd and Inductor see the launches, so that buffers are planned and CUDA graphs recorded
around them. Matchings, weights, sizes and log-sum-exps are constants.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op

from mctf_compile.kernels.ahead import triton as _ahead
from mctf_compile.kernels.attention import triton as _attention
from mctf_compile.kernels.attention import triton_backward as _gradients
from mctf_compile.kernels.matching import triton as _matching
from mctf_compile.kernels.pooling import triton as _pooling
from mctf_compile.kernels.shift import triton as _shift
from mctf_compile.kernels.unmerge import triton as _unmerge


@triton_op("mctf::attention_triton", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, log_size: Tensor | None, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """``mctf::attention`` without dropout, and the base-2 log-sum-exp [B, H, Nq] for its backward."""
    o, lse = _attention.attention_forward(q, k, v, log_size, bias, scale)
    assert o is not None  # as there are values
    return o, lse


@triton_op("mctf::attention_triton_backward", mutates_args=())
def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_size: Tensor | None,
    bias: Tensor | None,
    scale: float,
    o: Tensor,
    lse: Tensor,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Its gradients dq, dk, dv from the one to its output, and dbias: [0] where not asked for."""
    dq, dk, dv, dbias = _gradients.attention_backward(do, q, k, v, log_size, bias, scale, o, lse, bias_gradient)
    return dq, dk, dv, q.new_empty(0) if dbias is None else dbias


def _keep_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, log_size, bias, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, log_size, bias, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.bias_gradient = bias is not None and ctx.needs_input_grad[4]


def _attention_gradients(ctx: Any, do: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, log_size, bias, o, lse = ctx.saved_tensors
    dq, dk, dv, dbias = torch.ops.mctf.attention_triton_backward(
        do, q, k, v, log_size, bias, ctx.scale, o, lse, ctx.bias_gradient
    )
    return dq, dk, dv, None, dbias if ctx.bias_gradient else None, None


attention.register_autograd(_attention_gradients, setup_context=_keep_attention)


@triton_op("mctf::importance_triton", mutates_args=())
def importance(
    q: Tensor, k: Tensor, log_size: Tensor | None, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The first result of ``mctf::importance``, and the base-2 log-sum-exp [B, H, Nq] that stands for its map."""
    return _attention.importance(q, k, log_size, bias, scale)


importance.register_autograd(lambda ctx, *grads: (None,) * 5)


@triton_op("mctf::ahead_triton", mutates_args=())
def ahead(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_size: Tensor | None,
    bias: Tensor | None,
    scale: float,
    lse: Tensor,
    index: Tensor,
    weight: Tensor,
    keep: Tensor,
    gone: Tensor,
    into: Tensor,
) -> tuple[Tensor, Tensor]:
    """``mctf::ahead`` without dropout, and the rows that it adds up, for its backward.

    ``lse``: what ``mctf::importance_triton`` gave for the same q, k, log_size, bias and scale.
    """
    return _ahead.ahead_forward(q, k, v, log_size, bias, scale, lse, index, weight, keep, gone, into)


@triton_op("mctf::ahead_triton_backward", mutates_args=())
def ahead_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_size: Tensor | None,
    bias: Tensor | None,
    scale: float,
    lse: Tensor,
    index: Tensor,
    weight: Tensor,
    keep: Tensor,
    gone: Tensor,
    into: Tensor,
    rows: Tensor,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Its gradients dq, dk, dv from the one to its output, and dbias: [0] where not asked for."""
    dq, dk, dv, dbias = _ahead.ahead_backward(
        do, q, k, v, log_size, bias, scale, lse, index, weight, keep, gone, into, rows, bias_gradient
    )
    return dq, dk, dv, q.new_empty(0) if dbias is None else dbias


def _keep_ahead(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, log_size, bias, ctx.scale, *matching = inputs
    ctx.save_for_backward(q, k, v, log_size, bias, *matching, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.bias_gradient = bias is not None and ctx.needs_input_grad[4]


def _ahead_gradients(ctx: Any, do: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, log_size, bias, *matching, rows = ctx.saved_tensors
    dq, dk, dv, dbias = torch.ops.mctf.ahead_triton_backward(
        do, q, k, v, log_size, bias, ctx.scale, *matching, rows, ctx.bias_gradient
    )
    return dq, dk, dv, None, dbias if ctx.bias_gradient else None, *(None,) * 7


ahead.register_autograd(_ahead_gradients, setup_context=_keep_ahead)


@triton_op("mctf::match_triton", mutates_args=())
def match(
    x: Tensor,
    importance: Tensor | None,
    size: Tensor,
    r: int,
    lead: int,
    tail: int,
    tau_sim: float,
    tau_info: float,
    tau_size: float,
    bidirectional: bool,
    kind: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``mctf::match``."""
    return _matching.match(x, importance, size, r, lead, tail, tau_sim, tau_info, tau_size, bidirectional, kind)


match.register_autograd(lambda ctx, *grads: (None,) * 11)


@triton_op("mctf::group_triton", mutates_args=())
def group(raw: Tensor, size: Tensor, keep: Tensor, gone: Tensor, into: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``mctf::group``."""
    return _pooling.group(raw, size, keep, gone, into)


group.register_autograd(lambda ctx, *grads: (None,) * 5)


@triton_op("mctf::pool_triton", mutates_args=())
def pool(x: Tensor, weight: Tensor, keep: Tensor, gone: Tensor, into: Tensor, dim: int) -> Tensor:
    """``mctf::pool`` by weights."""
    return _pooling.pool(x, weight, keep, gone, into, dim)


@triton_op("mctf::pool_triton_backward", mutates_args=())
def pool_backward(dy: Tensor, weight: Tensor, keep: Tensor, gone: Tensor, into: Tensor, dim: int) -> Tensor:
    """The gradient of ``mctf::pool_triton`` to ``x`` [B, ..., N, ...], tokens at ``dim``."""
    return _pooling.pool_backward(dy, weight, keep, gone, into, dim)


def _keep_pool(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:5])
    ctx.dim = inputs[5]


def _pool_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.mctf.pool_triton_backward(dy, *ctx.saved_tensors, ctx.dim), *(None,) * 5


pool.register_autograd(_pool_gradient, setup_context=_keep_pool)


@triton_op("mctf::unmerge_triton", mutates_args=())
def unmerge(y: Tensor, index: Tensor, dim: int) -> Tensor:
    """``mctf::unmerge``."""
    return _unmerge.unmerge(y, index, dim)


@triton_op("mctf::unmerge_triton_backward", mutates_args=())
def unmerge_backward(dx: Tensor, index: Tensor, m: int, dim: int) -> Tensor:
    """The gradient of ``mctf::unmerge_triton`` to its ``m`` fused tokens at ``dim``."""
    return _unmerge.unmerge_backward(dx, index, m, dim)


def _keep_unmerge(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, index, ctx.dim = inputs
    ctx.save_for_backward(index)
    ctx.m = y.shape[ctx.dim]


def _unmerge_gradient(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.mctf.unmerge_triton_backward(dx, *ctx.saved_tensors, ctx.m, ctx.dim), None, None


unmerge.register_autograd(_unmerge_gradient, setup_context=_keep_unmerge)


@triton_op("mctf::shift_linear_triton", mutates_args=())
def shift_linear(x: Tensor, codes: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer [..., C] -> [..., O] with the weights of ``codes`` [O, C]."""
    return _shift.shift_linear(x, codes, bias)


def _keep_codes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, bias = inputs
    ctx.save_for_backward(codes)
    ctx.bias_gradient = bias is not None and ctx.needs_input_grad[2]


def _shift_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (codes,) = ctx.saved_tensors
    dbias = dy.flatten(0, -2).sum(0) if ctx.bias_gradient else None
    return dy @ torch.ops.mctf.powers(codes, dy.dtype), None, dbias


shift_linear.register_autograd(_shift_gradients, setup_context=_keep_codes)
