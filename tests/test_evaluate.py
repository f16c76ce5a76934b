"""Evaluation: outcomes of every image, what is kept of them, statistics, corruptions, the table and the command."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from fractions import Fraction
from math import comb
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from mctf_compile import METHODS, ConfigError, FusionConfig, MctfError, cli, explain
from mctf_compile.cli.evaluate import check_plot
from mctf_compile.evaluating import result as results
from mctf_compile.evaluating import run as running
from mctf_compile.evaluating.corruptions import CORRUPTIONS, Corruption
from mctf_compile.evaluating.images import Files, Folder
from mctf_compile.evaluating.outcomes import Kept, Outcomes
from mctf_compile.evaluating.quality import Quality, quality
from mctf_compile.evaluating.result import draw, front, robustness, table, to_dict
from mctf_compile.evaluating.run import Evaluated, Evaluation, evaluate
from mctf_compile.evaluating.settings import DENSE, SWEEPS, Setting, chosen_methods, sweep, sweeps
from mctf_compile.evaluating.statistics import (
    calibration_error,
    loses_less,
    lower_bound,
    mcnemar,
    most_lost,
    paired_interval,
    upper_bound,
)
from mctf_compile.measuring import timm_models
from mctf_compile.measuring.timm_models import corrupted
from mctf_compile.testing import TinyViT, VitSpec

# timm's smallest plain ViT: six blocks, 100 patches of a 160x160 image.
MODEL = "test_vit"
COUNTS = [Setting("mctf", {"r": r, "min_tokens": 2}, f"mctf r={r}") for r in (2, 4, 10)]
BROKEN = [
    (Setting("mctf", {"r": 4, "tau_simm": 1.0}, "typing error"), "did you mean 'tau_sim'"),
    (Setting("mctf", {"r": [0, 4]}, "too short a list"), "r is a list of 2 entries"),
    (Setting("no_such_method", {}, "unknown"), "unknown method 'no_such_method'"),
    (Setting("mctf", {"r": 0}, "nothing to do"), "stays dense: r is 0"),
]


def some_images() -> Tensor:
    """Not a whole number of batches of 4."""
    return torch.randn(23, 3, 20, 20, generator=torch.Generator().manual_seed(1))


def tiny() -> TinyViT:
    """Three blocks over 26 tokens, of which the last two fuse."""
    torch.manual_seed(0)
    model = TinyViT(VitSpec(grid=5, position=True)).eval()
    with torch.no_grad():
        # Random weights prefer one class for all images, whatever is fused.
        model.head.bias -= model(some_images()).mean(0)
    return model


@pytest.fixture(scope="module")
def images() -> Tensor:
    return some_images()


@pytest.fixture(scope="module")
def labels(images: Tensor) -> Tensor:
    """What the dense model says, and three mistakes."""
    with torch.no_grad():
        found = tiny()(images).argmax(1)
    found[[0, 9, 22]] = (found[[0, 9, 22]] + 1) % 5
    return found


@pytest.fixture(scope="module")
def rows(images: Tensor, labels: Tensor) -> list[Evaluated]:
    settings = [*COUNTS, *(setting for setting, _ in BROKEN)]
    # Past its limit Dynamo would run a setting dense, unless told otherwise.
    with torch._dynamo.config.patch(recompile_limit=1):
        return evaluate(tiny(), images, labels, settings, batch=4, rounds=1).rows


def plain_accuracy(model: nn.Module, images: Tensor, labels: Tensor, options: dict) -> float:
    """The accuracy of the model, alone and image by image."""
    torch._dynamo.reset()
    fused = torch.compile(model, backend="mctf", options={**options, "inner": "eager"})
    with torch.no_grad():
        right = [fused(images[i : i + 1])[0].argmax().item() == labels[i].item() for i in range(len(images))]
    return sum(right) / len(right)


def test_the_dense_model_comes_first(rows: list[Evaluated]) -> None:
    assert [row.setting.label for row in rows[:2]] == ["dense", "mctf r=2"]
    assert rows[0].setting.method == DENSE and rows[0].reason is None
    assert rows[0].clean.top1 == 20 / 23 and rows[0].clean.agreement == 1


def test_accuracy_is_that_of_a_plain_loop(rows: list[Evaluated], images: Tensor, labels: Tensor) -> None:
    measured = {row.setting.label: row.clean.top1 for row in rows if row.reason is None}
    for setting in COUNTS:
        assert measured[setting.label] == plain_accuracy(tiny(), images, labels, setting.options)
    # The premise: settings that were mixed up, or run dense, would be seen.
    assert len({row.clean.top1 for row in rows[:4]}) == 4


def test_macs_are_those_of_explain(rows: list[Evaluated], images: Tensor) -> None:
    with torch.no_grad():
        reports = [explain(tiny(), images[:1], **setting.options) for setting in COUNTS]
    assert rows[0].gmacs == reports[0].macs_before / 1e9
    assert [row.gmacs for row in rows[1:4]] == [report.macs_after / 1e9 for report in reports]
    assert rows[3].gmacs < rows[2].gmacs < rows[1].gmacs < rows[0].gmacs


def test_a_setting_that_does_not_apply_says_why(rows: list[Evaluated]) -> None:
    broken = rows[1 + len(COUNTS) :]
    assert len(broken) == len(BROKEN)
    for (setting, message), row in zip(BROKEN, broken):
        assert row.setting == setting and message in row.reason and "\n" not in row.reason
        assert row.qualities == {} and row.gmacs is row.milliseconds is row.peak_bytes is None


def test_a_wrong_output_is_a_reason(monkeypatch: pytest.MonkeyPatch, images: Tensor, labels: Tensor) -> None:
    check = running.check_output
    wrong = lambda name, output, expected: check(name, [x / 0 if name == "mctf r=2" else x for x in output], expected)
    monkeypatch.setattr(running, "check_output", wrong)
    dense, fused = evaluate(tiny(), images, labels, COUNTS[:1], batch=4, rounds=1).rows
    assert "mctf r=2 has values that are not finite" in fused.reason and dense.reason is None


def test_an_error_of_the_model_itself_is_raised(labels: Tensor, images: Tensor) -> None:
    with pytest.raises(MctfError, match="output 0 of dense has values that are not finite"):
        evaluate(tiny(), images / 0, labels, [], batch=4, rounds=1)


@pytest.mark.parametrize(
    ("count", "settings", "message"),
    [(22, [], r"23 images \(clean\) and 22 labels"), (23, [COUNTS[0]] * 2, "two settings have the same label")],
)
def test_bad_arguments(count: int, settings: list, message: str, images: Tensor, labels: Tensor) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(tiny(), images, labels[:count], settings)


def test_counts_suit_the_size_of_the_model() -> None:
    assert [s.options["r"] for s in sweep("mctf", tokens=197, depth=12)] == [3, 7, 10, 13, 16]
    assert [s.label for s in sweep("mctf", tokens=9, depth=6)] == ["mctf r=1", "mctf r=2"]


def test_every_sweep_has_options_that_its_method_takes() -> None:
    assert "mctf" in chosen_methods()
    for method in chosen_methods():
        assert SWEEPS[method]
        for setting in sweep(method, 197, 12):
            FusionConfig.from_options({**setting.options, "method": method})


def test_sweeps_follow_the_order_asked_for(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "none", METHODS["mctf"])
    # 26 tokens, three blocks.
    labels = [s.label for s in sweeps(tiny(), images, ["none", "mctf", "none"])]
    assert labels == ["none", "mctf r=2", "mctf r=3", "mctf r=5", "mctf r=7", "mctf r=9"]


def test_a_method_without_a_sweep_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "mine", METHODS["mctf"])
    assert "mine" not in chosen_methods()
    with pytest.raises(ConfigError, match="no settings of 'mine' are known"):
        chosen_methods(["mctf", "mine"])


def test_a_model_without_tokens_is_refused(images: Tensor) -> None:
    with pytest.raises(MctfError, match="nothing to compare: the graph has no self-attention"):
        sweeps(nn.Sequential(nn.Flatten(), nn.Linear(1200, 5)), images)


def made_up(top1: float, lost: int = 0, won: int = 0) -> dict[str, Quality]:
    return {"clean": Quality(top1, 0.9, 0.95, lost, won, (-0.1, 0.05), 0.5, 0.03)}


# Of two methods and three settings, the last without a result.
MADE_UP = Evaluation(
    [
        Evaluated(Setting(DENSE, {}, DENSE), 0.05, made_up(0.8), 20.0, 2**20),
        Evaluated(Setting("one", {"r": 4}, "one r=4"), 0.04, made_up(0.75, 6, 1), 16.0, 2**19),
        Evaluated(Setting("one", {"r": 8}, "one r=8"), 0.02, made_up(0.5, 30), 10.0, 2**19),
        Evaluated(Setting("two", {}, "two"), 0.045, made_up(0.81, 0, 1), 25.0, 2**19),
        Evaluated(Setting("three", {}, "three a"), reason="it [does] not fit"),
        Evaluated(Setting("three", {}, "three b"), reason="it [does] not fit"),
        Evaluated(Setting("none", {}, "none"), 0.05, made_up(0.8), 21.0, 2**20),
    ],
    parameters=1234,
    images=100,
    batch=4,
    confidence=0.95,
)


def test_the_table_compares_with_dense_and_gives_reasons_below() -> None:
    console = Console(width=130, record=True, file=io.StringIO())
    console.print(table(MADE_UP, "Title", "Caption"))
    lines = console.export_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    shared = ["90.0%", "95.0%", "3.0%"]
    interval = "[-10.0, +5.0]"
    assert cells[:3] == [
        ["dense", "80.0%", "", "", "90.0%", "", "3.0%", "50.000", "", "20.0", "200.0", "1.0"],
        ["one r=4", "75.0%", f"-5.0 {interval}", "6/1", *shared, "40.000", "1.25x", "16.0", "250.0", "0.5"],
        ["one r=8", "50.0%", f"-30.0 {interval}", "30/0", *shared, "20.000", "2.50x", "10.0", "400.0", "0.5"],
    ]
    assert cells[4] == ["three a", *["-"] * 11]
    assert [line.strip() for line in lines[-2:]] == ["Caption", "three a, three b: it [does] not fit"]


def test_values_for_json() -> None:
    values = json.loads(json.dumps(to_dict(MADE_UP)))
    assert (values["parameters"], values["images"], values["batch"]) == (1234, 100, 4)
    found = values["rows"]
    assert found[1] == {
        "label": "one r=4",
        "method": "one",
        "options": {"r": 4},
        "gmacs": 0.04,
        "median_ms": 16.0,
        "images_per_second": 250.0,
        "peak_bytes": 2**19,
        "quality": {
            "clean": {
                "top1": 0.75,
                "top5": 0.9,
                "agreement": 0.95,
                "lost": 6,
                "won": 1,
                "interval": [-0.1, 0.05],
                "p_value": 0.5,
                "calibration": 0.03,
            }
        },
        "reason": None,
    }
    assert found[4]["quality"] == {} and found[4]["reason"] == "it [does] not fit"


def test_the_front_has_what_nothing_beats() -> None:
    assert [row.setting.label for row in front(MADE_UP.rows)] == ["one r=8", "one r=4", "two"]


def test_the_plot_has_a_line_for_each_method_and_the_front(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    made = results.figure_class()
    monkeypatch.setattr(results, "figure_class", lambda: lambda **k: figures.append(made(**k)) or figures[-1])
    path = tmp_path / "new folder" / "plot.png"
    draw(MADE_UP, path, "Title")
    with Image.open(path) as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 10
    (axes,) = figures[0].axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["dense", "one", "two", "Pareto front"]
    # Hundredths of a GMAC are shown as MMACs.
    assert axes.get_xlabel() == "MMACs per image" and axes.get_ylabel() == "top-1 accuracy (%)"
    lines = {line.get_label(): list(zip(*line.get_data())) for line in axes.lines}
    assert lines["one"] == [(20, 50), (40, 75)] and lines["two"] == [(45, 81)] and lines["dense"] == [(50, 80)]
    assert lines["Pareto front"] == [(20, 50), (40, 75), (45, 81)]


def test_a_missing_matplotlib_says_what_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="package matplotlib; pip install"):
        draw(MADE_UP, tmp_path / "plot.png")
    with pytest.raises(ImportError, match="package matplotlib; pip install"):
        check_plot(tmp_path / "plot.png")


def make_folder(path: Path, counts: dict[str, int]) -> Path:
    """A folder with that many images in each subfolder."""
    for kind, (name, count) in enumerate(counts.items()):
        (path / name).mkdir(parents=True)
        for i in range(count):
            pixels = torch.randint(0, 256, (70, 90, 3), generator=torch.Generator().manual_seed(100 * kind + i))
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(path / name / f"{i}.png")
    return path


def test_subfolders_are_classes_in_sorted_order(tmp_path: Path) -> None:
    folder = Folder(make_folder(tmp_path, {"b": 3, "a": 1, "c": 0}))
    assert folder.classes == ["a", "b", "c"] and folder.labels.tolist() == [0, 1, 1, 1]
    images = Files(folder.paths, lambda picture: torch.tensor(picture.size))
    assert len(images) == folder.total == 4 and images[2:9].tolist() == [[90, 70]] * 2


def test_names_that_are_numbers_are_classes(tmp_path: Path) -> None:
    folder = Folder(make_folder(tmp_path, {"0007": 1, "10": 2, "2": 1}), outputs=11)
    assert folder.classes == ["2", "0007", "10"] and sorted(folder.labels.tolist()) == [2, 7, 10, 10]
    assert all(path.parent.name.lstrip("0") == str(label) for path, label in zip(folder.paths, folder.labels.tolist()))
    with pytest.raises(ConfigError, match="'10' is the class 10; the model has the 10 classes from 0 to 9"):
        Folder(tmp_path, outputs=10)


def test_a_class_map_names_the_classes(tmp_path: Path) -> None:
    data, names = make_folder(tmp_path / "data", {"cat": 1, "dog": 2}), tmp_path / "names.txt"
    names.write_text("dog\nbird\ncat\n")
    folder = Folder(data, outputs=3, class_map=names)
    assert folder.labels.tolist() == [2, 0, 0] and "names.txt" in folder.numbering
    names.write_text("dog\nbird\n")
    with pytest.raises(ConfigError, match=r"names\.txt has no line for the class 'cat'"):
        Folder(data, class_map=names)


def test_a_limit_is_spread_over_the_folder(tmp_path: Path) -> None:
    folder = Folder(make_folder(tmp_path, {"a": 4, "b": 2, "c": 2}), limit=4)
    assert folder.labels.tolist() == [0, 0, 1, 2] and (len(folder), folder.total) == (4, 8)
    assert len(Folder(tmp_path, limit=100)) == 8


def test_folders_within_a_class_are_refused(tmp_path: Path) -> None:
    make_folder(make_folder(tmp_path, {"a": 1}) / "a", {"deeper": 1})
    with pytest.raises(ConfigError, match="deeper is a folder in the folder of a class"):
        Folder(tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_is_no_image_is_named(workers: int, tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": 1})
    whole = (tmp_path / "a" / "0.png").read_bytes()
    (tmp_path / "a" / "1.png").write_bytes(whole[: len(whole) // 2])
    folder = Folder(tmp_path)
    images = Files(folder.paths, lambda picture: torch.zeros(3, 20, 20))
    with pytest.raises(MctfError, match=r"1\.png cannot be read") as raised:
        evaluate(tiny(), images, folder.labels, [], batch=1, rounds=0, workers=workers)
    assert "\n" not in str(raised.value)


@pytest.fixture
def three_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with three classes, and a short sweep."""
    monkeypatch.setattr(timm_models, "make_model", lambda *_: timm.create_model(MODEL, num_classes=3))
    monkeypatch.setitem(SWEEPS, "mctf", [{"removed": 0.5}])


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The error message: the one line on stderr that the command signs."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mctf: ")]
    return line


@pytest.mark.parametrize(
    ("counts", "more", "message"),
    [
        (None, [], "no such folder"),
        ({}, [], "has no subfolders; it needs one for each class"),
        ({"a": 0, "b": 0}, [], "there are no images in its 2 subfolders"),
        ({"a": 1, "b": 0, "c": 0, "d": 0}, [], "'d' is the class 3; the model has the 3 classes from 0 to 2"),
        ({"a": 1}, ["--methods", "mctf,tomme"], "unknown method 'tomme'"),
        ({"a": 1}, ["--options", "r=4", "method=tome tau_sim=1"], "method 'tome' takes no option 'tau_sim'"),
        ({"a": 1}, ["--corruptions", "jpeg,blurr"], "there is no corruption 'blurr'"),
        ({"a": 1}, ["--corruptions", "jpeg-6"], "a severity is a whole number from 1 to 5"),
        ({"a": 1}, ["--plot", "plot.xyz"], "--plot plot.xyz: its ending must be one of"),
        ({"a": 1}, ["--resume", "tests"], "tests is not empty and holds no evaluation"),
    ],
)
def test_what_is_wrong_with_the_command_line_is_one_line(
    counts: dict[str, int] | None,
    more: list[str],
    message: str,
    tmp_path: Path,
    three_classes: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "data"
    if counts is not None:
        path.mkdir()
        make_folder(path, counts)
    assert cli.main(["evaluate", MODEL, str(path), "--options", "r=2", *more]) == 2
    assert message in one_line(capsys)


def test_a_command_without_anything_to_evaluate_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", MODEL, str(tmp_path)]) == 2
    assert "nothing to evaluate: name options" in one_line(capsys)


def test_an_unknown_model_names_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path, {"a": 1})
    assert cli.main(["evaluate", "test_vitt", str(tmp_path), "--options", "r=2"]) == 2
    assert "no model 'test_vitt'; the nearest are test_vit" in one_line(capsys)


def test_weights_of_another_model_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path / "data", {"a": 1})
    torch.save({"head.weight": torch.zeros(3, 3)}, tmp_path / "other.pth")
    weights = ["--weights", str(tmp_path / "other.pth")]
    assert cli.main(["evaluate", MODEL, str(tmp_path / "data"), "--options", "r=2", *weights]) == 2
    assert "other.pth is of another model" in one_line(capsys)


def test_a_file_is_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").write_text("")
    assert cli.main(["evaluate", MODEL, str(tmp_path / "data"), "--options", "r=2"]) == 2
    assert "not a folder" in one_line(capsys)


@pytest.mark.parametrize("arguments", [[], [".", "--methods", "a,,b"], [".", "--limit", "0"], [".", "--options", "r"]])
def test_a_bad_command_line_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["evaluate", MODEL, *arguments])
    assert exit_info.value.code == 2 and "error:" in capsys.readouterr().err


def test_the_command_writes_table_plot_and_json(
    tmp_path: Path, three_classes: None, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_folder(tmp_path / "data", {"cat": 3, "dog": 4})
    plot, result = tmp_path / "plot.svg", tmp_path / "result.json"
    more = ["--methods", "mctf", "--options", "r=3 tau_info=0", "--limit", "5", "--batch", "2", "--rounds", "1"]
    more += ["--corruptions", "gaussian_noise-5"]
    files = ["--plot", str(plot), "--json", str(result)]
    assert cli.main(["evaluate", MODEL, str(data), *more, *files]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "random weights" in output and "5 of 7 images" in output and "gaussian_noise-5" in output
    assert "The 2 subfolders, sorted, are taken as the first of the model's classes" in output
    assert "<svg" in plot.read_text()
    found = json.loads(result.read_text())
    assert (found["model"], found["images"], found["classes"], found["batch"]) == (MODEL, 5, 2, 2)
    # Half of 101 tokens over six blocks.
    assert [row["label"] for row in found["rows"]] == ["dense", "mctf r=3 tau_info=0", "mctf r=8"]
    assert found["rows"][0]["quality"]["clean"]["top1"] == plain_folder_accuracy(data)
    assert found["rows"][1]["gmacs"] < found["rows"][0]["gmacs"]
    assert found["rows"][0]["peak_bytes"] > 0


def plain_folder_accuracy(data: Path) -> float:
    """The dense accuracy over the five images that a limit of 5 takes of 3 + 4."""
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=3).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    right = 0
    for name in ("cat/0", "cat/1", "cat/2", "dog/1", "dog/2"):
        with Image.open(data / f"{name}.png") as picture, torch.no_grad():
            right += model(transform(picture)[None]).argmax().item() == ("cat", "dog").index(name[:3])
    return right / 5


# What is kept, and who shares the work.


class Counting:
    """Images that say which were asked for, and may be cut off."""

    def __init__(self, images: Tensor, stop: int | None = None) -> None:
        self.images, self.stop, self.read = images, stop, list[int]()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, part: slice) -> Tensor:
        if self.stop is not None and len(self.read) >= self.stop:
            raise KeyboardInterrupt
        self.read.append(part.start or 0)
        return self.images[part]


def all_of(found: Evaluation) -> list:
    """All that outcomes decide."""
    return [(row.setting.label, row.reason, row.gmacs, row.qualities) for row in found.rows]


def test_an_evaluation_that_was_stopped_goes_on(tmp_path: Path, images: Tensor, labels: Tensor) -> None:
    settings = COUNTS[:2]
    whole = evaluate(tiny(), images, labels, settings, batch=4, rounds=0)
    with pytest.raises(KeyboardInterrupt):
        # The first read is for the batch that everything is compiled for.
        evaluate(tiny(), Counting(images, 4), labels, settings, batch=4, rounds=0, keep=Kept(tmp_path, {}))
    # What was being written when the power failed.
    (file,) = tmp_path.glob("dense*.jsonl")
    file.write_bytes(file.read_bytes() + b'{"batch": 3, "top": [[1, 0')
    rest = Counting(images)
    found = evaluate(tiny(), rest, labels, settings, batch=4, rounds=0, keep=Kept(tmp_path, {}))
    assert rest.read == [0, 12, 16, 20] and all_of(found) == all_of(whole)
    # Now all is there: nothing is read but the images that settings are explained for.
    again = evaluate(tiny(), Counting(images, 1), labels, settings, batch=4, rounds=0, keep=Kept(tmp_path, {}))
    assert all_of(again) == all_of(whole)


def test_a_folder_of_another_evaluation_is_refused(tmp_path: Path) -> None:
    Kept(tmp_path / "one", {"model": "a", "batch": 8})
    Kept(tmp_path / "one", {"model": "a", "batch": 8})
    with pytest.raises(ConfigError, match="another evaluation: its batch is 8, and now it is 4"):
        Kept(tmp_path / "one", {"model": "a", "batch": 4})
    (tmp_path / "one" / "run.json").write_text("{")
    with pytest.raises(ConfigError, match=r"run\.json is damaged"):
        Kept(tmp_path / "one", {"model": "a", "batch": 8})
    (tmp_path / "file").write_text("")
    with pytest.raises(MctfError, match="outcomes cannot be kept in"):
        Kept(tmp_path / "file", {})


def test_a_damaged_line_is_an_error_that_names_it(tmp_path: Path) -> None:
    kept = Kept(tmp_path, {})
    for batch in (0, 1):
        kept.add("a setting", batch, Outcomes.of(torch.tensor([[0.0, 1.0]])))
    (file,) = tmp_path.glob("*.jsonl")
    file.write_bytes(b"{nonsense\n" + file.read_bytes())
    with pytest.raises(MctfError, match="line 1 is damaged"):
        kept.read("a setting")


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Kept(tmp_path, {})
    kept.add("a setting", 0, Outcomes.of(torch.tensor([[0.0, 1.0]])))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(MctfError, match="No space left on device; those kept so far are whole"):
            kept.add("a setting", 1, Outcomes.of(torch.tensor([[1.0, 0.0]])))
    assert kept.read("a setting")[0].top.tolist() == [[1, 0]]


def test_options_that_a_file_says_are_part_of_what_is_kept() -> None:
    one, other = Setting("mctf", {"r": [0, 1]}, "same"), Setting("mctf", {"r": [1, 0]}, "same")
    assert running.key_of(one) != running.key_of(other)


TWO = """
import sys
from mctf_compile.measuring import timm_models
import timm, torch
torch.set_num_threads(1)
timm_models.make_model = lambda *_: timm.create_model("test_vit", num_classes=3)
from mctf_compile.cli import main
raise SystemExit(main())
"""


def test_two_processes_find_what_one_finds(
    tmp_path: Path, three_classes: None, capsys: pytest.CaptureFixture[str]
) -> None:
    data, program = make_folder(tmp_path / "data", {"cat": 5, "dog": 6}), tmp_path / "program.py"
    program.write_text(TWO)
    arguments = ["evaluate", MODEL, str(data), "--options", "r=4", "--batch", "2", "--rounds", "0", "--json"]
    assert cli.main([*arguments, str(tmp_path / "one.json")]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(program), *arguments, str(tmp_path / "two.json"), "--resume", str(tmp_path / "kept")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one == two and len(one["rows"]) == 2
    # Both worked: of six batches three each.
    lines = {path.suffixes[-2]: len(path.read_text().splitlines()) for path in (tmp_path / "kept").glob("dense*.jsonl")}
    assert lines == {".0": 3, ".1": 3}


# Statistics.


def exact_mcnemar(lost: int, won: int) -> Fraction:
    changed = lost + won
    few = sum(Fraction(comb(changed, k), 2**changed) for k in range(min(lost, won) + 1))
    return min(Fraction(1), 2 * few)


@pytest.mark.parametrize(("lost", "won"), [(5, 15), (0, 0), (0, 6), (7, 7), (40, 1)])
def test_mcnemar_is_exact(lost: int, won: int) -> None:
    assert mcnemar(lost, won) == pytest.approx(float(exact_mcnemar(lost, won)), rel=1e-12)


def at_most(trials: int, events: int, share: Fraction) -> Fraction:
    return sum((comb(trials, k) * share**k * (1 - share) ** (trials - k) for k in range(events + 1)), Fraction(0))


@pytest.mark.parametrize(("events", "images"), [(0, 10), (1, 10), (5, 40), (39, 40)])
def test_bounds_leave_the_error_that_was_asked_for(events: int, images: int) -> None:
    high = upper_bound(events, images, 0.9)
    assert float(at_most(images, events, Fraction(high))) == pytest.approx(0.1, rel=1e-9)
    low = lower_bound(images - events, images, 0.9)
    assert low == 1 - high and upper_bound(images, images) == 1


def most_likely(lost: int, won: int, images: int, change: float) -> float:
    """The log-likelihood of the most likely shares of lost and won images whose difference is ``change``."""
    low, high = max(0.0, -change), (1 - change) / 2
    grid = torch.linspace(0, 1, 200_001, dtype=torch.float64) * (high - low) + low
    logs = torch.special.xlogy(lost, grid) + torch.special.xlogy(won, grid + change)
    logs = logs + torch.special.xlogy(images - lost - won, 1 - 2 * grid - change)
    return float(grid[logs.nan_to_num(-torch.inf).argmax()])


@pytest.mark.parametrize(("lost", "won", "images"), [(5, 15, 100), (3, 1, 50), (0, 0, 40), (12, 0, 60)])
def test_the_interval_is_where_a_score_test_rejects(lost: int, won: int, images: int) -> None:
    """Its ends by the most likely shares found by trying, in the place of Tango's formula."""
    for end in paired_interval(lost, won, images, 0.95):
        share = most_likely(lost, won, images, end)
        variance = images * (2 * share + end - end**2)
        assert abs(won - lost - images * end) / variance**0.5 == pytest.approx(1.959964, rel=2e-3)
    low, high = paired_interval(lost, won, images)
    assert low <= (won - lost) / images <= high and high - low > 0
    swapped = paired_interval(won, lost, images)
    assert (-swapped[1], -swapped[0]) == pytest.approx((low, high), abs=1e-9)


@pytest.mark.parametrize("tolerance", [0.05, 0.2])
def test_a_certificate_is_wrong_as_rarely_as_it_says(tolerance: float) -> None:
    """Of all samples of 30 images that are certified: how likely they are where the tolerance is just not kept."""
    images, error = 30, 0.1
    certified = [
        (lost, won)
        for lost in range(images + 1)
        for won in range(images + 1 - lost)
        if loses_less(lost, won, images, tolerance, 1 - error)
    ]
    worst = 0.0
    for step in range(60):
        won_share = step / 60 * (1 - tolerance) / 2
        shares = (won_share + tolerance, won_share, 1 - tolerance - 2 * won_share)
        total = sum(
            comb(images, b) * comb(images - b, c) * shares[0] ** b * shares[1] ** c * shares[2] ** (images - b - c)
            for b, c in certified
        )
        worst = max(worst, total)
    assert worst <= error
    # It is not empty either, and uses most of the error that it may make where samples this small can.
    assert tolerance < 0.1 or worst > error / 3


def test_the_least_tolerance_is_certified_and_less_is_not() -> None:
    found = most_lost(8, 5, 500)
    assert loses_less(8, 5, 500, found) and not loses_less(8, 5, 500, found - 1e-4)
    # Less than is known of the lost images alone, more than what was seen.
    assert 3 / 500 < found < upper_bound(8, 500)
    assert most_lost(500, 0, 500) == 1


def test_the_calibration_error_of_known_confidence() -> None:
    # Two parts of [0, 1]: 0.25 off in one, 0.4 in the other.
    confidence = torch.tensor([0.25, 0.25, 0.9, 0.9])
    right = torch.tensor([True, False, True, False])
    assert calibration_error(confidence, right) == pytest.approx((0.25 + 0.4) / 2, abs=1e-7)


def test_quality_counts_images() -> None:
    dense, found = (
        Outcomes(torch.tensor(top), torch.tensor([0.5] * 4))
        for top in ([[0, 1], [1, 0], [2, 0], [0, 2]], [[0, 1], [0, 1], [1, 2], [2, 0]])
    )
    labels = torch.tensor([0, 1, 1, 2])
    values = quality(found, dense, labels, 0.95)
    assert (values.top1, values.top5, values.agreement, values.lost, values.won) == (0.75, 1.0, 0.25, 1, 2)


# Corruptions.


@pytest.fixture
def picture() -> Tensor:
    """Smooth spots of every size."""
    noise = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
    frequency = torch.fft.fftfreq(64).square()
    spectrum = torch.fft.fft2(noise) / (frequency[:, None] + frequency + 1e-3)
    image = torch.fft.ifft2(spectrum).real
    return (0.4 + 0.12 * image / image.std()).clamp(0.1, 0.8)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_are_stronger_by_severity_and_the_same_every_time(name: str, picture: Tensor) -> None:
    images = [Corruption(name, severity)(picture, 3) for severity in range(1, 6)]
    distances = [float((image - picture).abs().mean()) for image in images]
    # Neighbours may fall on the grid of pixels differently.
    assert 0 < distances[0] < distances[2] < distances[4] and len(set(distances)) == 5
    for severity, image in enumerate(images, 1):
        assert image.shape == picture.shape and image.min() >= 0 and image.max() <= 1
        assert torch.equal(Corruption(name, severity)(picture, 3), image)
    by_chance = name.endswith("noise")
    assert torch.equal(Corruption(name, 2)(picture, 4), images[1]) != by_chance


def test_corruptions_do_what_they_say(picture: Tensor) -> None:
    noise = Corruption("gaussian_noise", 1)(torch.full((3, 200, 200), 0.5), 0)
    assert abs(float(noise.std()) - 0.08) < 1e-3 and abs(float(noise.mean()) - 0.5) < 1e-3
    faded = Corruption("contrast", 1)(picture, 0)
    assert float(faded.std((1, 2))[0] / picture.std((1, 2))[0]) == pytest.approx(0.4, abs=0.01)
    coarse = Corruption("pixelate", 5)(picture, 0)
    assert torch.equal(coarse[:, 0, 0], coarse[:, 3, 3])
    # What is even stays even under a blur, up to the border.
    assert torch.allclose(Corruption("gaussian_blur", 5)(torch.full((3, 40, 40), 0.6), 0), torch.tensor(0.6))
    bright = Corruption("brightness", 2)(torch.tensor([0.1, 0.2, 0.4])[:, None, None].expand(3, 8, 8), 0)
    assert bright[:, 0, 0].tolist() == pytest.approx([0.15, 0.3, 0.6], abs=3e-3)


def test_a_corruption_comes_before_the_normalization(tmp_path: Path) -> None:
    model = timm.create_model(MODEL).eval()
    transform = timm_models.evaluation_transform(model, None)
    folder = Folder(make_folder(tmp_path, {"a": 2}))
    plain = Files(folder.paths, transform)
    same = Files(folder.paths, *corrupted(transform, lambda image, number: image))
    assert torch.equal(plain[:], same[:])
    black = Files(folder.paths, *corrupted(transform, lambda image, number: image * 0))
    config = timm.data.resolve_model_data_config(model)
    want = [-mean / std for mean, std in zip(config["mean"], config["std"])]
    assert black[:1][0, :, 0, 0].tolist() == pytest.approx(want)


def test_conditions_are_columns_of_their_own(images: Tensor, labels: Tensor) -> None:
    given = {"clean": images, "dark": images * 0}
    found = evaluate(tiny(), given, labels, COUNTS[:1], batch=8, rounds=0)
    assert list(found.rows[1].qualities) == ["clean", "dark"]
    alone = evaluate(tiny(), images * 0, labels, COUNTS[:1], batch=8, rounds=0)
    assert found.rows[1].qualities["dark"] == alone.rows[1].clean != found.rows[1].clean
    shown = robustness(found)
    assert [column.header for column in shown.columns] == ["", "clean", "dark", "mean"] and shown.row_count == 2
    assert robustness(alone) is None
