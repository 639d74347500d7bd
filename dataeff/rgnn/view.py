"""A `View`: one graph as one layer sees it, with as many types as the layer has weights for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dataeff.rgnn import domains
from dataeff.rgnn.sorting import sort_ids
from dataeff.rgnn.structure import Segments, TypedRows
from dataeff.rgnn.tilemap import TileMaps

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
        self.sizes = sizes
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
        missing = self._rows["etype"] - found.numel()
        return torch.nn.functional.pad(found, (0, missing)) if missing else found

    def segments(self, name: str) -> Segments:
        """For each row of the map's target, the rows that lead to it."""
        if name.startswith("etype."):
            types = self.index(name).to(self.graph.structure.dtype)
            by_type = sort_ids(types, self._rows["ntype"])
            return Segments(by_type.ptr[:-1], by_type.ptr[1:], by_type.order)
        found = self.graph.structure.segments(name)
        target, source = domains.map_target(name), domains.map_source(name)
        missing = self._rows[target] - found.begin.numel()
        if missing <= 0:
            return found
        fill = found.begin.new_full((missing,), self._rows[source])
        return Segments(torch.cat([found.begin, fill]), torch.cat([found.end, fill]), found.items)

    def arguments(
        self, wanted: Iterable[tuple[str, int | str]], values: dict[int, Tensor]
    ) -> list[Tensor]:
        """What a generated kernel takes, in order.

        Args:
            wanted: ("value", id) for a stored value, or a map's name behind "index", or behind
                "begin", "end" or "items" of its segments.
            values: the stored values.
        """
        found = []
        for kind, what in wanted:
            if isinstance(what, int):
                found.append(values[what])
            else:
                found.append(
                    self.index(what) if kind == "index" else getattr(self.segments(what), kind)
                )
        return found

    def sorted_by_type(self, name: str) -> bool:
        """Whether rows of the map's source are known to stand type by type."""
        layout = self.graph.layout
        if layout is None or not name.endswith(".ntype"):
            return False
        return name == "dst.ntype" or (name == "node.ntype" and layout.whole)

    def typed_rows(self, domain: str, types: str) -> TypedRows:
        """The rows of a domain as a map leads them to types; kept by the graph for every layer.

        Args:
            domain: the map's source.
            types: the rest of its name: a type domain, or the end of a relation whose type it is.
        """
        num_types = self._rows[domains.map_target(f"{domain}.{types}")]
        key = (domain, self._rows[domain], types, num_types)
        return self.graph.structure.typed_rows(key, lambda: self._split_by_type(domain, types))

    def _split_by_type(self, domain: str, types: str) -> TypedRows:
        num_rows, order = self._rows[domain], None
        if types == "one":
            pointers = torch.zeros(2, dtype=torch.int64, device=self.device)
            pointers[1:].fill_(num_rows)  # no copy from the host: CUDA graphs refuse it
        else:
            name = f"{domain}.{types}"
            assert name in domains.MAPS
            s = self.segments(name)
            pointers = torch.cat([s.begin, s.begin.new_full((1,), num_rows)])
            order = None if self.sorted_by_type(name) else s.items
        return TypedRows(pointers, order, TileMaps(pointers, num_rows))
