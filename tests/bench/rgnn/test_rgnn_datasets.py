import pytest
import torch

from dataeff.bench.rgnn.datasets import DATASETS, Statistics, generate, uniform

SMALL = Statistics("small", 500, 3_000, 4, 20)


@pytest.mark.parametrize("statistics", [SMALL, DATASETS[0]], ids=lambda s: s.name)
def test_a_graph_has_the_numbers_it_is_named_for(statistics):
    edges = generate(statistics)
    assert edges.edge_index.shape == (2, statistics.edges)
    assert edges.edge_index.min() >= 0 and edges.edge_index.max() < statistics.nodes
    assert edges.edge_type.bincount().numel() == statistics.relations
    assert edges.edge_type.bincount().min() > 0
    assert edges.type_ptr.numel() == statistics.node_types + 1
    assert edges.type_ptr[-1] == statistics.nodes


def test_a_relation_leads_between_two_node_types():
    edges = generate(SMALL)
    for end in edges.edge_index:
        kind = torch.bucketize(end, edges.type_ptr[1:], right=True)
        for relation in range(SMALL.relations):
            assert kind[edges.edge_type == relation].unique().numel() == 1


def test_half_of_the_relations_are_the_other_half_reversed():
    aifb = DATASETS[0]
    edges = generate(aifb)
    forward, backward = (
        sorted(zip(*edges.edge_index[:, edges.edge_type == r].tolist(), strict=True))
        for r in (3, 3 + aifb.relations // 2)
    )
    assert sorted((b, a) for a, b in backward) == forward


def test_relations_and_degrees_are_skewed_and_the_seed_decides():
    edges = generate(SMALL)
    sizes = edges.edge_type.bincount()
    assert sizes.max() > 5 * sizes.median()
    degrees = edges.edge_index[1].bincount(minlength=SMALL.nodes)
    assert degrees.max() > 5 * degrees.float().mean()
    assert torch.equal(generate(SMALL).edge_index, edges.edge_index)
    assert not torch.equal(generate(SMALL, seed=1).edge_index, edges.edge_index)


def test_more_relations_than_edges_are_possible():
    edges = uniform(nodes=5, edges=3, relations=7)
    assert edges.edge_type.numel() == 3 and edges.edge_type.max() < 7
