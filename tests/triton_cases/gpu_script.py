"""``benchmarks.gpu`` on small shapes: that it checks before it times, and keeps what it measured."""

import json

from benchmarks import gpu
from mctf_compile.kernels.roofline import BlockShape


def test_every_kernel_is_checked_and_timed(tmp_path):
    assert gpu.main(["--device", "cpu", "--tiny", "--output", str(tmp_path)]) == 0
    kept = json.loads((tmp_path / "kernels" / "cpu.json").read_text())
    assert {row["kernel"] for row in kept["rows"]} == set(BlockShape("tiny", 128, 37, 2).kernels())
    assert kept["failed"] == [] and kept["machine"] and all(row["ms"] > 0 for row in kept["rows"])


def test_what_is_wrong_is_not_timed(tmp_path, monkeypatch, capsys):
    right = gpu.cases

    def with_a_wrong_one(block, device, dtype):
        first, *others = right(block, device, dtype)
        return [gpu.Case(first.name, lambda: [first.run()[0] + 0.01], first.exact, first.plain), *others]

    monkeypatch.setattr(gpu, "cases", with_a_wrong_one)
    assert gpu.main(["--device", "cpu", "--tiny", "--output", str(tmp_path)]) == 1
    kept = json.loads((tmp_path / "kernels" / "cpu.json").read_text())
    assert "attention" not in {row["kernel"] for row in kept["rows"]} and len(kept["rows"]) == 5
    assert kept["failed"][0].startswith("tiny N=37 B=2 attention: an error of 1.00e-02")
    assert "not timed" in capsys.readouterr().err
