import warnings

import pytest
import torch

from dataeff import nn, rgnn

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


def test_equals_pyg_in_float32(edges):
    index, etype = edges
    ours, theirs = layers(torch.float32, 16, 16, 5, heads=2)
    x = torch.randn(25, 16)
    torch.testing.assert_close(ours(x, index, etype), theirs(x, index, etype), rtol=1e-5, atol=1e-4)


def test_attention_is_returned_in_the_order_of_the_edges(edges):
    index, etype = edges
    ours, theirs = layers(torch.float64, 6, 4, 5, heads=2)
    x = torch.randn(25, 6, dtype=torch.float64)
    a, (edge_index, alpha) = ours(x, index, etype, return_attention_weights=True)
    b, (_, expected) = theirs(x, index, etype, return_attention_weights=True)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(alpha, expected)
    assert edge_index is index


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
    with pytest.raises(ValueError, match="attention_mode"):
        nn.RGATConv(4, 4, 2, attention_mode="dot")
    with pytest.raises(ValueError, match="dropout"):
        nn.RGATConv(4, 4, 2, dropout=0.1, mod="scaled")
    conv = nn.RGATConv(6, 4, 5)
    with pytest.raises(NotImplementedError, match="size"):
        conv(torch.randn(25, 6), *edges, size=(25, 25))
    with pytest.raises(ValueError, match="edge_dim"):
        conv(torch.randn(25, 6), *edges, edge_attr=torch.randn(90, 3))
