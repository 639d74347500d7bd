"""PyG's graphs as dataeff's CSC graphs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
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


@runtime_checkable
class KeepsGraphs(Protocol):
    """A graph store whose arrays can be had as they are kept, where `csc()` widens them for PyG."""

    def kept(self) -> Any:
        """`(row, colptr, e_id)`, each by edge type where there are types."""
        ...


def is_table(value: object) -> bool:
    """Whether `value` is a table of rows rather than a tensor (which has a `gather` of its own)."""
    # Of the class: Python remembers its answer, where it looks at each instance anew.
    return not isinstance(value, Tensor) and issubclass(type(value), RowTable)


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

    Raises:
        TypeError: `data` is nothing that PyG's loaders take.
        ValueError: labels or masks are of another number of nodes than the table.
    """
    if not isinstance(data, (Data, HeteroData)):
        _check_stores(data)
        return data
    counted = copy.copy(data)
    for store in counted.node_stores:
        if "num_nodes" in store or ("x" in store and not is_table(store["x"])):
            continue
        tables = [key for key in store if key != "edge_attr" and is_table(store[key])]
        if tables:
            name = "x" if "x" in tables else tables[0]
            store.num_nodes = len(store[name])
            _check_labels(store, name, counted.num_edges)
    return counted


def _check_stores(data: Any) -> None:
    kinds = FeatureStore, GraphStore
    pair = isinstance(data, (tuple, list)) and len(data) == len(kinds)
    if not (pair and all(map(isinstance, data, kinds))):
        parts = f" of {', '.join(type(part).__name__ for part in data)}" if pair else ""
        raise TypeError(
            "data is a Data, a HeteroData or a pair (FeatureStore, GraphStore), not a "
            f"{type(data).__name__}{parts}; a data set's graph is dataset[0]"
        )


def _check_labels(store: Any, name: str, num_edges: int) -> None:
    # Where a transform has taken nodes out, the table's rows would go to others without a word.
    num_rows = len(store[name])
    for key, value in store.items():
        of_nodes = (key == "y" or key.endswith("_mask")) and isinstance(value, Tensor)
        if of_nodes and value.dim() and len(value) not in (1, num_rows, num_edges):
            raise ValueError(
                f"{name} is a table of {num_rows} rows but {key} is of {len(value)}: PyG's "
                "transforms that take nodes out leave tables as they are, so make the table "
                "afterwards; or tell num_nodes"
            )


def is_homogeneous(data: Any) -> bool:
    """Whether there is one node set, without a name: a `Data`, or stores with such edges."""
    if isinstance(data, (Data, HeteroData)):
        return isinstance(data, Data)
    return [attr.edge_type for attr in data[1].get_all_edge_attrs()] == [None]


def node_counts(data: Any) -> int | dict[str, int]:
    """Number of nodes, by type when there are types.

    Raises:
        ValueError: stores do not tell it.
    """
    if isinstance(data, Data):
        return int(data.num_nodes)
    if isinstance(data, HeteroData):
        return {key: int(data[key].num_nodes or 0) for key in data.node_types}
    feature_store, graph_store = data
    edge_attrs = graph_store.get_all_edge_attrs()
    if is_homogeneous(data):
        if edge_attrs[0].size is None:
            raise ValueError(
                "the graph store does not tell the number of nodes: put edges with size="
            )
        return int(max(edge_attrs[0].size))
    named = [t for attr in edge_attrs for t in (attr.edge_type[0], attr.edge_type[2])]
    featured = [attr.group_name for attr in feature_store.get_all_tensor_attrs()]
    types = [*named, *(group for group in featured if isinstance(group, str))]
    return {t: store_num_nodes(feature_store, graph_store, t) for t in dict.fromkeys(types)}


Times = Mapping[Any, Tensor]


def times_of(data: Any, time_attr: str | None) -> tuple[Times, Times]:
    """The times of nodes, and those of edges, by type (None where there are no types).

    One of the two is empty: PyG takes times of nodes or of edges, not both.

    Raises:
        ValueError: `time_attr` is found at both, or nowhere.
    """
    if time_attr is None:
        return {}, {}
    if isinstance(data, Data):
        there = time_attr in data
        nodes = {None: data[time_attr]} if there and data.is_node_attr(time_attr) else {}
        edges = {None: data[time_attr]} if there and data.is_edge_attr(time_attr) else {}
    elif isinstance(data, HeteroData):
        nodes = {s._key: s[time_attr] for s in data.node_stores if time_attr in s}
        edges = {s._key: s[time_attr] for s in data.edge_stores if time_attr in s}
    else:
        nodes, edges = _times_of_stores(data, time_attr)
    if bool(nodes) == bool(edges):
        where = "both nodes and edges" if nodes else "neither nodes nor edges"
        raise ValueError(f"time_attr {time_attr!r} is an attribute of {where}")
    return nodes, edges


def _times_of_stores(
    stores: tuple[FeatureStore, GraphStore], time_attr: str
) -> tuple[dict[Any, Tensor], dict[Any, Tensor]]:
    nodes: dict[Any, Tensor] = {}
    edges: dict[Any, Tensor] = {}
    for attr in stores[0].get_all_tensor_attrs():
        if attr.attr_name != time_attr:
            continue
        times = stores[0].get_tensor(attr.group_name, time_attr, None)
        by_edge = isinstance(attr.group_name, tuple)
        if attr.group_name is None:  # no type tells them apart
            by_edge = len(times) != node_counts(stores)
        (edges if by_edge else nodes)[attr.group_name] = times
    return nodes, edges


def homogeneous_graph(data: Any, time_attr: str | None, weight_attr: str | None) -> CSCGraph:
    """The graph of a `Data`, or of stores without types, with the edges' weights and times.

    Raises:
        ValueError: there is no `edge_index`, an attribute belongs to neither nodes nor edges, or
            there are no weights of that name.
    """
    node_time, edge_time = times_of(data, time_attr)
    if not isinstance(data, Data):
        _refuse_weights(weight_attr)
        count = node_counts(data)
        assert isinstance(count, int)
        return _stored_graph(
            _csc_of(data[1]), (count, count), node_time.get(None), edge_time.get(None)
        )
    _check_edges(data, "data")
    if weight_attr is not None and weight_attr not in data:
        raise ValueError(f"weight_attr {weight_attr!r} is no attribute of the edges")
    return _graph(
        data,
        (data.num_nodes, data.num_nodes),
        weight_attr,
        node_time.get(None),
        edge_time.get(None),
    )


def hetero_graphs(
    data: HeteroData | tuple[FeatureStore, GraphStore],
    time_attr: str | None,
    weight_attr: str | None,
) -> dict[EdgeType, CSCGraph]:
    """One graph per edge type, with the edges' weights and times where these have any.

    Raises:
        ValueError: `time_attr` is found at no node and no edge, or at both, no edge type has the
            weights, or stores are asked for them.
    """
    node_time, edge_time = times_of(data, time_attr)
    counts = node_counts(data)
    assert isinstance(counts, dict)
    if isinstance(data, HeteroData):
        if weight_attr is not None and not any(weight_attr in s for s in data.edge_stores):
            raise ValueError(f"weight_attr {weight_attr!r} is no attribute of any edges")
        return {
            key: _graph(
                _with_edges(data, key),
                (counts[key[0]], counts[key[2]]),
                weight_attr,
                node_time.get(key[0]),
                edge_time.get(key),
            )
            for key in data.edge_types
        }
    _refuse_weights(weight_attr)
    rows, colptrs, e_ids = _csc_of(data[1])
    return {
        key: _stored_graph(
            (row, colptrs[key], e_ids.get(key)),
            (counts[key[0]], counts[key[2]]),
            node_time.get(key[0]),
            edge_time.get(key),
            key,
        )
        for key, row in rows.items()
    }


def _with_edges(data: HeteroData, key: EdgeType) -> Any:
    """The store of an edge type, whose edges end in nodes that the data has."""
    _check_edges(data[key], f"data[{key}]")
    for node_type in (key[0], key[2]):
        if node_type not in data.node_types:
            raise ValueError(
                f"edges {key} end in nodes of type {node_type!r}, of which data has nothing: "
                f"data[{node_type!r}].num_nodes = their number"
            )
    return data[key]


def _check_edges(store: Any, name: str) -> None:
    if "edge_index" not in store:
        raise ValueError(
            f"{name} has no edge_index to sample from"
            + f": {name}.edge_index = torch.stack({name}.adj_t.t().coo()[:2])" * ("adj_t" in store)
        )


def _csc_of(store: GraphStore) -> Any:
    return store.kept() if isinstance(store, KeepsGraphs) else store.csc()


def _refuse_weights(weight_attr: str | None) -> None:
    if weight_attr is not None:
        raise ValueError("weight_attr needs a Data or HeteroData object, not stores")


def _graph(
    edges: Any,
    num_nodes: tuple[int, int],
    weight_attr: str | None,
    node_time: Tensor | None,
    edge_time: Tensor | None,
) -> CSCGraph:
    edge_index = edges.edge_index.cpu()
    if node_time is not None:
        edge_time = node_time.cpu()[edge_index[0]]
    weight = edges[weight_attr].cpu() if weight_attr is not None and weight_attr in edges else None
    return CSCGraph(
        edge_index,
        num_nodes=num_nodes,
        edge_weight=weight,
        edge_time=None if edge_time is None else edge_time.cpu(),
    )


def _stored_graph(
    csc: tuple[Tensor, Tensor, Tensor | None],
    num_nodes: tuple[int, int],
    node_time: Tensor | None,
    edge_time: Tensor | None,
    key: EdgeType | None = None,
) -> CSCGraph:
    row, colptr, e_id = csc
    if len(colptr) - 1 != num_nodes[1]:
        raise ValueError(
            f"colptr of {key} has {len(colptr) - 1} columns for {num_nodes[1]} "
            f"nodes of type {key and key[2]!r}"
        )
    if e_id is not None:
        e_id = e_id.to(row.dtype)
    if node_time is None and edge_time is None:
        return CSCGraph.from_csc(colptr.to(row.dtype), row, e_id=e_id, num_src_nodes=num_nodes[0])
    if node_time is not None:
        edge_time = node_time[row.long()]
    elif e_id is not None and edge_time is not None:
        edge_time = edge_time[e_id.long()]
    # Grouped anew, since within a column the edges ascend in time.
    target = torch.arange(num_nodes[1], device="cpu").repeat_interleave(colptr.long().diff())
    edges = torch.stack([row.long(), target])
    graph = CSCGraph(edges, num_nodes=num_nodes, edge_time=edge_time, index_dtype=row.dtype)
    if e_id is not None:
        graph.e_id = e_id if graph.e_id is None else e_id[graph.e_id.long()]
    return graph
