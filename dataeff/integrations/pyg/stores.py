"""PyG's remote-backend interface over dataeff's tables and graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import EdgeAttr, FeatureStore, GraphStore, TensorAttr
from torch_geometric.data.graph_store import EdgeLayout

from dataeff.integrations.pyg.graph import RowTable
from dataeff.sampling import CSCGraph
from dataeff.sampling.hetero import EdgeType


class TableFeatureStore(FeatureStore):  # type: ignore[misc]
    """A `torch_geometric.data.FeatureStore` whose features are `FeatureTable`s or tensors.

    Args:
        tables: table or tensor of rows by (group, attribute): `{("paper", "x"): table}`.
    """

    def __init__(self, tables: Mapping[tuple[Any, str], RowTable | Tensor] | None = None) -> None:
        super().__init__()
        self.__dict__["_tables"] = dict(tables or {})

    def _put_tensor(self, tensor: Any, attr: TensorAttr) -> bool:
        key = (attr.group_name, attr.attr_name)
        value = torch.from_numpy(tensor) if isinstance(tensor, np.ndarray) else tensor
        if attr.index is None:
            self._tables[key] = value
            return True
        table = self._tables.get(key)
        if table is None:
            return False
        index = _as_index(attr.index, len(table))
        if isinstance(table, Tensor):
            table[index] = value
        else:
            table.scatter_(index, value)
        return True

    def _get_tensor(self, attr: TensorAttr) -> Tensor | None:
        table = self._tables.get((attr.group_name, attr.attr_name))
        if table is None:
            return None
        index = _as_index(attr.index, len(table))
        if isinstance(table, Tensor):
            return table[index]
        rows: Tensor = table.gather(index)
        return rows

    def _remove_tensor(self, attr: TensorAttr) -> bool:
        return self._tables.pop((attr.group_name, attr.attr_name), None) is not None

    def _get_tensor_size(self, attr: TensorAttr) -> tuple[int, ...] | None:
        table = self._tables.get((attr.group_name, attr.attr_name))
        return None if table is None else tuple(table.shape)

    def get_all_tensor_attrs(self) -> list[TensorAttr]:
        """Group and name of everything stored."""
        return [TensorAttr(group, name) for group, name in self._tables]


class CSCGraphStore(GraphStore):  # type: ignore[misc]
    """A `torch_geometric.data.GraphStore` over `CSCGraph`s: no conversion, no copy.

    Args:
        graphs: the edges by (source type, name, target type).
    """

    def __init__(self, graphs: Mapping[EdgeType, CSCGraph] | None = None) -> None:
        super().__init__()
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
        if graph is None:
            return None
        if edge_attr.layout == EdgeLayout.CSC:
            return graph.row, graph.colptr
        if edge_attr.layout == EdgeLayout.COO:
            targets = torch.arange(graph.num_dst_nodes, dtype=graph.index_dtype)
            return graph.row, targets.repeat_interleave(graph.colptr.diff())
        return None

    def _remove_edge_index(self, edge_attr: EdgeAttr) -> bool:
        return self._graphs.pop(edge_attr.edge_type, None) is not None

    def get_all_edge_attrs(self) -> list[EdgeAttr]:
        """Type, layout and size of everything stored."""
        return [
            EdgeAttr(key, EdgeLayout.CSC, size=(graph.num_src_nodes, graph.num_dst_nodes))
            for key, graph in self._graphs.items()
        ]

    def csc(
        self, edge_types: list[Any] | None = None, store: bool = False
    ) -> tuple[dict[EdgeType, Tensor], dict[EdgeType, Tensor], dict[EdgeType, Tensor | None]]:
        """`(row, colptr, e_id)` by edge type; unlike PyG's default it keeps the edges' own ids."""
        chosen = list(self._graphs) if edge_types is None else edge_types
        graphs = {key: self._graphs[key] for key in chosen}
        return (
            {key: graph.row for key, graph in graphs.items()},
            {key: graph.colptr for key, graph in graphs.items()},
            {key: graph.e_id for key, graph in graphs.items()},
        )


def _as_index(index: Any, num_rows: int) -> Tensor:
    """What PyG indexes with, as row numbers; None is all rows."""
    if index is None:
        return torch.arange(num_rows)
    if isinstance(index, slice):
        return torch.arange(num_rows)[index]
    if isinstance(index, int):
        return torch.tensor([index])
    chosen: Tensor = index
    return chosen
