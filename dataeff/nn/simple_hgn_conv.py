"""SimpleHGN (Lv et al., KDD 2021, arXiv 2112.14936), written in the layer language alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from dataeff import rgnn
from dataeff.nn.arguments import check_features, check_width, optional
from dataeff.nn.graphs import graph_for
from dataeff.nn.initialise import glorot, zeros
from dataeff.rgnn.graph_symbol import GraphSymbol
from dataeff.rgnn.symbols import Argument, Value


@rgnn.layer
def simple_hgn(
    g: GraphSymbol,
    x: Argument,
    weight: Argument,
    relation: Argument,
    rel_weight: Argument,
    a_src: Argument,
    a_dst: Argument,
    a_rel: Argument,
    previous: Argument | None = None,
    keep: Argument | None = None,
    residual: Argument | None = None,
    *,
    slope: float,
    beta: float,
) -> tuple[Value, Value]:
    """Attention with relations in its scores (Lv et al., KDD 2021, arXiv 2112.14936)."""
    z = rgnn.linear(g.node(x), weight)
    along = rgnn.dot(rgnn.linear(relation[g.etype], rel_weight), a_rel)
    score = g.dst(rgnn.dot(z, a_dst)) + g.src(rgnn.dot(z, a_src)) + along
    alpha = rgnn.edge_softmax(rgnn.leaky_relu(score, slope))
    if previous is not None:
        alpha = (1 - beta) * alpha + beta * g.edge(previous)
    out = g.sum(g.src(z) * (alpha if keep is None else alpha * g.edge(keep)))
    if residual is not None:
        out = out + rgnn.linear(g.at_dst(x), residual)
    return out, alpha


class SimpleHGNConv(torch.nn.Module):
    r"""Graph attention with relation embeddings in the scores, and residual attention.

    Section 4 of the paper; for each head, with :math:`\ell` the layer,

    .. math::
        \hat\alpha_{ij} = \mathrm{softmax}_j\; \mathrm{LeakyReLU}\big(a^T
            [W h_i \,\|\, W h_j \,\|\, W_r r_{\psi(i,j)}]\big), \qquad
        \alpha^{(\ell)} = (1 - \beta)\, \hat\alpha^{(\ell)} + \beta\, \alpha^{(\ell - 1)}, \qquad
        h'_i = \sum_j \alpha_{ij} W h_j + W_{res} h_i

    The activation is the caller's, and so is the paper's L2 normalisation of the last layer.

    Args:
        in_channels: input width.
        out_channels: output width of one head.
        num_relations: relations; the paper counts self loops as one more.
        rel_channels: width of a relation's embedding.
        heads: attention heads.
        concat: join the heads, or take their mean.
        beta: share of the previous layer's attention, where it is given.
        negative_slope: of the leaky ReLU over scores.
        dropout: share of attention coefficients dropped in training.
        residual: add a projection of the node's own features.
        bias: add a bias.

    Raises:
        ValueError: a negative input width.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_relations: int,
        rel_channels: int,
        heads: int = 1,
        concat: bool = True,
        beta: float = 0.05,
        negative_slope: float = 0.2,
        dropout: float = 0.0,
        residual: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_width(type(self).__name__, in_channels)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.num_relations, self.rel_channels = num_relations, rel_channels
        self.heads, self.concat, self.beta = heads, concat, beta
        self.negative_slope, self.dropout = negative_slope, dropout
        self.weight = Parameter(torch.empty(in_channels, heads, out_channels))
        self.relation = Parameter(torch.empty(num_relations, rel_channels))
        self.rel_weight = Parameter(torch.empty(rel_channels, heads, rel_channels))
        self.att_src = Parameter(torch.empty(heads, out_channels))
        self.att_dst = Parameter(torch.empty(heads, out_channels))
        self.att_rel = Parameter(torch.empty(heads, rel_channels))
        self.residual: Parameter | None
        self.bias: Parameter | None
        optional(self, "residual", residual, in_channels, heads, out_channels)
        optional(self, "bias", bias, out_channels * (heads if concat else 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all parameters again."""
        for value in (self.weight, self.rel_weight, self.residual):
            if value is not None:
                glorot(value.view(value.shape[0], -1))
        for value in (self.relation, self.att_src, self.att_dst, self.att_rel):
            glorot(value)
        zeros(self.bias)

    def forward(
        self,
        x: Tensor,
        edge_index: Tensor | rgnn.Graph,
        edge_type: Tensor | None = None,
        previous: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the layer.

        Args:
            x: features [num_nodes, in_channels].
            edge_index: [2, num_edges], or an `rgnn.Graph`.
            edge_type: relation of each edge, [num_edges]; left out with a graph.
            previous: attention of the layer before, [num_edges, heads].

        Returns:
            [num_nodes, heads * out_channels] (without heads if they are not concatenated), and the
            attention [num_edges, heads], for the next layer.

        Raises:
            TypeError: features that are no tensor or not floating-point; no `edge_type`.
            ValueError: features of another width, or `previous` of another shape.
            IndexError: an id of a node or a relation that is out of range.
        """
        check_features("SimpleHGNConv", x, self.in_channels)
        graph = graph_for(edge_index, edge_type, x.shape[0], x.shape[0], self.num_relations)
        keep = None
        if self.training and self.dropout > 0:
            keep = F.dropout(x.new_ones(graph.num_edges, self.heads), self.dropout)
        result: Any = simple_hgn(
            graph, x, self.weight, self.relation, self.rel_weight,
            self.att_src, self.att_dst, self.att_rel, previous, keep, self.residual,
            slope=float(self.negative_slope), beta=float(self.beta),
        )  # fmt: skip
        out, attention = result
        out = out.flatten(1) if self.concat else out.mean(dim=1)
        return (out if self.bias is None else out + self.bias), attention

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_channels}, {self.out_channels}, heads={self.heads})"
