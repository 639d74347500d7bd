"""Edge softmax of scores of any size: every backend keeps the precision of float32."""

import pytest
import torch

from dataeff import rgnn
from dataeff.rgnn.plan import disabled_passes

NODES, EDGES, HEADS = 20, 60, 3


@pytest.fixture(params=["reference", "cpp", "triton"])
def backend(request, monkeypatch):
    if request.param == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("DATAEFF_RGNN_BACKEND", request.param)
    return request.param


@rgnn.layer
def attend(g, score, value):
    return g.sum(rgnn.edge_softmax(g.edge(score)) * g.src(value))


@rgnn.layer
def attend_per_relation(g, score, value):
    return g.sum(rgnn.edge_softmax(g.edge(score), per_relation=True) * g.src(value))


def results(layer, graph, score, value):
    """The output and the gradients of both arguments."""
    args = [t.detach().clone().requires_grad_() for t in (score, value)]
    y = layer(graph, *args)
    given = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    return [y, *torch.autograd.grad(y, args, given)]


@pytest.mark.parametrize("off", [(), ("fuse",)], ids=str)
@pytest.mark.parametrize("heads", [(), (HEADS,)], ids=str)
@pytest.mark.parametrize("layer", [attend, attend_per_relation], ids=lambda f: f.name)
@pytest.mark.parametrize("scale", [1e4, -1e4, 0.0])
def test_near_scores_of_any_size(backend, scale, layer, heads, off, small, monkeypatch):
    """Scores are exact in float32 and their differences are of size one, as the weights need."""
    score = scale + 2 * torch.randn(EDGES, *heads)
    value = torch.randn(NODES, *heads, 2)
    with disabled_passes(*off):
        got = results(layer, small, score, value)
    monkeypatch.setenv("DATAEFF_RGNN_BACKEND", "reference")
    want = results(layer, small, score.double(), value.double())
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_far_scores(backend, scale, small):
    """Weights stay weights: positive, and one in sum."""
    y, *gradients = results(attend, small, scale * torch.randn(EDGES), torch.ones(NODES, 2))
    reached = torch.bincount(small.edge_index[1], minlength=NODES) > 0
    torch.testing.assert_close(y, reached[:, None].to(y).expand_as(y), rtol=0, atol=1e-6)
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("scale", [1e4, -1e4])
@pytest.mark.parametrize("heads", [(), (HEADS,)], ids=str)
def test_weights_of_computed_scores_add_up_to_one(backend, scale, heads, small):
    """Scores are rounded once: not otherwise where a maximum is subtracted, nor in backward."""

    @rgnn.layer
    def scaled(g, s, a, b, value):
        score = rgnn.leaky_relu(g.src(s) * a[g.etype] + g.edge(b) * 0.37, 0.2)
        return g.sum(rgnn.edge_softmax(score * 1.7) * g.src(value))

    s = scale * (1 + torch.rand(NODES, *heads) / 1e4)
    a, b = 1 + torch.rand(4, *heads) / 1e4, torch.randn(EDGES, *heads)
    value = torch.ones(NODES, *heads, requires_grad=True)
    y = scaled(small, s, a, b.requires_grad_(), value)
    reached = torch.bincount(small.edge_index[1], minlength=NODES) > 0
    want = reached.to(y).view(-1, *(1 for _ in heads)).expand_as(y)
    torch.testing.assert_close(y, want, rtol=0, atol=2e-6)
    y.sum().backward()
    torch.testing.assert_close(value.grad.sum(0), want.sum(0), rtol=2e-6, atol=0)
    assert b.grad.abs().max() < 1e-6


def test_scores_that_no_edge_reads_have_no_gradient(backend, small):
    """A node without edges has a score of its own here, and the softmax of nothing."""

    @rgnn.layer
    def by_destination(g, score, value):
        return g.sum(rgnn.edge_softmax(g.dst(score)) * g.src(value))

    graph = rgnn.Graph(small.edge_index, small.edge_type, num_nodes=NODES + 2)
    score = torch.full((NODES + 2,), 1e4)
    y, by_score, by_value = results(by_destination, graph, score, torch.ones(NODES + 2, 2))
    assert y.isfinite().all() and by_value.isfinite().all() and not y[NODES:].any()
    assert by_score.abs().max() < 1e-6 and not by_score[NODES:].any()


def test_infinite_scores_are_as_in_torch(backend):
    graph = rgnn.Graph(torch.tensor([[0, 1, 2, 0, 1], [0, 0, 0, 1, 1]]), num_nodes=3)
    inf = torch.inf
    score = torch.tensor([1.0, -inf, 2.0, -inf, -inf])
    y = attend(graph, score, torch.eye(3))
    want = torch.zeros(3, 3)
    want[0], want[1] = score[:3].softmax(0), torch.full((3,), torch.nan)
    torch.testing.assert_close(y[0], want[0])
    assert y[1, :2].isnan().all() and not y[2].any()


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # of NumPy, in Triton's interpreter
def test_a_score_that_is_no_number_spoils_its_whole_destination(backend):
    """However many edges there are: a C++ kernel takes them in blocks."""

    @rgnn.layer
    def weights(g, score):
        return rgnn.edge_softmax(g.edge(score))

    source = torch.arange(40)
    graph = rgnn.Graph(torch.stack([source, (source >= 32).long()]), num_nodes=40)
    for spoilt in (0, 17, 31, slice(0, 16), slice(16, 32), slice(0, 32)):
        score = torch.ones(40)
        score[spoilt] = torch.nan
        y = weights(graph, score)
        assert y[:32].isnan().all() and torch.equal(y[32:], torch.full((8,), 1 / 8))


@rgnn.layer
def attend_by_products(g, key, query, value, key_weight, query_weight):
    return g.sum(rgnn.edge_softmax(rgnn.dot(g.src(key), g.dst(query))) * g.src(value))


@rgnn.layer
def attend_by_sums(g, key, query, value, key_weight, query_weight):
    score = rgnn.dot(g.src(key), key_weight[g.etype]) + rgnn.dot(
        g.dst(query), query_weight[g.etype]
    )
    return g.sum(rgnn.edge_softmax(rgnn.leaky_relu(score, 0.2)) * g.src(value))


@pytest.mark.parametrize("backend", ["cpp", "triton"], indirect=True)
@pytest.mark.parametrize("offset", [6.0, 1e4])
@pytest.mark.parametrize("layer", [attend_by_products, attend_by_sums], ids=lambda f: f.name)
def test_backward_has_the_weights_of_forward_in_bfloat16(backend, layer, offset, monkeypatch):
    """Rounded to bfloat16, a largest score of 1e4 puts the weights of backward off by e^32."""
    draw = torch.Generator().manual_seed(3)
    index = torch.randint(0, NODES, (2, 4000), generator=draw)
    graph = rgnn.Graph(index, torch.arange(4000) % 4, num_nodes=NODES)
    shapes = [(NODES, HEADS, 4)] * 2 + [(NODES, HEADS, 2)] + [(4, HEADS, 4)] * 2
    args = [torch.randn(shape, generator=draw).bfloat16() for shape in shapes]
    for position, last in ((0, offset), (1, float(layer is attend_by_products)), (3, 1), (4, 0)):
        # One more element adds the same number to the scores of all edges, or nothing.
        column = torch.full_like(args[position][..., :1], last)
        args[position] = torch.cat([args[position], column], -1)
    got = _results(layer, graph, args)
    monkeypatch.setenv("DATAEFF_RGNN_BACKEND", "reference")
    want = _results(layer, graph, [t.double() for t in args])
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.bfloat16
        # Not the last element's gradient: terms that cancel are left of it.
        a, b = a[..., :4].double(), b[..., :4]
        assert (a - b).norm() < 0.03 * b.norm().clamp(min=1)


@rgnn.layer
def attend_and_multiply(g, key, query, value, weight):
    score = rgnn.dot(g.src(key), g.dst(query))
    return g.sum(rgnn.edge_softmax(score) * g.src(value)), g.sum(rgnn.linear(score, weight))


@pytest.mark.parametrize("backend", ["cpp", "triton"], indirect=True)
def test_products_may_read_scores_in_half_precision(backend, small, monkeypatch):
    shapes = [(NODES, HEADS, 4)] * 2 + [(NODES, HEADS, 2), (HEADS, 16)]
    args = [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]
    found = attend_and_multiply(small, *args)
    got = torch.autograd.grad(sum(y.sum() for y in found), args)
    monkeypatch.setenv("DATAEFF_RGNN_BACKEND", "reference")
    wide = [t.detach().double().requires_grad_() for t in args]
    want = torch.autograd.grad(sum(y.sum() for y in attend_and_multiply(small, *wide)), wide)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.bfloat16 and (a.double() - b).norm() < 0.03 * b.norm()


def _results(layer, graph, args):
    args = [t.clone().requires_grad_() for t in args]
    y = layer(graph, *args)
    given = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    found = torch.autograd.grad(y, args, given, allow_unused=True)
    return [y, *(gradient for gradient in found if gradient is not None)]
