"""What forward keeps for backward, and where it waits until then."""

import pytest
import torch
from rgnn_layers import rgat, tensors, typed_graph

from dataeff import rgnn
from dataeff.rgnn.plan import Plan, watched_plans

NODES, EDGES, RELATIONS, HEADS, WIDTH = 40, 3000, 3, 2, 12


@rgnn.layer
def attention(g, x, K, Q):
    k = rgnn.linear(rgnn.reshape(g.src(x), HEADS, -1), K[g.etype])
    score = rgnn.dot(k, g.dst(rgnn.reshape(rgnn.linear(x, Q), HEADS, -1)))
    return g.sum(rgnn.edge_softmax(score) * g.src(rgnn.reshape(x, HEADS, -1)))


@rgnn.layer
def crossed(g, x, K, Q):
    """A stored weight of each head that is made of the score of the other one."""
    k = rgnn.linear(rgnn.reshape(g.src(x), HEADS, -1), K[g.etype])
    score = rgnn.dot(k, g.dst(rgnn.reshape(rgnn.linear(x, Q), HEADS, -1)))
    first, second = rgnn.split(score, (1, 1))
    weight = rgnn.edge_softmax(score) + rgnn.concat(second, first)
    return weight, g.sum(weight * g.src(rgnn.reshape(x, HEADS, -1)))


SHAPES = [(NODES, WIDTH), (RELATIONS, HEADS, WIDTH // HEADS, 5), (WIDTH, HEADS * 5)]


def _graph(edges=EDGES):
    g = torch.Generator().manual_seed(0)
    ends = torch.randint(NODES, (2, edges), generator=g)
    types = torch.randint(RELATIONS, (edges,), generator=g)
    return typed_graph((ends, types, NODES, RELATIONS))


def _inputs():
    torch.manual_seed(1)
    return [torch.randn(s, dtype=torch.float64).div_(2).requires_grad_() for s in SHAPES]


def _kept_of_edges(compiled):
    saved = compiled.forward.outputs[compiled.num_outputs :]
    return [compiled.forward[v] for v in saved if compiled.forward[v].type.domain == "edge"]


def test_the_weights_of_a_softmax_are_kept_and_not_its_scores():
    compiled = attention.plan(_graph(), *_inputs()).compiled
    assert [op.kind for op in _kept_of_edges(compiled)] == ["exp"]
    assert not [op for op in compiled.backward.ops if op.kind in ("exp", "logsum")]


def test_scores_are_kept_where_backward_reads_them():
    """The gradient of a factor of relations is a sum of scores: they are there, weights follow."""

    @rgnn.layer
    def scaled(g, x, K, Q, p):
        k = rgnn.linear(rgnn.reshape(g.src(x), HEADS, -1), K[g.etype])
        score = rgnn.dot(k, g.dst(rgnn.reshape(rgnn.linear(x, Q), HEADS, -1))) * p[g.etype]
        return g.sum(rgnn.edge_softmax(score) * g.src(rgnn.reshape(x, HEADS, -1)))

    prior = torch.ones(RELATIONS, HEADS, dtype=torch.float64)
    request = scaled.plan(_graph(), *_inputs(), prior).request
    compiled = Plan(request, frozenset({"scale_weights"})).compiled
    assert [op.kind for op in _kept_of_edges(compiled)] == ["reduce"]


@pytest.mark.parametrize(("edges", "kept"), [(EDGES, []), (300, ["exp"])])
def test_what_pairs_hold_is_not_kept_for_edges_that_outnumber_features(edges, kept):
    """RGAT's scores are sums of two numbers of pairs; its weights are kept where they are few."""
    args = tensors(rgat, NODES, edges, RELATIONS, torch.float64).values()
    compiled = rgat.plan(_graph(edges), *args).compiled
    assert [op.kind for op in _kept_of_edges(compiled)] == kept
    assert sum(op.kind == "exp" for op in compiled.backward.ops) == 1 - len(kept)


def test_a_backend_that_computes_scores_again_keeps_them():
    request = attention.plan(_graph(), *_inputs()).request
    compiled = Plan(request, backend="triton").compiled
    assert [op.kind for op in _kept_of_edges(compiled)] == ["reduce"]


def test_a_score_waits_where_its_weight_will_stand():
    compiled = attention.plan(_graph(), *_inputs()).compiled
    (source,) = [
        text
        for text in compiled.forward_runner.sources().split("// traversal")
        if "Exponents acc" in text
    ]
    assert source.count("simd reduction") == 1
    assert source.count("= math::exp(") == 1


def test_a_weight_that_follows_from_its_score_alone_is_computed_in_a_loop_of_its_own():
    """Neither row numbers nor rows are read in it: it takes a vector of edges at a time."""
    args = tensors(rgat, NODES, 300, RELATIONS, torch.float64).values()
    text = rgat.plan(_graph(300), *args).compiled.forward_runner.sources()
    (loop,) = [b for b in text.split("for (int64_t t = ") if "math::exp(s" in b]
    assert "index_" not in loop


@pytest.mark.parametrize("layer", [attention, crossed], ids=lambda f: f.name)
def test_weights_are_those_of_the_reference(layer, monkeypatch):
    graph, found = _graph(), []
    for backend in ("cpp", "reference"):
        monkeypatch.setenv("DATAEFF_RGNN_BACKEND", backend)
        inputs = _inputs()
        with watched_plans() as plans:
            outputs = layer(graph, *inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        assert plans[0].compiled.forward_runner.name == backend
        loss = sum(y.square().sum() for y in outputs)
        found.append([*outputs, *torch.autograd.grad(loss, inputs)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
