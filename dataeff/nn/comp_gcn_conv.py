"""CompGCN (Vashishth et al., ICLR 2020, arXiv 1911.03082), written in the layer language alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from dataeff import rgnn
from dataeff.nn.arguments import check_features, check_tensor, check_width, optional
from dataeff.nn.graphs import graph_for
from dataeff.nn.initialise import glorot, zeros
from dataeff.rgnn.graph_symbol import GraphSymbol
from dataeff.rgnn.symbols import Argument, Value

COMPOSITIONS = ("sub", "mult", "corr")


@rgnn.layer
def comp_gcn(
    g: GraphSymbol,
    x: Argument,
    relation: Argument,
    weight: Argument,
    loop: Argument,
    loop_weight: Argument,
    edge_weight: Argument | None = None,
    bias: Argument | None = None,
    *,
    composition: str,
    norm: bool,
) -> Value:
    """Nodes composed with relations (Vashishth et al., ICLR 2020, arXiv 1911.03082)."""

    def compose(rows: Any, relation: Any) -> Value:
        if composition == "corr":  # relation: its circulant matrix
            return rgnn.linear(rows, relation)
        made: Value = rows * relation if composition == "mult" else rows - relation
        return made

    message = rgnn.linear(compose(g.src(x), relation[g.etype]), weight[g.etype])
    message = message * g.degree_norm() if norm else message
    message = message if edge_weight is None else message * g.edge(edge_weight)
    out = g.sum(message) + rgnn.linear(compose(g.at_dst(x), loop), loop_weight)
    return out if bias is None else out + bias


class CompGCNConv(torch.nn.Module):
    r"""Composition-based graph convolution over nodes and relations (section 4 of the paper).

    .. math::
        h_v = \sum_{(u, r) \to v} W_{\lambda(r)}\, \phi(x_u, z_r)
              + W_{loop}\, \phi(x_v, z_{loop}) + b, \qquad h_r = W_{rel}\, z_r

    with :math:`\lambda(r)` original or inverse, and :math:`\phi(x, z)` one of x - z, x * z, and the
    circular correlation :math:`\sum_i x_i z_{(i + k) \bmod d}`. Relation r + num_relations is the
    inverse of relation r; add inverse edges to the graph yourself.

    Args:
        in_channels: width of nodes and relations.
        out_channels: output width of both.
        num_relations: relations without their inverses.
        composition: "sub", "mult" or "corr".
        norm: scale each message by 1 / sqrt(out-degree of u x in-degree of v).
        bias: add a bias.

    Raises:
        ValueError: an unknown composition, or a negative width.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_relations: int,
        composition: str = "sub",
        norm: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_width(type(self).__name__, in_channels)
        if composition not in COMPOSITIONS:
            raise ValueError(f"composition must be one of {COMPOSITIONS}, got {composition!r}")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.num_relations, self.composition, self.norm = num_relations, composition, norm
        self.weight = Parameter(torch.empty(2, in_channels, out_channels))
        self.loop_weight = Parameter(torch.empty(in_channels, out_channels))
        self.rel_weight = Parameter(torch.empty(in_channels, out_channels))
        self.loop = Parameter(torch.empty(1, in_channels))
        self.bias: Parameter | None
        optional(self, "bias", bias, out_channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all parameters again."""
        for value in (self.weight, self.loop_weight, self.rel_weight, self.loop):
            glorot(value)
        zeros(self.bias)

    def forward(
        self,
        x: Tensor,
        relation: Tensor,
        edge_index: Tensor | rgnn.Graph,
        edge_type: Tensor | None = None,
        edge_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the layer.

        Args:
            x: node features [num_nodes, in_channels].
            relation: embeddings of relations, then of their inverses,
                [2 * num_relations, in_channels].
            edge_index: [2, num_edges], or an `rgnn.Graph`.
            edge_type: relation of each edge, [num_edges]; left out with a graph.
            edge_weight: factor of each edge's message, [num_edges].

        Returns:
            Nodes [num_nodes, out_channels] and relations [2 * num_relations, out_channels].

        Raises:
            TypeError: features that are no tensor or not floating-point; no `edge_type`.
            ValueError: features of another width, embeddings of another number of relations, or
                `edge_weight` of another number of edges.
            IndexError: an id of a node or a relation that is out of range.
        """
        check_tensor("CompGCNConv", relation, "relation")
        count = 2 * self.num_relations
        if relation.shape != (count, self.in_channels):
            raise ValueError(
                f"relation must be [{count}, {self.in_channels}], relations and their inverses,"
                f" got {list(relation.shape)}"
            )
        check_features("CompGCNConv", x, self.in_channels)
        graph = graph_for(edge_index, edge_type, x.shape[0], x.shape[0], count)
        made, loop = relation, self.loop[0]
        if self.composition == "corr":
            made, loop = circulant(relation), circulant(self.loop)[0]
        out: Tensor = comp_gcn(
            graph, x, made, self.weight.repeat_interleave(self.num_relations, dim=0),
            loop, self.loop_weight, edge_weight, self.bias,
            composition=self.composition, norm=self.norm,
        )  # fmt: skip
        return out, relation @ self.rel_weight

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.in_channels}, {self.out_channels},"
            f" num_relations={self.num_relations}, composition={self.composition!r})"
        )


def circulant(z: Tensor) -> Tensor:
    """Matrices C with `x @ C` the circular correlation of x and z: `C[i, k] = z[(i + k) % d]`."""
    place = torch.arange(z.shape[1], device=z.device)
    return z[:, (place[:, None] + place) % z.shape[1]]
