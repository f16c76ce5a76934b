"""The three folders are one package, in the checkout and in a wheel."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"mctf_compile": "mctf_compile", "passes": "mctf_compile.passes", "kernels": "mctf_compile.kernels"}


def test_listed_packages_are_the_folders():
    import ast

    text = (ROOT / "pyproject.toml").read_text()
    listed = ast.literal_eval(text.split("packages = ")[1].split("]")[0] + "]")
    found = []
    for folder, package in FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            inside = init.parent.relative_to(ROOT / folder).parts
            found.append(".".join([package, *inside]))
    assert sorted(listed) == sorted(found)


def test_the_top_level_is_what_the_readme_says():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not tracked:
        pytest.fail("the tests run in a git checkout")
    folders = {name.split("/")[0] for name in tracked if "/" in name} - {".ci"}
    assert folders <= {"mctf_compile", "passes", "kernels", "examples", "tests", "benchmarks"}


def test_a_wheel_works_from_another_directory(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    program = (
        "import mctf_compile, mctf_compile.passes.rules, mctf_compile.kernels.ahead.reference, torch\n"
        "assert mctf_compile.__file__.startswith(__import__('sys').argv[1]), mctf_compile.__file__\n"
        "from mctf_compile.kernels import cpp\n"
        "print(torch.ops.mctf.match.default._schema.name, mctf_compile.passes.PIPELINE[0].name, cpp.problem())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
    )
    assert done.stdout.split() == ["mctf::match", "normalize", "None"], done.stderr
