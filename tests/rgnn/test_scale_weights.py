"""Factors of relations scale weights instead of rows: the same results, and no edge reads one."""

import pytest
import torch

from dataeff import rgnn
from dataeff.rgnn.passes.scale_weights import scale_weights
from dataeff.rgnn.plan import disabled_passes, watched_plans

NODES, EDGES, RELATIONS, HEADS, WIDTH = 500, 4000, 3, 2, 12


@rgnn.layer
def attention(g, x, K, Q, p):
    """HGT's score with a prior per head."""
    k = rgnn.linear(rgnn.reshape(g.src(x), HEADS, -1), K[g.etype])
    score = rgnn.dot(k, g.dst(rgnn.reshape(rgnn.linear(x, Q), HEADS, -1))) * p[g.etype]
    return g.sum(rgnn.edge_softmax(score) * g.src(rgnn.reshape(x, HEADS, -1)))


@rgnn.layer
def message(g, x, W, s):
    """The factor stands first, and the sign inside."""
    return g.sum(s[g.etype] * -rgnn.linear(g.src(x), W[g.etype]))


@rgnn.layer
def read_twice(g, x, W, s):
    z = rgnn.linear(g.src(x), W[g.etype])
    return g.sum(z * s[g.etype]) + g.max(z)


@rgnn.layer
def by_column(g, x, W, s):
    """A factor for each column is none of the rows that the product sums up, but W has columns."""
    return g.sum(rgnn.linear(g.src(x), W[g.etype]) * s[g.etype])


@rgnn.layer
def untyped(g, x, W, s):
    return g.sum(rgnn.linear(g.src(x), W) * s[g.etype])


W = (RELATIONS, WIDTH, WIDTH)
K = (RELATIONS, HEADS, WIDTH // HEADS, 5)
CASES = {
    attention: [K, (WIDTH, HEADS * 5), (RELATIONS, HEADS)],
    message: [W, (RELATIONS,)],
    read_twice: [W, (RELATIONS,)],
    by_column: [W, (RELATIONS, WIDTH)],
    untyped: [W[1:], (RELATIONS,)],
}
SCALED = (attention, message)


def _graph(edges):
    g = torch.Generator().manual_seed(0)
    ends = torch.randint(NODES, (2, edges), generator=g)
    types = torch.randint(RELATIONS, (edges,), generator=g)
    return rgnn.Graph(ends, types, num_nodes=NODES, num_relations=RELATIONS)


def _train(layer, graph):
    torch.manual_seed(1)
    shapes = [(NODES, WIDTH), *CASES[layer]]
    inputs = [(torch.randn(s, dtype=torch.float64) / 2).requires_grad_() for s in shapes]
    with watched_plans() as plans:
        y = layer(graph, *inputs)
    return plans[0].compiled, [y, *torch.autograd.grad(y.square().sum(), inputs)]


@pytest.mark.parametrize("layer", CASES, ids=lambda f: f.name)
def test_a_scaled_weight_gives_the_same_results_and_gradients(layer):
    graph = _graph(EDGES)
    with_pass, found = _train(layer, graph)
    assert ("scale_weights" in dict(with_pass.stages)) == (layer in SCALED)
    with disabled_passes("scale_weights"):
        without, want = _train(layer, graph)
    assert "scale_weights" not in dict(without.stages)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_no_edge_reads_its_relation_any_more():
    compiled, _ = _train(attention, _graph(EDGES))
    read = {op.attrs[0] for p in (compiled.forward, compiled.backward) for op in p.ops if op.attrs}
    assert "edge.src_pair" in read and "edge.etype" not in read


def test_few_edges_do_not_pay_for_weights():
    compiled, _ = _train(attention, _graph(100))
    assert "scale_weights" not in dict(compiled.stages)


def test_a_returned_product_stays_as_it_is():
    @rgnn.layer
    def both(g, x, W, s):
        z = rgnn.linear(g.src(x), W[g.etype])
        return z, g.sum(z * s[g.etype])

    graph = _graph(EDGES)
    plan = both.plan(graph, *(torch.zeros(s) for s in [(NODES, WIDTH), *CASES[message]]))
    rows = dict.fromkeys(("node", "dst", "edge", "src_pair", "dst_pair", "etype"), 1)
    rows["edge"] = 10**6
    assert scale_weights(plan.traced, rows) == plan.traced
