"""Multiply-accumulates block by block, and the plot of a report."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from matplotlib.colors import to_hex

import mctf_compile
from mctf_compile import plot
from mctf_compile.report import BlockReport, Report
from mctf_compile.testing import TinyViT, VitSpec


def report_of(depth: int = 3, **options: object) -> tuple[Report, VitSpec]:
    torch.manual_seed(0)
    spec = VitSpec(depth=depth, grid=4, **options.pop("spec", {}))
    model = TinyViT(spec).eval()
    with torch.no_grad():
        return mctf_compile.explain(model, *model.example(kinds=16, seed=0), min_tokens=1, **options), spec


def dense_macs(spec: VitSpec, n: int, batch: int = 2) -> int:
    """Of one block on ``n`` tokens: four projections, an MLP of twice the width, and two products with the map."""
    c = spec.width
    return batch * (n * c * c * (3 + 1 + 2 + 2) + 2 * n * n * c)


def test_blocks_are_counted_as_their_formula_has_it() -> None:
    report, spec = report_of(r=2, method="tome")
    # ToMe: attention on the tokens that come in, the MLP on those that are left, and the scores of the matching.
    c, head = spec.width, spec.head_dim
    for i, (before, after) in enumerate(report.macs_by_block):
        n, m = 17 - 2 * i, 15 - 2 * i
        assert before == dense_macs(spec, 17)
        assert after - 2 * (n * c * c * 4 + 2 * n * n * c + m * c * c * 4) == 2 * ((n - 1) // 2) ** 2 * (head + 1)


def test_the_rest_is_what_no_block_has() -> None:
    report, spec = report_of(r=3)
    embedding_and_head = 2 * (16 * 3 * 16 * spec.width + spec.width * 5)
    assert report.macs_before - sum(work[0] for work in report.macs_by_block) == embedding_and_head
    assert report.macs_after - sum(work[1] for work in report.macs_by_block) == embedding_and_head
    assert report.macs_by_block[0][0] == report.macs_by_block[0][1]
    fewer = [after for _, after in report.macs_by_block[1:]]
    assert fewer == sorted(fewer, reverse=True) and fewer[0] < report.macs_by_block[1][0]


def test_blocks_are_counted_whatever_kernels_are_chosen() -> None:
    assert report_of(r=2, kernels="aten")[0].macs_by_block == report_of(r=2)[0].macs_by_block


PLACED = [{"norm": "parallel"}, {"norm": "post"}, {"layout": "bchw", "prefix": 0, "head": "mean"}]


@pytest.mark.parametrize("spec", PLACED, ids=str)
def test_an_mlp_is_its_blocks_however_it_is_placed(spec: dict) -> None:
    report, made = report_of(r=2, spec=spec)
    assert [before for before, _ in report.macs_by_block] == [dense_macs(made, made.tokens)] * 3


def test_blocks_of_windows_are_counted() -> None:
    """They stay dense; the MLP works on the tokens in another layout than attention's."""
    import timm

    c = 24
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, embed_dim=c, depths=(1, 2), num_heads=(2, 4))
    with torch.no_grad():
        report = mctf_compile.explain(model.eval(), torch.randn(1, 3, 56, 56), r=0)
    for (before, after), (n, width) in zip(report.macs_by_block, [(14 * 14, c), (7 * 7, 2 * c), (7 * 7, 2 * c)]):
        assert before == after == n * width**2 * (4 + 8) + 2 * n * 49 * width


def test_a_dense_model_is_counted_too() -> None:
    report, spec = report_of(r=0)
    assert report.macs_by_block == [(dense_macs(spec, 17),) * 2] * 3


def heights(axes: object) -> list[float]:
    return [bar.get_height() for bar in axes.patches]


def test_a_plot_has_the_numbers_of_the_report() -> None:
    report, _ = report_of(r=3)
    figure = report.plot()
    tokens, macs = figure.axes
    assert heights(tokens) == [17, 17, 14, 17, 14, 11]
    unit = 1e6
    before, after = zip(*report.macs_by_block)
    expected = [macs / unit for macs in (*before, *after)]
    assert heights(macs) == pytest.approx(expected)
    assert [to_hex(bar.get_facecolor()) for bar in tokens.patches[3:]] == [plot.DENSE, plot.FUSED, plot.FUSED]
    assert [t.get_text() for t in macs.get_xticklabels()] == ["0", "1", "2"]
    assert figure.get_suptitle() == report.summary


def test_what_is_not_known_is_a_question_mark(tmp_path: Path) -> None:
    block = BlockReport(0, None, None, "no residual connection")
    unknown = Report([block], lambda: (10, 10), reason="no block can fuse")
    figure = unknown.plot()
    assert [[t.get_text() for t in axes.texts] for axes in figure.axes] == [["?"], ["?"]]
    figure.savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_a_plot_leaves_no_state_of_pyplot() -> None:
    sys.modules.pop("matplotlib.pyplot", None)
    report_of(r=3)[0].plot()
    assert "matplotlib.pyplot" not in sys.modules


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"matplotlib; pip install 'mctf-compile\[pictures\]'"):
        Report([], lambda: (0, 0)).plot()
