"""What is needed of other packages: torch, and no timm or numpy unless a command asks for a model by its name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# As where they are not installed: looking for them finds nothing.
HIDDEN = """
import importlib.machinery, sys

found = importlib.machinery.PathFinder.find_spec

def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in ("timm", "numpy") else found(name, path, target)

importlib.machinery.PathFinder.find_spec = find_spec
"""
OWN_MODEL = """
import torch
from torch import nn

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
    def forward(self, x):
        q, k, v = (t.unsqueeze(1) for t in self.qkv(self.norm(x)).chunk(3, -1))
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1))

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    def forward(self, x):
        x = x + self.attn(x)
        return x + self.mlp(x)

torch.manual_seed(0)
model = nn.Sequential(Block(), Block(), Block()).eval()
x = torch.randn(2, 5, 16)[:, [0, 1, 2, 0, 3, 4, 1, 2]]
# In one block: of tokens whose scores are equal, rounding decides the order, and so which ones meet in the next.
options = {"r": 1, "layers": [1], "min_tokens": 1, "inner": "eager", "strict": True, "tau_info": 0, "tau_size": 0}
with torch.no_grad():
    torch.testing.assert_close(torch.compile(model, backend="mctf", options=options)(x), model(x))
    import mctf_compile
    report = mctf_compile.explain(model, x, **options)
assert report.fused and "<!doctype html>" in report.html()
assert mctf_compile.trace(model, x, **options).blocks
for name in mctf_compile.__all__:
    if name != "testing":  # it needs Hypothesis, which takes numpy where there is one
        getattr(mctf_compile, name)
assert not {"timm", "numpy"} & sys.modules.keys()
"""
COMMANDS = """
from mctf_compile import cli
for command in ("explain", "bench", "report", "linearity", "fuzz --model"):
    print(cli.main([*command.split(), "test_vit"]))
"""


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_a_model_of_ones_own_needs_neither_timm_nor_numpy() -> None:
    done = run(HIDDEN + OWN_MODEL)
    assert done.returncode == 0, done.stderr


def test_a_command_says_in_one_line_what_to_install() -> None:
    done = run(HIDDEN + COMMANDS)
    said = [line for line in done.stderr.splitlines() if line.startswith("mctf: ")]
    line = "mctf: a model that is given by its name needs the package timm; pip install 'mctf-compile[models]'"
    assert said == [line] * 5, done.stderr
    assert done.stdout.split() == ["2"] * 5


@pytest.mark.parametrize("arguments", [[], ["report"], ["explain"]], ids=str)
def test_help_imports_no_torch(arguments: list[str]) -> None:
    program = (
        "import sys\nfrom mctf_compile import cli\n"
        "try:\n    cli.main([*sys.argv[1:], '--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'timm', 'numpy', 'jinja2'} & sys.modules.keys()"
    )
    done = run(program, *arguments)
    assert done.returncode == 0 and "usage: mctf" in done.stdout, done.stderr


def test_the_package_itself_imports_no_torch_until_it_is_used() -> None:
    """What is imported after torch's own is then a matter of milliseconds; no test asserts a time."""
    done = run("import sys, mctf_compile\nassert 'torch' not in sys.modules\nprint(len(dir(mctf_compile)))")
    assert done.returncode == 0 and int(done.stdout) >= len(__import__("mctf_compile").__all__), done.stderr
