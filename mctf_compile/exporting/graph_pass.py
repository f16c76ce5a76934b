"""The rewrite as a pass over a graph, for what owns its backend and takes passes."""

from __future__ import annotations

import operator
from hashlib import sha256
from inspect import getsourcefile
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

import mctf_compile
from mctf_compile.compiler import fuse_or_decline, in_one_piece, reparameterized
from mctf_compile.errors import ConfigError
from mctf_compile.exporting.program import config_of_graph, flat, put
from mctf_compile.narrowing import present
from mctf_compile.report import Report


class MctfPass(CustomGraphPass):
    """Fuses tokens in a graph, in place; for ``torch._inductor.config.pre_grad_custom_pass``, among others.

    The graph is one of torch functions or ATen operators before autograd, as Dynamo, ``make_fx`` or ``torch.export``
    gives it. One in which nothing can be fused stays as it is, as does one whose nodes do not carry the shapes of their
    values.

    Args:
        options: as for the backend, but for those that say what compiles the graph.

    Attributes:
        reports: what was fused, of each graph so far; none of one that came from a cache.

    Raises ``ConfigError`` for a wrong option, and ``NothingFusedError`` when it runs with ``strict=True``.
    """

    def __init__(self, **options: Any) -> None:
        self.config = config_of_graph(options)
        if self.config.lowering.outputs != "dense":
            raise ConfigError("outputs='fused' would change the shapes of a graph that others call; leave it out.")
        self.reports: list[Report] = []

    def __call__(self, graph: fx.Graph) -> None:
        inputs = graph.find_nodes(op="placeholder")
        values = [n.meta.get("example_value", n.meta.get("val")) for n in inputs]
        if any(value is None for value in values):
            return
        owner = present(graph.owning_module)
        given = flat(owner)
        gm = reparameterized(given, values, self.config)
        state, report = fuse_or_decline(gm, values, self.config, one_piece=True)
        self.reports.append(report)
        if report.fused:
            _replace(graph, owner, in_one_piece(present(state)))
        elif gm is not given:
            _replace(graph, owner, gm)

    def __deepcopy__(self, memo: dict[int, Any]) -> MctfPass:
        # Inductor copies its configuration; what the pass reports is for whoever made it.
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "reports": []}

    def uuid(self) -> str:
        """The same for the same options and sources, in every process."""
        method = getsourcefile(type(self.config.method))
        digest = sha256(repr(self.config).encode())
        for file in [*_sources(), *([] if method is None else [Path(method)])]:
            digest.update(file.read_bytes())
        return f"mctf {mctf_compile.__version__} {digest.hexdigest()}"


def _sources() -> list[Path]:
    """All that decides what a rewritten graph is."""
    package = Path(mctf_compile.__file__).parent
    folders = (package, package / "kernels", package / "passes")
    # Links are not followed by themselves.
    return sorted(p for folder in folders for p in folder.rglob("*") if p.suffix in (".py", ".cpp", ".h"))


def _replace(graph: fx.Graph, owner: torch.nn.Module, fused: fx.GraphModule) -> None:
    """What ``fused`` computes in the place of all that ``graph`` does."""
    inputs = graph.find_nodes(op="placeholder")
    for node in reversed(list(graph.nodes)):
        if node.op != "placeholder":
            graph.erase_node(node)
    for node in fused.graph.find_nodes(op="get_attr"):
        value, name = operator.attrgetter(str(node.target))(fused), f"mctf_{node.name}"
        put(owner, name, value)
        node.target = name
    places: dict[fx.Node, Any] = dict(zip(fused.graph.find_nodes(op="placeholder"), inputs, strict=True))
    graph.output(graph.graph_copy(fused.graph, places))
