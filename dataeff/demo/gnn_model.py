"""The models of the graph part: relational attention over sampled blocks, and a plain MLP.

Dimensions: N nodes of a block, E edges, R relations, F features, D hidden, H heads, C classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dataeff import rgnn
from dataeff.sampling import SampledSubgraph


@rgnn.layer
def relational_attention(g, x, W, a_src, a_dst, heads):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Additive attention over all edges into a node, in one softmax (RGAT, arXiv 1904.05811)."""
    z_src = rgnn.reshape(rgnn.linear(g.src(x), W[g.etype]), heads, -1)
    z_dst = rgnn.reshape(rgnn.linear(g.dst(x), W[g.etype]), heads, -1)
    score = rgnn.dot(z_src, a_src[g.etype]) + rgnn.dot(z_dst, a_dst[g.etype])
    weight = rgnn.edge_softmax(rgnn.leaky_relu(score, 0.2))
    return g.sum(rgnn.reshape(weight, heads, 1) * z_src)


def blocks(sample: SampledSubgraph, num_relations: int, device: torch.device) -> list[rgnn.Graph]:
    """One graph per layer, the outermost first; layer l computes only the nodes that l + 1 reads.

    The sampler numbers nodes by hop, seeds first, and keeps the edges of a hop together, so that
    each block is a prefix of the next.
    """
    assert sample.edge_type is not None
    edge_index, edge_type = sample.edge_index.to(device), sample.edge_type.to(device)
    nodes, edges = sample.num_sampled_nodes, sample.num_sampled_edges
    return [
        rgnn.Graph(
            edge_index[:, : sum(edges[: hop + 1])],
            edge_type[: sum(edges[: hop + 1])],
            num_src_nodes=sum(nodes[: hop + 2]),
            num_dst_nodes=sum(nodes[: hop + 1]),
            num_relations=num_relations,
            validate=False,
        )
        for hop in reversed(range(len(edges)))
    ]


def unit_variance(x: Tensor) -> Tensor:
    """Rows of length 1 to entries of variance 1, as weights are initialised for; [n, F]."""
    return x * math.sqrt(x.shape[1])


class RelationalAttention(nn.Module):
    """`norm(attention(x) + x W_self)`, after which the input is added: [N_src, D] -> [N_dst, D]."""

    def __init__(self, dim: int, num_relations: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.weight = nn.Parameter(torch.empty(num_relations, dim, dim))
        self.a_src = nn.Parameter(torch.empty(num_relations, heads, dim // heads))
        self.a_dst = nn.Parameter(torch.empty(num_relations, heads, dim // heads))
        self.own = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        for weight in self.weight:  # per relation: fans are those of one matrix
            nn.init.xavier_uniform_(weight)
        nn.init.normal_(self.a_src, std=0.1)
        nn.init.normal_(self.a_dst, std=0.1)

    def forward(self, x: Tensor, graph: rgnn.Graph) -> Tensor:
        """Computes the states of the block's targets."""
        target = x[: graph.num_dst_nodes]
        message = relational_attention(
            graph, x, self.weight, self.a_src, self.a_dst, heads=self.heads
        )
        return target + F.relu(self.norm(message.flatten(1) + self.own(target)))


class RelationalClassifier(nn.Module):
    """Features and node type to a hidden state, relational attention twice, classes."""

    def __init__(
        self,
        num_features: int,
        hidden: int,
        num_classes: int,
        *,
        num_relations: int,
        num_node_types: int,
        num_layers: int = 2,
        heads: int = 4,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        self.encode = nn.Linear(num_features, hidden)
        self.type_embedding = nn.Embedding(num_node_types, hidden)
        self.layers = nn.ModuleList(
            RelationalAttention(hidden, num_relations, heads) for _ in range(num_layers)
        )
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor, node_type: Tensor, graphs: list[rgnn.Graph]) -> Tensor:
        """Class scores of the seeds, [num_seeds, C].

        Args:
            x: features of the sampled nodes, [N, F].
            node_type: their types, [N].
            graphs: one block per layer, as from `blocks`.
        """
        state = F.relu(self.encode(unit_variance(x)) + self.type_embedding(node_type))
        for layer, graph in zip(self.layers, graphs, strict=True):
            state = layer(self.dropout(state), graph)
        scores: Tensor = self.classify(state)
        return scores


class FeatureClassifier(nn.Module):
    """The baseline that sees a node's own features only: two hidden layers, [n, F] -> [n, C]."""

    def __init__(
        self, num_features: int, hidden: int, num_classes: int, dropout: float = 0.3
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(num_features, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Class scores, [n, C]."""
        scores: Tensor = self.mlp(unit_variance(x))
        return scores
