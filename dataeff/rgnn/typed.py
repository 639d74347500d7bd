"""Graphs whose nodes and edges have named types: how rows of many tables become rows of one.

A node's row follows from its type and its number within the type. Destinations come first, type by
type, and then the other nodes, type by type; in a whole graph every node is a destination, so each
type is one block of rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NoReturn

import torch
from torch import Tensor

from dataeff import _core
from dataeff.rgnn.id_range import as_edge_index, refuse_meta
from dataeff.rgnn.watched import is_watched

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
        if len(parts) == 1:
            return parts[0]
        whole = joined(parts)
        return torch.cat(parts) if whole is None else whole

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

    def offsets(self) -> tuple[list[int], list[int]]:
        """What to add to a node's number within its type: for destinations, for others."""
        first = [0, *accumulate(self.num_dst_nodes)]
        others = [n - d for n, d in zip(self.num_nodes, self.num_dst_nodes, strict=True)]
        before = [0, *accumulate(others)]
        rest = [first[-1] + before[t] - inner for t, inner in enumerate(self.num_dst_nodes)]
        return first[:-1], rest


def joined(parts: Sequence[Tensor]) -> Tensor | None:
    """The table that these are the parts of, in order, where they stand so and need no gradients.

    So do the results of a layer that the next one is given: nothing is copied.
    """
    first = parts[0]
    if is_watched() or first.device.type != "cpu" or any(type(p) is not Tensor for p in parts):
        return None
    kind = first.dtype, first.shape[1:], first.untyped_storage().data_ptr()
    end = first.data_ptr()
    for part in parts:
        if (part.dtype, part.shape[1:], part.untyped_storage().data_ptr()) != kind:
            return None
        if not part.is_contiguous() or (part.data_ptr() != end and part.numel()):
            return None
        end += part.nbytes
    # Not by the strides of `first`: those of a single row, or of none, may be anything.
    flat = first.as_strided((sum(p.numel() for p in parts),), (1,))
    return flat.view(sum(p.shape[0] for p in parts), *first.shape[1:])


def typed_layout(
    edges: Mapping[EdgeType, Tensor],
    num_nodes: Mapping[str, int],
    num_dst_nodes: Mapping[str, int] | None,
    edge_types: Sequence[EdgeType] | None,
) -> TypedLayout:
    """The layout of a dictionary of edges.

    Raises:
        TypeError: no dictionaries, or an edge type of other parts.
        ValueError: an edge type that is not listed, or whose ends have no number of nodes; more
            destinations than nodes.
    """
    for name, given in (("edges", edges), ("num_nodes", num_nodes)):
        if not isinstance(given, Mapping):
            raise TypeError(f"{name} is a dictionary by type, got {type(given).__name__}")
    known = tuple(edges) if edge_types is None else tuple(edge_types)
    for key in (*edges, *known):
        if key not in known:
            raise ValueError(f"edge type {key} is not among {list(known)}")
        if not isinstance(key, tuple) or len(key) != 3:
            raise TypeError(
                f"an edge type is (source type, relation, destination type), got {key!r}"
            )
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


def merge_edges(
    layout: TypedLayout,
    edges: Mapping[EdgeType, Tensor],
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """One `edge_index` [2, num_edges] over rows, and the relation of each edge; int32 if that fits.

    They are on `device`; by default where the edges are, or on the CPU where there are none.

    Raises:
        IndexError: a node number that its type does not have.
        ValueError: an edge index that is not [2, num_edges].
    """
    given = {key: as_edge_index(f"edges of {key}", index) for key, index in edges.items()}
    fits = max(sum(layout.num_nodes), len(layout.edge_types)) < 2**31
    dtype = torch.int32 if fits else torch.int64
    found = {index.device for index in given.values()} or {torch.device("cpu")}
    if device is not None:
        found |= {torch.device(device)}
    for index in given.values():
        refuse_meta("edges", index)
    if found == {torch.device("cpu")}:
        return _merged_by_core(layout, given, dtype)
    return _merged_by_torch(layout, given, dtype, device)


def _merged_by_core(
    layout: TypedLayout, edges: Mapping[EdgeType, Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    first, rest = layout.offsets()
    type_of = {name: t for t, name in enumerate(layout.node_types)}
    number_of = {key: number for number, key in enumerate(layout.edge_types)}

    def node_rows(t: int, limit: int) -> tuple[int, int, int, int]:
        return limit, layout.num_dst_nodes[t], first[t], rest[t]

    parts = []
    for key, ids in edges.items():
        s, d = type_of[key[0]], type_of[key[2]]
        src, size = ids.data_ptr(), ids.element_size()
        where = src, src + ids.stride(0) * size, ids.stride(1), size, ids.shape[1]
        ends = *node_rows(s, layout.num_nodes[s]), *node_rows(d, layout.num_dst_nodes[d])
        parts.append((*where, number_of[key], *ends))
    num_edges = sum(ids.shape[1] for ids in edges.values())
    merged = torch.empty(3, num_edges, dtype=dtype, device="cpu")
    src, dst, types = (row.data_ptr() for row in merged)
    table = torch.tensor(parts, dtype=torch.int64, device="cpu")
    wrong = _core.merge_edges(
        *(table.data_ptr(), len(parts), merged.element_size()),
        *(src, dst, types, torch.get_num_threads()),
    )
    if wrong >= 0:
        end, at = divmod(wrong, num_edges)
        for key, ids in edges.items():
            if at < ids.shape[1]:
                t = type_of[key[2 * end]]
                limit = (layout.num_nodes, layout.num_dst_nodes)[end][t]
                _refuse(key, end, at, int(ids[end, at]), limit)
            at -= ids.shape[1]
    return merged[:2], merged[2]


def _merged_by_torch(
    layout: TypedLayout,
    edges: Mapping[EdgeType, Tensor],
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> tuple[Tensor, Tensor]:
    if not edges:
        none = torch.zeros(3, 0, dtype=dtype, device=device)
        return none[:2], none[2]
    # All types together: a loop over hundreds of them would take longer than sorting their edges.
    ids, keys = torch.cat(list(edges.values()), dim=1), list(edges)
    if device is not None:
        ids = ids.to(device)
    counts = torch.tensor([index.shape[1] for index in edges.values()], device=ids.device)
    key_of = torch.repeat_interleave(counts, output_size=ids.shape[1])

    def of_edge(numbers: Iterable[int]) -> Tensor:
        return torch.tensor([*numbers], dtype=ids.dtype, device=ids.device)[key_of]

    src, dst = ([layout.node_types.index(key[end]) for key in keys] for end in (0, 2))
    limits = torch.stack(
        [of_edge(layout.num_nodes[t] for t in src), of_edge(layout.num_dst_nodes[t] for t in dst)]
    )
    wrong = (ids < 0) | (ids >= limits)
    if wrong.any():  # on a GPU the one wait for all types and both ends
        row, at = wrong.nonzero()[0].tolist()
        number = int(key_of[at])
        edge = at - int(counts[:number].sum())
        _refuse(keys[number], row, edge, int(ids[row, at]), int(limits[row, at]))
    first, rest = layout.offsets()
    offset = of_edge(first[t] for t in src)
    if not layout.whole:
        inner = ids[0] < of_edge(layout.num_dst_nodes[t] for t in src)
        offset = torch.where(inner, offset, of_edge(rest[t] for t in src))
    ids += torch.stack([offset, of_edge(first[t] for t in dst)])
    types = of_edge(map(layout.edge_types.index, keys))
    return ids.to(dtype), types.to(dtype)


def _refuse(key: EdgeType, row: int, edge: int, node: int, limit: int) -> NoReturn:
    end, side = (key[0], "source") if row == 0 else (key[2], "destination")
    none = "" if limit else "; num_nodes, and num_dst_nodes of a block, say how many"
    raise IndexError(
        f"{side} {node} of edge type {key} at edge {edge} is out of range: there are {limit}"
        f" {end!r} nodes{none}"
    )


def hetero_parts(
    data: Any,
) -> tuple[dict[EdgeType, Tensor], dict[str, int], torch.device | None]:
    """Edges, node counts and, where there is no edge type, the device of what nodes have.

    Of a `torch_geometric.data.HeteroData`.

    Raises:
        TypeError: other data.
        ValueError: a node type of unknown size.
    """
    if not hasattr(data, "edge_types"):
        raise TypeError(
            f"from_hetero takes a HeteroData, got {type(data).__name__}; rgnn.Graph itself"
            " makes a graph of edge_index and edge_type"
        )
    edges = {key: data[key].edge_index for key in data.edge_types if "edge_index" in data[key]}
    counts = {}
    for name in data.node_types:
        count = data[name].num_nodes
        if count is None:
            raise ValueError(f"node type {name!r} has neither features nor num_nodes")
        counts[name] = int(count)
    if edges:
        return edges, counts, None
    held = (v for name in data.node_types for v in data[name].values() if isinstance(v, Tensor))
    return edges, counts, next((tensor.device for tensor in held), None)
