"""Imports between folders run one way."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[1]
# Folders whose files are rooms of their own: the front door, and what the passes share.
OPEN = {("mctf_compile",), ("mctf_compile", "passes"), ("mctf_compile", "kernels")}


def module_of(path: Path) -> tuple[str, ...]:
    inside = () if path.parts[0] in ("mctf_compile", "benchmarks", "examples") else ("mctf_compile",)
    name = (*inside, *path.with_suffix("").parts)
    return name[:-1] if name[-1] == "__init__" else name


def room_of(module: tuple[str, ...]) -> str:
    """The folder that a module is in, or the module itself where its folder is open."""
    for end in range(1, len(module)):
        if module[:end] not in OPEN:
            return ".".join(module[:end])
    return ".".join(module)


def imports(tree: ast.AST, annotations: bool = False) -> Iterator[tuple[str, ...]]:
    """What a file imports when it runs, wherever in it; and what it imports for its ``annotations`` alone."""
    for node in ast.iter_child_nodes(tree):
        if not annotations and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (tuple(f"{node.module}.{alias.name}".split(".")) for alias in node.names)
        else:
            yield from imports(node, annotations)


def files() -> dict[tuple[str, ...], Path]:
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {module_of(Path(name)): ROOT / name for name in tracked.split() if not name.startswith("tests/")}


def arrows(annotations: bool = False) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Which module imports which."""
    modules = files()
    for module, path in modules.items():
        for name in imports(ast.parse(path.read_text()), annotations):
            found = next((name[:end] for end in range(len(name), 0, -1) if name[:end] in modules), None)
            if found is not None:
                yield module, found


def rooms() -> nx.DiGraph:
    pairs = ((room_of(module), room_of(found)) for module, found in arrows())
    return nx.DiGraph((a, b) for a, b in pairs if a != b)


def test_imports_between_folders_run_one_way() -> None:
    graph = rooms()
    assert graph.number_of_nodes() > 20
    circles = [sorted(circle) for circle in nx.strongly_connected_components(graph) if len(circle) > 1]
    assert not circles


@pytest.mark.parametrize("folder", ["rules", "analysis", "rewriting"])
def test_files_of_a_folder_import_one_way_for_their_annotations_too(folder: str) -> None:
    """What a rule or a call must know of the program around it is an interface beside it."""
    inside = ("mctf_compile", "passes", folder)
    graph = nx.DiGraph((a, b) for a, b in arrows(annotations=True) if a[:3] == b[:3] == inside and a != b)
    assert [sorted(c) for c in nx.strongly_connected_components(graph) if len(c) > 1] == []


def test_rules_name_nothing_of_those_that_run_them() -> None:
    rules = ("mctf_compile", "passes", "rules")
    above = {found for module, found in arrows(annotations=True) if module[:3] == rules and found[:2] == rules[:2]}
    assert {found[2] for found in above} <= {"rules", "axes", "subclasses", "tracing"}


def test_what_is_below_knows_nothing_of_what_is_above() -> None:
    """Options, methods and kernels serve the passes; passes serve the backend; commands are on top."""
    graph = rooms()
    above = {room: nx.ancestors(graph, room) for room in graph}
    stages = ["passes.rules", "passes.analysis", "passes.planning", "passes.rewriting", "passes", "compiler", "cli"]
    pairs = [
        ("options", "methods"),
        ("methods", "passes.planning"),
        ("passes.lowering", "passes"),
        *pairwise(stages),
    ]
    for lower, upper in pairs:
        assert f"mctf_compile.{upper}" in above[f"mctf_compile.{lower}"], (lower, upper)
    assert not {room for room in above["mctf_compile.cli"] if not room.startswith(("benchmarks", "examples"))}
