"""Graphs of compiled calls: index structures are built outside the compiled graph.

How many pairs a graph has is known only when it is built, so a compiled graph breaks here and goes
on behind. Loaded by the compiler's trace alone: `torch.compiler.disable` imports TorchDynamo, which
takes over a second.
"""

from __future__ import annotations

from typing import Any

import torch

from dataeff.nn import graphs, table_graph
from dataeff.rgnn import Graph

REMEDY = (
    "edges are sorted outside of compiled code: for one graph without a break, give the layer an"
    " rgnn.Graph(...).prepare() in place of edge_index"
)

IDS_REMEDY = (
    "edges of node ids are sorted outside of compiled code: for one graph without a break, give"
    " RGCNConv features, such as the rows of a torch.nn.Embedding"
)


@torch.compiler.disable(reason=REMEDY)  # type: ignore[untyped-decorator]
def graph_outside(*args: Any) -> Graph:
    """`graph_for(*args)`, prepared."""
    _refuse_export()
    return graphs.graph_for(*args).prepare()


@torch.compiler.disable(reason=REMEDY)  # type: ignore[untyped-decorator]
def typed_graph_outside(*args: Any) -> Graph:
    """`typed_graph_for(*args)`, prepared."""
    _refuse_export()
    return graphs.typed_graph_for(*args).prepare()


@torch.compiler.disable(reason=IDS_REMEDY)  # type: ignore[untyped-decorator]
def table_graph_outside(*args: Any) -> Graph:
    """`table_graph_for(*args)`, prepared."""
    _refuse_export(IDS_REMEDY)
    return table_graph.table_graph_for(*args).prepare()


def _refuse_export(remedy: str = REMEDY) -> None:
    """An exported program has no outside.

    Raises:
        ValueError: says what to export instead.
    """
    if torch.compiler.is_exporting():
        raise ValueError(f"torch.export cannot sort edges: {remedy}")
