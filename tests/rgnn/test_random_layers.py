"""Random layers on random graphs: the passes and the gradients against torch's own autograd."""

import random

import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from random_layers import RandomLayer
from rgnn_layers import graphs, typed_graph

from dataeff.rgnn.interpret import interpret
from dataeff.rgnn.kernels_ir import parse_schedule, render_schedule
from dataeff.rgnn.passes.pipeline import OPTIONAL
from dataeff.rgnn.plan import Plan
from dataeff.rgnn.text import parse, render
from dataeff.rgnn.view import View


@given(
    case=graphs(),
    seed=st.integers(0, 2**32 - 1),
    off=st.sets(st.sampled_from(OPTIONAL)),
)
@settings(max_examples=20, deadline=None)
def test_programs_that_passes_make_give_the_traced_one_s_results(case, seed, off):
    graph, (_, etype, nodes, relations) = typed_graph(case), case
    drawn = RandomLayer(random.Random(seed), nodes, etype.numel(), relations)
    note(drawn.source)
    g = torch.Generator().manual_seed(0)
    named = {
        name: torch.randn(shape, generator=g, dtype=torch.float64).mul_(0.6).requires_grad_()
        for name, shape in drawn.shapes.items()
    }
    layer = drawn.compiled()
    request = layer.plan(graph, **named).request
    plan = Plan(request, frozenset(off), backend="reference")
    view, inputs = View(graph, plan.sizes), list(named.values())

    want = interpret(plan.traced, view, named)
    grads = [torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape) for y in want]
    total = sum((y * g).sum() for y, g in zip(want, grads, strict=True))
    total = total + sum(0 * t.sum() for t in inputs)
    want = [y.detach() for y in want]
    want += torch.autograd.grad(total, inputs, materialize_grads=True)

    inputs = [t.detach() for t in inputs]
    found, saved = plan.run_forward(view, inputs)
    found = [*found, *plan.run_backward(view, grads, inputs, found, saved)]
    for a, b in zip(found, want, strict=True):
        largest = max([1.0, *b.abs().flatten().tolist()])
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * largest)
    for _, program in plan.compiled.stages:
        assert parse(render(program)) == program


@given(case=graphs(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_schedules_parse_back_and_are_explained(case, seed):
    _, etype, nodes, relations = case
    drawn = RandomLayer(random.Random(seed), nodes, etype.numel(), relations)
    note(drawn.source)
    named = {name: torch.ones(shape) for name, shape in drawn.shapes.items()}
    layer, graph = drawn.compiled(), typed_graph(case)
    compiled = layer.plan(graph, **named).compiled
    text = layer.explain(graph, **named)
    for runner in (compiled.forward_runner, compiled.backward_runner):
        if runner is not None and runner.schedule is not None:
            rendered = render_schedule(runner.schedule)
            assert parse_schedule(rendered, runner.schedule.program) == runner.schedule
            assert rendered in text
