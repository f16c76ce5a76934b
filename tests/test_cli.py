"""The command ``mctf``, run in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import timm
import torch

import mctf_compile
from mctf_compile import cli
from mctf_compile.cli.arguments import parse_value

# timm's smallest plain ViT: six blocks, 100 patches of a 160x160 image.
MODEL = "test_vit"


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The error message: the one line on stderr that the command signs."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mctf: ")]
    return line


def test_explain_prints_the_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", MODEL, "--r", "0,8,8,8,8,8", "-o", "tau_info=0"]) == 0
    output = capsys.readouterr().out
    assert "5 of 6 blocks fuse, 40 tokens removed" in output
    rows = [[cell.strip() for cell in line.strip("│\n ").split("│")] for line in output.splitlines() if "│" in line]
    blocks = {row[0]: row[1:4] for row in rows if row[0].isdecimal()}
    assert blocks["1"] == ["blocks.1.attn", "101", "93"] and blocks["2"] == ["blocks.2.attn", "93", "85"]


def test_an_unknown_model_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "vit_tinny_patch16_224"]) == 2
    line = one_line(capsys)
    assert "no model 'vit_tinny_patch16_224'" in line and "vit_tiny_patch16_224" in line.split("nearest", 1)[1]


def test_an_unknown_tag_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", f"{MODEL}.no_such_tag"]) == 2
    assert "no_such_tag" in one_line(capsys)


@pytest.mark.parametrize("command", ["explain", "bench"])
def test_an_unknown_option_names_the_nearest(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, MODEL, "-o", "tau_simm=1"]) == 2
    assert "did you mean 'tau_sim'" in one_line(capsys)


@pytest.mark.parametrize(
    ("r", "message"), [("quick", "r='quick' is no preset"), ("-3", "negative"), ("1.5", "must be below 1")]
)
def test_a_bad_r_is_one_line(r: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", MODEL, "--r", r]) == 2
    assert message in one_line(capsys)


def test_an_error_inside_the_compiler_is_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", MODEL, "--r", "0,8"]) == 2
    assert "r is a list of 2 entries, but the model has 6 attention blocks" in one_line(capsys)


def test_ctrl_c_exits_with_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mctf_compile.measuring.timm_models.make_model", interrupt)
    assert cli.main(["explain", MODEL]) == 130
    assert one_line(capsys) == "mctf: interrupted"


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench", MODEL, "--batch", "0"],
        ["bench", MODEL, "-o", "tau_sim"],
        ["bench", MODEL, "--json", "no/such/folder/file.json"],
        [],
    ],
)
def test_a_bad_command_line_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    assert exit_info.value.code == 2 and "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("16", 16),
        ("0.3", 0.3),
        ("0,8,8", [0, 8, 8]),
        ("[0, 8]", [0, 8]),
        ("(8, -1)", (8, -1)),
        ("fast", "fast"),
        ("True", True),
        ("{'mode': 'default'}", {"mode": "default"}),
    ],
)
def test_values_of_options(text: str, value: object) -> None:
    assert parse_value(text) == value


@pytest.mark.parametrize(
    ("method", "shown"), [("evit", "evit: 3 of"), ("dtem", "modules of method 'dtem' are untrained")]
)
def test_explain_takes_any_method(method: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", MODEL, "--method", method]) == 0
    assert shown in " ".join(capsys.readouterr().out.split())


def test_bench_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    arguments = [
        "--r",
        "8",
        "--batch",
        "2",
        "--rounds",
        "2",
        "--candidates",
        "eager,mctf",
        "-o",
        "inner=eager",
        "--json",
        str(path),
    ]
    assert cli.main(["bench", MODEL, *arguments]) == 0
    assert "dense eager *" in capsys.readouterr().out
    result = json.loads(path.read_text())
    assert result["model"] == MODEL and result["options"] == {"r": 8, "inner": "eager"}
    assert list(result["candidates"]) == ["eager", "mctf"]
    for candidate in result["candidates"].values():
        measured = {"median_ms", "spread_ms", "milliseconds", "first_call_s", "error", "speedup_over_alike"}
        assert set(candidate) == measured
        assert len(candidate["milliseconds"]) == 2
    assert result["macs_after"] < result["macs_before"]
    assert result["best_dense"] == "eager" and result["speedup_over_inductor"] is None
    expected = result["speedup_over_best_dense"] / result["macs_ratio"]
    assert result["realized_over_best_dense"] == pytest.approx(expected)


def repeated(file: Path) -> subprocess.CompletedProcess[str]:
    """A program that was written, run in a process of its own, from another folder."""
    path = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "80"}
    return subprocess.run(
        [sys.executable, str(file)], capture_output=True, text=True, timeout=300, cwd=file.parent, env=environment
    )


def test_a_program_repeats_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    file = tmp_path / "repro.py"
    arguments = ["explain", MODEL, "--r", "0,8,8,8,8,8", "--img-size", "128", "--batch", "2", "-o", "tau_info=0"]
    assert cli.main([*arguments, "--repro", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "40 tokens removed" in printed
    done = repeated(file)
    assert done.stdout == printed, done.stderr
    text = file.read_text()
    assert f"torch {metadata.version('torch')}" in text and " ".join(["mctf", *arguments]) in text


def test_a_program_has_the_weights_and_the_modules_of_a_method(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    model, file = timm.create_model(MODEL), tmp_path / "repro.py"
    mctf_compile.attach(model.eval(), torch.randn(1, 3, 160, 160), method="dtem")
    torch.save(model.state_dict(), tmp_path / "model.pth")
    arguments = ["explain", MODEL, "--method", "dtem", "--weights", str(tmp_path / "model.pth")]
    assert cli.main([*arguments, "--repro", str(file)]) == 0
    printed = capsys.readouterr().out
    done = repeated(file)
    assert done.stdout == printed and "dtem: 6 of 6 blocks fuse" in printed, done.stderr


@pytest.mark.parametrize(
    "wrong",
    [["--r", "0,8"], ["-o", "tau_simm=1"], ["--method", "dtem", "-o", "layers=[9]"], ["-o", "strict=True", "--r", "0"]],
    ids=str,
)
def test_a_program_repeats_a_failure(wrong: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "repro.py"
    assert cli.main(["explain", MODEL, *wrong, "--repro", str(file)]) != 0
    _, _, message = capsys.readouterr().err.partition("mctf: ")
    done = repeated(file)
    assert done.returncode == 1 and message
    kind, _, repeated_message = done.stderr[done.stderr.rindex("mctf_compile.errors.") :].partition(": ")
    assert repeated_message == message and kind.removeprefix("mctf_compile.errors.") in (
        "ConfigError",
        "NothingFusedError",
    )
