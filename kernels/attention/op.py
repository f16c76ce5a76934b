"""``mctf::attention`` and ``mctf::importance``: attention over tokens that have sizes."""

from math import prod

from torch import Tensor

from mctf_compile.kernels.attention import aten
from mctf_compile.kernels.library import autocast_dtype, composite, resized, working_dtype


def _check_operands(q: Tensor, k: Tensor, log_size: Tensor | None, bias: Tensor | None) -> None:
    """Raises ``RuntimeError`` for other numbers of tokens, as computing would; those that are symbols are not read."""
    logits = [*q.shape[:3], k.shape[2]]
    for x, shape in ((log_size, logits[-1:]), (bias, logits)):
        given = [] if x is None else list(x.shape)
        for have, want in zip(reversed(given), reversed(shape)):
            if isinstance(have, int) and isinstance(want, int) and have not in (1, want):
                raise RuntimeError(f"{given} is given for attention logits of {logits}")


def _attention_shapes(
    q: Tensor, k: Tensor, v: Tensor, log_size: Tensor | None, bias: Tensor | None, *_: object
) -> Tensor:
    _check_operands(q, k, log_size, bias)
    return resized(q, 3, v.shape[3]).to(autocast_dtype(q))


def _attention_macs(q: Tensor, k: Tensor, v: Tensor, *_: object) -> int:
    return prod(q.shape[:3]) * k.shape[2] * (q.shape[3] + v.shape[3])


@composite(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? log_size, Tensor? bias, float scale, float dropout_p) -> Tensor",
    _attention_shapes,
    _attention_macs,
)
def attention(
    q: Tensor, k: Tensor, v: Tensor, log_size: Tensor | None, bias: Tensor | None, scale: float, dropout_p: float
) -> Tensor:
    """softmax(q kᵀ·scale + bias + log s) v: attention in which key j occurs s_j times.

    Args:
        q: [B, H, Nq, D], of one floating dtype with k and v; differentiable, like them.
        k: [B, H, Nk, D].
        v: [B, H, Nk, Dv].
        log_size: [B, Nk] natural logarithm of the sizes, or None for sizes of one.
        bias: additive, broadcastable to [B, H, Nq, Nk], or None.
        scale: usually D ** -0.5.
        dropout_p: dropout probability of the attention weights.

    Returns:
        [B, H, Nq, Dv] in the dtype of ``q``, or in that of autocast.

    Source: proportional attention, Bolya et al., ICLR 2023 (arXiv 2210.09461), eq. 1.
    """
    return aten.attention(q, k, v, log_size, bias, scale, dropout_p)


def _importance_shapes(
    q: Tensor, k: Tensor, log_size: Tensor | None, bias: Tensor | None, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    _check_operands(q, k, log_size, bias)
    exact = working_dtype(q.dtype)
    return (
        q.new_empty(k.shape[0], k.shape[2], dtype=exact),
        resized(q, 3, k.shape[2]),
        q.new_empty(*q.shape[:3], 1, dtype=exact),
    )


def _importance_macs(q: Tensor, k: Tensor, *_: object) -> int:
    """Those of the logits, and of the sum over heads and queries."""
    return prod(q.shape[:3]) * k.shape[2] * (q.shape[3] + 1)


@composite(
    "importance(Tensor q, Tensor k, Tensor? log_size, Tensor? bias, float scale) -> (Tensor, Tensor, Tensor)",
    _importance_shapes,
    _importance_macs,
)
def importance(
    q: Tensor, k: Tensor, log_size: Tensor | None, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean attention that each token receives, before any value is computed.

    Args: as for ``mctf::attention``.

    Returns:
        importance: [B, Nk], mean over heads and queries of the attention weights; sums to 1; a constant
            for autograd; float32 or wider.
        weights: [B, H, Nq, Nk], unnormalised attention weights in the dtype of ``q``; differentiable.
        norm: [B, H, Nq, 1], the reciprocals of their row sums: A = weights * norm; differentiable.

    Source: Lee et al., CVPR 2024, section 3.2 (informativeness) and 3.4 (one step ahead).
    """
    return aten.importance(q, k, log_size, bias, scale)


@composite("policy_attention(Tensor q, Tensor k, Tensor v, Tensor policy, float scale) -> Tensor")
def policy_attention(q: Tensor, k: Tensor, v: Tensor, policy: Tensor, scale: float) -> Tensor:
    """Attention in which a token counts for others as ``policy`` says, and fully for itself.

    (e + ε/N) / (Σ e + ε) with e_ij = exp(l_ij - max) · (1 if i = j else policy_j) and ε = 1e-6.

    Args:
        q: [B, H, N, D], of one floating dtype with k and v; differentiable, like them.
        k: [B, H, N, D].
        v: [B, H, N, D].
        policy: [B, N], 0 or 1 for dropped and kept tokens; differentiable.
        scale: usually D ** -0.5.

    Returns:
        [B, H, N, D] in the dtype of ``v``.

    Source: Rao et al., NeurIPS 2021 (arXiv 2106.02034), section 3.3, eq. 10-11.
    """
    return aten.policy_attention(q, k, v, policy, scale)
