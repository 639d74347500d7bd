"""Each optional pass switched off gives the same values and gradients, on any graph."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rgnn_layers import STATICS, gated, graphs, heads, rgat, rgcn_mean, tensors, typed_graph

from dataeff import rgnn
from dataeff.rgnn.passes.pipeline import OPTIONAL
from dataeff.rgnn.plan import Plan, Request, spec_of
from dataeff.rgnn.published import comp_gcn, hgt, simple_hgn
from dataeff.rgnn.view import View

LAYERS = [rgcn_mean, rgat, gated, heads, hgt, simple_hgn, comp_gcn]


def arguments(layer, nodes, edges, relations):
    return tensors(layer, nodes, edges, relations, torch.float64, width=3, out=4)


def results(layer, graph, args, disabled):
    """Outputs and all gradients, carried out by the interpreter of the programs that are made."""
    given, statics = layer.bind(graph, (), args | STATICS.get(layer, {}))
    values = list(given.values())
    wanted = (1 << len(values)) - 1
    request = Request.of(layer.id, spec_of(tuple(given), statics), values, graph.sizes, wanted)
    plan = Plan(request, disabled, backend="reference")
    view = View(graph, plan.sizes)
    outputs, saved = plan.run_forward(view, values)
    grads = [torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape) for y in outputs]
    return plan, [*outputs, *plan.run_backward(view, grads, values, outputs, saved)]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda f: f.name)
@given(case=graphs(), off=st.sets(st.sampled_from(OPTIONAL), min_size=1))
@settings(max_examples=15, deadline=None)
def test_passes_left_out_change_no_result(layer, case, off):
    _, etype, nodes, relations = case
    graph = typed_graph(case)
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
