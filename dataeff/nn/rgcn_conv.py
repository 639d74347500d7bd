"""RGCN (Schlichtkrull et al., arXiv 1703.06103), a drop-in for PyTorch Geometric's `RGCNConv`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from dataeff import rgnn
from dataeff.nn.arguments import (
    check_features,
    check_width,
    optional,
    pair_of,
    refuse_other_arguments,
)
from dataeff.nn.graphs import graph_for
from dataeff.nn.initialise import glorot, zeros
from dataeff.nn.table_graph import table_graph_for


@rgnn.layer
def rgcn(  # type: ignore[no-untyped-def]  # noqa: ANN201, D103
    g, x, weight, root_x=None, root=None, bias=None, edge_weight=None, *, aggr, width,  # noqa: ANN001
):  # fmt: skip
    rows = g.src(x) if edge_weight is None else g.src(x) * g.edge(edge_weight)
    if len(weight[g.etype].type.shape) == 3:  # block-diagonal: [blocks, in / blocks, out / blocks]
        rows = rgnn.reshape(rows, weight[g.etype].type.shape[0], -1)
    if aggr == "max":
        out = g.sum(rgnn.linear(g.per_relation.max(rows), weight[g.etype]))
    elif aggr == "mean":
        out = g.mean_per_relation(rgnn.linear(rows, weight[g.etype]))
    else:
        out = g.sum(rgnn.linear(rows, weight[g.etype]))
    out = rgnn.reshape(out, width)
    if root is not None:
        out = out + rgnn.linear(g.at_dst(x if root_x is None else root_x), root)
    return out if bias is None else out + bias


@rgnn.layer
def rgcn_table(g, table, *, aggr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201, D103
    rows = g.src(table)
    if aggr == "max":
        return g.sum(g.per_relation.max(rows))
    return g.mean_per_relation(rows) if aggr == "mean" else g.sum(rows)


class RGCNConv(torch.nn.Module):
    r"""Relational graph convolution.

    .. math::
        x'_i = \Theta_0 x_i + \sum_r \mathrm{aggr}_{j \in N_r(i)} \Theta_r x_j + b

    The mean is taken within each relation, as PyTorch Geometric documents it (its `pyg-lib` path
    takes it over all relations together).

    Args:
        in_channels: input width, or a pair for sources and destinations.
        out_channels: output width.
        num_relations: relations.
        num_bases: rank of the basis decomposition of the weights.
        num_blocks: blocks of the block-diagonal decomposition of the weights.
        aggr: "mean", "add" (or "sum") or "max" over the neighbours of one relation.
        root_weight: transform and add the node's own features.
        is_sorted: accepted, and not needed.
        bias: add a bias.

    Raises:
        ValueError: both decompositions, widths the blocks do not divide, a negative width, or an
            unknown `aggr`.
        NotImplementedError: a message passing argument that this layer does not follow.
    """

    def __init__(
        self,
        in_channels: int | tuple[int, int],
        out_channels: int,
        num_relations: int,
        num_bases: int | None = None,
        num_blocks: int | None = None,
        aggr: str = "mean",
        root_weight: bool = True,
        is_sorted: bool = False,
        bias: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        refuse_other_arguments(type(self).__name__, kwargs)
        check_width(type(self).__name__, in_channels, pair=True)
        if num_bases is not None and num_blocks is not None:
            raise ValueError("basis and block-diagonal decomposition exclude each other")
        if aggr not in ("add", "sum", "mean", "max"):
            raise ValueError(f"aggr must be add, sum, mean or max, got {aggr!r}")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.num_relations = num_relations
        self.num_bases, self.num_blocks = num_bases, num_blocks
        self.aggr, self.is_sorted = "add" if aggr == "sum" else aggr, is_sorted
        pair = (in_channels, in_channels) if isinstance(in_channels, int) else in_channels
        self.in_channels_l = pair[0]
        self.comp: Parameter | None
        self.root: Parameter | None
        self.bias: Parameter | None
        self.weight = Parameter(torch.empty(self._weight_shape(pair[0])))
        optional(self, "comp", num_bases is not None, num_relations, num_bases or 0)
        optional(self, "root", root_weight, pair[1], out_channels)
        optional(self, "bias", bias, out_channels)
        self.reset_parameters()

    def _weight_shape(self, width: int) -> tuple[int, ...]:
        if self.num_bases is not None:
            return (self.num_bases, width, self.out_channels)
        if self.num_blocks is None:
            return (self.num_relations, width, self.out_channels)
        if width % self.num_blocks or self.out_channels % self.num_blocks:
            raise ValueError(
                f"{self.num_blocks} blocks do not divide {width} and {self.out_channels} channels"
            )
        blocks = self.num_blocks
        return (self.num_relations, blocks, width // blocks, self.out_channels // blocks)

    def reset_parameters(self) -> None:
        """Initialise all parameters again."""
        glorot(self.weight)
        glorot(self.comp)
        glorot(self.root)
        zeros(self.bias)

    def forward(
        self,
        x: Tensor | tuple[Tensor | None, Tensor] | None,
        edge_index: Tensor | rgnn.Graph,
        edge_type: Tensor | None = None,
        edge_weight: Tensor | None = None,
    ) -> Tensor:
        """Run the layer.

        Args:
            x: features [num_nodes, in_channels]; node ids [num_nodes] to use rows of the weights
                as embeddings; None for all ids in order; or a pair for sources and destinations.
            edge_index: [2, num_edges], or an `rgnn.Graph`.
            edge_type: relation of each edge, [num_edges]; left out with a graph.
            edge_weight: factor of each edge's features, [num_edges]; a mean still divides by the
                number of edges. PyTorch Geometric's layer has no such argument.

        Returns:
            [num_nodes, out_channels] in the dtype of the features.

        Raises:
            TypeError: features of a dtype that is neither features nor ids; no `edge_type`.
            ValueError: features of another width or number of rows; node ids with `edge_weight` or
                block-diagonal weights.
            IndexError: an id of a node or a relation that is out of range.
        """
        left, right = pair_of("RGCNConv", x, or_none=True)
        right = left if right is None else right
        weight: Tensor = self.weight
        if self.comp is not None:
            flat = self.comp @ weight.reshape(weight.shape[0], -1)
            weight = flat.view(self.num_relations, *weight.shape[1:])
        num_src = self.in_channels_l if left is None else left.shape[0]
        num_dst = num_src if right is None else right.shape[0]
        graph = graph_for(edge_index, edge_type, num_src, num_dst, self.num_relations)
        if left is None or not left.is_floating_point():
            if edge_weight is not None:
                raise ValueError("edge_weight needs floating-point features, not node ids")
            return self._embed(graph, left, right, num_dst, weight)
        check_features("RGCNConv", left, self.in_channels_l)
        own = None if right is left or self.root is None else right
        if own is not None and self.root is not None:
            check_features("RGCNConv", own, self.root.shape[0], "x of the destinations")
        out: Tensor = rgcn(
            graph, left, weight, own, self.root, self.bias, edge_weight,
            aggr=self.aggr, width=self.out_channels,
        )  # fmt: skip
        return out

    def _embed(
        self,
        graph: rgnn.Graph,
        left: Tensor | None,
        right: Tensor | None,
        num_dst: int,
        weight: Tensor,
    ) -> Tensor:
        """Integer features: the message of node n along relation r is row n of weight r."""
        if self.num_blocks is not None:
            raise ValueError("block-diagonal weights need floating-point features, not node ids")
        relations, width, out_channels = weight.shape
        has_features = right is not None and right.is_floating_point()
        own = width if self.root is None or has_features else self.root.shape[0]
        others = None if has_features or right is left else right
        table = table_graph_for(graph, left, others, num_dst, relations, width, own)
        out: Tensor = rgcn_table(table, weight.reshape(-1, out_channels), aggr=self.aggr)
        if self.root is not None:
            if right is None:
                out = out + self.root[:num_dst]
            else:
                out = out + (right @ self.root if has_features else self.root[right.long()])
        return out if self.bias is None else out + self.bias

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.in_channels}, {self.out_channels},"
            f" num_relations={self.num_relations})"
        )
