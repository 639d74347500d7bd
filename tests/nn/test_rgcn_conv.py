import gc
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nn_graphs import compare as compare_tensors
from nn_graphs import many_relations, relational

from dataeff import nn, rgnn
from dataeff.nn import graphs
from dataeff.rgnn import indexed

pyg = pytest.importorskip("torch_geometric.nn")


def edges(nodes, relations, count, seed=0):
    g = torch.Generator().manual_seed(seed)
    index = torch.randint(0, nodes, (2, count), generator=g)
    index[1] //= 2  # the upper half has no incoming edge
    return index, torch.randint(0, max(relations - 1, 1), (count,), generator=g)


def pair(cls, dtype, *args, **kwargs):
    theirs = getattr(pyg, cls)(*args, **kwargs).to(dtype)
    ours = getattr(nn, cls)(*args, **kwargs).to(dtype)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def compare(ours, theirs, x, call, tolerance):
    """Forward, and every gradient."""
    xs = [x.clone().requires_grad_() if x.is_floating_point() else x for _ in range(2)]
    a, b = call(ours, xs[0]), call(theirs, xs[1])
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    weight = torch.randn_like(b)
    for out in (a, b):
        (out * weight).sum().backward()
    if x.is_floating_point():
        torch.testing.assert_close(xs[0].grad, xs[1].grad, rtol=tolerance, atol=10 * tolerance)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if q.grad is None:
            assert p.grad is None or not p.grad.any(), name
        else:
            torch.testing.assert_close(p.grad, q.grad, rtol=tolerance, atol=10 * tolerance)


OPTIONS = [
    {"aggr": "add"},
    {"aggr": "mean"},
    {"aggr": "max"},
    {"num_bases": 2},
    {"num_blocks": 2},
    {"num_blocks": 2, "aggr": "max"},
    {"root_weight": False, "bias": False, "aggr": "sum"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_pyg(options):
    index, etype = edges(30, 5, 120)
    ours, theirs = pair("RGCNConv", torch.float64, 6, 10, 5, **options)
    call = lambda m, x: m(x, index, etype)  # noqa: E731
    compare(ours, theirs, torch.randn(30, 6, dtype=torch.float64), call, 1e-10)


def check(case, dtype, tolerance, **options):
    """Results and gradients on a graph of `nn_graphs`."""
    index, etype, nodes, relations = case
    ours, theirs = pair("RGCNConv", dtype, 6, 4, relations, **options)
    x = torch.randn(nodes, 6, dtype=dtype, requires_grad=True)
    names = dict(theirs.named_parameters())
    tensors = [("x", x, x), *((n, p, names[n]) for n, p in ours.named_parameters())]
    run = lambda m: lambda: m(x, index, etype)  # noqa: E731
    compare_tensors(run(ours), run(theirs), tensors, tolerance)


@given(relational(), st.sampled_from(OPTIONS))
@settings(max_examples=12, deadline=None)
def test_equals_pyg_on_any_graph(case, options):
    check(case, torch.float64, 1e-10, **options)


@pytest.mark.parametrize("aggr", ["mean", "add", "max"])
def test_equals_pyg_with_many_relations_in_float32(aggr):
    check(many_relations(), torch.float32, 1e-5, aggr=aggr)


@pytest.mark.parametrize("aggr", ["mean", "add", "max"])
def test_edge_weights_scale_the_features_of_the_source(aggr):
    index, etype = edges(30, 5, 120)
    conv = nn.RGCNConv(6, 4, 5, aggr=aggr).double()
    x = torch.randn(30, 6, dtype=torch.float64)
    weight = torch.rand(120, dtype=torch.float64, requires_grad=True)
    # Each edge as an edge from a node of its own, which holds the scaled features.
    own = torch.stack([torch.arange(120), index[1]])
    want = conv((x[index[0]] * weight[:, None], x), own, etype)
    got = conv(x, index, etype, weight)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    grads = [torch.autograd.grad(y.square().sum(), weight)[0] for y in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


def test_equals_pyg_in_float32():
    index, etype = edges(30, 5, 120)
    ours, theirs = pair("RGCNConv", torch.float32, 16, 16, 5)
    compare(ours, theirs, torch.randn(30, 16), lambda m, x: m(x, index, etype), 1e-5)


def test_mean_is_per_relation():
    """Not over all relations together, as PyG's pyg-lib path has it."""
    conv = nn.RGCNConv(1, 1, 2, root_weight=False, bias=False)
    torch.nn.init.ones_(conv.weight)
    index = torch.tensor([[0, 1, 2], [0, 0, 0]])
    out = conv(torch.tensor([[2.0], [4.0], [7.0]]), index, torch.tensor([0, 0, 1]))
    assert out[0].item() == pytest.approx(3 + 7)


@pytest.mark.parametrize("options", [{}, {"num_bases": 2}, {"aggr": "add"}], ids=str)
def test_node_ids_as_features(options):
    index, etype = edges(12, 3, 40)
    ours, theirs = pair("RGCNConv", torch.float32, 12, 5, 3, **options)
    compare(ours, theirs, torch.randperm(12), lambda m, x: m(x, index, etype), 1e-5)
    torch.testing.assert_close(ours(None, index, etype), theirs(None, index, etype))


def test_node_ids_out_of_range_are_named():
    """A wrong one must not become a row of another relation's weight."""
    index, etype = edges(12, 3, 40)
    conv = nn.RGCNConv(12, 5, 3)
    for wrong in (12, -1):
        ids = torch.arange(12)
        ids[4] = wrong
        with pytest.raises(IndexError, match=f"node id {wrong} at row 4 of x is out of range"):
            conv(ids, index, etype)
    both = nn.RGCNConv((12, 11), 5, 3)
    with pytest.raises(IndexError, match="node id 11 at row 11 of x of the destinations"):
        both((torch.arange(12), torch.arange(12)), index, etype)


@pytest.mark.parametrize("kind", ["none", "counted", "inference"])
@pytest.mark.parametrize("prepared", [False, True])
@torch.no_grad()
def test_the_graph_of_node_ids_is_made_once(kind, prepared):
    """For every layer of such sizes, until the ids are written to."""
    with torch.inference_mode(kind == "inference"):
        ids = None if kind == "none" else torch.arange(12)
    given = index, etype = edges(12, 3, 40)
    if prepared:
        given = (rgnn.Graph(*given, num_nodes=12, num_relations=3),)
    pairs = [pair("RGCNConv", torch.float32, 12, 5, 3, aggr=aggr) for aggr in ("mean", "add")]
    with mock.patch.object(indexed, "Structure", side_effect=indexed.Structure) as built:
        for _ in range(2):
            for ours, theirs in pairs:
                torch.testing.assert_close(ours(ids, *given), theirs(ids, index, etype))
        assert built.call_count == 1
        if ids is not None:
            with torch.inference_mode(kind == "inference"):
                ids.copy_(ids.flip(0))
            ours, theirs = pairs[0]
            torch.testing.assert_close(ours(ids, *given), theirs(ids, index, etype))
            assert built.call_count == 2
            with torch.inference_mode(kind == "inference"):
                ids[3] = 12
            with pytest.raises(IndexError, match="node id 12 at row 3 of x is out of range"):
                ours(ids, *given)


def test_graphs_of_node_ids_go_with_the_edges_and_with_the_ids():
    conv = nn.RGCNConv(12, 5, 3)
    index, etype = edges(12, 3, 40)
    graphs._tables.clear()
    ids = torch.arange(12)
    with torch.no_grad():  # autograd keeps the ids
        conv(ids, index, etype)
    assert len(graphs._tables) == 1
    del ids
    assert not graphs._tables
    given = [rgnn.Graph(index, etype, num_nodes=12, num_relations=3) for _ in range(12)]
    for graph in given:
        y = conv(None, graph)
    assert len(graphs._tables) == graphs._KEPT
    del graph
    given.clear()
    gc.collect()
    assert not graphs._tables
    y.sum().backward()


def test_ids_of_a_graph_that_nobody_has_checked_are_named_before_they_look_up_others():
    index, etype = edges(12, 3, 40)
    index[0, 7] = 12
    graph = rgnn.Graph(index, etype, num_nodes=12, num_relations=3, validate=False)
    for ids in (None, torch.arange(12)):
        with pytest.raises(IndexError, match="source node 12 at edge 7"):
            nn.RGCNConv(12, 5, 3)(ids, graph)


def test_more_nodes_than_destinations_have_ids_are_named():
    index, etype = edges(12, 3, 40)
    for ids in (None, torch.arange(12)):
        with pytest.raises(IndexError, match=r"node id (7|11) at row \1 of x is out of range"):
            nn.RGCNConv((12, 7), 5, 3)(ids, index, etype)


def test_embeddings_of_sources_beside_features_of_destinations():
    """PyG's layer fails at such a pair; the formula is the same."""
    index, etype = torch.tensor([[8, 2, 8], [0, 1, 1]]), torch.tensor([0, 1, 1])
    conv = nn.RGCNConv((9, 7), 5, 2, aggr="add")
    own = torch.randn(2, 7)
    messages = torch.stack([conv.weight[0, 8], conv.weight[1, 2] + conv.weight[1, 8]])
    want = messages + own @ conv.root + conv.bias
    torch.testing.assert_close(conv((None, own), index, etype), want)


def test_pair_of_sources_and_destinations():
    src = torch.randint(0, 9, (30,))
    dst = torch.randint(0, 4, (30,))
    index, etype = torch.stack([src, dst]), torch.randint(0, 3, (30,))
    ours, theirs = pair("RGCNConv", torch.float64, (6, 7), 5, 3)
    right = torch.randn(4, 7, dtype=torch.float64)
    call = lambda m, x: m((x, right), index, etype)  # noqa: E731
    compare(ours, theirs, torch.randn(9, 6, dtype=torch.float64), call, 1e-10)


def test_half_precision_keeps_its_dtype():
    index, etype = edges(30, 5, 120)
    conv = nn.RGCNConv(16, 16, 5)
    x = torch.randn(30, 16)
    exact = conv(x, index, etype)
    half = conv.bfloat16()(x.bfloat16(), index, etype)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, rtol=0.05, atol=0.05)


def test_graph_instead_of_edges_and_reuse_of_structures():
    from dataeff.nn.graphs import graph_for

    index, etype = edges(30, 5, 120)
    conv = nn.RGCNConv(6, 4, 5)
    x = torch.randn(30, 6)
    graph = rgnn.Graph(index, etype, num_nodes=30)
    assert torch.equal(conv(x, graph), conv(x, index, etype))
    first = graph_for(index, etype, 30, 30, 5)
    assert graph_for(index, etype, 30, 30, 5) is first
    etype[0] = 4  # changed in place: the old structures no longer hold
    assert graph_for(index, etype, 30, 30, 5) is not first


def test_edges_of_inference_mode_may_be_written_to():
    """Such tensors count no writes: what was built of them is not taken for what they hold."""
    from dataeff.nn.graphs import graph_for

    with torch.inference_mode():
        (index, etype), (other, _) = edges(30, 5, 120), edges(30, 5, 120, seed=1)
        first = graph_for(index, etype, 30, 30, 5)
        assert graph_for(index, etype, 30, 30, 5) is first
        index.copy_(other)
        second = graph_for(index, etype, 30, 30, 5)
        assert second is not first and graph_for(index, etype, 30, 30, 5) is second
        etype.add_(1).remainder_(5)
        assert graph_for(index, etype, 30, 30, 5) is not second


@pytest.mark.parametrize("typed", [False, True])
def test_the_graph_of_edges_that_are_gone_is_let_go(typed):
    index, etype = edges(30, 5, 120)
    conv = nn.HGTConv(6, 6, (["n"], [("n", "to", "n")])) if typed else nn.RGCNConv(6, 4, 5)
    x = torch.randn(30, 6).requires_grad_()
    graphs._graphs.clear()
    ids = index.clone(), etype.clone()
    y = conv({"n": x}, {("n", "to", "n"): ids[0]})["n"] if typed else conv(x, *ids)
    assert len(graphs._graphs) == 1
    del ids
    assert not graphs._graphs
    y.sum().backward()  # which kept what it needs
    assert x.grad.abs().sum() > 0


def test_refusals():
    with pytest.raises(ValueError, match="exclude"):
        nn.RGCNConv(4, 4, 2, num_bases=2, num_blocks=2)
    with pytest.raises(ValueError, match="do not divide"):
        nn.RGCNConv(5, 4, 2, num_blocks=2)
    with pytest.raises(ValueError, match="aggr"):
        nn.RGCNConv(4, 4, 2, aggr="median")
    with pytest.raises(NotImplementedError, match="flow"):
        nn.RGCNConv(4, 4, 2, flow="target_to_source")
    conv = nn.RGCNConv(4, 4, 2)
    with pytest.raises(IndexError, match="relation 2"):
        conv(torch.randn(3, 4), torch.tensor([[0], [1]]), torch.tensor([2]))
    with pytest.raises(TypeError, match="edge_type"):
        conv(torch.randn(3, 4), torch.tensor([[0], [1]]))
