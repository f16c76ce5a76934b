"""Training: the losses of a step, its gradients alone and shared, and runs that are stopped, go on, or meet errors."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import mctf_compile
from mctf_compile import ConfigError, MctfError, cli
from mctf_compile.evaluating.images import Files
from mctf_compile.evaluating.sharding import World
from mctf_compile.finetuning.checkpoints import Checkpoints
from mctf_compile.finetuning.finetune import finetune
from mctf_compile.finetuning.recipe import Recipe
from mctf_compile.finetuning.samples import Part, Plan, Samples, chance, number_from, read
from mctf_compile.finetuning.student import Student
from mctf_compile.measuring import timm_models

# Both blocks fuse: of 17 tokens 6 leave in the first, and 4 in the second.
OPTIONS: dict[str, Any] = {"r": [6, 4], "layers": [0, 1], "min_tokens": 2, "kernels": "aten"}
REMOVED = [6, 4]


def tiny(*_: Any, **kwargs: Any) -> nn.Module:
    """Two blocks over 17 tokens, three classes, each of which is likely for some images."""
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = timm.create_model("vit_tiny_patch16_224", **shape, **kwargs)
    with torch.no_grad():
        # timm's small ones would make all images alike.
        for parameter in (p for p in model.parameters() if p.ndim > 1):
            nn.init.normal_(parameter, std=0.15)
    return model


IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
# One step of plain gradient descent: what changes is the gradient.
STEP = Recipe(epochs=1, batch=8, opt="momentum", lr=0.1, weight_decay=0, sched="none", smoothing=0.1, seed=4)
# What the blocks remove in its gentler pass.
FEWER = [2, 1]


def stepped(folder: Path, recipe: Recipe, labels: Tensor | None = LABELS, **kwargs: Any) -> dict[str, Tensor]:
    """The gradients that one step of ``finetune`` follows, by name, and its metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    finetune(model, IMAGES, labels, recipe, OPTIONS, Checkpoints(folder), **{"inner": "eager", **kwargs})
    after = load_file(folder / "weights.safetensors")
    return {name: (before[name] - after[name]) / recipe.lr for name in before}


def order_of(seed: int, epoch: int, images: int = 8) -> Tensor:
    return torch.randperm(images, generator=torch.Generator().manual_seed(number_from("order", seed, epoch)))


def plain_gradients(parts: int = 1, teacher: nn.Module | None = None) -> tuple[float, dict[str, Tensor], list[int]]:
    """Loss and gradients of the step by the paper's formula, without what trains: a graph for each schedule and part.

    The last are the places in the batch of samples that the consistency is of.
    """
    model, total, places = tiny().train(), torch.zeros(()), list[int]()

    def run(images: Tensor, r: list[int]) -> tuple[Tensor, Tensor]:
        torch._dynamo.reset()

        def forward(x: Tensor) -> tuple[Tensor, Tensor]:
            tokens = model.forward_features(x)
            return tokens[:, 0], model.head(tokens[:, 0])

        return torch.compile(forward, backend="mctf", options={**OPTIONS, "r": r, "inner": "eager"})(images)

    for number, part in enumerate(order_of(4, 0).chunk(parts)):
        images, labels = IMAGES[part], LABELS[part]
        (features, logits), (other_features, other_logits) = run(images, REMOVED), run(images, FEWER)
        if teacher is None:
            own = sum(cross_entropy(y, labels, label_smoothing=0.1) for y in (logits, other_logits))
        else:
            with torch.no_grad():
                target = teacher(images).softmax(-1)
            labels = target.argmax(-1)
            own = sum((target * (target.log() - y.log_softmax(-1))).sum(-1).mean() for y in (logits, other_logits))
        sure = [i for i in range(len(part)) if logits[i].softmax(0)[labels[i]] > 0.4]
        # The premise: some samples count, and others do not.
        assert 0 < len(sure) < len(part)
        places += [number * len(part) + i for i in sure]
        distances = [(other_features[i].detach() - features[i]).pow(2).mean() for i in sure]
        total = total + (own + 3 * sum(distances) / len(sure)) / parts
    total.backward()
    return total.item(), {name: parameter.grad for name, parameter in model.named_parameters()}, places


def same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        # A weight is of order 1, so what its change says of a gradient is rounded there.
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=2e-6, msg=name)


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_follows_the_gradient_of_the_paper_s_loss(parts: int, tmp_path: Path) -> None:
    """At once, with the backward compiled too; and in two parts that compute activations anew."""
    inner = "aot_eager" if parts == 1 else "eager"
    found = stepped(tmp_path, replace(STEP, accumulate=parts, checkpointing=parts > 1), inner=inner)
    loss, expected, _ = plain_gradients(parts)
    (line,) = metrics_of(tmp_path)
    assert line["fewer"] == max(FEWER) and line["loss"] == pytest.approx(loss, rel=1e-6)
    same_gradients(found, expected)


def test_without_labels_a_step_follows_the_dense_model(tmp_path: Path) -> None:
    teacher = tiny()
    nn.init.normal_(teacher.head.weight, std=0.3)
    found = stepped(tmp_path, STEP, None, teacher=teacher)
    loss, expected, _ = plain_gradients(teacher=teacher.eval())
    (line,) = metrics_of(tmp_path)
    assert line["loss"] == pytest.approx(loss, rel=1e-6)
    same_gradients(found, expected)


TWO = """
import sys
from dataclasses import replace
from pathlib import Path
from test_finetune import *
from mctf_compile.evaluating.sharding import world

torch.set_num_threads(1)
folder = Path(sys.argv[1])


class Stopped(Exception):
    pass


def stop(what, done, total):
    if what.startswith("epoch 2"):
        raise Stopped


PROGRESS = {"ddp": None, "fsdp": stop}
with world() as processes:
    for kind in ("ddp", "fsdp"):
        given = {"inner": "eager", "world": processes, "sharded": kind == "fsdp"}
        (folder / kind).mkdir(exist_ok=True)
        checkpoints = Checkpoints(folder / kind, processes.first)
        try:
            finetune(tiny(), IMAGES, LABELS, RUN, OPTIONS, checkpoints, **given, progress=PROGRESS[kind])
        except Stopped:
            found = finetune(tiny(), IMAGES, LABELS, RUN, OPTIONS, checkpoints, **given)
            assert found.begun == 1, found
"""
RUN = replace(STEP, epochs=2, ema=0.5)


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    """By DDP, and by FSDP2 with a run that is stopped and goes on: the gradients of a step, and the end of the run."""
    program, root = tmp_path / "program.py", Path(__file__).parents[1]
    program.write_text(TWO)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, program, tmp_path],
        env={**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    loss, expected, places = plain_gradients()
    # The premise: not as many samples count on the one process as on the other.
    assert sum(place < 4 for place in places) != sum(place >= 4 for place in places)
    (tmp_path / "alone").mkdir()
    finetune(tiny(), IMAGES, LABELS, RUN, OPTIONS, Checkpoints(tmp_path / "alone"), inner="eager")
    before = tiny().state_dict()
    for kind in ("ddp", "fsdp"):
        lines = metrics_of(tmp_path / kind)
        assert [line["step"] for line in lines] == [1, 2] and lines[0]["loss"] == pytest.approx(loss, rel=1e-6)
        after = torch.load(tmp_path / kind / "checkpoint-00000001.pt", weights_only=True)["model"]
        same_gradients({name: (before[name] - after[name]) / RUN.lr for name in before}, expected)
        for name in ("weights.safetensors", "weights-ema.safetensors"):
            alone, together = (load_file(tmp_path / where / name) for where in ("alone", kind))
            assert alone.keys() == together.keys()
            for key, value in alone.items():
                torch.testing.assert_close(together[key], value, rtol=1e-5, atol=2e-6, msg=key)


# What each step sees.


def test_a_plan_is_the_same_for_several_processes_and_from_any_step_on() -> None:
    alone = list(Plan(11, 4, 2, 3, seed=5))
    assert len(alone) == 3 * 2 * 2 and Plan(11, 4, 2, 3, seed=5).steps == 6
    epochs = [[number for part in alone if part.epoch == epoch for number in part.numbers] for epoch in range(3)]
    assert all(len(set(seen)) == len(seen) == 8 and set(seen) <= set(range(11)) for seen in epochs)
    assert len({tuple(seen) for seen in epochs}) == 3
    both = [list(Plan(11, 4, 2, 3, seed=5, world=World(rank, 2))) for rank in (0, 1)]
    assert [Part(a.epoch, a.numbers + b.numbers) for a, b in zip(*both)] == alone
    for start in range(7):
        assert list(Plan(11, 4, 2, 3, seed=5, start=start)) == alone[2 * start :]
    assert list(Plan(11, 4, 2, 3, seed=6)) != alone


@pytest.mark.parametrize(
    ("given", "message"),
    [((3, 4, 1, 1), "3 images are fewer than a batch of 4"), ((9, 4, 3, 1), "in 3 equal parts by 1 processes each")],
)
def test_a_batch_that_cannot_be_made_is_refused(given: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Plan(*given, seed=0)


class Noise:
    """Images of which all three sources of chance have a part."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, part: slice) -> Tensor:
        return torch.rand(1, 3, 2, 2) + random.random() + float(np.random.rand())


@pytest.mark.parametrize("workers", [0, 1])
def test_augmentation_depends_on_seed_epoch_and_number_alone(workers: int) -> None:
    seen = {}
    for seed, start in ((1, 0), (1, 3), (2, 0)):
        for part, images in read(Plan(10, 2, 1, 2, seed=0, start=start), Samples(Noise(), seed), workers):
            for number, image in zip(part.numbers, images):
                key = (seed, part.epoch, number)
                assert torch.equal(seen.setdefault(key, image), image)
    assert len({float(image[0, 0, 0]) for image in seen.values()}) == len(seen) == 2 * 2 * 10


def test_what_was_left_to_chance_before_is_as_it_was() -> None:
    def draw() -> tuple[float, ...]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    with chance("a", 1):
        first = draw()
    assert states[:2] == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(states[2], torch.get_rng_state())
    with chance("a", 1):
        assert draw() == first
    with chance("a", 2):
        assert not set(draw()) & set(first)


def student(options: dict[str, Any], **given: Any) -> Student:
    return Student(
        tiny().train(), IMAGES[:1], options, inner="eager", gentle=True, world=World(), sharded=False, **given
    )


def test_the_gentler_pass_removes_less_than_half_by_chance() -> None:
    found = student({**OPTIONS, "r": 6})
    assert found.removed == [6, 5]
    counts = Counter(tuple(found.fewer(0, step)) for step in range(300))
    assert set(counts) == {(0, 0), (1, 0), (2, 1)} and min(counts.values()) > 70
    assert [found.fewer(3, step) for step in range(9)] == [found.fewer(3, step) for step in range(9)]


def test_methods_without_an_r_have_no_gentler_pass() -> None:
    assert student({"method": "evit", "keep_rate": 0.5, "layers": [0, 1]}).fewer(0, 0) is None


def test_several_r_are_one_compilation(tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    recipe = Recipe(epochs=6, batch=8, lr=1e-3, seed=3)
    graphs = []
    finetune(
        tiny(),
        IMAGES,
        LABELS,
        recipe,
        OPTIONS,
        Checkpoints(tmp_path),
        inner="eager",
        progress=lambda *_: graphs.append(counters["stats"]["unique_graphs"]),
    )
    assert {line["fewer"] for line in metrics_of(tmp_path)} == {0, 1, 2} and max(graphs) == 1


def test_the_modules_of_a_method_learn(tmp_path: Path) -> None:
    model = mctf_compile.attach(tiny(), IMAGES, method="dtem", layers=[0, 1])
    before = {name: value.clone() for name, value in model.state_dict().items() if name.startswith("mctf_dtem")}
    options = {"method": "dtem", "r": 4, "layers": [0, 1], "kernels": "aten"}
    finetune(model, IMAGES, LABELS, STEP, options, Checkpoints(tmp_path), inner="eager")
    _, learned = timm_models.read_weights(tmp_path / "weights.safetensors")
    assert learned.keys() == before.keys() and len(learned) > 0
    # What the last block merges, behind its attention, the class token does not see.
    first = [name for name in before if name.startswith("mctf_dtem.0.")]
    assert first and all((learned[name] != before[name]).any() for name in first)


def test_a_loss_that_is_not_finite_ends_the_run_before_the_weights_change(tmp_path: Path) -> None:
    images = IMAGES.clone()
    images[int(order_of(0, 0)[7])] = torch.nan
    model = tiny()
    with pytest.raises(MctfError, match="the loss of step 2 is nan; a smaller learning rate"):
        recipe = Recipe(epochs=1, batch=4, lr=1e-3, sched="none")
        finetune(model, images, LABELS, recipe, OPTIONS, Checkpoints(tmp_path), inner="eager", save_every=1)
    saved = Checkpoints(tmp_path).read()
    assert saved["step"] == 1
    assert all(torch.equal(saved["model"][name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"opt": "adamv"}, "timm has no optimizer 'adamv'; did you mean"),
        ({"sched": "cosines"}, "sched='cosines': Unknown scheduler"),
        ({"sched": "plateau"}, "sched='plateau' follows the accuracy"),
        ({"lr": -1.0}, "lr=-1.0 must be a number >= 0"),
        ({"smoothing": 1.0}, "smoothing=1.0 must be a number from 0 to below 1"),
        ({"ema": 1.0}, "ema=1.0 must be a number above 0 and below 1"),
        ({"epochs": 0}, "epochs=0 must be a whole number above 0"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe = Recipe(**given)
        recipe.scheduler(recipe.optimizer(nn.Linear(2, 2)), 10)


def test_a_model_that_cannot_compute_activations_anew_is_refused(tmp_path: Path) -> None:
    model = tiny()
    model.set_grad_checkpointing = None
    with pytest.raises(ConfigError, match="checkpointing: the model does not offer it"):
        finetune(model, IMAGES, LABELS, replace(STEP, checkpointing=True), OPTIONS, Checkpoints(tmp_path))


def test_a_model_in_which_nothing_fuses_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MctfError, match="nothing to train with fused tokens: not among the layers that fuse"):
        finetune(tiny(), IMAGES, LABELS, STEP, {**OPTIONS, "r": 4, "layers": []}, Checkpoints(tmp_path))


# Runs of the command that are stopped, and go on.

COMMAND = ["--img-size", "32", "--epochs", "2", "--batch", "4", "--ema", "0.5", "--lr", "0.01", "--seed", "3"]
COMMAND += ["--save-every", "1", "--inner", "eager", "--r", "6,4", "-o", "kernels=aten", "-o", "layers=[0,1]"]
COMMAND += ["-o", "min_tokens=2"]
FINISHED = ["metrics.jsonl", "weights-ema.safetensors", "weights.safetensors"]


def make_images(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 4, 3 and 3 images: two steps an epoch, and two images that are not seen in it."""
    folder = tmp_path_factory.mktemp("data") / "classes"
    for name, count in (("ant", 4), ("bee", 3), ("cat", 3)):
        make_images(folder / name, count)
    return folder


@pytest.fixture(scope="module", autouse=True)
def tiny_models() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(timm_models, "make_model", tiny)
        yield


def train(data: Path, folder: Path, *more: str) -> int:
    return cli.main(["finetune", "tiny", str(data), "--output", str(folder), *COMMAND, *more])


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(data, folder) == 0
    return folder


@pytest.fixture(scope="module")
def stopped(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that was stopped by Ctrl-C while images of the third of four steps were read."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patched:
        interrupt(patched, 2 * 4 + 3)
        assert train(data, folder) == 130
    return folder


def interrupt(patched: pytest.MonkeyPatch, after: int) -> None:
    """Have Ctrl-C come while an image is read, after as many; the first is for looking at the model."""
    read_one, seen = Files.__getitem__, list[slice]()

    def read_or_stop(self: Files, part: slice) -> Tensor:
        seen.append(part)
        if len(seen) > after:
            raise KeyboardInterrupt
        return read_one(self, part)

    patched.setattr(Files, "__getitem__", read_or_stop)


@pytest.fixture
def again(stopped: Path, tmp_path: Path) -> Path:
    """A copy of the run that was stopped."""
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def the_same(folder: Path, whole: Path) -> None:
    """To the last bit, weights, averages and what was said of each step."""
    found, expected = files_of(folder), files_of(whole)
    assert found.keys() == expected.keys()
    for name in FINISHED:
        assert found[name] == expected[name], name


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The error message: the one line on stderr that the command signs."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mctf: ")]
    return line


def test_a_run_keeps_two_checkpoints_metrics_and_weights(whole: Path) -> None:
    kept = ["checkpoint-00000003.pt", "checkpoint-00000004.pt", *FINISHED]
    assert sorted(files_of(whole)) == sorted([*kept, "run.json"])
    lines = metrics_of(whole)
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and [line["epoch"] for line in lines] == [1, 1, 2, 2]
    # timm's cosine: from 0.01 down to 1e-6.
    cosine = [1e-6 + (0.01 - 1e-6) * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert [line["lr"] for line in lines] == pytest.approx(cosine)
    assert all(line["loss"] == pytest.approx(line["own"] + line["gentler"] + 3 * line["consistency"]) for line in lines)
    averaged, last = (load_file(whole / name) for name in ("weights-ema.safetensors", "weights.safetensors"))
    assert averaged.keys() == last.keys() and any((averaged[name] != last[name]).any() for name in last)


def test_its_weights_load_strictly_and_are_evaluated(
    whole: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("weights.safetensors", "weights-ema.safetensors"):
        timm.models.load_checkpoint(tiny(), str(whole / name), strict=True)
    found = tmp_path / "found.json"
    weights = ["--weights", str(whole / "weights.safetensors"), "--img-size", "32", "--rounds", "0"]
    assert cli.main(["evaluate", "tiny", str(data), *weights, "--options", "r=4", "--json", str(found)]) == 0
    assert json.loads(found.read_text())["weights"] == "weights.safetensors"


def test_a_run_that_was_stopped_ends_as_if_it_was_not(
    again: Path, whole: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sorted(files_of(again)) == ["checkpoint-00000001.pt", "checkpoint-00000002.pt", "metrics.jsonl", "run.json"]
    # What a write that was cut off leaves behind.
    with open(again / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 3, "epoch": 2, "lr": 9}\n{"step": 4, "epo')
    assert train(data, again) == 0
    the_same(again, whole)
    assert "after 4 steps, 2 of them before" in capsys.readouterr().out


def test_ctrl_c_says_how_to_go_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt(monkeypatch, 3)
    assert train(data, tmp_path / "run") == 130
    assert "no checkpoint yet; the same command starts anew" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(timm_models, "make_model", tiny)
    interrupt(monkeypatch, 6)
    assert train(data, tmp_path / "run") == 130
    assert "checkpoint-00000001.pt is whole; the same command goes on from there" in capsys.readouterr().err


KILLED = """
import os, signal, sys
import torch
from test_finetune import COMMAND, tiny
from mctf_compile.finetuning import checkpoints
from mctf_compile.measuring import timm_models

torch.set_num_threads(1)
timm_models.make_model = tiny
save, saved = torch.save, []


def save_and_die(values, file):
    save(values, file)
    saved.append(file)
    if len(saved) == 3:
        os.truncate(file, os.path.getsize(file) // 2)
        os.kill(os.getpid(), signal.SIGKILL)


torch.save = save_and_die
from mctf_compile.cli import main

raise SystemExit(main(["finetune", "tiny", sys.argv[1], "--output", sys.argv[2], *COMMAND]))
"""


def test_a_run_that_was_killed_while_it_wrote_ends_as_if_it_was_not(data: Path, whole: Path, tmp_path: Path) -> None:
    program, folder, root = tmp_path / "program.py", tmp_path / "run", Path(__file__).parents[1]
    program.write_text(KILLED)
    done = subprocess.run(
        [sys.executable, program, data, folder],
        env={**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = ["checkpoint-00000001.pt", "checkpoint-00000002.pt", "checkpoint-00000003.pt.new"]
    assert sorted(files_of(folder)) == [*left, "metrics.jsonl", "run.json"]
    assert [line["step"] for line in metrics_of(folder)] == [1, 2, 3]
    assert train(data, folder) == 0
    the_same(folder, whole)


def test_a_finished_run_has_nothing_left_to_do(
    whole: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    (folder / "weights.safetensors").unlink()
    assert train(data, folder) == 0
    the_same(folder, whole)
    assert "after 4 steps, 4 of them before" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["cut", "noise", "another"])
def test_a_damaged_checkpoint_is_named_and_nothing_is_lost(
    damage: str, again: Path, whole: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = again / "checkpoint-00000002.pt"
    if damage == "another":
        torch.save({"model": {}}, newest)
    else:
        size = newest.stat().st_size
        newest.write_bytes(newest.read_bytes()[: size // 2] if damage == "cut" else random.Random(0).randbytes(size))
    before = files_of(again)
    assert train(data, again) == 1
    line = one_line(capsys)
    assert "checkpoint-00000002.pt is damaged" in line
    assert "Without this file the same command goes on from checkpoint-00000001.pt" in line
    assert files_of(again) == before
    if damage == "cut":
        newest.unlink()
        assert train(data, again) == 0
        the_same(again, whole)


def test_a_full_disk_is_said_and_nothing_is_lost(
    again: Path, whole: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of more than 50 kB cannot be written; a checkpoint is one."""
    before, limits = files_of(again), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        assert train(data, again) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    line = one_line(capsys)
    assert "checkpoint-00000003.pt cannot be written" in line
    assert "checkpoint-00000002.pt is whole, and the same command goes on from there" in line
    after = files_of(again)
    # The third step was done, and said.
    assert len(after.pop("metrics.jsonl").splitlines()) == 3
    assert after == {name: content for name, content in before.items() if name != "metrics.jsonl"}
    assert train(data, again) == 0
    the_same(again, whole)


def test_a_power_failure_finds_the_file_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written, synchronised, renamed, in this order."""
    order = list[str]()
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, call=call: (order.append(name), call(*a))[1])
    Checkpoints(tmp_path).write(1, {})
    assert order == ["fsync", "replace", "fsync"] and Checkpoints(tmp_path).read()["step"] == 1


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_image_that_cannot_be_read_is_named_and_nothing_is_lost(
    workers: str, again: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Path(shutil.copytree(data, tmp_path / "data"))
    # One that the third step sees; the first of all is looked at before.
    number = next(number for number in order_of(3, 1, 10)[:4].tolist() if number != 0)
    file = sorted(broken.rglob("*.png"))[number]
    file.write_bytes(bytes(file.stat().st_size))
    checkpoints = {name: content for name, content in files_of(again).items() if name.endswith(".pt")}
    assert train(broken, again, "--workers", workers) == 1
    assert f"{file} cannot be read" in one_line(capsys)
    assert {name: content for name, content in files_of(again).items() if name.endswith(".pt")} == checkpoints


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lr", "0.02"], "its lr is 0.01, and now it is 0.02; name another folder"),
        (["--distill"], "its teacher is None, and now it is"),
        (["--augment", "re_prob=0.5"], "its transform is"),
        (["--limit", "8"], "its images is"),
    ],
)
def test_a_folder_of_another_run_is_refused(
    more: list[str], message: str, again: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(data, again, *more) == 2
    line = one_line(capsys)
    assert "holds another training run" in line
    assert message in line


@pytest.mark.parametrize(
    ("classes", "more", "message"),
    [
        (None, [], "no such folder"),
        ({}, [], "has no subfolders; it needs one for each class"),
        ({"ant": 3, "bee": 2}, [], "has 2 subfolders, one for each class, and the model has 3 classes; name the"),
        ({"ant": 3, "bee": 2, "cat": 0}, [], "cat has no images; a class is learned from some"),
        ({"0": 3, "3": 1}, [], "'3' is the class 3; the model has the 3 classes from 0 to 2"),
        ({"ant": 1, "bee": 1, "cat": 1}, [], "3 images are fewer than a batch of 4"),
        ({"ant": 2, "bee": 2, "cat": 2}, ["--accumulate", "3"], "a batch of 4 images cannot be computed in 3 equal"),
        ({"ant": 2, "bee": 2, "cat": 2}, ["--opt", "adamv"], "timm has no optimizer 'adamv'"),
        ({"ant": 2, "bee": 2, "cat": 2}, ["--augment", "auto_augmnt=x"], "timm has no augmentation by auto_augmnt='x'"),
        ({"ant": 2, "bee": 2, "cat": 2}, ["-o", "tau_simm=1"], "did you mean 'tau_sim'"),
        ({"ant": 2, "bee": 2, "cat": 2}, ["--fsdp"], "shared among several processes, and this is the only one"),
        ({}, ["--distill"], "has no images, and no subfolders with some"),
    ],
)
def test_what_is_wrong_with_the_command_line_is_one_line(
    classes: dict[str, int] | None,
    more: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images = tmp_path / "images"
    if classes is not None:
        images.mkdir()
        for name, count in classes.items():
            make_images(images / name, count)
    assert train(images, tmp_path / "run", *more) == 2
    assert message in one_line(capsys)


def test_distillation_takes_a_folder_without_classes_and_another_teacher(
    tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = make_images(tmp_path / "images", 4)
    weights = []
    for name, more in (("own", ["--distill"]), ("other", ["--teacher", str(whole / "weights.safetensors")])):
        assert train(images, tmp_path / name, "--epochs", "1", "--ema", "0.9", *more) == 0
        (line,) = metrics_of(tmp_path / name)
        # The dense model is near its own fused one, and far from what was trained.
        assert (line["own"] < 0.05) is (name == "own")
        weights.append((tmp_path / name / "weights.safetensors").read_bytes())
    assert weights[0] != weights[1]


def test_numbers_map_and_limit_choose_images_and_labels(data: Path, tmp_path: Path) -> None:
    from mctf_compile.cli.finetune import images_of

    def chosen(*more: str) -> tuple[list[str], list[int]]:
        args = cli.parser().parse_args(["finetune", "tiny", str(data), "--output", str(tmp_path), *more])
        paths, labels, _ = images_of(args, 3)
        return [path.parent.name for path in paths], labels.tolist()

    (tmp_path / "names.txt").write_text("cat\nant\nbee\n")
    names, labels = chosen("--class-map", str(tmp_path / "names.txt"), "--limit", "5")
    assert labels == [("cat", "ant", "bee").index(name) for name in names] and len(names) == 5
    assert chosen()[1] == [0] * 4 + [1] * 3 + [2] * 3
