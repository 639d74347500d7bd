"""A graph grouped by target node, the layout that sampling reads."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor

from dataeff import _core
from dataeff._integers import check_id_dtype, checked_int
from dataeff._ops import with_memory
from dataeff.memory import SharedTensor

_MAX_INT32 = 2**31 - 1


def id_tensor(name: str, ids: Tensor, ndim: int = 1, on_host: bool = True) -> Tensor:
    """Checks that `ids` is an int32/int64 tensor with `ndim` dimensions; makes it contiguous.

    Raises:
        TypeError: it is not a tensor of int32 or int64.
        ValueError: its number of dimensions is another, or it is not on the host but should be.
    """
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(ids).__name__}")
    ids = with_memory(ids, name)
    if ids.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, not {ids.layout}: use .to_dense()")
    check_id_dtype(name, ids)
    if ids.dim() != ndim:
        raise ValueError(f"{name} must have {ndim} dimension(s), not shape {tuple(ids.shape)}")
    if on_host and ids.device.type != "cpu":
        raise ValueError(f"{name} must be in host memory, not on {ids.device}: use .cpu()")
    return ids.contiguous()


def _edge_values(name: str, values: Tensor, num_edges: int, dtype: torch.dtype) -> Tensor:
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(values).__name__}")
    if values.shape != (num_edges,):
        raise ValueError(
            f"{name} must have shape [{num_edges}], one value per edge, not {tuple(values.shape)}"
        )
    if values.device.type != "cpu":
        raise ValueError(f"{name} must be in host memory, not on {values.device}: use .cpu()")
    if dtype == torch.int64 and values.dtype.is_floating_point:
        raise TypeError(f"{name} must be an integer tensor, not {values.dtype}")
    if values.is_complex():
        raise TypeError(f"{name} must be a real tensor, not {values.dtype}")
    return with_memory(values.detach().to(dtype), name).contiguous()


class CSCGraph:
    """A directed graph in host memory, its edges grouped by target (compressed sparse columns).

    Column `v` holds the edges into node `v`: `row[colptr[v]:colptr[v + 1]]` are their sources and
    `e_id[...]` their places in `edge_index`. Edges of a column keep the order of `edge_index`; with
    edge types they are grouped by type, with times they ascend in time.

    Args:
        edge_index: source and target of each edge, [2, num_edges], int32/int64, host.
        edge_type: relation of each edge, [num_edges], integers from 0, or None.
        num_nodes: number of nodes, or (sources, targets) of a bipartite graph; by default one more
            than the largest id.
        num_relations: number of edge types; by default one more than the largest.
        edge_weight: weight of each edge for weighted sampling, [num_edges], finite, >= 0, or None.
        edge_time: when each edge came to be, [num_edges], integers, for temporal sampling, or None.
        index_dtype: dtype in which the graph keeps ids; by default int32 when all of them fit.

    Raises:
        IndexError: a node id or an edge type is out of range (the message names it).
        TypeError: ids are neither int32 nor int64.
        ValueError: shapes disagree, ids do not fit `index_dtype`, or a weight is negative.
    """

    colptr: Tensor
    row: Tensor
    e_id: Tensor | None

    def __init__(
        self,
        edge_index: Tensor,
        edge_type: Tensor | None = None,
        *,
        num_nodes: int | tuple[int, int] | None = None,
        num_relations: int | None = None,
        edge_weight: Tensor | None = None,
        edge_time: Tensor | None = None,
        index_dtype: torch.dtype | None = None,
    ) -> None:
        edge_index = id_tensor("edge_index", edge_index, ndim=2)
        if edge_index.shape[0] != 2:
            raise ValueError(f"edge_index must be [2, num_edges], not {tuple(edge_index.shape)}")
        num_edges = edge_index.shape[1]
        if num_nodes is None:
            num_nodes = int(edge_index.max()) + 1 if num_edges else 0
        self._set_size(num_nodes, num_edges, index_dtype)
        if index_dtype == torch.int32 or self.index_dtype == torch.int32:
            self._check_fits_int32(edge_index)
        src, dst = edge_index.to(self.index_dtype)
        self.colptr = torch.empty(self.num_dst_nodes + 1, dtype=self.index_dtype, device="cpu")
        self.row = torch.empty(num_edges, dtype=self.index_dtype, device="cpu")
        e_id = torch.empty(num_edges, dtype=self.index_dtype, device="cpu")
        values = self._checked_values(edge_type, num_relations, edge_weight, edge_time)
        order = self._visiting_order(*values)
        identity = _core.build_csc(
            id_nbytes=self.index_dtype.itemsize,
            src=src.data_ptr(),
            dst=dst.data_ptr(),
            num_edges=num_edges,
            num_src_nodes=self.num_src_nodes,
            num_dst_nodes=self.num_dst_nodes,
            order=0 if order is None else order.data_ptr(),
            colptr=self.colptr.data_ptr(),
            row=self.row.data_ptr(),
            e_id=e_id.data_ptr(),
        )
        self.e_id = None if identity else e_id
        self._set_values(*(v if v is None or identity else v[e_id] for v in values))

    @classmethod
    def from_csc(
        cls,
        colptr: Tensor,
        row: Tensor,
        *,
        e_id: Tensor | None = None,
        num_src_nodes: int | None = None,
        edge_type: Tensor | None = None,
        num_relations: int | None = None,
        edge_weight: Tensor | None = None,
        edge_time: Tensor | None = None,
    ) -> CSCGraph:
        """A graph over arrays that are grouped by target already; nothing is copied.

        Args:
            colptr: where each column begins, [num_dst_nodes + 1], int32/int64, host.
            row: source of each edge, [num_edges], dtype of `colptr`; may be memory-mapped.
            e_id: id of each edge, [num_edges]; by default its place in `row`.
            num_src_nodes: number of source nodes; by default that of the targets.
            edge_type: relation of each edge, in the order of `row`.
            num_relations: number of edge types.
            edge_weight: weight of each edge, in the order of `row`.
            edge_time: time of each edge, in the order of `row`, ascending within columns.

        Raises:
            IndexError: `row` or `edge_type` holds a value out of range.
            TypeError: ids are neither int32 nor int64, or of two dtypes.
            ValueError: `colptr` falls or does not run from 0 to num_edges; shapes disagree.
        """
        colptr, row = id_tensor("colptr", colptr), id_tensor("row", row)
        if colptr.dtype != row.dtype:
            raise TypeError(f"colptr is {colptr.dtype} but row is {row.dtype}: give both one dtype")
        if colptr.numel() == 0:
            raise ValueError("colptr must hold at least one value, the 0 it starts with")
        num_dst_nodes, num_edges = colptr.numel() - 1, row.numel()
        graph = cls.__new__(cls)
        size = (num_dst_nodes if num_src_nodes is None else num_src_nodes, num_dst_nodes)
        graph._set_size(size, num_edges, colptr.dtype)
        _core.check_csc(
            id_nbytes=colptr.dtype.itemsize,
            colptr=colptr.data_ptr(),
            num_dst_nodes=num_dst_nodes,
            row=row.data_ptr(),
            num_edges=num_edges,
            num_src_nodes=graph.num_src_nodes,
        )
        graph.colptr, graph.row, graph.e_id = colptr, row, None
        if e_id is not None:
            e_id = id_tensor("e_id", e_id)
            if e_id.shape != row.shape:
                raise ValueError(f"e_id has {e_id.numel()} values but row has {num_edges}")
            graph.e_id = e_id.to(colptr.dtype)
        values = graph._checked_values(edge_type, num_relations, edge_weight, edge_time)
        graph._set_values(*values)
        if graph.edge_time is not None and not graph.sorted_in_columns(graph.edge_time):
            raise ValueError("edge_time must ascend within each column: sort the edges by time")
        return graph

    @property
    def num_edges(self) -> int:
        """Number of edges."""
        return self.row.numel()

    @property
    def num_nodes(self) -> int:
        """Number of nodes; of both sides together they are numbered from 0 each."""
        return max(self.num_src_nodes, self.num_dst_nodes)

    @property
    def device(self) -> torch.device:
        """Where the graph is."""
        return self.colptr.device

    def arrays(self) -> list[Tensor]:
        """The arrays that the graph consists of."""
        values = (self.row, self.e_id, self.edge_type, self.edge_weight, self.edge_time)
        return [self.colptr, *(value for value in values if value is not None)]

    def to(self, device: torch.device | str) -> CSCGraph:
        """This graph in the memory of `device`, for seeds that are there; itself when it is."""
        graph = CSCGraph.__new__(CSCGraph)
        graph.__dict__ = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in self.__dict__.items()
        }
        return self if graph.device == self.device else graph

    def with_index_dtype(self, index_dtype: torch.dtype) -> CSCGraph:
        """This graph with ids of `index_dtype`; itself when they are already.

        Raises:
            TypeError: neither int32 nor int64.
            ValueError: the ids do not fit.
        """
        if index_dtype == self.index_dtype:
            return self
        graph = CSCGraph.__new__(CSCGraph)
        graph._set_size((self.num_src_nodes, self.num_dst_nodes), self.num_edges, index_dtype)
        graph.colptr, graph.row = self.colptr.to(index_dtype), self.row.to(index_dtype)
        graph.e_id = None if self.e_id is None else self.e_id.to(index_dtype)
        graph.num_relations = self.num_relations
        graph._set_values(self.edge_type, self.edge_weight, self.edge_time)
        return graph

    def sorted_in_columns(self, values: Tensor) -> bool:
        """Whether `values` ([num_edges], int32/int64, in the order of `row`) ascend per column."""
        return _core.sorted_in_columns(
            id_nbytes=self.index_dtype.itemsize,
            colptr=self.colptr.data_ptr(),
            num_dst_nodes=self.num_dst_nodes,
            value_nbytes=values.dtype.itemsize,
            value=values.data_ptr(),
        )

    def _set_size(
        self, num_nodes: int | tuple[int, int], num_edges: int, index_dtype: torch.dtype | None
    ) -> None:
        if isinstance(num_nodes, tuple):
            num_sources, num_targets = num_nodes
        else:
            num_sources = num_targets = num_nodes
        self.num_src_nodes = checked_int("num_nodes", num_sources, least=0)
        self.num_dst_nodes = checked_int("num_nodes", num_targets, least=0)
        largest = max(self.num_src_nodes, self.num_dst_nodes, num_edges)
        if index_dtype is None:
            index_dtype = torch.int32 if largest <= _MAX_INT32 else torch.int64
        if index_dtype not in (torch.int32, torch.int64):
            raise TypeError(f"index_dtype must be torch.int32 or torch.int64, not {index_dtype}")
        if index_dtype == torch.int32 and largest > _MAX_INT32:
            raise ValueError(
                f"{largest} nodes or edges do not fit int32: use index_dtype=torch.int64"
            )
        self.index_dtype = index_dtype

    @staticmethod
    def _check_fits_int32(edge_index: Tensor) -> None:
        # A narrowing cast would wrap a wrong id round into the valid range.
        if edge_index.dtype == torch.int64 and edge_index.numel():
            low, high = (int(value) for value in edge_index.aminmax())
            if low < -(2**31) or high > _MAX_INT32:
                wrong = high if high > _MAX_INT32 else low
                raise IndexError(f"edge_index holds node {wrong}, which is out of range")

    def _checked_values(
        self,
        edge_type: Tensor | None,
        num_relations: int | None,
        edge_weight: Tensor | None,
        edge_time: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        num_edges = self.num_edges
        if edge_type is not None:
            edge_type = _edge_values("edge_type", edge_type, num_edges, torch.int64)
            if num_relations is not None:
                num_relations = checked_int("num_relations", num_relations, least=0)
            low, high = (int(v) for v in edge_type.aminmax()) if num_edges else (0, -1)
            num_relations = high + 1 if num_relations is None else num_relations
            if low < 0 or high >= num_relations:
                wrong = low if low < 0 else high
                raise IndexError(f"edge type {wrong} is not in [0, {num_relations})")
            edge_type = edge_type.to(torch.int32)
        elif num_relations is not None:
            raise ValueError("num_relations is given, but edge_type is not")
        self.num_relations = 1 if num_relations is None else num_relations
        if edge_weight is not None:
            edge_weight = _edge_values("edge_weight", edge_weight, num_edges, torch.float64)
            wrong_at = ((edge_weight < 0) | ~edge_weight.isfinite()).nonzero()
            if wrong_at.numel():
                place = int(wrong_at[0])
                raise ValueError(
                    f"edge_weight[{place}] is {float(edge_weight[place])}: "
                    "weights must be finite and not negative"
                )
        if edge_time is not None:
            edge_time = _edge_values("edge_time", edge_time, num_edges, torch.int64)
        return edge_type, edge_weight, edge_time

    @staticmethod
    def _visiting_order(
        edge_type: Tensor | None, edge_weight: Tensor | None, edge_time: Tensor | None
    ) -> Tensor | None:
        """The order in which the stable counting sort meets the edges; None is 0, 1, 2 ..."""
        by = edge_type if edge_time is None else edge_time
        return None if by is None else by.argsort(stable=True)

    def _set_values(
        self, edge_type: Tensor | None, edge_weight: Tensor | None, edge_time: Tensor | None
    ) -> None:
        self.edge_type, self.edge_weight, self.edge_time = edge_type, edge_weight, edge_time

    def __repr__(self) -> str:
        sides = f"num_src_nodes={self.num_src_nodes}, num_dst_nodes={self.num_dst_nodes}"
        return f"CSCGraph({sides}, num_edges={self.num_edges}, index_dtype={self.index_dtype})"


def _receive(state: dict[str, Any]) -> CSCGraph:
    graph = CSCGraph.__new__(CSCGraph)
    graph.__dict__ = {
        name: value.tensor() if isinstance(value, SharedTensor) else value
        for name, value in state.items()
    }
    return graph


def _send(graph: CSCGraph) -> tuple[Callable[[dict[str, Any]], CSCGraph], tuple[dict[str, Any]]]:
    on_host = graph.device.type == "cpu"
    state = {
        name: SharedTensor(value) if on_host and isinstance(value, Tensor) else value
        for name, value in graph.__dict__.items()
    }
    return _receive, (state,)


# Between processes a graph travels as descriptors, like the rows of a table.
ForkingPickler.register(CSCGraph, _send)
