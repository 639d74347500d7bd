"""Graphs of layer calls: a layer that is called again with the same edges reuses the structures."""

from __future__ import annotations

import weakref
from collections import OrderedDict

import torch
from torch import Tensor

from dataeff.rgnn import Graph

_KEPT = 8  # a mini-batch trainer makes new edges at each step; old entries must not pile up

_Key = tuple[int, int, int, int, int, int, int]
_graphs: OrderedDict[_Key, tuple[weakref.ref[Tensor], weakref.ref[Tensor], Graph]] = OrderedDict()


def graph_for(
    edge_index: Tensor | Graph,
    edge_type: Tensor | None,
    num_src_nodes: int,
    num_dst_nodes: int,
    num_relations: int,
) -> Graph:
    """The graph of these edges, from an earlier call with the same unchanged tensors if possible.

    Raises:
        TypeError: `edge_index` is neither a tensor nor a graph, or `edge_type` is missing.
        ValueError: a given graph has other nodes than the features.
        IndexError: an id is out of range.
    """
    if isinstance(edge_index, Graph):
        return _checked(edge_index, edge_type, num_src_nodes, num_dst_nodes, num_relations)
    if not isinstance(edge_index, Tensor) or edge_index.layout != torch.strided:
        raise TypeError(
            "edge_index must be a dense [2, num_edges] tensor or an rgnn.Graph, got"
            f" {type(edge_index).__name__}; turn sparse adjacencies into indices first"
        )
    if edge_type is None:
        raise TypeError("edge_type is needed beside edge_index")
    versions = edge_index._version, edge_type._version
    key = (id(edge_index), id(edge_type), *versions, num_src_nodes, num_dst_nodes, num_relations)
    found = _graphs.get(key)
    if found is not None and found[0]() is edge_index and found[1]() is edge_type:
        _graphs.move_to_end(key)
        return found[2]
    graph = Graph(
        edge_index,
        edge_type,
        num_src_nodes=num_src_nodes,
        num_dst_nodes=num_dst_nodes,
        num_relations=num_relations,
    )
    _graphs[key] = (weakref.ref(edge_index), weakref.ref(edge_type), graph)
    while len(_graphs) > _KEPT:
        _graphs.popitem(last=False)
    return graph


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
