"""Node ids as features: graphs whose source nodes are the rows of a layer's weights."""

from __future__ import annotations

import torch
from torch import Tensor

from dataeff.nn.graphs import remembered_table
from dataeff.rgnn import Graph
from dataeff.rgnn.id_range import IdColumn, check_ids

_ID_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def table_graph_for(
    graph: Graph,
    left: Tensor | None,
    right: Tensor | None,
    num_dst_nodes: int,
    relations: int,
    width: int,
    own: int,
) -> Graph:
    """A graph with the edges of another, from rows `relation * width + id of the source`.

    It is that of an earlier call with the same graph and the same unchanged ids if possible: to
    make it is most of a layer's call, waits for a GPU, and cannot be done in a CUDA graph.

    Args:
        graph: whose edges these are.
        left: id of each source node, [num_src_nodes]; None for all in order.
        right: id of each destination node, [num_dst_nodes], where these are others than `left`.
        num_dst_nodes: destination nodes.
        relations: types of edges, a block of the table for each.
        width: rows of a block, which the ids number.
        own: how many ids destination nodes may have.

    Raises:
        TypeError: ids of another dtype.
        IndexError: an id that is out of range; names it.
    """
    if torch.compiler.is_compiling():
        from dataeff.nn.uncompiled import table_graph_outside

        made: Graph = table_graph_outside(graph, left, right, num_dst_nodes, relations, width, own)
        return made
    ids = tuple(x for x in (left, right) if x is not None)
    for x in ids:
        if x.dtype not in _ID_DTYPES:
            raise TypeError(
                "RGCNConv needs floating-point features, or integers that are node ids,"
                f" got {x.dtype}"
            )

    def build() -> Graph:
        limit = width if right is not None else min(width, own)
        if left is None and graph.num_src_nodes > limit:
            raise IndexError(_complaint("x", limit, limit, limit))
        columns = [] if left is None else [_node_ids("x", left, limit)]
        if right is not None:
            columns.append(_node_ids("x of the destinations", right, own))
        check_ids(columns)
        graph.validate()  # or ids that nobody has checked would look up others
        (src, dst), etype = graph.ids()
        rows = etype.long() * width + (src if left is None else left[src]).long()
        return Graph(
            torch.stack([rows, dst.long()]),
            etype,
            num_src_nodes=relations * width,
            num_dst_nodes=num_dst_nodes,
            num_relations=relations,
            validate=False,
        )

    sizes = (left is None, num_dst_nodes, relations, width, own)
    return remembered_table(graph, ids, sizes, build)


def _node_ids(name: str, ids: Tensor, limit: int) -> IdColumn:
    return IdColumn(ids, limit, lambda wrong, row: _complaint(name, wrong, row, limit))


def _complaint(name: str, wrong: int, row: int, limit: int) -> str:
    return (
        f"RGCNConv: node id {wrong} at row {row} of {name} is out of range: in_channels is {limit}"
    )
