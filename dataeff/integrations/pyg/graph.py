"""PyG's graphs as dataeff's CSC graphs."""

from __future__ import annotations

import copy
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from torch_geometric.data import Data, FeatureStore, GraphStore, HeteroData
from torch_geometric.data.remote_backend_utils import num_nodes as store_num_nodes

from dataeff.sampling import CSCGraph
from dataeff.sampling.hetero import EdgeType


@runtime_checkable
class RowTable(Protocol):
    """What a loader asks of a `FeatureTable` that stands where PyG expects a tensor."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def gather(self, index: Tensor) -> Tensor:
        """Rows by number, delivered where `index` is."""
        ...


def is_table(value: object) -> bool:
    """Whether `value` is a table of rows rather than a tensor (which has a `gather` of its own)."""
    return not isinstance(value, Tensor) and isinstance(value, RowTable)


def has_row_per_node(key: str, num_rows: int, data: Any) -> bool:
    """Whether the table under `key` of a `Data` holds nodes; False: edges.

    Where there are as many nodes as edges the name decides, as it does in PyG.

    Raises:
        ValueError: it has neither one row per node nor one per edge.
    """
    if num_rows not in (data.num_nodes, data.num_edges):
        raise ValueError(
            f"{key} is a table of {num_rows} rows, which is neither one per node "
            f"({data.num_nodes}) nor one per edge ({data.num_edges})"
        )
    return num_rows == data.num_nodes and (num_rows != data.num_edges or "edge" not in key)


def with_node_counts(data: Any) -> Any:
    """`data`, its stores told their number of nodes where only a table knows it.

    PyG infers the number from tensors and cannot see tables; the caller's object is not changed.
    """
    if not isinstance(data, (Data, HeteroData)):
        return data
    counted = copy.copy(data)
    for store in counted.node_stores:
        if "num_nodes" in store or ("x" in store and not is_table(store["x"])):
            continue
        tables = [key for key in store if key != "edge_attr" and is_table(store[key])]
        if tables:
            store.num_nodes = len(store["x" if "x" in tables else tables[0]])
    return counted


def node_counts(data: Any) -> int | dict[str, int]:
    """Number of nodes, by type when there are types."""
    if isinstance(data, Data):
        return int(data.num_nodes)
    if isinstance(data, HeteroData):
        return {key: int(data[key].num_nodes) for key in data.node_types}
    feature_store, graph_store = data
    types = [
        t
        for attr in graph_store.get_all_edge_attrs()
        for t in (attr.edge_type[0], attr.edge_type[2])
    ]
    return {t: store_num_nodes(feature_store, graph_store, t) for t in dict.fromkeys(types)}


def homogeneous_graph(data: Data, time_attr: str | None, weight_attr: str | None) -> CSCGraph:
    """The graph of `data`, with the edges' weights and times.

    Raises:
        ValueError: there is no `edge_index`, an attribute belongs to neither nodes nor edges, or
            there are no weights of that name.
    """
    if data.edge_index is None:
        raise ValueError("data has no edge_index to sample from")
    edge_index = data.edge_index.cpu()
    time = None
    if time_attr is not None:
        if data.is_node_attr(time_attr):
            time = data[time_attr].cpu()[edge_index[0]]
        elif data.is_edge_attr(time_attr):
            time = data[time_attr].cpu()
        else:
            raise ValueError(f"time_attr {time_attr!r} is an attribute of neither nodes nor edges")
    weight = _edge_weight(data, weight_attr)
    return CSCGraph(edge_index, num_nodes=data.num_nodes, edge_weight=weight, edge_time=time)


def hetero_graphs(
    data: HeteroData | tuple[FeatureStore, GraphStore],
    time_attr: str | None,
    weight_attr: str | None,
) -> dict[EdgeType, CSCGraph]:
    """One graph per edge type, with the edges' weights and times.

    Raises:
        ValueError: `time_attr` is found at no node and no edge, an edge type lacks the weights, or
            stores are asked for them.
    """
    if not isinstance(data, HeteroData):
        if weight_attr is not None:
            raise ValueError("weight_attr needs a Data or HeteroData object, not stores")
        return _graphs_of_store(data)
    if time_attr is not None and not any(time_attr in store for store in data.stores):
        raise ValueError(f"time_attr {time_attr!r} is an attribute of neither nodes nor edges")
    graphs = {}
    for src, name, dst in data.edge_types:
        store = data[src, name, dst]
        edge_index = store.edge_index.cpu()
        time = None
        if time_attr is not None and time_attr in store:
            time = store[time_attr].cpu()
        elif time_attr is not None and time_attr in data[src]:
            time = data[src][time_attr].cpu()[edge_index[0]]
        graphs[src, name, dst] = CSCGraph(
            edge_index,
            num_nodes=(data[src].num_nodes, data[dst].num_nodes),
            edge_weight=_edge_weight(store, weight_attr),
            edge_time=time,
        )
    return graphs


def _edge_weight(edges: Any, weight_attr: str | None) -> Tensor | None:
    if weight_attr is None:
        return None
    if weight_attr not in edges:
        kind = getattr(edges, "_key", None)
        raise ValueError(f"weight_attr {weight_attr!r} is no attribute of the edges {kind or ''}")
    weight: Tensor = edges[weight_attr]
    return weight.cpu()


def _graphs_of_store(stores: tuple[FeatureStore, GraphStore]) -> dict[EdgeType, CSCGraph]:
    counts = node_counts(stores)
    assert isinstance(counts, dict)
    rows, colptrs, e_ids = stores[1].csc()
    graphs = {}
    for key, row in rows.items():
        e_id = e_ids.get(key)
        graphs[key] = CSCGraph.from_csc(
            colptrs[key].to(row.dtype),
            row,
            e_id=None if e_id is None else e_id.to(row.dtype),
            num_src_nodes=counts[key[0]],
        )
        if graphs[key].num_dst_nodes != counts[key[2]]:
            raise ValueError(
                f"colptr of {key} has {graphs[key].num_dst_nodes} columns for {counts[key[2]]} "
                f"nodes of type {key[2]!r}"
            )
    return graphs
