"""The operators of a model that have no rule: found, and told by whether they read tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mctf_compile import cli
from mctf_compile.packages import MissingPackage
from mctf_compile.testing import TinyViT, VitSpec, coverage, zoo
from mctf_compile.testing.coverage import operators_page, survey
from mctf_compile.testing.unruled import unruled_operators
from mctf_compile.testing.zoo import Entry


class Around(nn.Module):
    """A ViT with something before it, on images, and something after it, on tokens."""

    def __init__(self, before=lambda images: images, after=lambda x: x) -> None:
        super().__init__()
        self.vit, self.before, self.after = TinyViT(VitSpec(depth=2, head="dense")), before, after

    def forward(self, images: Tensor) -> Tensor:
        return self.after(self.vit(self.before(images)))


def images() -> Tensor:
    return torch.randn(2, 3, 16, 16)


def flipped(images: Tensor) -> Tensor:
    return torch.fft.fft(images).real


def test_a_plain_model_has_none():
    assert unruled_operators(Around(), images()) == {}


def test_what_reads_tokens_is_told_from_what_does_not():
    found = unruled_operators(Around(flipped, lambda x: torch.linalg.vecdot(x, x)), images())
    assert found == {"aten.fft_fft.default": False, "aten.linalg_vecdot.default": True}


def test_an_operator_reads_tokens_if_it_does_once():
    found = unruled_operators(Around(flipped, lambda x: torch.fft.fft(x).real), images())
    assert found == {"aten.fft_fft.default": True}


def test_what_another_one_makes_of_tokens_counts_as_tokens():
    def spectrum(x: Tensor) -> Tensor:
        y = torch.fft.fft(x, 6, 1).real[..., :3]
        return torch.cross(y, 2 * y, dim=-1)

    found = unruled_operators(Around(after=spectrum), images())
    assert found == {"aten.fft_fft.default": True, "aten.cross.default": True}


def test_of_several_graphs_all_are_looked_at():
    def breaking(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return torch.linalg.vecdot(x, x)

    assert unruled_operators(Around(flipped, breaking), images()).keys() == {
        "aten.fft_fft.default",
        "aten.linalg_vecdot.default",
    }


ENTRIES = [Entry(name, "A", "tiny", 16, 4) for name in ("plain", "squared")]


@pytest.fixture
def tiny_zoo(monkeypatch: pytest.MonkeyPatch) -> list[Entry]:
    """A zoo of two models, of a library that is there and of one that is not."""
    after = {"plain": lambda x: x, "squared": lambda x: torch.linalg.vecdot(x, x)}
    monkeypatch.setitem(zoo.MAKERS, "tiny", lambda entry: Around(flipped, after[entry.name]))
    entries = [*ENTRIES, Entry("other", "A", "no_such_library", 16, 4)]
    monkeypatch.setattr(zoo, "ZOO", entries)

    def required(library, *more):
        if library != "tiny":
            raise MissingPackage(f"{library} is missing")

    monkeypatch.setattr("mctf_compile.cli.coverage.required", required)
    return entries


def test_the_command_writes_them_as_a_page(
    tiny_zoo: list[Entry], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "operators.md"
    assert cli.main(["coverage", "--operators", str(path)]) == 0
    text = path.read_text()
    assert "2 models of\ntiny consist of" in text
    assert [line for line in text.splitlines() if line.startswith("| `")] == [
        "| `aten.linalg_vecdot.default` | 1 | 1 | tiny squared |",
        "| `aten.fft_fft.default` | 2 | 0 | tiny plain |",
    ]
    assert "left out: no_such_library is missing" in capsys.readouterr().out


def test_a_zoo_of_missing_libraries_is_an_error(tiny_zoo: list[Entry], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["coverage", "no_such_library"]) == 2
    assert "no_such_library is missing" in capsys.readouterr().err


def test_nobody_looks_for_them_unasked(tiny_zoo: list[Entry], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "unruled_operators", None)
    (row,) = survey(ENTRIES[:1])
    assert row.error is None and row.unruled == {} and "`" not in operators_page([row]).partition("|---|")[2]
