"""The comparison of methods: its accuracy, its multiply-accumulates, its reasons, its plot and its command."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from mctf_compile import METHODS, ConfigError, FusionConfig, MctfError, cli, explain
from mctf_compile.cli.compare import check_plot
from mctf_compile.measuring import compare as comparison
from mctf_compile.measuring import timm_models
from mctf_compile.measuring.compare import (
    DENSE,
    SWEEPS,
    Folder,
    Measured,
    Setting,
    chosen_methods,
    compare,
    draw,
    sweep,
    sweeps,
    table,
    to_dict,
)
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
def rows(images: Tensor, labels: Tensor) -> list[Measured]:
    settings = [*COUNTS, *(setting for setting, _ in BROKEN)]
    # Past its limit Dynamo would run a setting dense, unless told otherwise.
    with torch._dynamo.config.patch(recompile_limit=1):
        return compare(tiny(), images, labels, settings, batch=4, rounds=1)


def plain_accuracy(model: nn.Module, images: Tensor, labels: Tensor, options: dict) -> float:
    """The accuracy of the model, alone and image by image."""
    torch._dynamo.reset()
    fused = torch.compile(model, backend="mctf", options={**options, "inner": "eager"})
    with torch.no_grad():
        right = [fused(images[i : i + 1])[0].argmax().item() == labels[i].item() for i in range(len(images))]
    return sum(right) / len(right)


def test_the_dense_model_comes_first(rows: list[Measured]) -> None:
    assert [row.setting.label for row in rows[:2]] == ["dense", "mctf r=2"]
    assert rows[0].setting.method == DENSE and rows[0].reason is None
    assert rows[0].accuracy == 20 / 23


def test_accuracy_is_that_of_a_plain_loop(rows: list[Measured], images: Tensor, labels: Tensor) -> None:
    measured = {row.setting.label: row.accuracy for row in rows}
    for setting in COUNTS:
        assert measured[setting.label] == plain_accuracy(tiny(), images, labels, setting.options)
    # The premise: settings that were mixed up, or run dense, would be seen.
    assert len({row.accuracy for row in rows[:4]}) == 4


def test_macs_are_those_of_explain(rows: list[Measured], images: Tensor) -> None:
    with torch.no_grad():
        reports = [explain(tiny(), images[:1], **setting.options) for setting in COUNTS]
    assert rows[0].gmacs == reports[0].macs_before / 1e9
    assert [row.gmacs for row in rows[1:4]] == [report.macs_after / 1e9 for report in reports]
    assert rows[3].gmacs < rows[2].gmacs < rows[1].gmacs < rows[0].gmacs


def test_a_setting_that_does_not_apply_says_why(rows: list[Measured]) -> None:
    broken = rows[1 + len(COUNTS) :]
    assert len(broken) == len(BROKEN)
    for (setting, message), row in zip(BROKEN, broken):
        assert row.setting == setting and message in row.reason and "\n" not in row.reason
        assert row.accuracy is row.gmacs is row.milliseconds is None


def test_a_wrong_output_is_a_reason(monkeypatch: pytest.MonkeyPatch, images: Tensor, labels: Tensor) -> None:
    check = comparison.check_output
    wrong = lambda name, output, expected: check(name, [x / 0 if name == "mctf r=2" else x for x in output], expected)
    monkeypatch.setattr(comparison, "check_output", wrong)
    dense, fused = compare(tiny(), images, labels, COUNTS[:1], batch=4, rounds=1)
    assert "mctf r=2 has values that are not finite" in fused.reason and dense.reason is None


def test_an_error_of_the_model_itself_is_raised(labels: Tensor, images: Tensor) -> None:
    with pytest.raises(MctfError, match="output 0 of dense has values that are not finite"):
        compare(tiny(), images / 0, labels, [], batch=4, rounds=1)


@pytest.mark.parametrize(
    ("count", "settings", "message"),
    [(22, [], "23 images and 22 labels"), (23, [COUNTS[0]] * 2, "two settings have the same label")],
)
def test_bad_arguments(count: int, settings: list, message: str, images: Tensor, labels: Tensor) -> None:
    with pytest.raises(ConfigError, match=message):
        compare(tiny(), images, labels[:count], settings)


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


# Of two methods and three settings, the last without a result.
MADE_UP = [
    Measured(Setting(DENSE, {}, DENSE), 0.8, 0.05, 20.0),
    Measured(Setting("one", {"r": 4}, "one r=4"), 0.75, 0.04, 16.0),
    Measured(Setting("one", {"r": 8}, "one r=8"), 0.5, 0.02, 10.0),
    Measured(Setting("two", {}, "two"), 0.81, 0.045, 25.0),
    Measured(Setting("three", {}, "three a"), reason="it [does] not fit"),
    Measured(Setting("three", {}, "three b"), reason="it [does] not fit"),
    Measured(Setting("none", {}, "none"), 0.8, 0.05, 21.0),
]


def test_the_table_compares_with_dense_and_gives_reasons_below() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(MADE_UP, "Title", "Caption"))
    lines = console.export_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert cells[:3] == [
        ["dense", "80.0%", "", "50.000", "", "20.0", ""],
        ["one r=4", "75.0%", "-5.0", "40.000", "1.25x", "16.0", "1.25x"],
        ["one r=8", "50.0%", "-30.0", "20.000", "2.50x", "10.0", "2.00x"],
    ]
    assert cells[4] == ["three a", *["-"] * 6]
    assert [line.strip() for line in lines[-2:]] == ["Caption", "three a, three b: it [does] not fit"]


def test_values_for_json() -> None:
    found = json.loads(json.dumps(to_dict(MADE_UP)))["rows"]
    assert found[1] == {
        "label": "one r=4",
        "method": "one",
        "options": {"r": 4},
        "accuracy": 0.75,
        "gmacs": 0.04,
        "median_ms": 16.0,
        "reason": None,
    }
    assert found[4]["accuracy"] is None and found[4]["reason"] == "it [does] not fit"


def test_the_plot_has_a_line_for_each_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    made = comparison.figure_class()
    monkeypatch.setattr(comparison, "figure_class", lambda: lambda **k: figures.append(made(**k)) or figures[-1])
    path = tmp_path / "new folder" / "plot.png"
    draw(MADE_UP, path, "Title")
    with Image.open(path) as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 10
    (axes,) = figures[0].axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["dense", "one", "two"]
    # Hundredths of a GMAC are shown as MMACs.
    assert axes.get_xlabel() == "MMACs per image" and axes.get_ylabel() == "top-1 accuracy (%)"
    lines = {line.get_label(): list(zip(*line.get_data())) for line in axes.lines}
    assert lines["one"] == [(20, 50), (40, 75)] and lines["two"] == [(45, 81)] and lines["dense"] == [(50, 80)]


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
    folder.transform = lambda picture: torch.tensor(picture.size)
    assert len(folder) == folder.total == 4 and folder[2:9].tolist() == [[90, 70]] * 2


def test_a_limit_is_spread_over_the_folder(tmp_path: Path) -> None:
    folder = Folder(make_folder(tmp_path, {"a": 4, "b": 2, "c": 2}), limit=4)
    assert folder.labels.tolist() == [0, 0, 1, 2] and (len(folder), folder.total) == (4, 8)
    assert len(Folder(tmp_path, limit=100)) == 8


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": 1})
    (tmp_path / "a" / "1.png").write_text("no image")
    folder = Folder(tmp_path)
    folder.transform = lambda picture: torch.zeros(1)
    with pytest.raises(MctfError, match=r"1\.png cannot be read"):
        folder[:2]


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
        ({"a": 1, "b": 0, "c": 0, "d": 0}, [], f"has 4 subfolders, one for each class, but {MODEL} has 3 classes"),
        ({"a": 1}, ["--methods", "mctf,tomme"], "unknown method 'tomme'"),
        ({"a": 1}, ["--plot", "plot.xyz"], "--plot plot.xyz: its ending must be one of"),
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
    assert cli.main(["compare", MODEL, "--data", str(path), *more]) == 2
    assert message in one_line(capsys)


def test_a_file_is_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").write_text("")
    assert cli.main(["compare", MODEL, "--data", str(tmp_path / "data")]) == 2
    assert "not a folder" in one_line(capsys)


@pytest.mark.parametrize("arguments", [[], ["--data", ".", "--methods", "a,,b"], ["--data", ".", "--limit", "0"]])
def test_a_bad_command_line_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["compare", MODEL, *arguments])
    assert exit_info.value.code == 2 and "error:" in capsys.readouterr().err


def test_the_command_writes_table_plot_and_json(
    tmp_path: Path, three_classes: None, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_folder(tmp_path / "data", {"cat": 3, "dog": 4})
    plot, result = tmp_path / "plot.svg", tmp_path / "result.json"
    more = ["--methods", "mctf", "--limit", "5", "--batch", "2", "--rounds", "1"]
    files = ["--plot", str(plot), "--json", str(result)]
    assert cli.main(["compare", MODEL, "--data", str(data), *more, *files]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "random weights" in output and "Top-1 over 5 of 7 images" in output
    assert "The 2 subfolders are taken as the first of the model's 3 classes" in output
    assert "<svg" in plot.read_text()
    found = json.loads(result.read_text())
    assert (found["model"], found["images"], found["classes"], found["batch"]) == (MODEL, 5, 2, 2)
    # Half of 101 tokens over six blocks.
    assert [row["label"] for row in found["rows"]] == ["dense", "mctf r=8"]
    assert found["rows"][0]["accuracy"] == plain_folder_accuracy(data)
    assert found["rows"][1]["gmacs"] < found["rows"][0]["gmacs"]


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
