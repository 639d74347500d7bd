import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from nn_graphs import compare, many_relations, relational

from dataeff import nn


def plain(conv, x, index, etype, previous=None):
    """Section 4 of the paper, one destination after the other."""
    z = torch.einsum("ni,iho->nho", x, conv.weight)
    r = torch.einsum("ri,iho->rho", conv.relation, conv.rel_weight)
    src, dst = index
    joined = torch.cat([z[dst], z[src], r[etype]], dim=-1)
    vector = torch.cat([conv.att_dst, conv.att_src, conv.att_rel], dim=-1)
    score = F.leaky_relu((joined * vector).sum(-1), conv.negative_slope)
    alpha = torch.zeros_like(score)
    for node in range(x.shape[0]):
        mine = (dst == node).nonzero()[:, 0]
        alpha = alpha.index_put((mine,), torch.softmax(score[mine], dim=0))
    if previous is not None:
        alpha = (1 - conv.beta) * alpha + conv.beta * previous
    out = torch.zeros_like(z).index_add(0, dst, alpha[..., None] * z[src])
    if conv.residual is not None:
        out = out + torch.einsum("ni,iho->nho", x, conv.residual)
    out = out.flatten(1) if conv.concat else out.mean(1)
    return (out if conv.bias is None else out + conv.bias), alpha


def check(case, dtype, tolerance, use_previous=False, **options):
    index, etype, nodes, relations = case
    torch.manual_seed(0)
    conv = nn.SimpleHGNConv(5, 4, relations, 3, **options).to(dtype)
    x = torch.randn(nodes, 5, dtype=dtype, requires_grad=True)
    previous = None
    tensors = [("x", x, x), *((n, p, p) for n, p in conv.named_parameters())]
    if use_previous:
        previous = torch.rand(etype.numel(), conv.heads, dtype=dtype, requires_grad=True)
        tensors.append(("previous", previous, previous))
    ours = lambda: conv(x, index, etype, previous)  # noqa: E731
    compare(ours, lambda: plain(conv, x, index, etype, previous), tensors, tolerance)


@given(relational())
@settings(max_examples=8, deadline=None)
def test_equals_the_formula(case):
    check(case, torch.float64, 1e-10, heads=2, use_previous=True)


@pytest.mark.parametrize(
    "options",
    [{}, {"heads": 3, "concat": False}, {"residual": False, "bias": False, "heads": 2}],
    ids=str,
)
def test_options(options):
    check(many_relations(), torch.float64, 1e-10, **options)


def test_float32():
    check(many_relations(), torch.float32, 1e-5, heads=2)


def test_attention_passes_through_two_layers():
    index, etype, nodes, relations = many_relations()
    first = nn.SimpleHGNConv(5, 4, relations, 3, heads=2)
    second = nn.SimpleHGNConv(8, 4, relations, 3, heads=2, beta=1.0)
    h, attention = first(torch.randn(nodes, 5), index, etype)
    assert attention.shape == (600, 2)
    _, same = second(h, index, etype, attention)
    torch.testing.assert_close(same, attention)


def test_dropout_drops_attention_in_training_only():
    index, etype, nodes, relations = many_relations()
    conv = nn.SimpleHGNConv(5, 4, relations, 3, dropout=0.5)
    x = torch.randn(nodes, 5)
    assert not torch.equal(conv(x, index, etype)[0], conv(x, index, etype)[0])
    conv.eval()
    assert torch.equal(conv(x, index, etype)[0], conv(x, index, etype)[0])
