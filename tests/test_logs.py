"""What TORCH_LOGS and TORCH_TRACE tell of a graph, each in a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mctf_compile
from mctf_compile.testing import TinyViT, VitSpec

ROOT = Path(__file__).parents[1]
OPTIONS = {"r": 2, "min_tokens": 1, "inner": "eager"}
COMPILED = f"""
import torch
from mctf_compile.testing import TinyViT, VitSpec
torch.manual_seed(0)
model = TinyViT(VitSpec(depth=3)).eval()
inputs = model.example(kinds=16, seed=0)
with torch.no_grad():
    torch.compile(model, backend="mctf", options={OPTIONS})(*inputs)
"""


def logged(program: str, **environment: str) -> list[str]:
    """The lines on stderr of a program that are ours, without what PyTorch puts before them."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    assert done.returncode == 0, done.stderr
    found = (
        re.match(r".*(?:mctf_compile|passes)/\S+:\d+\](?: \[[^]]+\])* (.*)", line) for line in done.stderr.splitlines()
    )
    return [match[1] for match in found if match]


def report_of() -> mctf_compile.Report:
    torch.manual_seed(0)
    model = TinyViT(VitSpec(depth=3)).eval()
    return mctf_compile.explain(model, *model.example(kinds=16, seed=0), **OPTIONS)


def test_info_is_one_line_a_graph() -> None:
    (line,) = logged(COMPILED, TORCH_LOGS="mctf_compile")
    report = report_of()
    assert line.startswith(f"{report.summary}; 1 dense: {report.blocks[0].reason}; ")
    assert list(report.seconds) == re.findall(r"(\w+) \d+\.\d\d", line.rpartition("(")[2])


def test_debug_has_every_block_and_every_pass() -> None:
    lines = logged(COMPILED, TORCH_LOGS="+mctf_compile")
    report = report_of()
    assert [line for line in lines if line.startswith("block ")] == [str(block) for block in report.blocks]
    passes = [
        match[1] for match in (re.match(r"pass (\w+): \d+\.\d{3} s, \d+ nodes$", line) for line in lines) if match
    ]
    assert list(dict.fromkeys(passes)) == list(report.seconds)


def test_names_that_set_logs_takes() -> None:
    setting = (
        "import logging, torch, mctf_compile.logs\n"
        "torch._logging.set_logs(modules={'mctf': logging.INFO, 'mctf_graphs': True})\n"
    )
    lines = logged(setting + COMPILED)
    assert lines[0].startswith(report_of().summary)
    text = "\n".join(lines)
    assert "before fusion:" in text and "after fusion:" in text
    before, after = text.split("after fusion:")
    assert "torch.ops.mctf.match" in after and "torch.ops.mctf.match" not in before


def test_nothing_is_told_unasked() -> None:
    assert logged(COMPILED) == []


@pytest.mark.parametrize("graph", ["fused", "dense"])
def test_a_trace_has_the_report_and_the_graphs(graph: str, tmp_path: Path) -> None:
    program = COMPILED if graph == "fused" else COMPILED.replace("'r': 2", "'r': 0")
    logged(program, TORCH_TRACE=str(tmp_path))
    (file,) = tmp_path.iterdir()
    artifacts = artifacts_of(file)
    report = json.loads(artifacts["mctf_report"]["payload"])
    assert artifacts["mctf_report"]["encoding"] == "json" and artifacts["mctf_report"]["frame_id"] == 0
    if graph == "fused":
        expected = report_of().to_dict()
        del report["seconds"], expected["seconds"]
        assert report == expected
        assert "torch.ops.mctf.match" in artifacts["mctf_graph_after"]["payload"]
    else:
        assert report["removed"] == 0 and "mctf_graph_after" not in artifacts
    assert "torch.ops.aten.scaled_dot_product_attention" in artifacts["mctf_graph_before"]["payload"]


def artifacts_of(file: Path) -> dict[str, dict[str, Any]]:
    """Our artifacts of a trace, by name: a line of metadata, and the indented lines of the payload after it."""
    found: dict[str, dict[str, Any]] = {}
    current: dict[str, Any] | None = None
    for line in file.read_text().splitlines():
        if line.startswith("\t"):
            if current is not None:
                current["payload"] += line[1:] + "\n"
            continue
        record = json.loads(line[line.index("{") :])
        artifact = record.get("artifact")
        current = None
        if artifact is not None and artifact["name"].startswith("mctf_"):
            current = found[artifact["name"]] = {**record, **artifact, "payload": ""}
    return found
