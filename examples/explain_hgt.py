"""A heterogeneous graph transformer to look into, on authors, papers and venues.

dataeff rgnn explain examples/explain_hgt.py
dataeff rgnn build --layer examples/explain_hgt.py --target sm_90
"""

import torch

from dataeff import rgnn


@rgnn.layer
def hgt(g, x, K, Q, V, A, M, prior):
    key, value = rgnn.linear(x, K[g.ntype]), rgnn.linear(x, V[g.ntype])
    query = rgnn.linear(g.at_dst(x), Q[g.ntype])
    score = rgnn.dot(rgnn.linear(g.src(key), A[g.etype]), g.dst(query)) * prior[g.etype]
    return g.sum(rgnn.edge_softmax(score) * rgnn.linear(g.src(value), M[g.etype]))


def example():
    nodes = {"author": 400, "paper": 800, "venue": 20}
    relations = [("author", "writes", "paper"), ("paper", "written_by", "author")]
    relations += [("paper", "cites", "paper"), ("paper", "appears_in", "venue")]
    width, heads, random = 64, 4, torch.Generator().manual_seed(0)
    edges = {
        r: torch.stack([torch.randint(nodes[r[k]], (2000,), generator=random) for k in (0, 2)])
        for r in relations
    }
    graph = rgnn.Graph.from_typed(edges, nodes)
    depth = width // heads
    K, Q, V = torch.randn(3, len(nodes), width, heads, depth, generator=random) * width**-0.5
    A, M = torch.randn(2, len(relations), heads, depth, depth, generator=random) * depth**-0.5
    x = torch.randn(sum(nodes.values()), width, generator=random)
    prior = torch.full((len(relations), heads), depth**-0.5)
    return hgt, graph, (x, K, Q, V, A, M, prior)


if __name__ == "__main__":
    layer, graph, arguments = example()
    print(layer.explain(graph, *arguments))
