import torch

from dataeff.demo.gnn_model import RelationalClassifier, blocks, relational_attention
from dataeff.rgnn import Graph
from dataeff.sampling import CSCGraph, NeighborSampler

NUM_NODES, NUM_RELATIONS, DIM, HEADS = 40, 3, 8, 2


def plain_attention(edge_index, edge_type, num_targets, x, W, a_src, a_dst):
    """The definition, one target at a time."""
    z = torch.einsum("ni,rio->rno", x, W).unflatten(-1, (HEADS, -1))
    out = torch.zeros(num_targets, HEADS, DIM // HEADS)
    for target in range(num_targets):
        into = (edge_index[1] == target).nonzero().flatten()
        if not into.numel():
            continue
        r, source = edge_type[into], edge_index[0, into]
        score = (z[r, source] * a_src[r]).sum(-1) + (z[r, target] * a_dst[r]).sum(-1)
        weight = torch.nn.functional.leaky_relu(score, 0.2).softmax(dim=0)
        out[target] = (weight[..., None] * z[r, source]).sum(0)
    return out


def random_graph(generator, num_edges=200):
    edge_index = torch.randint(NUM_NODES, (2, num_edges), generator=generator)
    return edge_index, torch.randint(NUM_RELATIONS, (num_edges,), generator=generator)


def test_attention_is_what_its_definition_says(generator):
    edge_index, edge_type = random_graph(generator)
    x = torch.randn(NUM_NODES, DIM, generator=generator)
    W = torch.randn(NUM_RELATIONS, DIM, DIM, generator=generator)
    a_src, a_dst = torch.randn(2, NUM_RELATIONS, HEADS, DIM // HEADS, generator=generator)
    graph = Graph(edge_index, edge_type, num_nodes=NUM_NODES, num_relations=NUM_RELATIONS)
    found = relational_attention(graph, x, W, a_src, a_dst, heads=HEADS)
    expected = plain_attention(edge_index, edge_type, NUM_NODES, x, W, a_src, a_dst)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_blocks_compute_what_the_whole_graph_computes(generator):
    """With all neighbours sampled, the seeds' scores are those of full-graph message passing."""
    edge_index, edge_type = random_graph(generator, num_edges=80)
    x = torch.randn(NUM_NODES, 5, generator=generator)
    node_type = torch.randint(4, (NUM_NODES,), generator=generator)
    torch.manual_seed(0)
    model = RelationalClassifier(
        5, DIM, 6, num_relations=NUM_RELATIONS, num_node_types=4, heads=HEADS
    ).eval()
    whole = Graph(edge_index, edge_type, num_nodes=NUM_NODES, num_relations=NUM_RELATIONS)
    expected = model(x, node_type, [whole, whole])
    csc = CSCGraph(edge_index, edge_type, num_nodes=NUM_NODES, num_relations=NUM_RELATIONS)
    seeds = torch.tensor([7, 3, 22])
    sample = NeighborSampler(csc, [-1, -1]).sample(seeds)
    graphs = blocks(sample, NUM_RELATIONS, torch.device("cpu"))
    assert graphs[1].num_dst_nodes == 3 and graphs[0].num_dst_nodes == graphs[1].num_src_nodes
    found = model(x[sample.n_id], node_type[sample.n_id], graphs)
    torch.testing.assert_close(found, expected[seeds], rtol=1e-4, atol=1e-5)
