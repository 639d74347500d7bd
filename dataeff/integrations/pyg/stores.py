"""PyG's remote-backend interface over dataeff's tables and graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import EdgeAttr, FeatureStore, GraphStore, TensorAttr
from torch_geometric.data.graph_store import EdgeLayout

from dataeff.features.index import row_index
from dataeff.integrations.pyg.graph import RowTable, is_table
from dataeff.sampling import CSCGraph
from dataeff.sampling.hetero import EdgeType


class TableFeatureStore(FeatureStore):  # type: ignore[misc]
    """A `torch_geometric.data.FeatureStore` whose features are `FeatureTable`s or tensors.

    Args:
        tables: table or tensor of rows by (group, attribute): `{("paper", "x"): table}`.
        attributes: what is of no row, by group and name; `open_dataset` gives back here what it
            found.

    Raises:
        TypeError: a table is neither, or not by (group, attribute).
    """

    attributes: dict[Any, dict[str, Any]]

    def __init__(
        self,
        tables: Mapping[tuple[Any, str], RowTable | Tensor] | None = None,
        attributes: Mapping[Any, dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        for key, table in (tables or {}).items():
            if not (isinstance(key, tuple) and len(key) == 2):
                raise TypeError(f"tables are by (group, attribute), as ('paper', 'x'); got {key!r}")
            if not (isinstance(table, Tensor) or is_table(table)):
                raise TypeError(f"{key} is a {type(table).__name__}: a FeatureTable or a tensor")
        self.__dict__["_tables"] = dict(tables or {})
        self.__dict__["attributes"] = dict(attributes or {})

    def _put_tensor(self, tensor: Any, attr: TensorAttr) -> bool:
        key = (attr.group_name, attr.attr_name)
        value = torch.from_numpy(tensor) if isinstance(tensor, np.ndarray) else tensor
        if attr.index is None:
            self._tables[key] = value
            return True
        table = self._tables.get(key)
        if table is None:
            return False
        if isinstance(table, Tensor):
            table[attr.index] = value
        else:
            table.scatter_(row_index(attr.index, len(table)), value)
        return True

    def _get_tensor(self, attr: TensorAttr) -> Tensor | None:
        table = self._tables.get((attr.group_name, attr.attr_name))
        if table is None:
            return None
        index = slice(None) if attr.index is None else attr.index
        if isinstance(table, Tensor):
            return table[index]
        rows: Tensor = table.gather(row_index(index, len(table)))
        return rows

    def update_tensor(self, tensor: Any, *args: Any, **kwargs: Any) -> bool:
        """Writes rows, or with index None all; PyG's default first removes what is there."""
        return bool(self.put_tensor(tensor, *args, **kwargs))

    def _remove_tensor(self, attr: TensorAttr) -> bool:
        return self._tables.pop((attr.group_name, attr.attr_name), None) is not None

    def _get_tensor_size(self, attr: TensorAttr) -> tuple[int, ...] | None:
        table = self._tables.get((attr.group_name, attr.attr_name))
        return None if table is None else tuple(table.shape)

    def get_all_tensor_attrs(self) -> list[TensorAttr]:
        """Group and name of everything stored."""
        return [TensorAttr(group, name) for group, name in self._tables]


class CSCGraphStore(GraphStore):  # type: ignore[misc]
    """A `torch_geometric.data.GraphStore` over `CSCGraph`s, which dataeff's samplers read in place.

    `coo()`, `csc()` and `csr()` are for PyG's own samplers, which take int64 alone: a graph that
    keeps its ids in int32 is copied. They tell edges by their ids, as `e_id` of a batch does:
    `coo()` gives them in that order, the others the id of each as PyG's permutation.

    Args:
        graphs: the edges by (source type, name, target type); of a graph without types by None.

    Raises:
        TypeError: one is no `CSCGraph`.
    """

    def __init__(self, graphs: Mapping[EdgeType | None, CSCGraph] | None = None) -> None:
        super().__init__()
        for key, graph in (graphs or {}).items():
            if not isinstance(graph, CSCGraph):
                raise TypeError(
                    f"the edges of {key} are a {type(graph).__name__}: CSCGraph(edge_index)"
                )
        self.__dict__["_graphs"] = dict(graphs or {})

    def _put_edge_index(self, edge_index: tuple[Tensor, Tensor], edge_attr: EdgeAttr) -> bool:
        size, (row, col) = edge_attr.size, edge_index
        if edge_attr.layout == EdgeLayout.CSC:
            graph = CSCGraph.from_csc(col, row, num_src_nodes=size and size[0])
        elif edge_attr.layout == EdgeLayout.COO:
            graph = CSCGraph(torch.stack([row, col]), num_nodes=size and tuple(size))
        else:
            raise ValueError("edges are kept by target: give them in the layout 'coo' or 'csc'")
        self._graphs[edge_attr.edge_type] = graph
        return True

    def _get_edge_index(self, edge_attr: EdgeAttr) -> tuple[Tensor, Tensor] | None:
        graph = self._graphs.get(edge_attr.edge_type)
        return None if graph is None else _LAYOUTS[edge_attr.layout](graph)[:2]

    def _remove_edge_index(self, edge_attr: EdgeAttr) -> bool:
        return self._graphs.pop(edge_attr.edge_type, None) is not None

    def get_all_edge_attrs(self) -> list[EdgeAttr]:
        """Type, layout and size of everything stored."""
        return [
            EdgeAttr(key, EdgeLayout.CSC, size=(graph.num_src_nodes, graph.num_dst_nodes))
            for key, graph in self._graphs.items()
        ]

    def coo(self, edge_types: list[Any] | None = None, store: bool = False) -> Any:
        """`(row, col, None)`, each by edge type, in the order of the edges' ids."""
        return self._each(edge_types, _coo)

    def csc(self, edge_types: list[Any] | None = None, store: bool = False) -> Any:
        """`(row, colptr, e_id)`, each by edge type; e_id is None where edges stand in its order."""
        return self._each(edge_types, _csc)

    def kept(self) -> Any:
        """What `csc()` gives, in the dtypes that the graphs keep their ids in."""
        return self._each(None, _kept)

    def csr(self, edge_types: list[Any] | None = None, store: bool = False) -> Any:
        """`(rowptr, col, e_id)`, each by edge type."""
        return self._each(edge_types, _csr)

    def _each(self, edge_types: list[Any] | None, read: Callable[[CSCGraph], _Arrays]) -> Any:
        if list(self._graphs) == [None]:
            return read(self._graphs[None])
        chosen = list(self._graphs) if edge_types is None else edge_types
        if missing := [key for key in chosen if key not in self._graphs]:
            raise ValueError(f"no edges of type {missing[0]} but of {list(self._graphs)}")
        arrays = {key: read(self._graphs[key]) for key in chosen}
        return tuple({key: own[i] for key, own in arrays.items()} for i in range(3))


_Arrays: TypeAlias = tuple[Tensor, Tensor, Tensor | None]


def _kept(graph: CSCGraph) -> _Arrays:
    return graph.row, graph.colptr, graph.e_id


def _csc(graph: CSCGraph) -> _Arrays:
    e_id = None if graph.e_id is None else graph.e_id.long()
    return graph.row.long(), graph.colptr.long(), e_id


def _coo(graph: CSCGraph) -> _Arrays:
    target = torch.arange(graph.num_dst_nodes, device="cpu")
    row, col = graph.row.long(), target.repeat_interleave(graph.colptr.diff())
    if graph.e_id is None:
        return row, col, None
    order = graph.e_id.argsort()
    return row[order], col[order], None


def _csr(graph: CSCGraph) -> _Arrays:
    row, col, _ = _coo(graph)
    e_id = row.argsort(stable=True)
    counts = torch.bincount(row, minlength=graph.num_src_nodes)
    rowptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return rowptr, col[e_id], e_id


_LAYOUTS = {EdgeLayout.COO: _coo, EdgeLayout.CSC: _csc, EdgeLayout.CSR: _csr}
