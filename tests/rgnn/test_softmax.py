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
def attend_by_products(g, query, key, value):
    score = rgnn.dot(g.src(key), g.dst(query))
    return g.sum(rgnn.edge_softmax(score) * g.src(value))


@pytest.mark.parametrize("backend", ["cpp", "triton"], indirect=True)
@pytest.mark.parametrize("off", [(), ("fuse",)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("products", [False, True])
def test_backward_has_the_weights_of_forward_in_half_precision(
    backend, products, dtype, off, small, monkeypatch
):
    """A largest score of 200 that is rounded puts all weights of its destination off by 60 %."""
    value = torch.randn(NODES, 2)
    if products:
        near = [(5 + torch.randn(NODES, 8) / 16).to(dtype) for _ in range(2)]
        layer, args = attend_by_products, [*near, value.to(dtype)]
    else:
        layer, args = attend, [(200 + 4 * torch.randn(EDGES)).to(dtype), value.to(dtype)]
    y, *got = _results(layer, small, args, off)
    monkeypatch.setenv("DATAEFF_RGNN_BACKEND", "reference")
    z, *want = _results(layer, small, [t.double() for t in args], off)
    # Not the query's gradient: terms that cancel are left of it, and half precision rounds them.
    first = 1 if products else 0
    for a, b in zip([y, *got[first:]], [z, *want[first:]], strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() < 0.03 * b.norm()


def _results(layer, graph, args, off):
    args = [t.clone().requires_grad_() for t in args]
    with disabled_passes(*off):
        y = layer(graph, *args)
        given = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
        return [y, *torch.autograd.grad(y, args, given)]
