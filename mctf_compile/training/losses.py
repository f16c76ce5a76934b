"""Training losses of the papers: for tokens that are fused, pruned or idle.

Plain functions of tensors that the training loop collects; nothing here needs a compiled model. Whatever comes
from a teacher is a constant: no gradient flows into it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, mse_loss, normalize

from mctf_compile.errors import ConfigError

# What one pass of a network returns: its class token after the final norm [B, C], and its logits [B, K].
Pass = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class TwoPassLoss:
    """The loss of :func:`mctf` and :func:`distillation`: scalars. ``total`` is the weighted sum, the parts are not.

    ``own``: of the pass that fuses r tokens; ``gentler``: of the pass that fuses fewer, and ``consistency`` between the
    two, both 0 without such a pass.
    """

    total: Tensor
    own: Tensor
    gentler: Tensor
    consistency: Tensor


@dataclass(frozen=True)
class DynamicViTLoss:
    """The loss of :func:`dynamicvit`: scalars. ``total`` is the weighted sum, the parts are not weighted.

    ``cls``: cross-entropy; ``ratio``: squared error of the kept fractions, mean over stages; ``kl``: divergence
    from the teacher's classes; ``token``: distance from the teacher's tokens.
    """

    total: Tensor
    cls: Tensor
    ratio: Tensor
    kl: Tensor
    token: Tensor


@dataclass(frozen=True)
class IdleViTLoss:
    """The loss of :func:`idlevit`: scalars. ``total`` is the weighted sum, the parts are not weighted.

    ``cls``: cross-entropy; ``cut``: token cut loss, mean over layers; ``kl``: divergence from the teacher's classes;
    ``feature``: squared error of the normalised class tokens. The last two are 0 without a teacher.
    """

    total: Tensor
    cls: Tensor
    cut: Tensor
    kl: Tensor
    feature: Tensor


def dynamicvit(
    logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor,
    tokens: Tensor,
    teacher_tokens: Tensor,
    decisions: Tensor | Sequence[Tensor],
    keep_ratios: Tensor | Sequence[float],
    *,
    ratio_weight: float = 2.0,
    kl_weight: float = 0.5,
    token_weight: float = 0.5,
    token: Literal["mse", "kl"] = "mse",
) -> DynamicViTLoss:
    """The training loss of DynamicViT: classify, keep as many tokens as asked for, stay near the dense teacher.

    Args:
        logits: [B, K] classes of the student.
        labels: int64 [B], or probabilities [B, K].
        teacher_logits: [B, K] classes of the dense model.
        tokens: [B, N, C] patch tokens of the student after the final norm.
        teacher_tokens: [B, N, C] those of the dense model.
        decisions: S tensors [B, N], or one [S, B, N]: 1 where a stage keeps a patch, else 0, the earlier stages'
            decisions multiplied in. Differentiable in training (hard Gumbel-softmax).
        keep_ratios: S fractions, of all N patches, that the stages are to keep.
        ratio_weight: of the ratios' part; the published runs have 2.
        kl_weight: of the divergence from the dense model; 0.5.
        token_weight: of the tokens' part; 0.5.
        token: distance between tokens: their mean squared error, or the divergence of their softmax over C.

    Returns:
        The parts and their weighted sum. ``token`` is the mean over the patches that the last stage keeps, and 0
        where it keeps none.

    Raises ``ConfigError`` for another ``token``, and ``ValueError`` where the stages and the ratios differ in number.

    Source: Rao et al., NeurIPS 2021.
    """
    if token not in ("mse", "kl"):
        raise ConfigError(f"token={token!r} must be 'mse' or 'kl'.")
    pairs = zip(decisions, keep_ratios, strict=True)
    errors = [(decision.mean(1) - asked).square().mean() for decision, asked in pairs]
    if token == "mse":
        distance = (tokens - teacher_tokens.detach()).square().mean(-1)
    else:
        distance = _divergence(tokens, teacher_tokens)
    cls = cross_entropy(logits, labels)
    ratio = torch.stack(errors).mean()
    kl = _divergence(logits, teacher_logits).mean()
    near = _mean_where(distance, decisions[-1] > 0.5)
    total = cls + ratio_weight * ratio + kl_weight * kl + token_weight * near
    return DynamicViTLoss(total, cls, ratio, kl, near)


def idlevit(
    logits: Tensor,
    labels: Tensor,
    attention_logits: Tensor | Sequence[Tensor],
    masks: Tensor | Sequence[Tensor],
    feature: Tensor,
    teacher_logits: Tensor | None = None,
    teacher_feature: Tensor | None = None,
    *,
    cut_weight: float = 20.0,
    kl_weight: float = 10.0,
    feature_weight: float = 1000.0,
    inter: bool = True,
    intra: bool = True,
) -> IdleViTLoss:
    """The training loss of IdleViT: classify, cut idle from selected tokens, stay near a dense teacher.

    Args:
        logits: [B, K] classes of the student.
        labels: int64 [B], or probabilities [B, K].
        attention_logits: as in :func:`cut`; so are the next three.
        masks: see there.
        inter: see there.
        intra: see there.
        feature: [B, C] class token of the student after the final norm.
        teacher_logits: [B, K] classes of the dense model; None: no such part.
        teacher_feature: [B, C] its class token; None: no such part.
        cut_weight: of the token cut; the published runs have 20.
        kl_weight: of the divergence from the dense model; 10.
        feature_weight: of the class token's part; 1000.

    Returns:
        The parts and their weighted sum.

    Source: Xu et al., 2023, *No Token Left Behind*.
    """
    cls = cross_entropy(logits, labels)
    mean_cut = cut(attention_logits, masks, inter=inter, intra=intra) / len(attention_logits)
    kl = distance = logits.new_zeros(())
    if teacher_logits is not None:
        kl = _divergence(logits, teacher_logits).mean()
    if teacher_feature is not None:
        distance = mse_loss(normalize(feature, dim=-1), normalize(teacher_feature.detach(), dim=-1))
    total = cls + cut_weight * mean_cut + kl_weight * kl + feature_weight * distance
    return IdleViTLoss(total, cls, mean_cut, kl, distance)


def cut(
    attention_logits: Tensor | Sequence[Tensor],
    masks: Tensor | Sequence[Tensor],
    *,
    inter: bool = True,
    intra: bool = True,
) -> Tensor:
    """The token cut loss: selected and idle tokens attend to their own kind.

    In the softmax over keys of a layer's head-mean logits, the weight that a token gives to the other kind is drawn
    to 0 (``inter``), and the weight that a selected token gives to selected ones is drawn to 1 (``intra``).

    Args:
        attention_logits: L tensors [B, H, N, N], or one [L, B, H, N, N]: scaled logits of the layers that select,
            before any key is masked; the class token is at position 0.
        masks: L tensors [B, N, 1], or one [L, B, N, 1]: 1 for selected tokens, the class token among them, else 0.
        inter: whether attention between the two kinds is counted.
        intra: whether attention within either kind is counted.

    Returns:
        A scalar: the sum over all L layers of the squared errors' means over tokens.

    Raises ``ValueError`` where the layers and the masks differ in number.

    Source: Xu et al., 2023, *No Token Left Behind*. The official code sums every second layer only, since it deletes
    from the list that it iterates over; here every layer counts.
    """
    total = attention_logits[0].new_zeros(())
    for logits, mask in zip(attention_logits, masks, strict=True):
        weight = logits.mean(1).softmax(-1)
        selected = mask.squeeze(-1).to(weight.dtype)
        if inter:
            # The class token is always selected; idle tokens may look at it too.
            other = (selected[:, :, None] != selected[:, None])[..., 1:]
            total = total + (weight[..., 1:] * other).sum(-1).square().mean()
        if intra:
            inside = selected * torch.einsum("bij,bj->bi", weight, selected)
            total = total + (inside - selected).square().mean()
    return total


def mctf(
    student: Pass,
    labels: Tensor,
    gentler: Pass | None = None,
    *,
    consistency_weight: float = 3.0,
    threshold: float = 0.4,
    label_smoothing: float = 0.0,
    over: Callable[[Tensor], Tensor] | None = None,
) -> TwoPassLoss:
    """The training loss of MCTF: classify with r tokens fused and with fewer, and follow the latter.

    Args:
        student: class token [B, C] after the final norm and logits [B, K], of the pass that fuses r tokens.
        labels: int64 [B].
        gentler: the same of a pass that fuses fewer; the published runs draw their number anew at every step. None:
            the cross-entropy of the student alone.
        consistency_weight: of the consistency; the published runs have 3.
        threshold: see :func:`consistency`; so is ``over``.
        label_smoothing: of both cross-entropies; the published runs have 0.1.
        over: see there.

    Returns:
        The two cross-entropies, the consistency, and ``own + gentler + consistency_weight * consistency``.

    Source: Lee et al., CVPR 2024, token reduction consistency.
    """

    def classify(logits: Tensor) -> Tensor:
        return cross_entropy(logits, labels, label_smoothing=label_smoothing)

    return _two_passes(student, gentler, classify, labels, consistency_weight, threshold, over)


def distillation(
    student: Pass,
    teacher_logits: Tensor,
    gentler: Pass | None = None,
    *,
    temperature: float = 1.0,
    consistency_weight: float = 3.0,
    threshold: float = 0.4,
    over: Callable[[Tensor], Tensor] | None = None,
) -> TwoPassLoss:
    """As :func:`mctf`, with the classes of a dense model in the place of labels; no images need labels.

    Args:
        student: class token [B, C] after the final norm and logits [B, K], of the pass that fuses r tokens.
        teacher_logits: [B, K] of the dense model, for the same images; a constant.
        gentler: the same as ``student`` of a pass that fuses fewer, or None.
        temperature: that both models' logits are divided by. The divergence is multiplied by its square, which keeps
            the size of the gradients.
        consistency_weight: of the consistency, for which the teacher's likeliest class is the label.
        threshold: see :func:`consistency`; so is ``over``.
        over: see there.

    Returns:
        The mean divergences KL(teacher || student) of both passes, the consistency, and their weighted sum.

    Source: Hinton et al., 2015, *Distilling the Knowledge in a Neural Network*, arXiv 1503.02531.
    """

    def follow(logits: Tensor) -> Tensor:
        return temperature**2 * _divergence(logits / temperature, teacher_logits / temperature).mean()

    return _two_passes(student, gentler, follow, teacher_logits.argmax(1), consistency_weight, threshold, over)


def _two_passes(
    student: Pass,
    gentler: Pass | None,
    own_loss: Callable[[Tensor], Tensor],
    labels: Tensor,
    weight: float,
    threshold: float,
    over: Callable[[Tensor], Tensor] | None,
) -> TwoPassLoss:
    """``own_loss`` of the logits of both passes, and their consistency."""
    (features, logits), zero = student, student[1].new_zeros(())
    own = own_loss(logits)
    if gentler is None:
        return TwoPassLoss(own, own, zero, zero)
    follows = consistency(features, gentler[0], logits, labels, threshold, over)
    second = own_loss(gentler[1])
    return TwoPassLoss(own + second + weight * follows, own, second, follows)


def consistency(
    student_cls: Tensor,
    teacher_cls: Tensor,
    student_logits: Tensor,
    labels: Tensor,
    threshold: float = 0.4,
    over: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Token reduction consistency: one network with many tokens fused follows itself with few fused.

    Args:
        student_cls: [B, C] class token after the final norm, of the pass that fuses r tokens.
        teacher_cls: [B, C] that of the pass that fuses fewer; a constant.
        student_logits: [B, K] classes of the student's pass.
        labels: int64 [B].
        threshold: samples count where the student's probability of their label exceeds it.
        over: takes the number of samples that count here, a scalar, and returns what to divide by in its place. Where
            several processes have a part of the batch each and gradients are their mean, give
            :func:`mean_over_processes`: the mean is then over the samples of all of them.

    Returns:
        A scalar: the mean over those samples of the squared error's mean over C, and 0 where there are none. The
        published runs add it three times to the cross-entropies of both passes.

    Source: Lee et al., CVPR 2024, token reduction consistency.
    """
    error = (teacher_cls.detach() - student_cls).square().mean(-1)
    probability = student_logits.softmax(-1).gather(1, labels[:, None]).squeeze(1)
    return _mean_where(error, probability > threshold, over)


def token_labeling(
    logits: Tensor,
    patch_logits: Tensor,
    labels: Tensor,
    patch_labels: Tensor,
    box: Tensor | None = None,
    *,
    weight: float = 0.5,
) -> Tensor:
    """The training loss of LV-ViT: the class of the image, and one of every patch.

    Args:
        logits: [B, K] of the class token.
        patch_logits: [B, N, K] of the patches.
        labels: int64 [B], or probabilities [B, K].
        patch_labels: probabilities [B, N, K] of the patches of an image as it was before MixToken.
        box: bool, N elements: the patches that each image has from another one of the batch, as given to
            ``mctf_compile.models.LVViT``. The label of the image is then theirs by as much as they are.
        weight: of the patches' part; 0.5.

    Returns:
        A scalar: cross-entropy, and ``weight`` times its mean over all patches.

    Source: Jiang et al., NeurIPS 2021 (arXiv 2104.10858).
    """
    cls = cross_entropy(logits, labels)
    if box is not None:
        share = box.to(logits.dtype).mean()
        cls = cls + share * (cross_entropy(logits, labels.flip(0)) - cls)
    return cls + weight * cross_entropy(patch_logits.flatten(0, 1), patch_labels.flatten(0, 1))


def balance(logits: Tensor, latency: Sequence[float]) -> Tensor:
    """The latency-aware balance loss of a mixture of experts: CV² of what they get, by importance and by load.

    With p the softmax of the logits, an expert's importance is Σ p over the tokens, and its load Σ P(p + ε is the
    largest), ε being normal noise of deviation 1/E. Both are counted in time: times the expert's share of the latency.

    Args:
        logits: [..., E] of the router, for each token.
        latency: E numbers above 0, what a token takes in each expert, in any unit.

    Returns:
        CV²(importance) + CV²(load), where CV² is the variance over the squared mean; 0 where every expert gets the same
        time. The published runs add it to the task's loss times 0.01.

    Raises ``ConfigError`` where ``latency`` is not a number above 0 for each expert.

    Source: You et al., ShiftAddViT, NeurIPS 2023 (arXiv 2306.06446), section 4.2; the load is that of Riquelme et al.,
    V-MoE, NeurIPS 2021, with the noise on the probabilities.
    """
    count = logits.shape[-1]
    if len(latency) != count or not all(x > 0 for x in latency):
        raise ConfigError(f"latency={latency!r} must be {count} numbers above 0, one for each expert.")
    p = logits.flatten(0, -2).float().softmax(-1)
    others = p[:, None, :].expand(-1, count, -1).masked_fill(torch.eye(count, device=p.device).bool(), float("-inf"))
    loads = torch.special.ndtr((p - others.amax(-1)) * count)
    share = torch.tensor(latency, dtype=p.dtype, device=p.device) / sum(latency)

    def spread(times: Tensor) -> Tensor:
        return times.var(correction=0) / times.mean().square()

    return spread(share * p.sum(0)) + spread(share * loads.sum(0))


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes of the default group; the tensor itself where there is one process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    # The sum: gloo has no mean.
    total = value.detach().to(torch.float32, copy=True)
    dist.all_reduce(total)
    return total / dist.get_world_size()


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of the softmaxes over the last axis, which goes."""
    target = teacher.detach().log_softmax(-1)
    return kl_div(student.log_softmax(-1), target, reduction="none", log_target=True).sum(-1)


def _mean_where(values: Tensor, chosen: Tensor, over: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The mean of the chosen values, 0 where there are none; no shape depends on how many."""
    count = chosen.sum() if over is None else over(chosen.sum())
    return values.where(chosen, 0).sum() / count.where(count > 0, 1)
