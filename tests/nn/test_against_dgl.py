"""Layers against DGL's on CPU, where DGL is installed: results and every gradient."""

import importlib
import sys
from types import ModuleType

import pytest
import torch

from dataeff import nn


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


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str
)
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
