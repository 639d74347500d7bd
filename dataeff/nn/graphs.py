"""Graphs of layer calls: a layer that is called again with the same edges reuses the structures."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from dataeff.rgnn import Graph
from dataeff.rgnn.capture import refuse_capture
from dataeff.rgnn.typed import EdgeType

FROM_SPARSE_TENSOR = (
    "a torch_sparse SparseTensor becomes one by to_torch_sparse_coo_tensor(), its values the types"
    " of edges by storage.value()"
)
_KEPT = 8  # of what is still there: graphs of edges that are gone are let go with them


class _Known(NamedTuple):
    """A graph, what it was made of, and copies of that where writes to it are not counted."""

    graph: Graph
    made_of: list[weakref.ref[Any]]
    copies: list[Tensor]


_Store = OrderedDict[tuple[Any, ...], _Known]
_graphs: _Store = OrderedDict()
_tables: _Store = OrderedDict()  # made of other graphs
# Graphs that replays of captured CUDA graphs read: they stay as long as what they were made of.
_captured: WeakIdKeyDictionary = WeakIdKeyDictionary()


def graph_for(
    edge_index: Tensor | Graph,
    edge_type: Tensor | None,
    num_src_nodes: int,
    num_dst_nodes: int,
    num_relations: int,
) -> Graph:
    """The graph of these edges, from an earlier call with the same unchanged tensors if possible.

    `edge_index` may be a sparse adjacency [destinations, sources] too, beside the types of its
    entries in their order, that of `torch_geometric.utils.to_edge_index`.

    Raises:
        TypeError: `edge_index` is neither a tensor nor a graph, or `edge_type` is missing.
        ValueError: a given graph has other nodes than the features.
        IndexError: an id is out of range.
    """
    if isinstance(edge_index, Graph):
        return _checked(edge_index, edge_type, num_src_nodes, num_dst_nodes, num_relations)
    if torch.compiler.is_compiling():
        from dataeff.nn.uncompiled import graph_outside

        made: Graph = graph_outside(
            edge_index, edge_type, num_src_nodes, num_dst_nodes, num_relations
        )
        return made
    if not isinstance(edge_index, Tensor):
        raise TypeError(
            "edge_index must be a tensor or an rgnn.Graph, got"
            f" {type(edge_index).__name__}; {FROM_SPARSE_TENSOR}"
        )
    if edge_type is None:
        raise TypeError("edge_type is needed beside edge_index")
    sizes = (num_src_nodes, num_dst_nodes, num_relations)

    def build() -> Graph:
        return Graph(
            _indices(edge_index).detach(),  # others of the same memory, for these to be let go
            edge_type.detach(),
            num_src_nodes=num_src_nodes,
            num_dst_nodes=num_dst_nodes,
            num_relations=num_relations,
        )

    return _remembered(_graphs, (edge_index, edge_type), sizes, build)


def typed_graph_for(
    edges: Mapping[EdgeType, Tensor] | Graph,
    x_dict: Mapping[str, Tensor],
    node_types: Sequence[str],
    edge_types: Sequence[EdgeType],
) -> Graph:
    """The graph of edges by type, with relations numbered as in `edge_types`.

    Raises:
        TypeError: edges that are no tensor.
        KeyError: an edge type that is not in `edge_types`.
        ValueError: a given graph has other types, or features do not fit.
        IndexError: a node number out of range.
    """
    if isinstance(edges, Graph):
        layout = edges.layout
        if layout is None or layout.edge_types != tuple(edge_types):
            have = "none" if layout is None else list(layout.edge_types)
            raise ValueError(
                f"the layer's edge types are {list(edge_types)}, the graph's {have}; make it with"
                " rgnn.Graph.from_typed(..., edge_types=layer.edge_types)"
            )
        if layout.node_types != tuple(node_types):
            raise ValueError(
                f"the layer's node types are {list(node_types)}, the graph's"
                f" {list(layout.node_types)}; num_nodes must name them in this order"
            )
        return edges
    if torch.compiler.is_compiling():
        from dataeff.nn.uncompiled import typed_graph_outside

        made: Graph = typed_graph_outside(edges, x_dict, node_types, edge_types)
        return made
    unknown = [key for key in edges if key not in edge_types]
    if unknown:
        raise KeyError(f"edge types {unknown} are not in the metadata, {list(edge_types)}")
    for key, value in edges.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"edges of {key} must be a tensor, got {type(value).__name__}; {FROM_SPARSE_TENSOR}"
            )
    counts = {t: int(x_dict[t].shape[0]) if t in x_dict else 0 for t in node_types}

    def build() -> Graph:
        indices = {key: _indices(value) for key, value in edges.items()}
        _check_ends(indices, x_dict)
        device = next((x.device for x in x_dict.values()), None) if not indices else None
        return Graph.from_typed(indices, counts, edge_types=edge_types, device=device)

    sizes = (*edges, *counts.items(), *edge_types)
    return _remembered(_graphs, tuple(edges.values()), sizes, build)


def remembered_table(
    graph: Graph, ids: tuple[Tensor, ...], sizes: tuple[Any, ...], build: Callable[[], Graph]
) -> Graph:
    """What `build` makes of a graph and ids, from an earlier call with the same if possible."""
    return _remembered(_tables, (graph, *ids), sizes, build)


def _check_ends(indices: Mapping[EdgeType, Tensor], x_dict: Mapping[str, Tensor]) -> None:
    """Refuse edges of nodes that no features came for: how many there are is told by those."""
    for key, index in indices.items():
        for end in (key[0], key[2]):
            if end not in x_dict and index.numel():
                raise ValueError(
                    f"x_dict has no features of {end!r} nodes, which edges {key} join: it has"
                    f" {list(x_dict)}; give x_dict[{end!r}], or leave those edges out"
                )


def _indices(edges: Tensor) -> Tensor:
    """Indices [2, num_edges] of themselves, or of a sparse [destinations, sources] matrix."""
    if edges.layout == torch.strided:
        return edges
    if edges.layout == torch.sparse_coo:
        return edges.coalesce().indices().flip(0)
    by_row = edges.layout == torch.sparse_csr
    ptr = edges.crow_indices() if by_row else edges.ccol_indices()
    inner = edges.col_indices() if by_row else edges.row_indices()
    outer = torch.arange(ptr.numel() - 1, device=ptr.device).repeat_interleave(ptr.diff())
    return torch.stack([inner, outer] if by_row else [outer, inner])


def _remembered(
    store: _Store,
    parts: tuple[Tensor | Graph, ...],
    sizes: tuple[Any, ...],
    build: Callable[[], Graph],
) -> Graph:
    """The graph made of these very tensors, and graph, before, if they hold what they held.

    Writes are counted, but not to tensors made in inference mode: copies of these are compared.
    """
    tensors = [part for part in parts if isinstance(part, Tensor)]
    versions = [-1 if t.is_inference() else t._version for t in tensors]
    uncounted = [t for t, version in zip(tensors, versions, strict=True) if version < 0]
    key = (*map(id, parts), *versions, *sizes)
    found = store.get(key)
    if (
        found is not None
        and all(r() is part for r, part in zip(found.made_of, parts, strict=True))
        and all(map(_equal, uncounted, found.copies))
    ):
        store.move_to_end(key)
        if parts and parts[0].device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            _captured.setdefault(parts[0], set()).add(found.graph)
        return found.graph
    if parts:
        refuse_capture(parts[0].device, "the graph of these edges")
    graph = build()

    def forget(_: object) -> None:  # ids that are gone make no graph again
        store.pop(key, None)

    made_of = [weakref.ref(part, forget) for part in parts]
    store[key] = _Known(graph, made_of, [t.clone() for t in uncounted])
    while len(store) > _KEPT:
        store.popitem(last=False)
    return graph


def _equal(edges: Tensor, others: Tensor) -> bool:
    return torch.equal(_indices(edges), _indices(others))


def _checked(
    graph: Graph, edge_type: Tensor | None, num_src: int, num_dst: int, num_relations: int
) -> Graph:
    if edge_type is not None and edge_type is not graph.edge_type:
        raise TypeError("an rgnn.Graph holds its edge types; leave edge_type out")
    if graph.num_src_nodes != num_src or num_dst not in (num_src, graph.num_dst_nodes):
        raise ValueError(f"features are for {num_src} and {num_dst} nodes, the graph is {graph!r}")
    if graph.num_relations > num_relations:
        raise ValueError(
            f"the graph has {graph.num_relations} relations, the layer {num_relations}"
        )
    return graph
