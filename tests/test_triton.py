"""The Triton kernels under Triton's interpreter: one process for each file of cases.

The interpreter has to be chosen before ``triton`` is imported, so the cases are no tests of this process.
"""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

CASES = Path(__file__).parent / "triton_cases"
FILES = sorted(path.stem for path in CASES.glob("*.py") if path.stem != "conftest")


@pytest.mark.parametrize("name", FILES)
def test_under_the_interpreter(name, tmp_path):
    report = tmp_path / "report.xml"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "--junitxml", str(report), str(CASES / f"{name}.py")],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = ElementTree.parse(report).getroot().find("testsuite").attrib
    assert int(counts["tests"]) > 0
    assert (counts["skipped"], counts["errors"], counts["failures"]) == ("0", "0", "0"), done.stdout


def test_nothing_needs_triton_until_its_kernels_are_wanted():
    program = "import sys; sys.modules['triton'] = None; import mctf_compile, mctf_compile.backend"
    subprocess.run([sys.executable, "-c", program], check=True)
