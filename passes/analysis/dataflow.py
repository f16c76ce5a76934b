"""What is computed from what in a graph."""

from __future__ import annotations

from functools import cached_property

import networkx as nx
from torch import fx


class Dataflow:
    """What is computed from what.

    Every question is answered within the nodes between two, so that the time for a graph of like blocks grows with
    their number.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.graph = nx.DiGraph()
        self.graph.add_nodes_from(self.nodes)
        self.graph.add_edges_from((source, node) for node in self.nodes for source in node.all_input_nodes)

    @cached_property
    def live(self) -> frozenset[fx.Node]:
        """What a graph is run for, and what that is computed from: not what attached modules say alone."""
        wanted = [node for node in self.nodes if node.is_impure()]
        return frozenset(wanted).union(*(nx.ancestors(self.graph, node) for node in wanted))

    def span(self, first: fx.Node, last: fx.Node | None) -> list[fx.Node]:
        """The nodes from ``first`` to ``last`` (to the end where None), in the order of execution."""
        stop = len(self.nodes) if last is None else self.order[last] + 1
        return self.nodes[self.order[first] : stop]

    def leads(self, source: fx.Node, node: fx.Node) -> bool:
        """Whether ``node`` is computed from ``source``, another node."""
        span = self.span(source, node)
        return len(span) > 1 and nx.has_path(self.graph.subgraph(span), source, node)

    def between(self, source: fx.Node, node: fx.Node) -> list[fx.Node]:
        """The nodes on the ways from ``source`` to ``node``, without the two."""
        inside = self.graph.subgraph(self.span(source, node))
        if node not in inside:
            return []
        ways = nx.descendants(inside, source) & nx.ancestors(inside, node)
        return sorted(ways, key=self.order.__getitem__)
