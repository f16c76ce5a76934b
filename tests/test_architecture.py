"""Imports between folders run one way."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import networkx as nx

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


def imports(tree: ast.AST) -> Iterator[tuple[str, ...]]:
    """What a file imports when it runs, wherever in it; not what it imports for its annotations alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (tuple(f"{node.module}.{alias.name}".split(".")) for alias in node.names)
        else:
            yield from imports(node)


def rooms() -> nx.DiGraph:
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = {module_of(Path(name)): ROOT / name for name in tracked.split() if not name.startswith("tests/")}
    graph = nx.DiGraph()
    for module, path in files.items():
        for name in imports(ast.parse(path.read_text())):
            found = next((name[:end] for end in range(len(name), 0, -1) if name[:end] in files), None)
            if found is not None and room_of(found) != room_of(module):
                graph.add_edge(room_of(module), room_of(found))
    return graph


def test_imports_between_folders_run_one_way() -> None:
    graph = rooms()
    assert graph.number_of_nodes() > 20
    circles = [sorted(circle) for circle in nx.strongly_connected_components(graph) if len(circle) > 1]
    assert not circles


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
