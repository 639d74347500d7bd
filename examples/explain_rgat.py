"""A relational attention layer to look into.

dataeff rgnn explain examples/explain_rgat.py
dataeff rgnn build --layer examples/explain_rgat.py --target sm_90
"""

import torch

from dataeff import rgnn


@rgnn.layer
def rgat(g, x, W, a_src, a_dst):
    z_src, z_dst = rgnn.linear(g.src(x), W[g.etype]), rgnn.linear(g.dst(x), W[g.etype])
    score = rgnn.dot(z_src, a_src[g.etype]) + rgnn.dot(z_dst, a_dst[g.etype])
    return g.sum(rgnn.edge_softmax(rgnn.leaky_relu(score, 0.2)) * z_src)


def example():
    nodes, edges, relations, width = 1000, 8000, 8, 64
    random = torch.Generator().manual_seed(0)
    edge_index = torch.randint(nodes, (2, edges), generator=random)
    edge_type = torch.randint(relations, (edges,), generator=random)
    graph = rgnn.Graph(edge_index, edge_type, num_nodes=nodes)
    W = torch.randn(relations, width, width, generator=random) * width**-0.5
    a = torch.randn(2, relations, width, generator=random)
    return rgat, graph, (torch.randn(nodes, width, generator=random), W, a[0], a[1])


if __name__ == "__main__":
    layer, graph, arguments = example()
    print(layer.explain(graph, *arguments))
