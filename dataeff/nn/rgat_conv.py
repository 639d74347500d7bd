"""RGAT (Busbridge et al., arXiv 1904.05811), a drop-in for PyTorch Geometric's `RGATConv`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
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

MODS = ("additive", "scaled", "f-additive", "f-scaled")
MODES = ("additive-self-attention", "multiplicative-self-attention")
AGGREGATIONS = ("add", "mean", "max")
MECHANISMS = ("within-relation", "across-relation")


@rgnn.layer
def rgat(  # type: ignore[no-untyped-def]  # noqa: ANN201, D103
    g, x, weight, q, k,  # noqa: ANN001
    x_dst=None, edge_attr=None, edge_weight=None, e=None, keep=None,  # noqa: ANN001
    w=None, l1=None, b1=None, l2=None, b2=None, bias=None, *,  # noqa: ANN001
    heads, dim, multiplicative, within, mod, slope, blocks, aggr, need_attention,  # noqa: ANN001
):  # fmt: skip
    src, dst = g.src(x), g.dst(x if x_dst is None else x_dst)
    if blocks:
        src, dst = rgnn.reshape(src, blocks, -1), rgnn.reshape(dst, blocks, -1)
    z_src, z_dst = rgnn.linear(src, weight[g.etype]), rgnn.linear(dst, weight[g.etype])
    if blocks:
        width = z_src.type.numel
        z_src, z_dst = rgnn.reshape(z_src, width), rgnn.reshape(z_dst, width)
    score, key = rgnn.linear(z_dst, q), rgnn.linear(z_src, k)
    score = score * key if multiplicative else score + key
    if edge_attr is not None:
        on_edge = rgnn.linear(rgnn.linear(g.edge(edge_attr), edge_weight), e)
        score = score * on_edge if multiplicative else score + on_edge
    if not multiplicative:
        score = rgnn.leaky_relu(score, slope)
    alpha = attention = rgnn.edge_softmax(score, per_relation=within)
    if mod == "f-additive":
        alpha = alpha + rgnn.positive(alpha)
    elif mod == "f-scaled":
        alpha = alpha * g.dst(g.in_degree())
    elif keep is not None:
        alpha = alpha * g.edge(keep)
    middle = (1,) if multiplicative else ()  # the attention dimensions, which additive has not
    z = rgnn.reshape(z_src, heads, *middle, -1)
    message = (rgnn.reshape(alpha, heads, dim) if multiplicative else alpha) * z
    if mod == "additive":
        message = message + z * w
    elif mod == "scaled":
        degree = rgnn.relu(rgnn.reshape(g.in_degree(), 1) * l1 + b1)
        message = message * rgnn.reshape(g.dst(rgnn.linear(degree, l2) + b2), 1, *middle, -1)
    out = {"add": g.sum, "mean": g.mean, "max": g.max}[aggr](message)
    if bias is not None:  # of the joined heads
        out = rgnn.reshape(out, out.type.numel) + bias
    return (out, attention) if need_attention else out


class RGATConv(torch.nn.Module):
    r"""Relational graph attention.

    For each head, with r the relation of the edge from j to i,

    .. math::
        \alpha_{ij} = \mathrm{softmax}_j\; \mathrm{LeakyReLU}\big(q^T W_r x_i + k^T W_r x_j\big),
        \qquad x'_i = \sum_j \alpha_{ij} W_r x_j + b

    The softmax runs over all edges that enter i ("across-relation"), or over those of one relation
    ("within-relation"). Edge features add a third score, :math:`e^T W_e e_{ij}`. Multiplicative
    attention takes the product of the scores, `dim` of them a head, and no leaky ReLU. With
    :math:`d_i` the number of edges that enter i, `mod` makes of an edge's message, elementwise,

    - "additive": :math:`(\alpha_{ij} + w)\, W_r x_j`;
    - "scaled": :math:`\alpha_{ij}\, W_r x_j\, (\mathrm{ReLU}(d_i l_1 + b_1)\, l_2 + b_2)`;
    - "f-additive": :math:`(\alpha_{ij} + 1)\, W_r x_j`, where :math:`\alpha_{ij} > 0`;
    - "f-scaled": :math:`d_i\, \alpha_{ij}\, W_r x_j`.

    Args:
        in_channels: input width.
        out_channels: output width of one head.
        num_relations: relations.
        num_bases: rank of the basis decomposition of the weights.
        num_blocks: blocks of the block-diagonal decomposition of the weights.
        mod: "additive", "scaled", "f-additive" or "f-scaled" cardinality preservation.
        attention_mechanism: softmax "within-relation" or "across-relation".
        attention_mode: "additive-self-attention" or "multiplicative-self-attention".
        heads: attention heads.
        dim: attention dimensions of one head (multiplicative attention only).
        concat: join the heads, or take their mean.
        negative_slope: of the leaky ReLU over additive scores.
        dropout: share of attention coefficients dropped in training.
        edge_dim: width of edge features.
        bias: add a bias.
        **kwargs: `aggr`, how messages are joined at a node: "add" (or "sum"), "mean" or "max".

    Raises:
        ValueError: arguments that exclude each other, unknown names, or a negative width.
        NotImplementedError: a message passing argument that this layer does not follow.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_relations: int,
        num_bases: int | None = None,
        num_blocks: int | None = None,
        mod: str | None = None,
        attention_mechanism: str = "across-relation",
        attention_mode: str = "additive-self-attention",
        heads: int = 1,
        dim: int = 1,
        concat: bool = True,
        negative_slope: float = 0.2,
        dropout: float = 0.0,
        edge_dim: int | None = None,
        bias: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        aggr = kwargs.pop("aggr", "add")
        self.aggr = "add" if aggr == "sum" else aggr
        refuse_other_arguments(type(self).__name__, kwargs)
        check_width(type(self).__name__, in_channels)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.num_relations = num_relations
        self.num_bases, self.num_blocks, self.mod = num_bases, num_blocks, mod
        self.attention_mechanism, self.attention_mode = attention_mechanism, attention_mode
        self.heads, self.dim, self.concat = heads, dim, concat
        self.negative_slope, self.dropout, self.edge_dim = negative_slope, dropout, edge_dim
        self._check()
        self._make_parameters(bias)
        self.reset_parameters()

    def _check(self) -> None:
        if self.aggr not in AGGREGATIONS:
            raise ValueError(f"aggr must be one of {AGGREGATIONS}, got {self.aggr!r}")
        if self.attention_mechanism not in MECHANISMS:
            raise ValueError(
                f"attention_mechanism must be one of {MECHANISMS}, got {self.attention_mechanism!r}"
            )
        if self.attention_mode not in MODES:
            raise ValueError(f"attention_mode must be one of {MODES}, got {self.attention_mode!r}")
        if self.attention_mode == MODES[0] and self.dim > 1:
            raise ValueError("additive attention has dim 1; use multiplicative-self-attention")
        if self.mod not in (None, *MODS):
            raise ValueError(f"mod must be None or one of {MODS}, got {self.mod!r}")
        if self.dropout > 0 and self.mod is not None:
            raise ValueError("dropout of attention needs mod=None")
        if self.num_bases is not None and self.num_blocks is not None:
            raise ValueError("basis and block-diagonal decomposition exclude each other")
        width = self.heads * self.out_channels
        if self.num_blocks and (self.in_channels % self.num_blocks or width % self.num_blocks):
            raise ValueError(
                f"{self.num_blocks} blocks do not divide {self.in_channels} and {width} channels"
            )

    def _make_parameters(self, bias: bool) -> None:
        width, scores = self.heads * self.out_channels, self.heads * self.dim
        self.q = Parameter(torch.empty(width, scores))
        self.k = Parameter(torch.empty(width, scores))
        self.bias: Parameter | None
        self.e: Parameter | None
        joined = self.dim * self.out_channels * (self.heads if self.concat else 1)
        optional(self, "bias", bias, joined)
        optional(self, "e", self.edge_dim is not None, width, scores)
        self.lin_edge = (
            None if self.edge_dim is None else torch.nn.Linear(self.edge_dim, width, bias=False)
        )
        if self.num_bases is not None:
            self.att = Parameter(torch.empty(self.num_relations, self.num_bases))
            self.basis = Parameter(torch.empty(self.num_bases, self.in_channels, width))
        elif self.num_blocks is not None:
            n = self.num_blocks
            shape = (self.num_relations, n, self.in_channels // n, width // n)
            self.weight = Parameter(torch.empty(shape))
        else:
            self.weight = Parameter(torch.empty(self.num_relations, self.in_channels, width))
        self.w = Parameter(torch.ones(self.out_channels))
        self.l1 = Parameter(torch.empty(1, self.out_channels))
        self.b1 = Parameter(torch.empty(1, self.out_channels))
        self.l2 = Parameter(torch.empty(self.out_channels, self.out_channels))
        self.b2 = Parameter(torch.empty(1, self.out_channels))

    def reset_parameters(self) -> None:
        """Initialise all parameters again.

        PyTorch Geometric leaves `l2` uninitialised; here it is 1 / out_channels, as meant there.
        """
        if self.num_bases is not None:
            glorot(self.basis)
            glorot(self.att)
        else:
            glorot(self.weight)
        for value in (self.q, self.k, self.e):
            glorot(value)
        zeros(self.bias)
        torch.nn.init.ones_(self.l1)
        zeros(self.b1)
        torch.nn.init.constant_(self.l2, 1 / self.out_channels)
        zeros(self.b2)
        if self.lin_edge is not None:
            glorot(self.lin_edge.weight)

    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        edge_index: Tensor | rgnn.Graph,
        edge_type: Tensor | None = None,
        edge_attr: Tensor | None = None,
        size: tuple[int, int] | None = None,
        return_attention_weights: bool | None = None,
    ) -> Any:
        """Run the layer.

        Args:
            x: features [num_nodes, in_channels], or a pair for sources and destinations.
            edge_index: [2, num_edges], a sparse adjacency [destinations, sources] whose entries
                `edge_type` and `edge_attr` follow, or an `rgnn.Graph` (of a sampled block, too).
            edge_type: relation of each edge, [num_edges]; left out with a graph.
            edge_attr: edge features, [num_edges, edge_dim] or [num_edges].
            size: numbers of sources and destinations; they follow from `x`, and are checked.
            return_attention_weights: also return (edge_index, attention [num_edges, heads * dim]).

        Returns:
            [num_nodes, heads * dim * out_channels], without heads if they are not concatenated.

        Raises:
            TypeError: features that are not floating-point; no `edge_type`.
            ValueError: features of another width or number of rows, or `edge_attr` without
                `edge_dim`.
            IndexError: an id of a node or a relation that is out of range.
        """
        left, right = pair_of("RGATConv", x)
        if not left.is_floating_point():
            raise TypeError(f"RGATConv needs floating-point features, got {left.dtype}")
        for rows, name in ((left, "x"), (right, "x of the destinations")):
            check_features("RGATConv", rows, self.in_channels, name)
        sizes = (left.shape[0], right.shape[0])
        if size is not None and tuple(size) != sizes:
            raise ValueError(f"size is {tuple(size)}, but the features are for {sizes} nodes")
        graph = graph_for(edge_index, edge_type, *sizes, self.num_relations)
        need_attention = isinstance(return_attention_weights, bool)
        own = right if right is not left else None
        out, attention = self._run(graph, left, own, edge_attr, need_attention)
        out = out.flatten(1) if self.concat else out.mean(dim=1).flatten(1)
        if self.bias is not None and not self.concat:
            out = out + self.bias
        elif self.bias is None and self.concat and out.requires_grad:
            out = out.clone()  # callers may write to it, and backward reads what it was made of
        if not need_attention:
            return out
        return out, (edge_index if isinstance(edge_index, Tensor) else graph.edge_index, attention)

    def _run(
        self,
        graph: rgnn.Graph,
        x: Tensor,
        x_dst: Tensor | None,
        edge_attr: Tensor | None,
        need_attention: bool,
    ) -> tuple[Tensor, Tensor | None]:
        inputs: dict[str, Tensor] = {"weight": self._weight(), "q": self.q, "k": self.k}
        if self.bias is not None and self.concat:
            inputs["bias"] = self.bias
        if x_dst is not None:
            inputs["x_dst"] = x_dst
        if edge_attr is not None:
            if self.lin_edge is None or self.e is None:
                raise ValueError("edge_attr was given, but the layer was made without edge_dim")
            edge_attr = edge_attr.unsqueeze(1) if edge_attr.dim() == 1 else edge_attr
            check_features("RGATConv", edge_attr, self.lin_edge.in_features, "edge_attr")
            inputs["edge_attr"] = edge_attr
            inputs |= {"edge_weight": self.lin_edge.weight.t(), "e": self.e}
        if self.training and self.dropout > 0:
            ones = x.new_ones(graph.num_edges, self.heads * self.dim)
            inputs["keep"] = F.dropout(ones, self.dropout)
        if self.mod == "additive":
            inputs["w"] = self.w.view(*(1,) * (2 if self.attention_mode == MODES[1] else 1), -1)
        elif self.mod == "scaled":
            inputs |= {"l1": self.l1.view(-1), "b1": self.b1.view(-1)}
            inputs |= {"l2": self.l2, "b2": self.b2.view(-1)}
        result = rgat(
            graph, x, **inputs, heads=self.heads, dim=self.dim, mod=self.mod,
            multiplicative=self.attention_mode == MODES[1],
            within=self.attention_mechanism == MECHANISMS[0],
            slope=float(self.negative_slope), blocks=self.num_blocks or 0,
            aggr=self.aggr, need_attention=need_attention,
        )  # fmt: skip
        return result if need_attention else (result, None)

    def _weight(self) -> Tensor:
        if self.num_bases is None:
            return self.weight
        flat = self.att @ self.basis.view(self.num_bases, -1)
        return flat.view(self.num_relations, self.in_channels, -1)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_channels}, {self.out_channels}, heads={self.heads})"
