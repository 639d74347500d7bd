import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nn_graphs import compare, many_relations, relational

from dataeff import nn


def correlation(x, z):
    """The paper's way, by Fourier transforms."""
    return torch.fft.irfft(torch.fft.rfft(x).conj() * torch.fft.rfft(z), n=x.shape[-1])


COMPOSE = {"sub": torch.sub, "mult": torch.mul, "corr": correlation}


def plain(conv, x, relation, index, etype, edge_weight=None):
    """Section 4 of the paper, edge by edge."""
    compose = COMPOSE[conv.composition]
    out = compose(x, conv.loop.expand_as(x)) @ conv.loop_weight
    out_degree = torch.bincount(index[0], minlength=x.shape[0])
    in_degree = torch.bincount(index[1], minlength=x.shape[0])
    for e, ((u, v), r) in enumerate(zip(index.t().tolist(), etype.tolist(), strict=True)):
        inverse = int(r >= conv.num_relations)
        message = compose(x[u], relation[r]) @ conv.weight[inverse]
        if conv.norm:
            message = message / (out_degree[u] * in_degree[v]).to(x.dtype).sqrt()
        if edge_weight is not None:
            message = message * edge_weight[e]
        out = out.index_add(0, torch.tensor([v]), message[None])
    return (out if conv.bias is None else out + conv.bias), relation @ conv.rel_weight


def check(case, dtype, tolerance, weighted=False, **options):
    index, etype, nodes, relations = case
    torch.manual_seed(0)
    conv = nn.CompGCNConv(6, 4, (relations + 1) // 2, **options).to(dtype)
    x = torch.randn(nodes, 6, dtype=dtype, requires_grad=True)
    relation = torch.randn(2 * conv.num_relations, 6, dtype=dtype, requires_grad=True)
    given_tensors = [x, relation]
    edge_weight = None
    if weighted:
        edge_weight = torch.rand(etype.numel(), dtype=dtype, requires_grad=True)
        given_tensors.append(edge_weight)
    tensors = [(str(k), t, t) for k, t in enumerate(given_tensors)]
    tensors += [(n, p, p) for n, p in conv.named_parameters()]
    ours = lambda: conv(x, relation, index, etype, edge_weight)  # noqa: E731
    compare(ours, lambda: plain(conv, x, relation, index, etype, edge_weight), tensors, tolerance)


@pytest.mark.parametrize("composition", COMPOSE)
@given(case=relational(), norm=st.booleans())
@settings(max_examples=6, deadline=None)
def test_equals_the_formula(composition, case, norm):
    check(case, torch.float64, 1e-10, weighted=norm, composition=composition, norm=norm)


@pytest.mark.parametrize("composition", ["sub", "mult"])
def test_float32_with_many_relations(composition):
    check(many_relations(), torch.float32, 1e-5, composition=composition, bias=False)


@pytest.mark.parametrize("composition", COMPOSE)
def test_results_may_be_written_to(composition):
    torch.manual_seed(0)
    conv = nn.CompGCNConv(6, 5, 2, composition=composition, norm=True).double()
    index, etype = torch.randint(9, (2, 30)), torch.randint(4, (30,))
    x, relation = (torch.randn(n, 6, dtype=torch.double, requires_grad=True) for n in (9, 4))
    found = []
    for write in (True, False):
        y, r = conv(x, relation, index, etype)
        y, r = (y.mul_(3.0).add_(1.0), r.mul_(2.0)) if write else (y * 3.0 + 1.0, r * 2.0)
        loss = y.square().sum() + r.square().sum()
        found.append(torch.autograd.grad(loss, [x, relation, *conv.parameters()]))
    torch.testing.assert_close(*found)


def test_refusals():
    with pytest.raises(ValueError, match="'conv'"):
        nn.CompGCNConv(4, 4, 2, composition="conv")
    conv = nn.CompGCNConv(4, 4, 2)
    with pytest.raises(TypeError, match="CompGCNConv: relation must be a tensor, got list"):
        conv(torch.zeros(3, 4), [0.0], torch.zeros(2, 0, dtype=torch.long), None)
    with pytest.raises(ValueError, match=r"\[4, 4\], relations and their inverses"):
        conv(torch.zeros(3, 4), torch.zeros(2, 4), torch.zeros(2, 0, dtype=torch.long), None)
