"""The page of a report, in a browser: what it shows at first and at another r, on a phone, and to a screen reader."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from browser import CHROMIUM, Browser

import mctf_compile
from mctf_compile import ConfigError, MctfError, Report, cli
from mctf_compile.measuring.blocks import BlockTimes, block_times
from mctf_compile.report import BlockReport
from mctf_compile.testing import TinyViT, VitSpec

MODEL = "test_vit"
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


def model_of(depth: int = 4) -> tuple[TinyViT, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    model = TinyViT(VitSpec(depth=depth, grid=4)).eval()
    return model, model.example(kinds=16, seed=0)


def report_of(r: object = 2, **options: object) -> Report:
    model, inputs = model_of()
    return mctf_compile.explain(model, *inputs, r=r, min_tokens=1, **options)


@pytest.fixture(scope="module")
def times() -> BlockTimes:
    model, inputs = model_of()
    with torch.no_grad():
        return block_times(model, *inputs, r=2, min_tokens=1, inner="eager", rounds=3)


@pytest.fixture(scope="module")
def page(times: BlockTimes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(times.report.html("a <model> & more", times, {"options": "r=2"}), encoding="utf-8")
    return file


@pytest.fixture
def browser() -> Iterator[Browser]:
    with Browser() as opened:
        yield opened
        assert opened.complaints == []


def test_every_r_counts_what_explain_counts_of_it() -> None:
    found = report_of().tradeoff
    assert [p.r for p in found.points] == list(range(9)) and found.reason is None
    for point in found.points:
        alone = report_of(point.r)
        assert point.blocks == alone.blocks and point.removed == alone.removed
        if point.r and all(b.removed for b in alone.blocks[1:]):
            assert point.macs == alone.macs_after
            assert point.macs_by_block == [after for _, after in alone.macs_by_block]
        else:
            # Looking for tokens is counted of blocks that find none.
            assert alone.macs_after <= point.macs <= 1.01 * alone.macs_after
    assert found.points[0].macs == report_of().macs_before


def test_a_padding_of_nothing_leaves_numbers_of_tokens_open() -> None:
    """PyTorch's own shape function for it takes plain numbers, for which alone the count would then hold."""
    size = {"img_size": 56, "embed_dim": 24, "depths": (1, 2), "num_heads": (2, 4)}
    model = timm.create_model("swin_tiny_patch4_window7_224", **size).eval()
    images = torch.randn(1, 3, 56, 56)
    by_r = {point.r: point for point in mctf_compile.explain(model, images, r=8).tradeoff.points}
    for r in (4, 8, 16):
        alone = mctf_compile.explain(model, images, r=r)
        assert by_r[r].macs == alone.macs_after < alone.macs_before and by_r[r].blocks == alone.blocks
    solved = mctf_compile.explain(model, images, r="auto", target="speedup=1.1")
    assert solved.macs_before / solved.macs_after >= 1.1


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"method": "evit"}, "'evit' has no option r"), ({"modules": ["nowhere"], "method": "mctf"}, "no block can fuse")],
)
def test_where_no_r_can_be_looked_at_there_is_a_reason(options: dict[str, object], reason: str) -> None:
    model, inputs = model_of()
    report = mctf_compile.explain(model, *inputs, **options)
    assert report.tradeoff.points == [] and reason in str(report.tradeoff.reason)
    assert f"There is none to show: {report.tradeoff.reason}." in report.html().replace("&#39;", "'")


def test_blocks_have_the_tokens_of_the_dense_model() -> None:
    assert [b.tokens for b in report_of().blocks] == [17] * 4
    assert [b.tokens_in for b in report_of().blocks] == [17, 17, 15, 13]


def test_times_are_of_each_block_and_of_the_rest(times: BlockTimes) -> None:
    for measured in (times.dense, times.fused):
        assert len(measured.blocks) == 4 and all(s is not None and s > 0 for s in measured.blocks)
        assert measured.total > sum(s or 0 for s in measured.blocks) / 2


def test_the_timed_graphs_compute_what_the_model_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from mctf_compile.inner import block_clock

    outputs: list[torch.Tensor] = []
    compiled = block_clock.compile_regions

    def kept(*args: object) -> object:
        run = compiled(*args)

        def call(*inputs: object) -> object:
            outputs.append(run(*inputs)[0])
            return outputs[-1]

        return call

    monkeypatch.setattr(block_clock, "compile_regions", kept)
    model, inputs = model_of()
    with torch.no_grad():
        block_times(model, *inputs, r=2, min_tokens=1, inner="eager", rounds=1)
        fused = torch.compile(model, backend="mctf", options={"r": 2, "min_tokens": 1, "inner": "eager"})(*inputs)
        torch.testing.assert_close(outputs[0], model(*inputs))
        torch.testing.assert_close(outputs[1], fused)
    assert not torch.allclose(outputs[0], outputs[1])


def test_what_cannot_be_timed_says_why() -> None:
    model, inputs = model_of()
    with pytest.raises(MctfError, match="nothing fuses"):
        block_times(model, *inputs, r=0)
    with pytest.raises(ConfigError, match="real inputs"), torch.device("meta"):
        block_times(model.to("meta"), *(x.to("meta") for x in inputs), r=2, min_tokens=1)


@in_browser
def test_the_first_state_is_the_report(page: Path, browser: Browser, times: BlockTimes) -> None:
    report = times.report
    browser.open(page)
    assert browser.run("document.title") == "a <model> & more – mctf report"
    assert browser.text(".summary") == report.summary
    assert browser.text("#r-shown") == "r = 2" and browser.run("document.querySelector('#back').hidden")
    unit = 1e6
    for i, (block, work) in enumerate(zip(report.blocks, report.macs_by_block)):
        assert browser.text(f"#tokens-{i}") == f"{block.tokens_in} → {block.tokens_out}"
        assert browser.text(f"#block-{i} .module") == block.module
        assert browser.text(f"#macs-{i}") == f"{work[1] / unit:.3f}"
        shown = browser.text(f"#block-{i} .time")
        assert shown == f"{1e3 * times.dense.blocks[i]:.2f} → {1e3 * times.fused.blocks[i]:.2f}"
    assert browser.text("#remark-0") == f"dense: {report.blocks[0].reason}"
    assert browser.text("#macs-all") == f"{report.macs_after / unit:.3f}"


def widths(browser: Browser, i: int) -> tuple[float, float]:
    """Of the drawing of a block: how wide it is above, and below."""
    points = browser.run(f"document.querySelector('#shape-{i}').getAttribute('points')").split()
    xs = [float(point.split(",")[0]) for point in points]
    return xs[1] - xs[0], xs[4] - xs[5]


@in_browser
def test_the_slider_shows_another_r(page: Path, browser: Browser, times: BlockTimes) -> None:
    by_r = {point.r: point for point in times.report.tradeoff.points}
    browser.open(page, "#r=3")
    for r, moves in ((3, ""), (4, "ArrowRight"), (0, "Home"), (8, "End")):
        if moves:
            browser.run("document.querySelector('#r').focus()")
            browser.press(moves)
            assert browser.run("location.hash") == f"#r={r}"
        assert browser.text("#r-shown") == f"r = {r}" == browser.run("document.querySelector('#r').ariaValueText")
        macs = f"{by_r[r].macs / 1e6:.3f}"
        assert browser.text("#at-r").startswith(f"{macs} MMACs") and browser.text("#macs-all") == macs
        assert browser.text("#at-r").endswith(f"{by_r[r].removed} tokens removed")
        for i, block in enumerate(by_r[r].blocks):
            assert browser.text(f"#tokens-{i}") == f"{block.tokens_in} → {block.tokens_out}"
            assert widths(browser, i) == pytest.approx(
                (100 * block.tokens_in / 17, 100 * block.tokens_out / 17), abs=0.02
            )
            said = f"dense: {block.reason}" if block.reason else block.note or ""
            assert browser.text(f"#remark-{i}") == said
        assert "times are those that were measured for the report" in browser.text("#elsewhere")
    browser.run("document.querySelector('#back').click()")
    assert browser.text("#r-shown") == "r = 2" and browser.run("document.querySelector('#elsewhere').hidden")


@in_browser
def test_a_schedule_of_its_own_is_shown_as_it_is(tmp_path: Path, browser: Browser) -> None:
    report = report_of([0, 3, 0, 5])
    file = tmp_path / "report.html"
    file.write_text(report.html(), encoding="utf-8")
    browser.open(file)
    assert browser.text("#r-shown") == "as in the report"
    assert [browser.text(f"#out-{i}") for i in range(4)] == ["17", "14", "14", "9"]
    browser.open(file, "#r=2")
    assert browser.text("#r-shown") == "r = 2" and browser.text("#out-3") == "11"


@in_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_phone_shows_all_of_it_and_asks_for_nothing(page: Path, dark: bool) -> None:
    with Browser(375, 800, dark) as phone:
        phone.open(page)
        assert phone.run("[innerWidth, document.documentElement.scrollWidth]") == [375, 375]
        wide = "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > 375).length"
        assert phone.run(f"{wide}") == 0
        assert phone.requests == [page.resolve().as_uri()] and phone.complaints == []
        assert contrast(phone, "body", "body") > 7 and contrast(phone, ".fine", "body") > 4.5
        assert contrast(phone, ".figures .name", ".figures > div") > 4.5


def contrast(browser: Browser, text: str, ground: str) -> float:
    """The contrast of two colours as the Web Content Accessibility Guidelines have it."""

    def luminance(selector: str, what: str) -> float:
        shown = browser.run(f"getComputedStyle(document.querySelector('{selector}')).{what}")
        channels = [int(c) / 255 for c in re.findall(r"\d+", shown)[:3]]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    one, other = sorted((luminance(text, "color"), luminance(ground, "backgroundColor")))
    return (other + 0.05) / (one + 0.05)


@in_browser
@pytest.mark.parametrize("width", [1280, 375])
def test_a_screen_reader_finds_a_table(page: Path, width: int) -> None:
    with Browser(width, 800) as browser:
        browser.open(page)
        found = [(node["role"], node["name"]) for node in browser.tree()]
    roles = [role for role, _ in found]
    assert ("table", "Blocks") in found and roles.count("columnheader") == 6 and roles.count("row") == 1 + 4 + 2
    assert ("slider", "Tokens that each block is to remove:") in found
    pictures = [name for role, name in found if role in ("image", "img")]
    assert len(pictures) == 2 and all(pictures)
    headings = [name for role, name in found if role == "heading"]
    assert headings[:4] == ["a <model> & more", "Trade-off over r", "Tokens, block by block", "Blocks"]


@in_browser
def test_what_is_not_known_is_a_question_mark(tmp_path: Path, browser: Browser) -> None:
    block = BlockReport(0, None, None, "no residual connection </script><b>")
    file = tmp_path / "report.html"
    file.write_text(Report([block], lambda: (10, 10), reason="no block can fuse").html(), encoding="utf-8")
    browser.open(file)
    assert browser.text("#tokens-0") == "? → ?" and browser.text("#macs-0") == "?"
    assert browser.text("#remark-0") == "dense: no residual connection </script><b>"
    assert "The graph stays dense: no block can fuse." in browser.text("main")


def test_the_page_of_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.html"
    arguments = ["report", MODEL, "--r", "8", "-o", str(file), "-o", "inner=eager", "--rounds", "1"]
    assert cli.main(arguments) == 0
    assert f"{file}: mctf: 5 of 6 blocks fuse" in capsys.readouterr().out
    text = file.read_text()
    assert f"<title>{MODEL} – mctf report</title>" in text and "medians of 1 calls" in text
    assert "r=8, inner=&#39;eager&#39;" in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])
    assert [point[0] for point in data["points"]][:9] == list(range(9))
    assert cli.main(["report", MODEL, "--r", "0", "-o", str(file)]) == 0
    assert "without times: nothing fuses" in capsys.readouterr().out
    assert "No times were measured." in file.read_text()
