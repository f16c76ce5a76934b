"""The fuzzer: it finds nothing in the code as it is, and finds rules that are broken."""

import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import strategies as st

from mctf_compile import cli
from mctf_compile.passes.analysis.casts import _Probe
from mctf_compile.passes.analysis.masks import _Finder
from mctf_compile.passes.planning.plan import _TowerPlanner
from mctf_compile.passes.rewriting.fused_call import FusedCall
from mctf_compile.passes.rewriting.insertion import Insertion
from mctf_compile.passes.rewriting.rewriter import Rewriter
from mctf_compile.passes.rewriting.stream import Stream
from mctf_compile.passes.rules import RULES
from mctf_compile.report import Report
from mctf_compile.testing import VitSpec
from mctf_compile.testing.fuzz import SpecCase, fuzz, spec_cases
from mctf_compile.testing.graphs import graph_cases
from mctf_compile.testing.soundness import Soundness

aten = torch.ops.aten


@dataclass(frozen=True)
class Plain:
    """A case that is its number."""

    number: int

    def program(self):
        return str(self.number)


def unweighted_mean(monkeypatch):
    broken = replace(
        RULES[aten.mean.dim],
        fused=lambda call: call.result(call.intensive("self").tensor.mean(call.args["dim"], call.args["keepdim"])),
    )
    monkeypatch.setitem(RULES, aten.mean.dim, broken)


def forgotten_log_size(monkeypatch):
    monkeypatch.setattr(FusedCall, "log_sizes", lambda self, place, dtype=None: None)


def wrong_composition(monkeypatch):
    def first_map_only(self, new, old, lead, tail):
        limit = self.fusion(new, lead, tail).keep.shape[1] - 1
        return self.fusion(old + 1, lead, tail).index.clamp(max=limit)

    monkeypatch.setattr(Stream, "map", first_map_only)


@pytest.mark.parametrize("breakage", [unweighted_mean, forgotten_log_size, wrong_composition])
def test_a_broken_rule_is_found_within_200_examples(breakage, monkeypatch):
    breakage(monkeypatch)
    outcome = fuzz(spec_cases(), 200, seed=0, shrink=False)
    assert outcome.failure is not None and outcome.counts["examples"] <= 200
    assert "fusing duplicates changed the output" in outcome.failure[1]


def unweighted_whole_numbers(monkeypatch):
    monkeypatch.setattr(FusedCall, "as_integers", lambda self, sizes: torch.ones_like(sizes, dtype=torch.int64))


def forgotten_region(monkeypatch):
    monkeypatch.setattr(_Probe, "casts", lambda self, node, state: {})


def evidence_over_queries(monkeypatch):
    """How much attention a token receives is read off the rows of a map, which say what each gives."""
    row = Insertion._mean_row

    def wrong(self, weights, keys, stream, query=None):
        if query is None:
            keys = next(p for p in stream.places(weights.dims) if p.dim != keys.dim)
        return row(self, weights, keys, stream, query)

    monkeypatch.setattr(Insertion, "_mean_row", wrong)


def stale_table(monkeypatch):
    """A table that was fused once is the same for ever, whatever stream reads it."""

    class ByNode(dict):
        def __contains__(self, key):
            return super().__contains__(key[1:4])

        def __getitem__(self, key):
            return super().__getitem__(key[1:4])

        def __setitem__(self, key, value):
            super().__setitem__(key[1:4], value)

    begin = Rewriter.__init__

    def wrong(self, *args):
        begin(self, *args)
        self._raised = ByNode()

    monkeypatch.setattr(Rewriter, "__init__", wrong)


def counts_by_axis(monkeypatch):
    """Tokens are counted by the axes that towers share, and nobody looks how many there are."""
    begin, counts = _TowerPlanner.__init__, {}

    def wrong(self, state, method, number, *more):
        begin(self, state, method, number, *more)
        if number == 0:
            counts.clear()
        self.counts = counts

    class Unheard(set):
        def add(self, index):
            pass

    insert = Insertion.__init__

    def unheard(self, rewriter):
        insert(self, rewriter)
        self.uncut = Unheard()

    monkeypatch.setattr(_TowerPlanner, "__init__", wrong)
    monkeypatch.setattr(Insertion, "__init__", unheard)


def read_by_its_columns(monkeypatch):
    """A mask over pairs of tokens is taken for padding."""
    at = _Finder.at
    monkeypatch.setattr(_Finder, "at", lambda self, node: at(self, node)[-1:])


def one_image(monkeypatch):
    """Several images in one sequence are taken for one."""
    image = Stream.image
    monkeypatch.setattr(Stream, "image", lambda self, *args: torch.zeros_like(image(self, *args)))


# What a program has to hold for a fault to show, and within how many examples it is found; with all of it each of the
# first five is found within 500 too, and later.
FAULTS = (
    (unweighted_whole_numbers, ("operators", "integers", "feedback"), 500),
    (forgotten_region, ("regions",), 500),
    (evidence_over_queries, (), 500),
    (stale_table, ("tables", "returns"), 500),
    (counts_by_axis, ("tables", "streams"), 500),
    (read_by_its_columns, ("pairs",), 200),
    (one_image, ("packed",), 200),
)


@pytest.mark.parametrize(("breakage", "features", "examples"), FAULTS)
def test_a_fault_that_generated_models_do_not_show_is_found_by_programs(breakage, features, examples, monkeypatch):
    breakage(monkeypatch)
    outcome = fuzz(graph_cases(features), examples, seed=0, shrink=False)
    assert outcome.failure is not None


def test_no_two_examples_are_alike():
    seen = []

    class Remembered(Plain):
        def check(self):
            seen.append(self.number)
            return Soundness([Report([], lambda: (0, 0))], [], 0.0, None)

    outcome = fuzz(st.builds(Remembered, st.integers(0, 99)), 60, seed=0)
    assert outcome.counts["examples"] == len(seen) == len(set(seen)) == 60
    assert fuzz(st.builds(Remembered, st.integers(100, 104)), 60, seed=0).counts["examples"] == 5


def test_models_pass():
    outcome = fuzz(spec_cases(), 25, seed=7)
    assert outcome.failure is None, outcome.failure[1] + "\n" + outcome.failure[0].program()
    assert outcome.counts["fused"] > 10 and outcome.counts["duplicates"] > 2


def test_the_program_of_a_failure_fails_alike(monkeypatch, tmp_path):
    """The smallest case that a broken rule fails is printed as a program of its own."""
    unweighted_mean(monkeypatch)
    spec = VitSpec(depth=2, head="mean", prefix=1, grid=3)
    options = {"r": 3, "min_tokens": 1, "tau_info": 0, "tau_size": 0, "layers": [0]}
    plain = st.builds(SpecCase, st.just(spec), st.just(options), st.just(2), st.integers(0, 9))
    case, _ = fuzz(plain, 20, seed=0).failure
    assert "VitSpec(depth=2, grid=3, head='mean')" in case.program()
    broken = (
        "import mctf_compile.passes.rules.reductions as r, torch\n"
        "from dataclasses import replace\n"
        "from mctf_compile.passes.rules import RULES\n"
        "m = torch.ops.aten.mean.dim\n"
        "RULES[m] = replace(RULES[m], fused=lambda c: c.result(c.intensive('self').tensor.mean(c.args['dim'])))\n"
    )
    done = subprocess.run([sys.executable, "-c", broken + case.program()], capture_output=True, text=True, timeout=300)
    assert "AssertionError: fusing duplicates changed the output" in done.stderr
    done = subprocess.run([sys.executable, "-c", case.program()], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_command_reports_what_it_tried(capsys):
    assert cli.main(["fuzz", "--examples", "3", "--seed", "1"]) == 0
    assert "3 examples" in capsys.readouterr().out


def test_the_command_tries_options_on_a_model(capsys):
    assert cli.main(["fuzz", "--model", "test_vit", "--examples", "2"]) == 0
    assert "2 examples: tokens fused in 2" in capsys.readouterr().out


def test_the_command_fails_with_a_program(capsys, monkeypatch):
    forgotten_log_size(monkeypatch)
    options = {"r": 3, "min_tokens": 1, "tau_info": 0, "tau_size": 0}
    plain = st.builds(SpecCase, st.just(VitSpec(head="dense")), st.just(options), st.just(2), st.integers(0, 3))
    monkeypatch.setattr("mctf_compile.testing.fuzz.cases", lambda what: plain)
    assert cli.main(["fuzz", "--examples", "10", "--seed", "0"]) == 1
    captured = capsys.readouterr()
    assert "assert_rewrite_sound(model, *model.example(" in captured.out
    assert "mctf: an unsound rewrite was found" in captured.err


def test_coverage_writes_the_table(tmp_path, capsys):
    path = tmp_path / "table.md"
    assert cli.main(["coverage", "^(B transformers Beit|D timm resnet18)", "--output", str(path)]) == 0
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
    assert lines[0].startswith("|  | model | fused | tokens") and len(lines) == 4
    assert "| B | transformers BeitModel | 2/3 | 50 → 37 |" in lines[2]
    assert "the graph has no self-attention over tokens" in lines[3]


def test_coverage_of_nothing_is_an_error(capsys):
    assert cli.main(["coverage", "no such model"]) == 2
    assert "no model of the zoo matches" in capsys.readouterr().err
