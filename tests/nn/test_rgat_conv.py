import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nn_graphs import compare, many_relations, relational

from dataeff import nn, rgnn
from dataeff.nn.rgat_conv import MECHANISMS, MODES, MODS

pyg = pytest.importorskip("torch_geometric.nn")

OPTIONS = [
    {},
    {"heads": 3},
    {"heads": 2, "concat": False, "bias": False},
    {"num_bases": 2},
    {"num_blocks": 2, "heads": 2},
    {"attention_mechanism": "within-relation", "heads": 2},
    {"attention_mode": "multiplicative-self-attention", "heads": 2, "dim": 3},
    {"attention_mode": "multiplicative-self-attention", "dim": 2, "concat": False},
    {"mod": "additive", "heads": 2},
    {"mod": "scaled"},
    {"mod": "f-additive"},
    {"mod": "f-scaled", "heads": 2},
    {"edge_dim": 3, "heads": 2},
    {"edge_dim": 3, "attention_mode": "multiplicative-self-attention"},
]


def layers(dtype, *args, **kwargs):
    theirs = pyg.RGATConv(*args, **kwargs).to(dtype)
    ours = nn.RGATConv(*args, **kwargs).to(dtype)
    with torch.no_grad():
        for p in theirs.parameters():
            torch.manual_seed(p.numel())
            p.copy_(torch.randn(p.shape) * 0.5)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.fixture
def edges():
    torch.manual_seed(0)
    index = torch.randint(0, 25, (2, 90))
    index[1] //= 2
    return index, torch.randint(0, 4, (90,))


def test_results_without_bias_may_be_written_to(edges):
    pair = layers(torch.float64, 6, 4, 5, heads=2, bias=False)
    base, found = torch.randn(25, 6, dtype=torch.float64), []
    for conv in pair:
        x = base.clone().requires_grad_()
        out = conv(x, *edges).mul_(3.0).relu_()
        used = [x, *(p for _, p in sorted(conv.named_parameters()))]
        grads = torch.autograd.grad(
            out.square().sum(), used, allow_unused=True, materialize_grads=True
        )
        found.append((out, grads))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_pyg(options, edges):
    index, etype = edges
    ours, theirs = layers(torch.float64, 6, 4, 5, **options)
    attr = torch.randn(90, 3, dtype=torch.float64) if "edge_dim" in options else None
    base = torch.randn(25, 6, dtype=torch.float64)
    xs = [base.clone().requires_grad_() for _ in range(2)]
    a = ours(xs[0], index, etype, edge_attr=attr)
    b = theirs(xs[1], index, etype, edge_attr=attr)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(b)
    for out in (a, b):
        (out * weight).sum().backward()
    torch.testing.assert_close(xs[0].grad, xs[1].grad, rtol=1e-9, atol=1e-9)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if q.grad is None:
            assert p.grad is None or not p.grad.any(), name
        else:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9, msg=name)


def check(case, dtype, tolerance, x_dst=None, **options):
    """Results and gradients on a graph of `nn_graphs`."""
    index, etype, nodes, relations = case
    ours, theirs = layers(dtype, 6, 4, relations, **options)
    torch.manual_seed(1)
    # Products of two scores grow with the fourth power of x: large ones are ill-conditioned.
    rows = [torch.randn(nodes, 6, dtype=dtype).mul(0.5).requires_grad_()]
    if x_dst:
        rows.append(torch.randn(x_dst, 6, dtype=dtype, requires_grad=True))
    x = tuple(rows) if x_dst else rows[0]
    attr = torch.randn(etype.numel(), 3, dtype=dtype) if "edge_dim" in options else None
    names = dict(theirs.named_parameters())
    tensors = [("x", r, r) for r in rows] + [(n, p, names[n]) for n, p in ours.named_parameters()]
    run = lambda m: lambda: m(x, index, etype, edge_attr=attr)  # noqa: E731
    compare(run(ours), run(theirs), tensors, tolerance)


@given(
    relational(),
    st.sampled_from(MODES),
    st.sampled_from(MECHANISMS),
    st.sampled_from([None, *MODS]),
    st.sampled_from([{}, {"heads": 2}, {"num_blocks": 2, "heads": 2}, {"edge_dim": 3}]),
)
@settings(max_examples=8, deadline=None)
def test_equals_pyg_on_any_graph(case, mode, mechanism, mod, options):
    check(
        case, torch.float64, 1e-10,
        attention_mode=mode, attention_mechanism=mechanism, mod=mod, **options,
    )  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_equals_pyg_with_many_relations_in_float32(mode):
    check(many_relations(), torch.float32, 1e-5, attention_mode=mode, heads=2)


@pytest.mark.parametrize("aggr", ["mean", "max"])
def test_other_aggregations(aggr, edges):
    check((*edges, 25, 4), torch.float64, 1e-10, aggr=aggr, heads=2)


def test_pair_of_sources_and_destinations(edges):
    check((*edges, 25, 4), torch.float64, 1e-10, x_dst=13, heads=2)


def test_attention_is_returned_in_the_order_of_the_edges(edges):
    index, etype = edges
    ours, theirs = layers(torch.float64, 6, 4, 5, heads=2)
    x = torch.randn(25, 6, dtype=torch.float64)
    a, (edge_index, alpha) = ours(x, index, etype, return_attention_weights=True)
    b, (_, expected) = theirs(x, index, etype, return_attention_weights=True)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(alpha, expected)
    assert edge_index is index


@pytest.mark.parametrize("layout", ["coo", "csr", "csc"])
def test_sparse_adjacency(layout, edges):
    index = torch.unique(edges[0], dim=1)
    values = torch.ones(index.shape[1], dtype=torch.float64)
    with torch.sparse.check_sparse_tensor_invariants():  # torch 2.11 warns unless it is told
        adjacency = torch.sparse_coo_tensor(index.flip(0), values, (25, 25)).coalesce()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # compressed layouts are "in beta state"
        if layout != "coo":
            adjacency = adjacency.to_sparse(layout=getattr(torch, f"sparse_{layout}"))
    etype = torch.arange(index.shape[1]) % 4
    x = torch.randn(25, 6, dtype=torch.float64)
    ours, theirs = layers(torch.float64, 6, 4, 5, heads=2)
    given, attention = ours(x, adjacency, etype, return_attention_weights=True)
    # torch.unique sorts by source, as CSC does, which PyG refuses
    edges = index if layout == "csc" else adjacency
    want, (_, expected) = theirs(x, edges, etype, return_attention_weights=True)
    torch.testing.assert_close(given, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(attention[1], expected, rtol=1e-10, atol=1e-10)
    assert attention[0] is adjacency


def test_dropout_drops_attention_in_training_only(edges):
    index, etype = edges
    conv = nn.RGATConv(6, 4, 5, dropout=0.5)
    x = torch.randn(25, 6)
    assert not torch.equal(conv(x, index, etype), conv(x, index, etype))
    conv.eval()
    assert torch.equal(conv(x, index, etype), conv(x, index, etype))


def test_one_graph_in_training_and_no_warning(edges):
    index, etype = edges
    graph = rgnn.Graph(index, etype, num_nodes=25)
    conv = nn.RGATConv(6, 4, 5, heads=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(conv(torch.ones(25, 6), graph), conv(torch.ones(25, 6), index, etype))


def test_refusals(edges):
    with pytest.raises(ValueError, match="additive attention"):
        nn.RGATConv(4, 4, 2, dim=2)
    with pytest.raises(ValueError, match=r"attention_mode must be one of .*, got 'dot'"):
        nn.RGATConv(4, 4, 2, attention_mode="dot")
    with pytest.raises(ValueError, match=r"attention_mechanism must be one of .*, got 'all'"):
        nn.RGATConv(4, 4, 2, attention_mechanism="all")
    with pytest.raises(ValueError, match="dropout"):
        nn.RGATConv(4, 4, 2, dropout=0.1, mod="scaled")
    conv = nn.RGATConv(6, 4, 5)
    with pytest.raises(ValueError, match=r"size is \(25, 24\)"):
        conv(torch.randn(25, 6), *edges, size=(25, 24))
    with pytest.raises(ValueError, match="aggr"):
        nn.RGATConv(4, 4, 2, aggr="median")
    with pytest.raises(NotImplementedError, match="flow"):
        nn.RGATConv(4, 4, 2, flow="target_to_source")
    with pytest.raises(ValueError, match="edge_dim"):
        conv(torch.randn(25, 6), *edges, edge_attr=torch.randn(90, 3))
