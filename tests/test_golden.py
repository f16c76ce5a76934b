"""The fused model against vectors of the official MCTF implementation; see golden/README.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, fx, nn
from vectors import Recorder, capture, load, near, official_match

import mctf_compile

ATTENTION = {0: "current", 1: "approx", 2: "exact"}
POOLING = {0: "size", 1: "attention", 2: "max", 3: "mean"}

# The whole way through torch.compile.
END_TO_END = [
    ("grid17", "bi1_pool1_osa1_r4"),
    ("grid17", "bi0_pool2_osa2_r4"),
    ("edge17", "protected0"),
    ("tok65_f64", "default_r12"),
]


def case_ids(*files: str) -> list[Any]:
    return [pytest.param(f, c, id=f"{f}-{c}") for f in files for c in load(f)["cases"]]


EVAL = case_ids("grid17", "edge17", "tok65", "tok65_f64")


def dtype_of(file: str) -> torch.dtype:
    return torch.float64 if file.endswith("f64") else torch.float32


def images_of(file: str) -> Tensor:
    data = load(file)
    return load(data.get("images_of", file))["images"].to(dtype_of(file))


def vit(file: str) -> VisionTransformer:
    """The model of ``file``, in eval mode."""
    weights = load("weights")[load(file)["weights"]]
    patch = weights["patch_embed.proj.weight"].shape[-1]
    model = VisionTransformer(img_size=32, patch_size=patch, embed_dim=48, depth=4, num_heads=3, num_classes=10)
    model.load_state_dict(weights)
    return model.eval().to(dtype_of(file))


class Readout(nn.Module):
    """A ViT that returns the class token after the final norm beside the logits."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.model.forward_features(images)
        return tokens[:, 0], self.model.forward_head(tokens)


def options_of(config: dict[str, Any]) -> dict[str, Any]:
    """The official settings as options of the backend."""
    ratio = isinstance(config["r"], float)
    options = {
        "r": config["r"],
        "layers": config["layers"],
        "attention": ATTENTION[config["one_step_ahead"]],
        "matching": "bidirectional" if config["bidirection"] else "one_way",
        "pooling": POOLING[config["pooling_type"]],
        "proportional": bool(config["prop_attn"]),
        "inner": "eager",
        # Officially the floor of ten tokens does not hold for ratios.
        "min_tokens": 1 if ratio else 10,
    }
    options |= {name: float(config[name]) for name in ("tau_sim", "tau_info", "tau_size")}
    if "num_protected" in config:
        options["protected"] = config["num_protected"]
    return options


@dataclass(frozen=True)
class Run:
    """What one case computed: tensors only, so that no graph stays alive."""

    logits: Tensor
    last: Tensor
    matches: list[tuple[Tensor, Tensor, Tensor]]
    groups: list[tuple[Tensor, Tensor, Tensor]]
    tokens_out: list[int]


@cache
def captured(file: str) -> tuple[fx.GraphModule, list[Tensor]]:
    with torch.no_grad():
        return capture(vit(file), images_of(file))


@cache
def run(file: str, name: str) -> Run:
    """Rewrite the captured graph with the options of a case, and run it."""
    gm, inputs = captured(file)
    config = mctf_compile.FusionConfig.from_options(options_of(load(file)["cases"][name]["config"]))
    with torch.no_grad():
        fused, report = mctf_compile.rewrite(gm, inputs, config)
        recorder = Recorder(fused)
        (logits,) = recorder.run(*inputs)
    tokens_out = [block.tokens_out for block in report.blocks]
    return Run(logits, recorder.normed, recorder.matches, recorder.groups, tokens_out)


@pytest.mark.parametrize(("file", "name"), EVAL)
def test_outputs_are_official(file: str, name: str) -> None:
    case, got = load(file)["cases"][name], run(file, name)
    near(got.logits, case["logits"])
    near(got.last, case["x_out"])


@pytest.mark.parametrize(("file", "name"), EVAL)
def test_matching_is_official(file: str, name: str) -> None:
    case, got = load(file)["cases"][name], run(file, name)
    n = case["source"].shape[2]
    fusing = [block["match"] for block in case["blocks"] if "match" in block]
    assert len(got.matches) == len(fusing)
    for matched, match in zip(got.matches, fusing):
        official = official_match(match, n)
        for actual, expected in zip(matched, official):
            assert torch.equal(actual, expected)
        n = official[0].shape[1]
    assert got.tokens_out == case["tokens_out"]


@pytest.mark.parametrize(("file", "name"), EVAL)
def test_tokens_come_from_official_sources(file: str, name: str) -> None:
    case, got = load(file)["cases"][name], run(file, name)
    images, final, n = case["source"].shape
    indices = [group[0] for group in got.groups]
    if len(indices) < len(got.matches):
        # The last map and sizes have no reader where the last block fuses by the maximum.
        assert (case["config"]["pooling_type"], case["config"]["one_step_ahead"]) == (2, 0)
        keep, gone, into = got.matches[-1]
        new = torch.arange(keep.shape[1]).expand_as(keep)
        indices.append(torch.zeros(images, keep.shape[1] + gone.shape[1], dtype=torch.long))
        indices[-1].scatter_(1, torch.cat([keep, gone], 1), torch.cat([new, into], 1))
    assert len(indices) == len(got.matches)
    place = torch.arange(n).expand(images, -1)
    for index in indices:
        place = index.gather(1, place)
    assert torch.equal(place[:, None] == torch.arange(final)[:, None], case["source"])


@pytest.mark.parametrize(("file", "name"), EVAL)
def test_sizes_are_official(file: str, name: str) -> None:
    case, got = load(file)["cases"][name], run(file, name)
    official = [block["size_out"] for block in case["blocks"] if "match" in block]
    assert len(official) - len(got.groups) in (0, 1)
    for (_, _, size), expected in zip(got.groups, official):
        assert torch.equal(size, expected)


@pytest.mark.parametrize(("file", "name"), [pytest.param(*c, id="-".join(c)) for c in END_TO_END])
def test_backend_gives_official_logits(file: str, name: str) -> None:
    case = load(file)["cases"][name]
    torch._dynamo.reset()
    model = torch.compile(vit(file), backend="mctf", options=options_of(case["config"]))
    with torch.no_grad():
        near(model(images_of(file)), case["logits"])


def check_training(case: dict[str, Any], model: nn.Module, fused: Callable[[int], Callable]) -> None:
    """Train on a student and a teacher, ``fused(r)`` of ``model``, and compare with the official step."""
    data = load("train17")
    images, labels = data["images"], data["labels"]
    model.zero_grad()
    student_cls, student = fused(case["r_student"])(images)
    teacher_cls, teacher = fused(case["r_teacher"])(images)
    consistency = (teacher_cls.detach() - student_cls).square().mean(-1)
    # Every sample counts: the vectors are from before a threshold.
    loss = mctf_compile.losses.mctf((student_cls, student), labels, (teacher_cls, teacher), threshold=-1).total
    loss.backward()

    near(student, case["x_student"])
    near(teacher, case["x_teacher"])
    near(consistency, case["loss_consistency"])
    near(loss, case["loss"])
    parameters = dict(model.named_parameters())
    for name, expected in case["grads"].items():
        largest = expected.abs().max().item()
        torch.testing.assert_close(parameters[name].grad, expected, rtol=0, atol=2e-5 * largest)


@cache
def trainee() -> tuple[VisionTransformer, fx.GraphModule, list[Tensor]]:
    model = vit("train17").train()
    return model, *capture(Readout(model), images_of("train17"))


@cache
def rewritten(attention: str, r: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The training graph with ``r`` tokens fewer per block; all share the parameters of ``trainee``."""
    _, gm, inputs = trainee()
    config = mctf_compile.FusionConfig(r=r, attention=attention)
    fused, _ = mctf_compile.rewrite(gm, inputs, config)
    # The captured inputs hold the images already.
    return lambda images: fused(*inputs)


@pytest.mark.parametrize("name", [pytest.param(c, id=c) for c in load("train17")["cases"]])
def test_training_step_is_official(name: str) -> None:
    case = load("train17")["cases"][name]
    check_training(case, trainee()[0], lambda r: rewritten(ATTENTION[case["one_step_ahead"]], r))


def test_training_step_through_backend_is_official() -> None:
    torch._dynamo.reset()
    model = vit("train17").train()

    def fused(r: int) -> Callable:
        options = {"r": r, "attention": "approx", "inner": "eager"}
        return torch.compile(Readout(model), backend="mctf", options=options, dynamic=False)

    check_training(load("train17")["cases"]["osa1_rt1"], model, fused)


@pytest.mark.parametrize("name", ["osa1_rt0", "osa1_rt2"])
def test_training_step_of_one_compiled_module_is_official(name: str) -> None:
    """Both passes are of one graph, whose r is changed in between, with its backward compiled."""
    torch._dynamo.reset()
    model, case = vit("train17").train(), load("train17")["cases"][name]
    options = {"r": case["r_student"], "dynamic_r": True, "inner": "aot_eager"}
    compiled = torch.compile(Readout(model), backend="mctf", options=options, dynamic=False)

    def fused(r: int) -> Callable:
        def run(images: Tensor) -> tuple[Tensor, Tensor]:
            with mctf_compile.set_r(compiled, r):
                return compiled(images)

        return run

    check_training(case, model, fused)
