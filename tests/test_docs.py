"""The documentation: its code runs, prints what it says, and has every option, method and command."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from torch import nn

from mctf_compile import METHODS, Merging, Method, cli
from mctf_compile.config import Lowering
from mctf_compile.passes.rules import RULES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Blocks that are shown and not run, marked by a comment that says why, by the page that has them.
ILLUSTRATIONS: dict[str, int] = {}

MARK = re.compile(r"<!-- not run: (?P<why>.+) -->")
FENCE = re.compile(r"^```(?P<language>\S*)$")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, its first line in the page, and why it is not run, if it is not."""

    language: str
    text: str
    line: int
    why_not: str | None


def blocks_of(page: Path) -> list[Block]:
    lines = page.read_text().splitlines()
    found, start = [], None
    for number, line in enumerate(lines):
        fence = FENCE.match(line.strip())
        if fence is None:
            continue
        if start is None:
            start, language = number, fence["language"]
            continue
        above = next((text for text in reversed(lines[:start]) if text.strip()), "")
        mark = MARK.fullmatch(above.strip())
        found.append(Block(language, "\n".join(lines[start + 1 : number]) + "\n", start + 2, mark and mark["why"]))
        start = None
    assert start is None, f"{page}: a fence is not closed"
    return found


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is downloaded, and nothing waits for Inductor; what a page registers or sets is forgotten after it.

    A pretrained model is a DeiT of as many tokens, but of three narrow blocks. Where a block names no inner compiler,
    the rewritten graph runs as it is.
    """
    create, compile_, precompile = timm.create_model, torch.compile, torch.compiler.precompile

    def create_narrow(name: str, *, pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if not pretrained:
            return create(name, **kwargs)
        return create("deit_small_patch16_224", depth=3, embed_dim=32, num_heads=2, **kwargs)

    def compile_eager(model: Any, *, backend: Any = "inductor", options: Any = None, **kwargs: Any) -> Any:
        if backend == "mctf":
            options = {"inner": "eager", "kernels": "aten", **options}
        return compile_(model, backend=backend, options=options, **kwargs)

    def precompile_eager(*args: Any, **kwargs: Any) -> tuple[str, bytes]:
        return precompile(*args, **{"backend": "eager", **kwargs})

    precompile_eager.load = precompile.load
    monkeypatch.setattr(torch.compiler, "precompile", precompile_eager)
    monkeypatch.setattr(timm, "create_model", create_narrow)
    monkeypatch.setattr(torch, "compile", compile_eager)
    tables: list[dict[Any, Any]] = [RULES, METHODS]
    kept = [dict(table) for table in tables]
    with torch._inductor.config.patch(torch._inductor.config.get_config_copy()):
        yield
    for table, before in zip(tables, kept):
        table.clear()
        table.update(before)
    torch._dynamo.reset()


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs_and_prints_what_it_says(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A name of its own: Dynamo keeps modules by name in the globals of the functions that it traced.
    blocks, module = blocks_of(page), ModuleType(f"page_{page.stem}")
    # Dataclasses look for the module that they are defined in.
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.manual_seed(0)
    for block, after in zip(blocks, [*blocks[1:], Block("", "", 0, None)]):
        if block.language != "python" or block.why_not is not None:
            continue
        # Empty lines before it, so that an error names the line of the page.
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as printed, warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            exec(code, module.__dict__)
        if after.language == "text":
            assert printed.getvalue() == after.text, f"{page.name}, line {block.line}"


def test_every_block_is_run_or_says_why_not() -> None:
    known = {"python", "console", "text", "yaml"}
    counts = {page.name: [b.why_not for b in blocks_of(page) if b.why_not is not None] for page in PAGES}
    assert {name: len(reasons) for name, reasons in counts.items() if reasons} == ILLUSTRATIONS
    assert {b.language for page in PAGES for b in blocks_of(page)} <= known
    # What is printed stands below the code that prints it.
    for page in PAGES:
        languages = [b.language for b in blocks_of(page)]
        assert all(languages[i - 1] == "python" for i, name in enumerate(languages) if name == "text" and i), page.name


def test_code_without_a_fence_is_no_python() -> None:
    """Indented blocks are not run, so no Python hides in them."""
    for page in PAGES:
        outside, inside = [], False
        for line in page.read_text().splitlines():
            inside ^= FENCE.match(line.strip()) is not None
            if not inside and line.startswith("    ") and not line.lstrip().startswith(("-", "*", "$")):
                outside.append(line.strip())
        for line in outside:
            assert not re.match(r"(import|from|def|class|with|for|assert) .*|.*torch\.compile\(.*", line), (page, line)


def console_lines() -> list[tuple[str, str]]:
    return [
        (page.name, line)
        for page in PAGES
        for b in blocks_of(page)
        if b.language == "console"
        for line in b.text.splitlines()
    ]


def test_commands_in_the_pages_are_taken() -> None:
    """``mctf`` knows each of its command lines, and the Makefile each target; nothing is run."""
    lines = console_lines()
    assert len(lines) > 10
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page, line in lines:
        assert line.startswith("$ "), (page, line)
        words = [word for word in shlex.split(line[2:], comments=True) if not re.match(r"[A-Z_]+=\+?\w+$", word)]
        if words[0] == "mctf":
            try:
                cli.parser().parse_args(words[1:])
            except SystemExit:
                pytest.fail(f"{page}: mctf does not take {line!r}")
        elif words[0] == "make":
            assert words[1] in targets, (page, line)
        else:
            assert words[0] in ("pip", "git", ".venv/bin/python", ".venv/bin/ruff"), (page, line)


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def tables_of_options() -> dict[str, dict[str, str]]:
    """The rows of docs/options.md, option to default as they are written, by the heading above them."""
    found: dict[str, dict[str, str]] = {}
    heading = ""
    for line in (ROOT / "docs" / "options.md").read_text().splitlines():
        if line.startswith("## "):
            heading = line[3:]
        row = re.match(r"\| `(\w+)`(?:, `\w+`)* \| `(.+?)` \|", line)
        if row:
            found.setdefault(heading, {})[row[1]] = row[2]
    return found


def own_options(options: type, *bases: type) -> dict[str, Any]:
    """The options that a class adds to those of others, or gives another default, with their defaults."""
    known = {f.name: default_of(f) for base in bases for f in fields(base)}
    return {
        f.name: default_of(f)
        for f in fields(options)
        if f.init and (f.name not in known or known[f.name] != default_of(f))
    }


def default_of(field: Any) -> Any:
    return field.default_factory() if field.default is MISSING else field.default


def test_every_option_has_a_row_with_its_default() -> None:
    expected: dict[str, dict[str, Any]] = {
        "The method": {"method": "mctf"},
        "Of every method": own_options(Method),
        "Compiling": own_options(Lowering),
        "Removing a number of tokens per block": own_options(Merging, Method),
    }
    for name, method in METHODS.items():
        base = Merging if issubclass(method, Merging) else Method
        own = own_options(method, base)
        if own:
            expected[f"Options of {name}"] = own
    written = {
        heading: {name: ast.literal_eval(default) for name, default in rows.items()}
        for heading, rows in tables_of_options().items()
    }
    assert written == expected


def rows_of(page: str, first: Callable[[str], bool]) -> list[str]:
    """The first cells of the tables of a page, without marks of code."""
    cells = [line.split("|")[1].strip() for line in (ROOT / "docs" / page).read_text().splitlines() if line[:1] == "|"]
    return [cell.strip("`") for cell in cells if first(cell)]


def test_every_method_has_a_row_with_its_source() -> None:
    page = (ROOT / "docs" / "methods.md").read_text()
    assert rows_of("methods.md", lambda cell: cell.startswith("`") and cell != "`method`") == [
        "mctf",
        "tome",
        "tofu",
        "pitome",
        "evit",
        "idlevit",
        "dynamicvit",
        "dtem",
        "select",
        "random",
        "none",
    ]
    assert set(rows_of("methods.md", lambda cell: cell.startswith("`"))) - {"method"} == set(METHODS)
    for method in METHODS.values():
        for source in re.findall(r"arXiv ([\d.]+)", method.source):
            assert f"https://arxiv.org/abs/{source}" in page


def test_every_command_has_a_section() -> None:
    headings = re.findall(r"^## mctf (\w+)$", (ROOT / "docs" / "commands.md").read_text(), re.MULTILINE)
    assert headings == [command.__name__.rpartition(".")[2] for command in cli.COMMANDS]


@pytest.mark.parametrize("page", ["README.md", "docs/performance.md"])
def test_figures_are_those_measured(page: str) -> None:
    """Each row of its table is part of one of benchmarks/results/README.md."""
    measured = (ROOT / "benchmarks" / "results" / "README.md").read_text()
    row_of: dict[str, list[str]] = {}
    for line in measured.splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.split("|")]
            row_of.setdefault(cells[1], cells)
    rows = re.findall(r"^\| `([\w-]+)` \|(.*)\|$", (ROOT / page).read_text(), re.MULTILINE)
    assert rows
    for name, written in rows:
        for cell in written.split("|"):
            assert any(cell.strip() == known.split(" (")[0] for known in row_of[name]), (name, cell)


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == [page.name for page in PAGES if page.parent != ROOT]


def test_the_pages_speak_of_files_that_are_there() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    known = {*tracked, *(str(parent) + "/" for name in tracked for parent in Path(name).parents)}
    for page in PAGES:
        text = page.read_text()
        for name in re.findall(r"`((?:mctf_compile|passes|kernels|tests|examples|benchmarks|docs)/[\w./-]*)`", text):
            assert name in known, (page.name, name)
