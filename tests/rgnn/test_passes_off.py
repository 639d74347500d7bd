"""Each optional pass switched off gives the same values and gradients, on any graph."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rgnn_layers import STATICS, gated, graphs, heads, rgat, rgcn_mean, tensors, typed_graph

from dataeff.nn.comp_gcn_conv import comp_gcn
from dataeff.nn.hgt_conv import hgt
from dataeff.nn.simple_hgn_conv import simple_hgn
from dataeff.rgnn.backend import Runner
from dataeff.rgnn.kernels_ir import Traversal
from dataeff.rgnn.memory_plan import peak
from dataeff.rgnn.passes.pipeline import OPTIONAL, PASSES
from dataeff.rgnn.plan import Plan, Request, spec_of
from dataeff.rgnn.view import View

SIZES = (1000, 1000, 20000, 9000, 8000, 4, 2)  # nodes, destinations, edges, pairs, types
LAYERS = [rgcn_mean, rgat, gated, heads, hgt, simple_hgn, comp_gcn]


def arguments(layer, nodes, edges, relations):
    return tensors(layer, nodes, edges, relations, torch.float64, width=3, out=4)


def results(layer, graph, args, disabled, backend="reference"):
    """Outputs and all gradients; the reference is the interpreter of the programs that are made."""
    given, statics = layer.bind(graph, (), args | STATICS.get(layer, {}))
    values = list(given.values())
    wanted = (1 << len(values)) - 1
    request = Request.of(layer.id, spec_of(tuple(given), statics), values, graph.sizes, wanted)
    plan = Plan(request, disabled, backend=backend)
    view = View(graph, plan.sizes)
    outputs, saved = plan.run_forward(view, values)
    grads = [torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape) for y in outputs]
    return plan, [*outputs, *plan.run_backward(view, grads, values, outputs, saved)]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda f: f.name)
@given(case=graphs(), off=st.sets(st.sampled_from(PASSES), min_size=1))
@settings(max_examples=15, deadline=None)
def test_passes_left_out_change_no_result(layer, case, off):
    _, etype, nodes, relations = case
    graph = typed_graph(case)
    args = arguments(layer, nodes, etype.numel(), relations)
    _, want = results(layer, graph, args, frozenset())
    _, got = results(layer, graph, args, frozenset(off))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layer", [gated, heads, hgt], ids=lambda f: f.name)
@pytest.mark.parametrize(
    "off", [*((name,) for name in OPTIONAL), OPTIONAL], ids=lambda off: "+".join(off[:2])
)
def test_compiled_kernels_of_programs_without_a_pass(layer, off):
    g = torch.Generator().manual_seed(0)
    case = torch.randint(0, 20, (2, 60), generator=g), torch.randint(0, 4, (60,), generator=g)
    graph = typed_graph((*case, 20, 4))
    args = arguments(layer, 20, 60, 4)
    _, want = results(layer, graph, args, frozenset())
    _, got = results(layer, graph, args, frozenset(off), backend="cpp")
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_lowering_without_fusion_and_without_a_memory_plan(small):
    """Fusion makes fewer traversals, the order of steps a lower peak; neither is there when off."""

    def schedules(off):
        args = tensors(simple_hgn, 20, 60, 4, torch.float64, width=16, out=16)
        plan, _ = results(simple_hgn, small, args, off)
        program = plan.compiled.backward
        runner = Runner(program, torch.float64, "cpu", "cpp", None, SIZES, off)
        return runner.schedule

    usual, unfused = schedules(frozenset()), schedules(frozenset({"fuse"}))
    sinks = [
        [len(s.sinks) for s in one.steps if isinstance(s, Traversal)] for one in (usual, unfused)
    ]
    assert max(sinks[0]) > 1 and max(sinks[1]) == 1 and len(sinks[1]) > len(sinks[0])
    unordered = schedules(frozenset({"memory_plan"}))
    peaks = [peak(one, SIZES, 8).nbytes for one in (usual, unordered)]
    assert peaks[0] < peaks[1]


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_left_out_is_left_out(name, small):
    made = {}
    for layer in (rgat, rgcn_mean, gated):
        args = arguments(layer, 20, 60, 4)
        for off in (frozenset(), frozenset({name})):
            plan, _ = results(layer, small, args, off)
            names = [stage for stage, _ in plan.compiled.stages]
            made[layer.name, off] = any(stage.endswith(name) for stage in names)
    assert not any(ran for (_, off), ran in made.items() if off)
    # Their own tests have layers they change.
    elsewhere = ("aggregate_first", "fold_types", "scale_weights", "spread", "narrow")
    assert name in elsewhere or any(ran for (_, off), ran in made.items() if not off)
