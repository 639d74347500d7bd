"""`Graph`: a relational graph, made of checked ids; `indexed` has what compiled layers walk."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dataeff._integers import checked_int
from dataeff.rgnn.id_range import IdColumn, as_edge_index, as_ids, check_ids, refuse_meta
from dataeff.rgnn.indexed import Indexed
from dataeff.rgnn.typed import EdgeType, hetero_parts, merge_edges, typed_layout

_TOKENS = itertools.count()
_LIVE: weakref.WeakValueDictionary[int, Graph] = weakref.WeakValueDictionary()


class Graph(Indexed):
    """A directed graph whose edges carry a relation.

    The ids given are kept, not copied, and must not be written to afterwards.

    Args:
        edge_index: sources and destinations, [2, num_edges], int32 or int64, any device.
        edge_type: relation of each edge, [num_edges]; None for a single relation.
        num_nodes: nodes of a graph whose sources and destinations are the same set.
        num_src_nodes: source nodes of a sampled block; its destinations are the first
            `num_dst_nodes` of them, as neighbour samplers number them, or a separate set when the
            layer is given separate features for them.
        num_dst_nodes: destination nodes of a block.
        num_relations: relations; the largest relation id plus one by default.
        node_type: type of each source node, [num_src_nodes]; optional.
        num_node_types: node types; the largest plus one by default.
        validate: check every id now (on a GPU this waits for the device once). Otherwise they are
            checked when the index structures are built: no kernel ever sees a wrong one.

    Raises:
        IndexError: a node id or relation id out of range; the message names it.
        ValueError: wrong shapes, devices, or missing sizes.
        TypeError: ids that are not int32 or int64.
    """

    def __init__(
        self,
        edge_index: Tensor,
        edge_type: Tensor | None = None,
        *,
        num_nodes: int | None = None,
        num_src_nodes: int | None = None,
        num_dst_nodes: int | None = None,
        num_relations: int | None = None,
        node_type: Tensor | None = None,
        num_node_types: int | None = None,
        validate: bool = True,
    ) -> None:
        edge_index = as_edge_index("edge_index", edge_index)
        self.num_src_nodes = _first_given("num_src_nodes", num_src_nodes, num_nodes)
        self.num_dst_nodes = _first_given("num_dst_nodes", num_dst_nodes, num_nodes)
        self.num_edges = int(edge_index.shape[1])
        self.device = edge_index.device
        refuse_meta("edge_index", edge_index)
        if edge_type is None:
            edge_type = edge_index.new_zeros(self.num_edges)
            num_relations = num_relations or 1
        edge_type = self._one_each("edge_type", edge_type, self.num_edges, " like the edges")
        relations = num_relations if num_relations is not None else _count(edge_type)
        self.num_relations = checked_int("num_relations", relations, least=0)
        self.num_node_types = 0
        if node_type is not None:
            node_type = self._one_each("node_type", node_type, self.num_src_nodes)
            types = num_node_types if num_node_types is not None else _count(node_type)
            self.num_node_types = checked_int("num_node_types", types, least=0)
        self._ids: tuple[Tensor, Tensor] | None = (edge_index, edge_type)
        self._by_type: Mapping[EdgeType, Tensor] | None = None  # what ids are merged of again
        self.node_type = node_type
        self._validated = False
        if validate:
            self.validate()
        self.layout = None
        super().__init__()
        # The operator finds this object again by a token that travels as a tensor, so that
        # torch.compile does not specialise on which graph it is.
        self._id = next(_TOKENS)
        _LIVE[self._id] = self
        with torch.inference_mode(False):  # autograd saves it, of graphs made in validation too
            self.token = torch.tensor([self._id], device="cpu")

    def _one_each(self, name: str, given: Any, rows: int, what: str = "") -> Tensor:
        """Types of the edges or nodes, on the device of the edges."""
        ids = as_ids(name, given)
        if ids.shape != (rows,):
            raise ValueError(f"{name} must be [{rows}]{what}, got {list(ids.shape)}")
        if ids.device != self.device:
            raise ValueError(f"{name} is on {ids.device}, edge_index on {self.device}")
        return ids

    @classmethod
    def from_typed(
        cls,
        edges: Mapping[EdgeType, Tensor],
        num_nodes: Mapping[str, int],
        *,
        num_dst_nodes: Mapping[str, int] | None = None,
        edge_types: Sequence[EdgeType] | None = None,
        device: torch.device | str | None = None,
    ) -> Graph:
        """A graph of edges by type, as `HeteroData.edge_index_dict` has them.

        Args:
            edges: [2, num_edges] for each (source type, relation, destination type), with nodes
                numbered within their type. They are kept, and must not be written to afterwards.
            num_nodes: nodes of each type.
            num_dst_nodes: of a sampled block, how many of each type, its first ones, are
                destinations; all by default.
            edge_types: the relations in the order of their numbers, also those without an edge;
                those of `edges` by default.
            device: where the graph is to be; where the edges are by default, and without any on
                the CPU.

        Returns:
            A graph with node types, whose `layout` brings features of each type to rows of one
            table and results back.

        Raises:
            IndexError: a node number that its type does not have.
            TypeError: no dictionaries, or an edge type of other parts.
            ValueError: edge types or sizes that are missing or do not fit.
        """
        layout = typed_layout(edges, num_nodes, num_dst_nodes, edge_types)
        edge_index, edge_type = merge_edges(layout, edges, device)
        graph = cls(
            edge_index,
            edge_type,
            num_src_nodes=sum(layout.num_nodes),
            num_dst_nodes=sum(layout.num_dst_nodes),
            num_relations=len(layout.edge_types),
            node_type=layout.node_type(edge_index.device),
            num_node_types=len(layout.node_types),
            validate=False,
        )
        graph.layout = layout
        # Others of the same memory: who remembers graphs by the edges given sees those let go.
        graph._by_type = {key: index.detach() for key, index in edges.items()}
        graph._validated = True  # by `merge_edges`
        return graph

    @classmethod
    def from_hetero(cls, data: Any) -> Graph:
        """The graph of a `torch_geometric.data.HeteroData`, whole or sampled.

        It is where the edges are; without any, where the features are.
        """
        edges, counts, device = hetero_parts(data)
        return cls.from_typed(edges, counts, device=device)

    @classmethod
    def from_block(
        cls,
        block: Any,
        *,
        num_relations: int | None = None,
        device: torch.device | str | None = None,
    ) -> Graph:
        """The graph of what a sampler returned (`dataeff.sampling`, or an object like it).

        Args:
            block: has `edge_index` and `n_id`, and perhaps `edge_type`: tensors for nodes of one
                kind, or dictionaries by type. All of its nodes can be destinations, so layers can
                be stacked; its seeds are the first rows (of their type).
            num_relations: relations of the whole graph, for edges with `edge_type`.
            device: where the graph is to be; where the block is by default.

        Raises:
            TypeError: the block holds no edges of either kind.
        """
        edges = getattr(block, "edge_index", None)
        if isinstance(edges, Mapping):
            counts = {name: int(ids.numel()) for name, ids in block.n_id.items()}
            return cls.from_typed(edges, counts, device=device)
        if not isinstance(edges, Tensor) or not hasattr(block, "n_id"):
            raise TypeError(f"a sampled block has edge_index and n_id, got {type(block).__name__}")
        types = getattr(block, "edge_type", None)
        if device is None:
            device = edges.device
        return cls(
            edges.to(device),
            None if types is None else types.to(device),
            num_nodes=int(block.n_id.numel()),
            num_relations=num_relations,
        )

    @property
    def edge_index(self) -> Tensor:
        """Sources and destinations, [2, num_edges]."""
        return self.ids()[0]

    @property
    def edge_type(self) -> Tensor:
        """Relation of each edge, [num_edges]."""
        return self.ids()[1]

    def ids(self) -> tuple[Tensor, Tensor]:
        """`edge_index` and `edge_type`; merged again where `drop_merged_ids` has let them go."""
        if self._ids is None:
            assert self.layout is not None and self._by_type is not None
            return merge_edges(self.layout, self._by_type, self.device)
        return self._ids

    def drop_merged_ids(self) -> None:
        """Let merged ids of edges by type go: twelve bytes an edge that sorted edges stand for."""
        if self._by_type is not None:
            self._ids = None

    def validate(self, again: bool = False) -> None:
        """Check every id, unless that has been done (on a GPU this waits for the device once).

        Args:
            again: check though it has been done: the ids may have been written to since.

        Raises:
            IndexError: an id is out of range; names it.
        """
        if self._validated and not again:
            return
        (src, dst), edge_type = self.ids()
        check_ids(
            [
                _edge_column("source node", src, self.num_src_nodes),
                _edge_column("destination node", dst, self.num_dst_nodes),
                _edge_column("relation", edge_type, self.num_relations),
                *([] if self.node_type is None else [self._node_types(self.node_type)]),
            ]
        )
        self._validated = True

    def _node_types(self, node_type: Tensor) -> IdColumn:
        limit = self.num_node_types
        return IdColumn(
            node_type,
            limit,
            lambda wrong, node: (
                f"node type {wrong} of node {node} is out of range: there are {limit}"
            ),
        )

    def to(self, device: torch.device | str) -> Graph:
        """The same graph on another device, with nothing built yet; itself where it is there."""
        if torch.empty(0, device=device).device == self.device:  # "cuda" is the current one of them
            return self
        edge_index, edge_type = self.ids()
        graph = Graph(
            edge_index.to(device),
            edge_type.to(device),
            num_src_nodes=self.num_src_nodes,
            num_dst_nodes=self.num_dst_nodes,
            num_relations=self.num_relations,
            node_type=None if self.node_type is None else self.node_type.to(device),
            num_node_types=self.num_node_types or None,
            validate=False,
        )
        graph.layout, graph._validated = self.layout, self._validated
        return graph

    def __deepcopy__(self, memo: dict[int, Any]) -> Graph:
        return self  # it never changes, and its token stands for this very object

    def __reduce__(self) -> tuple[Any, ...]:
        options: dict[str, Any] = {
            "num_src_nodes": self.num_src_nodes,
            "num_dst_nodes": self.num_dst_nodes,
            "num_relations": self.num_relations,
            "node_type": self.node_type,
            "num_node_types": self.num_node_types or None,
            "validate": False,
        }
        made = functools.partial(Graph, **options), self.ids()
        return *made, {"layout": self.layout, "_validated": self._validated}

    def __repr__(self) -> str:
        nodes = (
            f"num_nodes={self.num_src_nodes}"
            if self.num_src_nodes == self.num_dst_nodes
            else f"num_src_nodes={self.num_src_nodes}, num_dst_nodes={self.num_dst_nodes}"
        )
        return (
            f"Graph({nodes}, num_edges={self.num_edges}, num_relations={self.num_relations},"
            f" device={self.device})"
        )


def graph_of(token: Tensor) -> Graph:
    """The graph that a token stands for.

    Raises:
        RuntimeError: the graph no longer exists.
    """
    graph = _LIVE.get(int(token))
    if graph is None:
        raise RuntimeError(
            "the graph of this layer call no longer exists; keep a reference to the rgnn.Graph"
            " until backward has run"
        )
    return graph


def _first_given(which: str, first: int | None, num_nodes: int | None) -> int:
    name, value = (which, first) if first is not None else ("num_nodes", num_nodes)
    if value is None:
        raise ValueError(f"the graph needs {which} or num_nodes")
    return checked_int(name, value, least=0)


def _count(ids: Tensor) -> int:
    return int(ids.max()) + 1 if ids.numel() else 0


def _edge_column(what: str, ids: Tensor, limit: int) -> IdColumn:
    return IdColumn(
        ids,
        limit,
        lambda wrong, edge: f"{what} {wrong} at edge {edge} is out of range: the graph has {limit}",
    )
