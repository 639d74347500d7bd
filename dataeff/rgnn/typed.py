"""Graphs whose nodes and edges have named types: how rows of many tables become rows of one.

A node's row follows from its type and its number within the type. Destinations come first, type by
type, and then the other nodes, type by type; in a whole graph every node is a destination, so each
type is one block of rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dataeff.rgnn.id_range import IdColumn, check_ids

EdgeType = tuple[str, str, str]


@dataclass(frozen=True)
class TypedLayout:
    """Names and sizes of node types, and names of relations.

    Attributes:
        node_types: names, in the order of their type numbers.
        edge_types: (source type, relation, destination type), in the order of relation numbers.
        num_nodes: nodes of each type.
        num_dst_nodes: how many of them, the first ones, are destinations.
    """

    node_types: tuple[str, ...]
    edge_types: tuple[EdgeType, ...]
    num_nodes: tuple[int, ...]
    num_dst_nodes: tuple[int, ...]

    @property
    def whole(self) -> bool:
        """Whether every node is a destination."""
        return self.num_nodes == self.num_dst_nodes

    def parts(self) -> list[tuple[int, int, int]]:
        """(type, first, last + 1) of every block of rows, in order."""
        first = [(t, 0, d) for t, d in enumerate(self.num_dst_nodes)]
        sizes = zip(self.num_dst_nodes, self.num_nodes, strict=True)
        rest = [(t, d, n) for t, (d, n) in enumerate(sizes)]
        return first if self.whole else first + rest

    def concatenate(self, values: Mapping[str, Tensor]) -> Tensor:
        """One table [num_src_nodes, ...] of a table for each node type.

        Raises:
            ValueError: a type is missing, or has another number of rows than the graph.
        """
        for name, rows in zip(self.node_types, self.num_nodes, strict=True):
            have = values[name].shape[0] if name in values else None
            if have != rows and not (have is None and rows == 0):
                raise ValueError(
                    f"node type {name!r} has {rows} nodes in the graph, but"
                    f" {'no features' if have is None else f'features for {have}'}"
                )
        parts = [
            values[name] if (begin, end) == (0, self.num_nodes[t]) else values[name][begin:end]
            for t, begin, end in self.parts()
            if (name := self.node_types[t]) in values
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """The rows [num_dst_nodes, ...] of each type's destinations."""
        return dict(zip(self.node_types, rows.split(list(self.num_dst_nodes)), strict=True))

    def node_type(self, device: torch.device) -> Tensor:
        """Type of each row, [num_src_nodes], int32."""
        parts = self.parts()
        types = torch.tensor([t for t, _, _ in parts], dtype=torch.int32, device=device)
        counts = torch.tensor([end - begin for _, begin, end in parts], device=device)
        return torch.repeat_interleave(types, counts, output_size=sum(self.num_nodes))

    def relation_ends(self, device: torch.device) -> Tensor:
        """Node types of each relation's sources and of its destinations, [2, relations]."""
        ends = [[self.node_types.index(e[k]) for e in self.edge_types] for k in (0, 2)]
        return torch.tensor(ends, dtype=torch.long, device=device).view(2, len(self.edge_types))

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """The rows of nodes numbered within one type."""
        t = self.node_types.index(name)
        first = sum(self.num_dst_nodes[:t])
        if self.whole:
            return ids + first
        rest = sum(self.num_dst_nodes) - self.num_dst_nodes[t]
        rest += sum(n - d for n, d in zip(self.num_nodes[:t], self.num_dst_nodes[:t], strict=True))
        return torch.where(ids < self.num_dst_nodes[t], ids + first, ids + rest)


def typed_layout(
    edges: Mapping[EdgeType, Tensor],
    num_nodes: Mapping[str, int],
    num_dst_nodes: Mapping[str, int] | None,
    edge_types: Sequence[EdgeType] | None,
) -> TypedLayout:
    """The layout of a dictionary of edges.

    Raises:
        ValueError: an edge type that is not listed, or whose ends have no number of nodes; more
            destinations than nodes.
    """
    known = tuple(edges) if edge_types is None else tuple(edge_types)
    for key in (*edges, *known):
        if key not in known:
            raise ValueError(f"edge type {key} is not among {list(known)}")
        for end in (key[0], key[2]):
            if end not in num_nodes:
                raise ValueError(
                    f"edge type {key} needs the number of {end!r} nodes; num_nodes has"
                    f" {sorted(num_nodes)}"
                )
    names = tuple(num_nodes)
    counts = tuple(int(num_nodes[n]) for n in names)
    inner = counts if num_dst_nodes is None else tuple(int(num_dst_nodes.get(n, 0)) for n in names)
    for name, count, dst in zip(names, counts, inner, strict=True):
        if not 0 <= dst <= count:
            raise ValueError(f"node type {name!r} has {count} nodes, of which {dst} destinations")
    return TypedLayout(names, known, counts, inner)


def merge_edges(layout: TypedLayout, edges: Mapping[EdgeType, Tensor]) -> tuple[Tensor, Tensor]:
    """One `edge_index` [2, num_edges] over rows, and the relation of each edge.

    Raises:
        IndexError: a node number that its type does not have.
        ValueError: an edge index that is not [2, num_edges].
    """
    indices, types, columns = [], [], []
    for key, index in edges.items():
        if index.dim() != 2 or index.shape[0] != 2:
            raise ValueError(f"edges of {key} must be [2, num_edges], got {list(index.shape)}")
        for end, ids, limits in ((0, index[0], layout.num_nodes), (2, index[1], _dst(layout))):
            columns.append(_column(key, end, ids, limits[layout.node_types.index(key[end])]))
        indices.append(torch.stack([layout.rows(key[0], index[0]), layout.rows(key[2], index[1])]))
        types.append(index.new_full((index.shape[1],), layout.edge_types.index(key)))
    check_ids(columns)
    if not indices:
        return torch.zeros(2, 0, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    return torch.cat(indices, dim=1), torch.cat(types)


def _dst(layout: TypedLayout) -> tuple[int, ...]:
    return layout.num_dst_nodes


def _column(key: EdgeType, end: int, ids: Tensor, limit: int) -> IdColumn:
    side = "source" if end == 0 else "destination"
    return IdColumn(
        ids,
        limit,
        lambda wrong, edge: (
            f"{side} {wrong} of edge type {key} at edge {edge} is out of range: there are"
            f" {limit} {key[end]!r} nodes"
        ),
    )


def hetero_parts(data: Any) -> tuple[dict[EdgeType, Tensor], dict[str, int]]:
    """Edges and node counts of a `torch_geometric.data.HeteroData`.

    Raises:
        ValueError: a node type of unknown size.
    """
    edges = {key: data[key].edge_index for key in data.edge_types if "edge_index" in data[key]}
    counts = {}
    for name in data.node_types:
        count = data[name].num_nodes
        if count is None:
            raise ValueError(f"node type {name!r} has neither features nor num_nodes")
        counts[name] = int(count)
    return edges, counts
