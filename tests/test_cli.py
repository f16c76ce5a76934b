"""The command ``mctf``, run in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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
        assert set(candidate) == {"median_ms", "spread_ms", "milliseconds", "first_call_s", "error"}
        assert len(candidate["milliseconds"]) == 2
    assert result["macs_after"] < result["macs_before"]
    assert result["best_dense"] == "eager" and result["speedup_over_inductor"] is None
    expected = result["speedup_over_best_dense"] / result["macs_ratio"]
    assert result["realized_over_best_dense"] == pytest.approx(expected)
