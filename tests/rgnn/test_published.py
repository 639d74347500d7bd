"""The published layers: short, and equal to their formulas."""

import inspect

import pytest
import torch

from dataeff import rgnn
from dataeff.rgnn.published import PUBLISHED, hgt

NODES, TYPES, RELATIONS, IN, HEADS, DIM = 20, 3, 4, 5, 2, 3


@pytest.fixture
def typed(small):
    types = torch.arange(NODES) % TYPES
    return rgnn.Graph(small.edge_index, small.edge_type, num_nodes=NODES, node_type=types)


def arguments(name):
    shapes = PUBLISHED[name].shapes(NODES, TYPES, RELATIONS, IN, HEADS, DIM)
    return {k: torch.randn(*s, dtype=torch.float64, requires_grad=True) for k, s in shapes.items()}


def hgt_dense(graph, x, K, Q, V, A, M, P):
    types, (src, dst), etype = graph.node_type, graph.edge_index, graph.edge_type
    k, q, v = (torch.einsum("ni,nihd->nhd", x, w[types]) for w in (K, Q, V))
    key = torch.einsum("ehd,ehdf->ehf", k[src], A[etype])
    message = torch.einsum("ehd,ehdf->ehf", v[src], M[etype])
    score, h = (key * q[dst]).sum(-1), torch.zeros_like(q)
    for node in range(NODES):
        mine = dst == node
        alpha = torch.softmax(score[mine], 0)
        h[node] = (alpha[:, :, None] * message[mine]).sum(0)
    h = torch.nn.functional.gelu(h).flatten(1)
    return torch.einsum("ni,nio->no", h, P[types])


def test_hgt_equals_its_formula(typed):
    args = arguments("hgt")
    ours, theirs = hgt(typed, **args), hgt_dense(typed, **args)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    got = torch.autograd.grad(ours.sin().sum(), args.values())
    want = torch.autograd.grad(theirs.sin().sum(), args.values())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", PUBLISHED)
def test_gradcheck(name, typed):
    args = arguments(name)
    layer = PUBLISHED[name].layer
    call = lambda *a: layer(typed, **dict(zip(args, a, strict=True)))  # noqa: E731
    assert torch.autograd.gradcheck(call, tuple(args.values()))


def test_the_three_layers_take_no_more_lines_than_hectors():
    functions = [published.layer.function for published in PUBLISHED.values()]
    lines = "\n".join(inspect.getsource(f) for f in functions).splitlines()
    assert len([line for line in lines if line.strip()]) <= 51
