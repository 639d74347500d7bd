"""A relational graph convolution to look into: the mean of each relation, and a root weight.

dataeff rgnn explain examples/explain_rgcn.py
dataeff rgnn build --layer examples/explain_rgcn.py --target sm_90
"""

import torch

from dataeff import rgnn


@rgnn.layer
def rgcn(g, x, W, root, bias):
    return g.mean_per_relation(rgnn.linear(g.src(x), W[g.etype])) + rgnn.linear(x, root) + bias


def example():
    nodes, edges, relations, width = 1000, 8000, 8, 64
    random = torch.Generator().manual_seed(0)
    edge_index = torch.randint(nodes, (2, edges), generator=random)
    edge_type = torch.randint(relations, (edges,), generator=random)
    graph = rgnn.Graph(edge_index, edge_type, num_nodes=nodes)
    x, bias = torch.randn(nodes, width, generator=random), torch.zeros(width)
    W = torch.randn(relations + 1, width, width, generator=random) * width**-0.5
    return rgcn, graph, (x, W[:relations], W[relations], bias)


if __name__ == "__main__":
    layer, graph, arguments = example()
    print(layer.explain(graph, *arguments))
