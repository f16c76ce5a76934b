"""The benchmark harness: what it keeps and says, and that nothing finished is lost. No times are asserted."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch

from benchmarks import __main__ as command
from benchmarks import accuracy
from benchmarks.suites import QUICK, SUITES, BenchmarkRow
from mctf_compile import FusionConfig, Report
from mctf_compile.errors import ConfigError, MctfError
from mctf_compile.evaluating.outcomes import Outcomes
from mctf_compile.measuring import fresh_process
from mctf_compile.measuring import suite as measuring
from mctf_compile.measuring.bench import BenchResult, Timing, WrongOutputError
from mctf_compile.measuring.candidates import CANDIDATES, check_candidates
from mctf_compile.measuring.fresh_process import isolate, peak_bytes
from mctf_compile.measuring.machine import machine
from mctf_compile.measuring.page import markdown, write
from mctf_compile.measuring.results import Result, append, latest, read
from mctf_compile.measuring.subprocesses import run_in_process
from mctf_compile.measuring.workload import Workload
from mctf_compile.tuning.contract import Contract

MACHINE = {
    "cpu": "Made Up 9000",
    "simd": "AVX2",
    "cores": 4,
    "threads": 1,
    "memory_gib": 15.5,
    "load": 0.25,
    "system": "Linux x86_64",
    "compiler": "g++ 12.2.0",
    "python": "3.11.7",
    "versions": {"torch": "2.15.0", "triton": None},
}


def result_of(row: BenchmarkRow, suite: str = "cpu", load: float = 0.25, **milliseconds: list[float]) -> Result:
    """A result with the given times; the ratio of multiply-accumulates is 1.6."""
    given = milliseconds or {"eager": [30.0, 32.0, 31.0], "inductor": [24.0, 26.0, 25.0], "mctf": [16.0, 13.0, 16.0]}
    timings = {name.replace("_", "-"): Timing(name, ms) for name, ms in given.items()}
    measured = BenchResult(timings, dict.fromkeys(timings, 1.0), Report([], lambda: (320, 200))).to_dict()
    alone = {
        "eager": {"cold_s": 0.5, "warm_s": 0.5, "peak_bytes": 2**20, "kernels": 0, "misses": 0},
        "inductor": {"cold_s": 20.0, "warm_s": 4.0, "peak_bytes": 2 * 2**20, "kernels": 15, "misses": 0},
        "mctf": {"cold_s": 30.0, "warm_s": 5.0, "peak_bytes": 2**20, "kernels": 26, "misses": 0},
    }
    return Result(suite, row, "2026-01-31", {**MACHINE, "load": load}, json.loads(json.dumps(measured)), alone)


ROW = BenchmarkRow("small", Workload("test_vit", r=8, batch=2, image_size=96, options={"tau_size": 0}))


def test_results_survive_their_files(tmp_path: Path) -> None:
    first, second = result_of(ROW), result_of(ROW, load=0.5, eager=[3.0], mctf=[2.0])
    assert append(first, tmp_path / "new") == tmp_path / "new" / "small.json"
    append(second, tmp_path / "new")
    assert read(tmp_path / "new" / "small.json") == [first, second]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["small.json"]


def test_the_latest_result_of_each_machine_counts(tmp_path: Path) -> None:
    first, second = result_of(ROW), result_of(ROW, load=0.5, eager=[3.0], mctf=[2.0])
    elsewhere = replace(first, machine={**MACHINE, "versions": {"torch": "2.16.0"}})
    for result in (first, elsewhere, second):
        append(result, tmp_path)
    assert latest(tmp_path) == [elsewhere, second]


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "small.json").write_text('[{"suite": "cpu"}]')
    with pytest.raises(MctfError, match=r"small\.json is no file of results: KeyError: 'row'"):
        append(result_of(ROW), tmp_path)
    assert (tmp_path / "small.json").read_text() == '[{"suite": "cpu"}]'


def cells(page: str, row: str) -> list[list[str]]:
    """The cells of the table rows that begin with a name."""
    lines = (line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith(f"| {row} |"))
    return [[cell.strip() for cell in line] for line in lines]


def test_the_page_says_what_was_measured() -> None:
    page = markdown([result_of(ROW)], SUITES)
    speed, *alone = cells(page, "small")
    # Round by round mctf is 24 / 16, 26 / 13 and 25 / 16 times faster: 1.5, 2 and 1.5625.
    assert speed == [
        "small",
        "test_vit at 96",
        "2",
        "1",
        "float32",
        "8 {'tau_size': 0}",
        "31.0 (1.0)",
        "25.0 (1.0)",
        "25.0 (1.0) inductor",
        "16.0 (1.5)",
        "16.0 (1.5) mctf",
        "1.60",
        "1.56 (1.53 to 1.78)",
        "0.98",
        "1.56",
    ]
    assert alone == [
        ["small", "eager", "0.5 (0.03x)", "0.5 (0.12x)", "0", "1.0 (0.50x)"],
        ["small", "inductor", "20.0", "4.0", "15", "2.0"],
        ["small", "mctf", "30.0 (1.50x)", "5.0 (1.25x)", "26", "1.0 (0.50x)"],
    ]
    software = "Linux x86_64, g++ 12.2.0, Python 3.11.7, torch 2.15.0"
    assert f"Made Up 9000, 4 cores, AVX2, 15.5 GiB, {software}; 2026-01-31" in page
    assert "Load before a row: 0.25 to 0.25." in page


def test_the_page_also_compares_with_what_is_compiled_for_one_batch() -> None:
    candidates = {"eager": [30.0], "inductor": [24.0], "freezing-dynamic": [20.0], "mctf": [16.0]}
    (speed,) = cells(markdown([replace(result_of(ROW, **candidates), isolated={})], SUITES), "small")
    assert speed[8] == "20.0 (0.0) freezing-dynamic" and speed[-3:] == ["1.25 (1.25 to 1.25)", "0.78", "1.50"]


def test_suites_and_machines_have_tables_of_their_own() -> None:
    first, other = (replace(ROW, name=name) for name in ("deit_t", "deit_s"))
    elsewhere = replace(result_of(first), machine={**MACHINE, "cpu": "Other"})
    page = markdown([result_of(first), result_of(other), elsewhere, result_of(ROW, "quick")], SUITES)
    assert page.index("## cpu") < page.index("## quick")
    # In the order of the suite, whatever that of the files.
    assert page.index("| deit_s |") < page.index("| deit_t |")
    assert page.count("| row | model |") == 3 and page.count("Other, 4 cores") == 1


def test_a_plot_for_each_suite(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = write([result_of(ROW), result_of(ROW, "quick", eager=[20.0], mctf=[30.0])], tmp_path, SUITES)
    assert [path.name for path in paths] == ["README.md", "cpu.png", "quick.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths[1:])
    assert all(f"]({path.name})" in paths[0].read_text() for path in paths[1:])


def test_every_row_can_be_run() -> None:
    rows = [row for suite in SUITES.values() for row in suite]
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        assert row.name.replace("-", "_").isidentifier() and timm.is_model(row.work.model)
        assert check_candidates(row.candidates) == list(row.candidates) and set(row.isolated) <= set(row.candidates)
        FusionConfig.from_options(row.work.all_options)
        # Other runtimes have no autocast.
        files = {name for name in row.candidates if CANDIDATES[name].target is not None}
        assert not files or row.work.autocast is None


def test_a_workload_is_the_same_each_time() -> None:
    work = Workload("test_vit", batch=2, image_size=96, dtype="bfloat16")
    (one, [images]), (two, [again]) = work.load(), work.load()
    assert images.shape == (2, 3, 96, 96) and torch.equal(images, again) and images.dtype == torch.bfloat16
    assert all(torch.equal(x, y) and x.dtype == torch.bfloat16 for x, y in zip(one.parameters(), two.parameters()))
    with pytest.raises(ConfigError, match="dtype='float23' is not one of"):
        Workload("test_vit", dtype="float23")


def test_the_machine_is_described_without_names_of_places() -> None:
    found = machine()
    text = json.dumps(found)
    assert found["versions"]["torch"] == torch.__version__.split("+")[0] and found["cores"] >= 1
    assert found["threads"] == torch.get_num_threads()
    assert not any(place in text for place in (platform.node(), str(Path.home()), os.getcwd()))


def test_peak_memory_is_the_highest_sum_of_what_is_held() -> None:
    def call() -> torch.Tensor:
        a = torch.ones(1000)
        b = a + 1
        del a
        c = torch.cat([b, b])
        del b
        return c[:1].clone()

    # 4000 bytes each for a and b, then b and c: 12000 at once.
    assert peak_bytes(call) == 12000


JOB = """
import os, subprocess, sys, time
from mctf_compile.errors import MctfError

def give(x, progress):
    print("a library prints")
    progress("half", 1, 2)
    return {"x": x, "threads": os.environ["OMP_NUM_THREADS"], "cache": os.environ["TORCHINDUCTOR_CACHE_DIR"]}

def fail(wrong, progress):
    raise MctfError("wrong outputs") if wrong else ValueError("a bug\\nin two lines")

def die(progress):
    print("Killed", file=sys.stderr)
    sys.stderr.flush()
    os._exit(3)

def wait(progress):
    progress(str(subprocess.Popen(["sleep", "600"]).pid), 0, 1)
    time.sleep(600)
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mctf_test_job.py").write_text(JOB)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("job")
def test_a_child_gives_its_result_and_its_progress(tmp_path: Path) -> None:
    told: list[tuple] = []
    given = {"x": {"r": (16, -1.0)}}
    found = run_in_process("mctf_test_job:give", given, 3, tmp_path, lambda *step: told.append(step))
    assert found == {"x": {"r": [16, -1.0]}, "threads": "3", "cache": str(tmp_path)} and told == [("half", 1, 2)]


@pytest.mark.usefixtures("job")
@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("fail", {"wrong": True}, "^wrong outputs$"),
        ("fail", {"wrong": False}, "^ValueError: a bug$"),
        ("die", {}, "ended with status 3: Killed"),
    ],
)
def test_a_child_that_fails_says_why(function: str, arguments: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(MctfError, match=message):
        run_in_process(f"mctf_test_job:{function}", arguments, 1, tmp_path)


@pytest.mark.usefixtures("job")
def test_ctrl_c_ends_a_child_and_what_it_started(tmp_path: Path) -> None:
    started: list[int] = []

    def interrupt(what: str, done: int, total: int) -> None:
        started.append(int(what))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_in_process("mctf_test_job:wait", {}, 1, tmp_path, interrupt)
    # What has ended may still be listed until it is collected.
    state = Path(f"/proc/{started[0]}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] in "ZX"


def test_a_warm_start_is_the_median_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    caches: list[Path] = []

    def start(function: str, arguments: dict, threads: int, cache: Path, progress: object) -> dict:
        caches.append(cache)
        number = len(caches) - 1
        assert arguments["state"] == ("warm" if number else "cold")
        return {
            "seconds": [30.0, 5.0, 9.0, 6.0][number],
            "peak_bytes": 100 + number,
            "kernels": 7 * (not number),
            "misses": [4, 0, 1, 0][number],
        }

    monkeypatch.setattr(fresh_process, "run_in_process", start)
    found = isolate(Workload("test_vit"), "mctf")
    assert len(set(caches)) == 1 and len(caches) == 4
    assert (found.cold_s, found.warm_s, found.peak_bytes, found.kernels, found.misses) == (30.0, 6.0, 103, 7, 1)


def test_the_quick_suite_from_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The median of several is for steady figures.
    monkeypatch.setattr(fresh_process, "WARM", 1)
    assert command.main(["--suite", "quick", "--rows", "quick", "--rounds", "2", "--output", str(tmp_path)]) == 0
    (result,) = read(tmp_path / "quick.json")
    assert result.row == QUICK[0] and result.machine["threads"] == 1
    assert list(result.measured["candidates"]) == ["eager", "mctf"]
    assert all(len(c["milliseconds"]) == 2 for c in result.measured["candidates"].values())
    alone = result.isolated["mctf"]
    # A batch of two images [3, 160, 160] becomes 100 patches of width 64 each, held twice while one is computed.
    assert alone["peak_bytes"] > 2 * 2 * 100 * 64 * 4 and alone["kernels"] == alone["misses"] == 0
    assert "quick: " in capsys.readouterr().out
    assert len(cells((tmp_path / "README.md").read_text(), "quick")) == 2


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, BaseException]:
    """Rows that raise, by name; the others have a result at once."""
    raised: dict[str, BaseException] = {}

    def measure_row(row: BenchmarkRow, suite: str, rounds: int, progress: object) -> Result:
        if row.name in raised:
            raise raised[row.name]
        return result_of(row, suite)

    monkeypatch.setattr(measuring, "measure_row", measure_row)
    return raised


def test_ctrl_c_keeps_what_is_finished(tmp_path: Path, measured: dict, capsys: pytest.CaptureFixture[str]) -> None:
    measured["quick-batch1"] = KeyboardInterrupt()
    assert command.main(["--suite", "quick", "--output", str(tmp_path)]) == 130
    told = f"interrupted in quick-batch1; the results of 1 finished rows of 2 are in {tmp_path}"
    assert told in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["quick.json"]
    assert command.main(["report", "--output", str(tmp_path)]) == 0
    assert "| quick |" in (tmp_path / "README.md").read_text()


def test_a_row_whose_outputs_are_wrong_has_no_result(
    tmp_path: Path, measured: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    measured["quick"] = WrongOutputError("the output of mctf is 1 away. No time is reported.")
    assert command.main(["--suite", "quick", "--output", str(tmp_path)]) == 1
    assert "quick failed: the output of mctf is 1 away. No time is reported." in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("*.json")] == ["quick-batch1.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "quick", "--rows", "quik"], "suite quick has no row 'quik'; its rows are: quick, quick-batch1"),
        (["report", "--output", "no/such/folder"], "no/such/folder has no results; python -m benchmarks measures them"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(arguments) == 2
    assert message in capsys.readouterr().err


def outcomes(classes: torch.Tensor) -> Outcomes:
    return Outcomes(classes[:, None], torch.ones(len(classes)))


def test_a_contract_is_tried_on_halves() -> None:
    labels = torch.arange(400) % 7
    dense = outcomes(labels)
    # Three schedules that lose 0, 4 and 200 of 400 images: the last one fails wherever it is certified.
    chain = [
        (gmacs, outcomes(torch.where(torch.arange(400) % every == 1, labels + 1, labels)))
        for gmacs, every in ((1.0, 401 * 2), (0.8, 100), (0.5, 2))
    ]
    found = accuracy.splits(Contract("agreement", 0.05), chain, dense, labels, halves=6)
    assert (found.halves, found.certified, found.kept) == (6, 6, 6) and found.gmacs == pytest.approx(0.8)
    none = accuracy.splits(Contract("agreement", 0.05), chain[2:], dense, labels, halves=6)
    assert (none.certified, none.kept, none.gmacs) == (0, 0, None)


def test_the_page_of_accuracies() -> None:
    quality = {"top1": 0.8, "agreement": 0.9, "lost": 5, "won": 1, "interval": [-0.02, 0.01], "calibration": 0.1}
    dense = {**quality, "top1": 0.82, "agreement": 1.0}
    rows = [
        {"label": "dense", "method": "dense", "gmacs": 1.25, "reason": None, "quality": {"clean": dense}},
        {"label": "mctf r=16", "method": "mctf", "gmacs": 0.7, "reason": None, "quality": {"clean": quality}},
        {"label": "broken", "method": "mctf", "gmacs": None, "reason": "it is", "quality": {}},
    ]
    schedule = {"gmacs": 0.71, "options": {"method": "mctf", "r": [0, 1]}}
    tried = {"measure": "top1", "tolerance": 0.03, "confidence": 0.95, "halves": 20, "certified": 20, "kept": 19}
    trained = {"label": "mctf r=16", "how": "one epoch", "gmacs": 0.7, "quality": {**quality, "top1": 0.81}}
    result = {"model": "vit", "set": "photos", "images": 100, "rows": rows, "schedules": [schedule]}
    result["trained"] = [trained]
    lines = accuracy.page([{**result, "splits": [{**tried, "gmacs": None}]}]).splitlines()
    assert "| `mctf r=16` | 0.700 | 80.0% | -2.0 [-2.0, +1.0] | 5/1 | 90.0% | 10.0% |" in lines
    assert "After training (one epoch), against the dense model before it:" in lines
    assert "| `mctf r=16` | 0.700 | 81.0% | -1.0 [-2.0, +1.0] | 5/1 | 90.0% | 10.0% |" in lines
    assert "| 3% of top1 | 95% | 20 of 20 | 19 | - |" in lines and not any("broken" in line for line in lines)
    assert '`tuned for 0.71 GMACs`: `{"method": "mctf", "r": [0, 1]}`' in lines
