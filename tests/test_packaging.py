"""The three folders are one package, in the checkout and in a wheel."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def sources(*endings: str) -> set[Path]:
    """The package's files with these endings, where the package has them (``passes`` and ``kernels`` inside)."""
    places = {"mctf_compile": "mctf_compile", "passes": "mctf_compile/passes", "kernels": "mctf_compile/kernels"}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    files = [Path(name) for name in tracked if name.endswith(endings or (".py",))]
    return {Path(places[f.parts[0]], *f.parts[1:]) for f in files if f.parts[0] in places}


def test_a_checkout_is_the_package_that_is_installed():
    """``passes`` and ``kernels`` are inside the package too, by links that editors and type checkers follow."""
    for name in ("passes", "kernels"):
        assert (ROOT / "mctf_compile" / name).resolve() == ROOT / name
    found = subprocess.run(
        [
            sys.executable,
            "-c",
            "import pkgutil, mctf_compile as m\n"
            "for p in pkgutil.walk_packages(m.__path__, 'mctf_compile.'): print(p.name)",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    names = {".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in sources()}
    assert {*found, "mctf_compile"} == names


def test_the_top_level_is_what_the_readme_says():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not tracked:
        pytest.fail("the tests run in a git checkout")
    folders = {name.split("/")[0] for name in tracked if "/" in name} - {".ci"}
    assert folders <= {"mctf_compile", "passes", "kernels", "examples", "tests", "benchmarks", "docs"}


def test_a_wheel_works_from_another_directory(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(tmp_path / "site")
    assert names == {str(path) for path in sources(".py", ".cpp", ".h", ".typed", ".html", ".css", ".js")}
    # Without it type checkers take the annotations of an installed package for none.
    assert "mctf_compile/py.typed" in names
    program = (
        "import mctf_compile, mctf_compile.passes.rules, mctf_compile.kernels.ahead.reference, torch\n"
        "assert mctf_compile.__file__.startswith(__import__('sys').argv[1]), mctf_compile.__file__\n"
        "from mctf_compile.kernels import cpp\n"
        "print(torch.ops.mctf.match.default._schema.name, mctf_compile.passes.ANALYSIS[0].name, cpp.problem())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
    )
    assert done.stdout.split() == ["mctf::match", "normalize", "None"], done.stderr
