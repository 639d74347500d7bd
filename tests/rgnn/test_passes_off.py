"""Each optional pass switched off gives the same values and gradients, on any graph."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rgnn_layers import gated, graphs, heads, rgat, rgcn_mean

from dataeff import rgnn
from dataeff.rgnn.passes.pipeline import OPTIONAL
from dataeff.rgnn.plan import Plan, Request, spec_of
from dataeff.rgnn.published import PUBLISHED, hgt
from dataeff.rgnn.view import View

NODE_TYPES = 3


def arguments(layer, nodes, edges, relations):
    x, W, c = (nodes, 3), (relations, 3, 4), (relations, 4)
    shapes = {
        rgcn_mean: (x, W, (3, 4), (4,)),
        rgat: (x, W, c, c),
        gated: (x, W, (3, 4), (relations,), (edges,)),
        heads: (x, (relations, 3, 12), (24, 24), (relations, 24)),
        hgt: tuple(PUBLISHED["hgt"].shapes(nodes, NODE_TYPES, relations, 3, 2, 2).values()),
    }[layer]
    return [0.5 * torch.randn(shape, dtype=torch.float64) for shape in shapes]


def results(layer, graph, args, disabled):
    """Outputs and all gradients, carried out by the interpreter of the programs that are made."""
    spec = spec_of(layer.parameters, ())
    request = Request.of(layer.id, spec, args, graph.sizes, (1 << len(args)) - 1)
    plan = Plan(request, disabled, backend="reference")
    view = View(graph, plan.sizes)
    outputs, saved = plan.run_forward(view, args)
    grads = [torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape) for y in outputs]
    return plan, [*outputs, *plan.run_backward(view, grads, args, outputs, saved)]


@pytest.mark.parametrize("layer", [rgcn_mean, rgat, gated, heads, hgt], ids=lambda f: f.name)
@given(case=graphs(), off=st.sets(st.sampled_from(OPTIONAL), min_size=1))
@settings(max_examples=15, deadline=None)
def test_passes_left_out_change_no_result(layer, case, off):
    edge_index, etype, nodes, relations = case
    types = torch.arange(nodes) % NODE_TYPES
    graph = rgnn.Graph(
        edge_index,
        etype,
        num_nodes=nodes,
        num_relations=relations,
        node_type=types,
        num_node_types=NODE_TYPES,
    )
    args = arguments(layer, nodes, etype.numel(), relations)
    _, want = results(layer, graph, args, frozenset())
    _, got = results(layer, graph, args, frozenset(off))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_pass_left_out_is_left_out(name, small):
    made = {}
    for layer in (rgat, rgcn_mean, gated):
        args = arguments(layer, 20, 60, 4)
        for off in (frozenset(), frozenset({name})):
            plan, _ = results(layer, small, args, off)
            names = [stage for stage, _ in plan.compiled.stages]
            made[layer.name, off] = any(stage.endswith(name) for stage in names)
    assert not any(ran for (_, off), ran in made.items() if off)
    elsewhere = ("aggregate_first", "fold_types")  # their own tests have layers they change
    assert name in elsewhere or any(ran for (_, off), ran in made.items() if not off)


@pytest.mark.parametrize("scale", [1e4, -1e4])
@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_softmax_survives_large_scores(backend, scale, small, monkeypatch):
    """Weights stay weights: positive, and one in sum, whatever the size of the scores."""
    if backend == "triton":
        pytest.importorskip("triton")

    @rgnn.layer
    def attend(g, score, value):
        return g.sum(rgnn.edge_softmax(g.edge(score)) * g.src(value))

    monkeypatch.setenv("DATAEFF_RGNN_BACKEND", backend)
    score = (scale * torch.randn(60)).requires_grad_()
    value = torch.ones(20, 2, requires_grad=True)
    y = attend(small, score, value)
    reached = torch.bincount(small.edge_index[1], minlength=20) > 0
    torch.testing.assert_close(y, reached[:, None].float().expand(20, 2))
    (y * torch.randn_like(y)).sum().backward()
    assert torch.isfinite(score.grad).all() and torch.isfinite(value.grad).all()
