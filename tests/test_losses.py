"""The training losses against the official ones; see golden/README.md."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mctf_compile import losses
from mctf_compile.errors import ConfigError

GOLDEN = Path(__file__).parent / "golden"

DYNAMICVIT = [f"mse{mse}_rw{weight}" for mse in (0, 1) for weight in (2, 5)]
IDLEVIT = [
    f"{kinds}_L{layers}_distill{teacher}"
    for kinds in ("both", "inter", "intra", "none")
    for layers in (1, 4)
    for teacher in (0, 1)
]
KINDS = {
    "both": {"inter": True, "intra": True},
    "inter": {"inter": True, "intra": False},
    "intra": {"inter": False, "intra": True},
    "none": {"inter": False, "intra": False},
}


@cache
def load(name: str) -> dict[str, Any]:
    return torch.load(GOLDEN / f"{name}_losses.pt", weights_only=True)


def near(actual: Tensor, expected: Tensor) -> None:
    """To 2e-5, of the value where that is above 1."""
    tolerance = 2e-5 * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def dynamicvit(data: dict[str, Any], **options: Any) -> losses.DynamicViTLoss:
    inputs = ("pred", "labels", "teacher_pred", "tokens", "teacher_tokens", "decisions", "keep_ratio")
    return losses.dynamicvit(*(data[name] for name in inputs), **options)


def idlevit(data: dict[str, Any], layers: int, teacher: bool, **options: Any) -> losses.IdleViTLoss:
    names = ("teacher_logits", "teacher_feature") if teacher else ()
    dense = {name: data[name] for name in names}
    inputs = (data["logits"], data["labels"], data["attn_logits"][:layers], data["masks"][:layers], data["feature"])
    return losses.idlevit(*inputs, **dense, **options)


def test_golden_files_have_these_cases() -> None:
    assert set(load("dynamicvit")["cases"]) == set(DYNAMICVIT)
    assert set(load("idlevit")["cases"]) == set(IDLEVIT)


@pytest.mark.parametrize("name", DYNAMICVIT)
def test_dynamicvit_is_official(name: str) -> None:
    data = load("dynamicvit")
    case, (token, weight) = data["cases"][name], name.split("_")
    got = dynamicvit(data, ratio_weight=float(weight[2:]), token="mse" if token == "mse1" else "kl")
    near(got.total, case["loss"])
    near(got.cls, case["cls"])
    near(got.ratio * len(data["keep_ratio"]), case["ratio_sum"])
    near(got.kl, case["kl"])
    near(got.token, case["token"])


def test_dynamicvit_defaults_are_official() -> None:
    near(dynamicvit(load("dynamicvit")).total, load("dynamicvit")["cases"]["mse1_rw2"]["loss"])


def test_dynamicvit_mask_is_the_last_decision() -> None:
    data = load("dynamicvit")
    assert torch.equal(data["mask"].squeeze(-1), data["decisions"][-1])


def test_dynamicvit_keeping_nothing_is_finite() -> None:
    data = load("dynamicvit")
    got = dynamicvit(data | {"decisions": torch.zeros_like(data["decisions"])})
    assert got.token == 0
    assert got.total.isfinite()


def test_dynamicvit_trains_student_and_decisions_only() -> None:
    data = {name: value.clone() for name, value in load("dynamicvit").items() if name != "cases"}
    learned, constant = ("pred", "tokens", "decisions"), ("teacher_pred", "teacher_tokens")
    for name in learned + constant:
        data[name].requires_grad_()
    for token in ("mse", "kl"):
        dynamicvit(data, token=token).total.backward()
    assert all(data[name].grad.abs().sum() > 0 for name in learned)
    assert all(data[name].grad is None for name in constant)


def test_dynamicvit_refuses_what_it_does_not_know() -> None:
    data = load("dynamicvit")
    with pytest.raises(ConfigError, match="token='mae'"):
        dynamicvit(data, token="mae")
    with pytest.raises(ValueError):
        dynamicvit(data | {"keep_ratio": [0.7]})


@pytest.mark.parametrize("name", IDLEVIT)
def test_idlevit_is_official(name: str) -> None:
    """With four layers the official cut loss sums layers 0 and 2 only; here it is corrected to all four."""
    data = load("idlevit")
    case, (kinds, layers, teacher) = data["cases"][name], name.split("_")
    count = int(layers[1:])
    skipped = [1, 3] if count == 4 else []
    missing = losses.cut(data["attn_logits"][skipped], data["masks"][skipped], **KINDS[kinds]) if skipped else 0
    got = idlevit(data, count, teacher == "distill1", **KINDS[kinds])
    near(got.cut * count, case["cut_loss_raw"] + missing)
    near(got.total, case["loss"] + 20 / count * missing)
    near(got.cls, case["cls"])
    near(got.kl, case["kl"])
    near(got.feature, case["feat"])


@pytest.mark.parametrize("kinds", ["both", "inter", "intra"])
def test_official_cut_skips_every_second_layer(kinds: str) -> None:
    data = load("idlevit")
    official = data["cases"][f"{kinds}_L4_distill0"]["cut_loss_raw"]
    pairs = zip(data["attn_logits"].split(1), data["masks"].split(1))
    each = torch.stack([losses.cut(logits, mask, **KINDS[kinds]) for logits, mask in pairs])
    near(each[0] + each[2], official)
    near(losses.cut(data["attn_logits"], data["masks"], **KINDS[kinds]), each.sum())
    assert each.sum() - official > 0.1


def test_cut_sums_all_layers() -> None:
    data = load("idlevit")
    layers, masks = list(data["attn_logits"]), list(data["masks"])
    near(losses.cut(layers, masks), data["per_layer_cut_both"].sum())
    for logits, mask, expected in zip(layers, masks, data["per_layer_cut_both"]):
        near(losses.cut([logits], [mask]), expected)


def test_cut_refuses_a_layer_without_a_mask() -> None:
    data = load("idlevit")
    with pytest.raises(ValueError):
        losses.cut(data["attn_logits"], data["masks"][:3])


def test_idlevit_trains_the_student_only() -> None:
    data = {name: value.clone() for name, value in load("idlevit").items() if name != "cases"}
    learned, constant = ("logits", "feature", "attn_logits"), ("teacher_logits", "teacher_feature")
    for name in learned + constant:
        data[name].requires_grad_()
    idlevit(data, 4, True).total.backward()
    assert all(data[name].grad.abs().sum() > 0 for name in learned)
    # Every layer learns, those too that the official sum skips.
    assert (data["attn_logits"].grad.flatten(1).abs().sum(1) > 0).all()
    assert all(data[name].grad is None for name in constant)


# Probabilities of label 0: 0.9, 0.5, 0.3.
SURE = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.3, 0.7]]).log()


@pytest.mark.parametrize(("threshold", "expected"), [(0.0, 14 / 6), (0.4, 2.5), (0.6, 0.5), (0.95, 0.0)])
def test_consistency_counts_samples_that_are_sure(threshold: float, expected: float) -> None:
    student = torch.zeros(3, 2)
    teacher = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]])
    got = losses.consistency(student, teacher, SURE, torch.tensor([0, 0, 0]), threshold)
    near(got, torch.tensor(expected))


def test_consistency_asks_for_the_label() -> None:
    student, teacher = torch.zeros(3, 2), torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]])
    # The probabilities of these labels: 0.1, 0.5, 0.7.
    near(losses.consistency(student, teacher, SURE, torch.tensor([1, 0, 1])), torch.tensor((4.5 + 2) / 2))


def test_consistency_trains_the_student_where_it_is_sure() -> None:
    student, teacher = torch.zeros(3, 2, requires_grad=True), torch.ones(3, 2, requires_grad=True)
    logits = SURE.clone().requires_grad_()
    losses.consistency(student, teacher, logits, torch.tensor([0, 0, 0])).backward()
    near(student.grad, torch.tensor([[-0.5, -0.5], [-0.5, -0.5], [0.0, 0.0]]))
    assert teacher.grad is None
    assert logits.grad is None


def test_consistency_without_a_sure_sample_has_a_gradient() -> None:
    student = torch.zeros(3, 2, requires_grad=True)
    losses.consistency(student, torch.ones(3, 2), SURE, torch.tensor([0, 0, 0]), 1.0).backward()
    assert torch.equal(student.grad, torch.zeros(3, 2))


def passes(seed: int, images: int = 6) -> tuple[Tensor, Tensor]:
    """Features [B, 4] and logits [B, 3] that are to be trained."""
    generator = torch.Generator().manual_seed(seed)
    made = (torch.randn(images, width, generator=generator, dtype=torch.float64) for width in (4, 3))
    features, logits = (2 * values for values in made)
    return features.requires_grad_(), logits.requires_grad_()


LABELS = torch.tensor([0, 1, 2, 2, 1, 0])


def written_out(student: tuple[Tensor, Tensor], gentler: tuple[Tensor, Tensor], target: Tensor) -> list[Tensor]:
    """Mean over samples of sum of -target log p, for both passes; and the consistency, sample by sample."""
    own, second = (-(target * y.log_softmax(1)).sum(1).mean() for _, y in (student, gentler))
    label = target.argmax(1)
    sure = [i for i in range(len(label)) if student[1][i].softmax(0)[label[i]] > 0.4]
    assert 0 < len(sure) < len(label)
    distance = [(gentler[0][i].detach() - student[0][i]).pow(2).sum() / 4 for i in sure]
    return [own, second, torch.stack(distance).mean()]


def gradients_of(total: Tensor, *tensors: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(total, tensors))


def test_mctf_is_the_sum_of_its_formula() -> None:
    student, gentler = passes(0), passes(1)
    smooth = 0.8 * torch.nn.functional.one_hot(LABELS, 3) + 0.2 / 3
    parts = written_out(student, gentler, smooth)
    expected = parts[0] + parts[1] + 2 * parts[2]
    got = losses.mctf(student, LABELS, gentler, consistency_weight=2, label_smoothing=0.2)
    for a, b in zip((got.own, got.gentler, got.consistency, got.total), (*parts, expected)):
        torch.testing.assert_close(a, b)
    learned = (*student, gentler[1])
    for a, b in zip(gradients_of(got.total, *learned), gradients_of(expected, *learned)):
        torch.testing.assert_close(a, b)
    assert torch.autograd.grad(got.total, gentler[0], allow_unused=True) == (None,)


def test_without_a_gentler_pass_it_is_the_cross_entropy() -> None:
    student = passes(0)
    got = losses.mctf(student, LABELS)
    torch.testing.assert_close(got.total, torch.nn.functional.cross_entropy(student[1], LABELS))
    assert got.gentler == got.consistency == 0


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_is_the_sum_of_its_formula(temperature: float) -> None:
    student, gentler, teacher = passes(0), passes(1), passes(2)[1]
    target = (teacher.detach() / temperature).softmax(1)
    scaled = [(features, logits / temperature) for features, logits in (student, gentler)]
    entropy = -(target * target.log()).sum(1).mean()
    # Which samples count does not depend on the temperature.
    consistency = written_out(student, gentler, target)[2]
    own, second = ((part - entropy) * temperature**2 for part in written_out(*scaled, target)[:2])
    expected = own + second + 3 * consistency
    got = losses.distillation(student, teacher, gentler, temperature=temperature)
    for a, b in zip((got.own, got.gentler, got.consistency, got.total), (own, second, consistency, expected)):
        torch.testing.assert_close(a, b)
    learned = (*student, gentler[1])
    for a, b in zip(gradients_of(got.total, *learned), gradients_of(expected, *learned)):
        torch.testing.assert_close(a, b)
    assert torch.autograd.grad(got.total, teacher, allow_unused=True) == (None,)


def test_a_teacher_that_is_followed_costs_nothing() -> None:
    student = passes(0)
    got = losses.distillation(student, student[1], student)
    torch.testing.assert_close(got.total, torch.zeros((), dtype=torch.float64))


def test_shares_of_a_batch_add_up_to_the_whole() -> None:
    """Gradients are the mean over two processes, of which one has no sample that counts."""
    student, gentler = passes(0), passes(1)
    label = student[1].argmin(1)
    label[4:] = student[1][4:].argmax(1)
    whole = losses.mctf(student, label, gentler)
    sure = [student[1][i].softmax(0)[label[i]] > 0.4 for i in range(6)]
    assert not any(sure[:3]) and sum(sure[3:]) > 1
    count = sum(sure)
    totals = []
    for share in (slice(0, 3), slice(3, 6)):
        own, other = (tuple(x[share] for x in part) for part in (student, gentler))
        totals.append(losses.mctf(own, label[share], other, over=lambda _: torch.as_tensor(count / 2)).total)
    learned = (*student, gentler[1])
    for a, b in zip(gradients_of(sum(totals) / 2, *learned), gradients_of(whole.total, *learned)):
        torch.testing.assert_close(a, b)


def test_a_mean_over_one_process_is_the_value() -> None:
    value = torch.tensor(3.0)
    assert losses.mean_over_processes(value) is value
