"""A `View`: one graph as one layer sees it, with as many types as the layer has weights for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dataeff.rgnn import domains
from dataeff.rgnn.structure import Segments

if TYPE_CHECKING:
    from dataeff.rgnn.graph import Graph

SIZE_ORDER = ("node", "dst", "edge", "src_pair", "dst_pair", "etype", "ntype")


class View:
    """Rows and maps of a graph; weights may know more relations than the graph shows.

    Args:
        graph: the graph.
        sizes: rows of each domain, in the order of `SIZE_ORDER`.
    """

    def __init__(self, graph: Graph, sizes: tuple[int, ...]) -> None:
        self.graph = graph
        self.device = graph.device
        self._rows = {**dict(zip(SIZE_ORDER, sizes, strict=True)), "one": 1}
        self._rows["given"] = self._rows["edge"]

    @staticmethod
    def rows_of(sizes: tuple[int, ...], domain: str) -> int:
        """Rows of a domain, given the sizes of a plan."""
        return 1 if domain == "one" else sizes[SIZE_ORDER.index(domain.replace("given", "edge"))]

    def num_rows(self, domain: str) -> int:
        """Rows of a domain."""
        return self._rows[domain]

    def index(self, name: str) -> Tensor:
        """For each row of the map's source, the row it leads to."""
        if not name.startswith("etype."):
            return self.graph.structure.index(name)
        found = self.graph.relation_ends[0 if name == "etype.src_ntype" else 1]
        # A relation that the graph does not show has no edge: any type does for it.
        return torch.nn.functional.pad(found, (0, self._rows["etype"] - found.numel()))

    def segments(self, name: str) -> Segments:
        """For each row of the map's target, the rows that lead to it."""
        found = self.graph.structure.segments(name)
        target, source = domains.map_target(name), domains.map_source(name)
        missing = self._rows[target] - found.begin.numel()
        if missing <= 0:
            return found
        fill = found.begin.new_full((missing,), self._rows[source])
        return Segments(torch.cat([found.begin, fill]), torch.cat([found.end, fill]), found.items)

    def sorted_by_type(self, name: str) -> bool:
        """Whether rows of the map's source are known to stand type by type."""
        layout = self.graph.layout
        if layout is None or not name.endswith(".ntype"):
            return False
        return name == "dst.ntype" or (name == "node.ntype" and layout.whole)

    def type_pointers(self, name: str) -> Tensor:
        """Boundaries [types + 1] of the rows of each type, once rows are sorted by type."""
        s = self.segments(name)
        return torch.cat([s.begin, s.begin.new_full((1,), self._rows[domains.map_source(name)])])
