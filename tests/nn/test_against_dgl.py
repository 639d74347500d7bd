"""Layers against DGL's on CPU, where DGL is installed: results and every gradient."""

import importlib
import sys
from types import ModuleType

import pytest
import torch

from dataeff import nn, rgnn
from dataeff.nn.hgt_conv import hgt

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
PRECISIONS = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str
)


@pytest.fixture
def dgl(monkeypatch):
    # DGL's GraphBolt needs its binary for exactly this torch, and nothing here uses it.
    if "dgl" not in sys.modules:
        monkeypatch.setitem(sys.modules, "dgl.graphbolt", ModuleType("dgl.graphbolt"))
    try:
        return importlib.import_module("dgl")
    except (ImportError, OSError, AttributeError) as error:
        pytest.skip(f"DGL cannot be imported: {error}")


@pytest.fixture
def edges():
    g = torch.Generator().manual_seed(0)
    index = torch.randint(0, 30, (2, 200), generator=g)
    index[1, :60] = 3  # a hub; nodes from 20 on stay isolated
    return index.remainder(20), torch.randint(0, 5, (200,), generator=g)


def equal(ours, theirs, tensors, tolerance):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    weight = torch.randn_like(ours)
    names, left, right = zip(*tensors, strict=True)
    got = torch.autograd.grad((ours * weight).sum(), left)
    want = torch.autograd.grad((theirs * weight).sum(), right)
    for name, a, b in zip(names, got, want, strict=True):
        scale = max(float(b.abs().max()), 1.0)
        torch.testing.assert_close(
            a, b.view_as(a), rtol=tolerance, atol=scale * tolerance, msg=name
        )


@PRECISIONS
def test_rgcn_equals_relgraphconv(dgl, edges, dtype, tolerance):
    index, etype = edges
    torch.manual_seed(0)
    ours = nn.RGCNConv(6, 5, 5).to(dtype)
    theirs = dgl.nn.pytorch.RelGraphConv(6, 5, 5).to(dtype)
    pairs = [("linear_r.W", "weight"), ("loop_weight", "root"), ("h_bias", "bias")]
    theirs.load_state_dict({name: ours.state_dict()[mine] for name, mine in pairs})
    counts = torch.zeros(30, 5, dtype=dtype).index_put_(
        (index[1], etype), torch.ones(200, dtype=dtype), accumulate=True
    )
    norm = 1 / counts[index[1], etype][:, None]
    graph = dgl.graph(tuple(index), num_nodes=30)
    xs = [torch.randn(30, 6, dtype=dtype).requires_grad_() for _ in range(2)]
    xs[1].data.copy_(xs[0])
    own, their = dict(ours.named_parameters()), dict(theirs.named_parameters())
    tensors = [("x", *xs), *((mine, own[mine], their[name]) for name, mine in pairs)]
    equal(ours(xs[0], index, etype), theirs(graph, xs[1], etype, norm), tensors, tolerance)


@PRECISIONS
@pytest.mark.parametrize("heads", [1, 3])
def test_rgat_equals_typed_linear_and_edge_softmax(dgl, edges, dtype, tolerance, heads):
    """DGL has no RGAT; its operators make one."""
    index, etype = edges
    torch.manual_seed(0)
    ours = nn.RGATConv(6, 4, 5, heads=heads, bias=False).to(dtype)
    typed = dgl.nn.pytorch.TypedLinear(6, heads * 4, 5).to(dtype)
    typed.load_state_dict({"W": ours.weight.detach()})
    graph = dgl.graph(tuple(index), num_nodes=30)
    x = torch.randn(30, 6, dtype=dtype)
    mine, its, q, k = (v.detach().clone().requires_grad_() for v in (x, x, ours.q, ours.k))
    z_src, z_dst = (typed(its[ends], etype) for ends in index)
    score = torch.nn.functional.leaky_relu(z_dst @ q + z_src @ k, 0.2)
    alpha = dgl.ops.edge_softmax(graph, score)
    theirs = dgl.ops.copy_e_sum(graph, alpha[:, :, None] * z_src.unflatten(1, (heads, -1)))
    tensors = [("x", mine, its), ("weight", ours.weight, typed.W), ("q", ours.q, q)]
    equal(ours(mine, index, etype), theirs.flatten(1), [*tensors, ("k", ours.k, k)], tolerance)


@PRECISIONS
@pytest.mark.parametrize("heads", [1, 3])
def test_hgt_equals_hgtconv(dgl, dtype, tolerance, heads):
    """Attention and messages; the projections that follow change nothing, gelu comes by hand."""
    counts = {"a": 11, "b": 14}
    kinds = [("a", "to", "b"), ("b", "to", "a"), ("b", "likes", "b"), ("a", "skips", "a")]
    torch.manual_seed(0)
    num_edges = {kind: 0 if kind[1] == "skips" else 40 for kind in kinds}
    graph = rgnn.Graph.from_typed(
        {
            kind: torch.stack([torch.randint(counts[end], (many,)) for end in kind[::2]])
            for kind, many in num_edges.items()
        },
        counts,
    )
    layer = dgl.nn.pytorch.HGTConv(6, 4, heads, 2, len(kinds), dropout=0.0).to(dtype)
    with torch.no_grad():
        layer.linear_a.W.copy_(torch.eye(heads * 4))
        layer.skip.fill_(float("inf"))  # sigmoid of it: all of the result, nothing of the input
        for prior in layer.relation_pri:
            prior.uniform_(0.5, 1.5)
    x = torch.randn(25, 6, dtype=dtype).requires_grad_()
    ntype = torch.arange(2).repeat_interleave(torch.tensor(list(counts.values())))
    plain = dgl.graph(tuple(graph.edge_index), num_nodes=25)
    theirs = torch.nn.functional.gelu(layer(plain, x, ntype, graph.edge_type))

    none = x.new_zeros(2, heads, 4)
    linears = (layer.linear_k, layer.linear_q, layer.linear_v)
    kqv = [part for lin in linears for part in (lin.W.unflatten(2, (heads, 4)), none)]
    attend, message = (
        torch.stack([lin.W for lin in relation], 1)
        for relation in (layer.relation_att, layer.relation_msg)
    )
    prior = torch.stack(list(layer.relation_pri), 1) / 2  # the root of the head's width
    eye, bias = layer.linear_a.W.detach(), x.new_zeros(2, heads * 4)
    ours = hgt(graph, x, *kqv, attend, message, prior, eye, bias)
    others = ("linear_a", "skip", "residual_w")
    tensors = [("x", x, x)]
    tensors += [(n, p, p) for n, p in layer.named_parameters() if not n.startswith(others)]
    equal(ours, theirs, tensors, tolerance)
