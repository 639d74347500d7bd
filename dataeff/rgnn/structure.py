"""Index structures of a graph: sorted edges, unique pairs, and every row map both ways.

For a map m from rows of domain B to rows of domain A there are two forms: `index` [B] gives m(b),
and `Segments` lists, for each a, the rows b with m(b) = a. Indices are int32 when every id fits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dataeff.rgnn import domains

if TYPE_CHECKING:
    from dataeff.rgnn.graph import Graph

# Maps whose segments are ranges of rows: `Segments.items` is None for these and no others.
CONTIGUOUS = ("edge.dst", "edge.dst_pair", "src_pair.etype", "dst_pair.etype")


@dataclass(frozen=True)
class Segments:
    """Rows `items[begin[a]:end[a]]` lead to row a; `items` is None when rows are in that order.

    Shapes: begin, end [rows of the target], items [rows of the source], all of one integer dtype.
    Rows of a segment have one fixed order, so a sum over it has one result.
    """

    begin: Tensor
    end: Tensor
    items: Tensor | None


class Structure:
    """What a `Graph` knows about its edges once they are sorted; internal to `dataeff.rgnn`."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        src, dst = graph.edge_index[0], graph.edge_index[1]
        largest = max(
            graph.num_edges, graph.num_src_nodes, graph.num_dst_nodes, graph.num_relations
        )
        self.dtype = torch.int32 if largest < 2**31 else torch.int64
        self._index: dict[str, Tensor] = {}
        self._segments: dict[str, Segments] = {}
        relations = max(graph.num_relations, 1)
        by_dst, order = torch.sort(dst.long() * relations + graph.edge_type, stable=True)
        self._index["edge.given"] = self._cast(order)
        src, etype = src[order], graph.edge_type[order]
        self._index["edge.src"] = self._cast(src)
        self._index["edge.dst"] = self._cast(dst[order])
        self._index["edge.etype"] = self._cast(etype)
        self._build_dst_pairs(by_dst, relations)
        self._build_src_pairs(etype.long() * max(graph.num_src_nodes, 1) + src)

    def _cast(self, ids: Tensor) -> Tensor:
        return ids.to(self.dtype).contiguous()

    def _build_dst_pairs(self, key: Tensor, relations: int) -> None:
        """Pairs are runs of the sorted key; they are renumbered by (relation, destination)."""
        runs, run_of_edge, counts = torch.unique_consecutive(
            key, return_inverse=True, return_counts=True
        )
        self.num_dst_pairs = int(runs.numel())
        run_dst, run_type = runs // relations, runs % relations
        _, by_type = torch.sort(run_type, stable=True)
        number = torch.empty_like(by_type)
        number[by_type] = torch.arange(by_type.numel(), device=by_type.device)
        self._index["edge.dst_pair"] = self._cast(number[run_of_edge])
        self._index["dst_pair.dst"] = self._cast(run_dst[by_type])
        self._index["dst_pair.etype"] = self._cast(run_type[by_type])
        end = counts.cumsum(0)
        self._segments["edge.dst_pair"] = Segments(
            self._cast((end - counts)[by_type]), self._cast(end[by_type]), None
        )
        ptr = _pointers(run_dst, self.graph.num_dst_nodes)
        self._segments["dst_pair.dst"] = self._split(ptr, number)

    def _build_src_pairs(self, key: Tensor) -> None:
        key, edges = torch.sort(key, stable=True)
        pairs, pair_of, counts = torch.unique_consecutive(
            key, return_inverse=True, return_counts=True
        )
        self.num_src_pairs = int(pairs.numel())
        pair_of_edge = torch.empty_like(pair_of)
        pair_of_edge[edges] = pair_of
        nodes = max(self.graph.num_src_nodes, 1)
        self._index["edge.src_pair"] = self._cast(pair_of_edge)
        self._index["src_pair.src"] = self._cast(pairs % nodes)
        self._index["src_pair.etype"] = self._cast(pairs // nodes)
        end = counts.cumsum(0)
        edges = self._cast(edges)
        self._segments["edge.src_pair"] = Segments(self._cast(end - counts), self._cast(end), edges)
        ptr = _pointers(key // nodes, self.graph.num_relations)
        self._segments["edge.etype"] = self._split(ptr, edges)

    def _split(self, ptr: Tensor, items: Tensor | None) -> Segments:
        ptr = self._cast(ptr)
        return Segments(ptr[:-1], ptr[1:], None if items is None else self._cast(items))

    def index(self, name: str) -> Tensor:
        """For each row of the map's source, the row it leads to."""
        if name not in self._index:
            if name not in ("node.ntype", "dst.ntype"):
                raise ValueError(f"map {name!r} has no index")
            types = self.graph.node_type
            if types is None:
                raise ValueError("the layer reads node types, but the graph has no node_type")
            rows = self.graph.num_rows(name.partition(".")[0])
            self._index[name] = self._cast(types[:rows])
        return self._index[name]

    def segments(self, name: str) -> Segments:
        """For each row of the map's target, the rows that lead to it."""
        if name not in self._segments:
            self._segments[name] = self._build_segments(name)
        return self._segments[name]

    def _build_segments(self, name: str) -> Segments:
        ids = self.index(name)
        rows = self.graph.num_rows(domains.map_target(name))
        if name in CONTIGUOUS:  # sorted already
            return self._split(_pointers(ids, rows), None)
        keys, items = torch.sort(ids, stable=True)
        return self._split(_pointers(keys, rows), items)

    @property
    def nbytes(self) -> int:
        """Bytes of everything built so far."""
        parts = list(self._index.values())
        for s in self._segments.values():
            parts += [s.begin, s.end] if s.items is None else [s.begin, s.end, s.items]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in parts}
        return sum(storages.values())


def _pointers(sorted_ids: Tensor, rows: int) -> Tensor:
    """CSR row pointers [rows + 1] of ids in ascending order."""
    bounds = torch.arange(rows + 1, device=sorted_ids.device, dtype=sorted_ids.dtype)
    return torch.searchsorted(sorted_ids.contiguous(), bounds)
