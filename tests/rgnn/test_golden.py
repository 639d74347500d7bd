"""What passes, fusion and the memory plan make of known layers, as text.

`DATAEFF_UPDATE_GOLDEN=1 pytest tests/rgnn/test_golden.py` writes the files again.
"""

import os
from pathlib import Path

import pytest
import torch
from rgnn_layers import gated, rgat, rgcn_mean

from dataeff import rgnn
from dataeff.rgnn.backend import Runner
from dataeff.rgnn.kernels_ir import parse_schedule, render_schedule
from dataeff.rgnn.memory_plan import render_moments
from dataeff.rgnn.passes.compact import compact
from dataeff.rgnn.passes.dce import eliminate_dead_code
from dataeff.rgnn.passes.narrow import narrow
from dataeff.rgnn.passes.scale_weights import scale_weights
from dataeff.rgnn.plan import Plan, Request
from dataeff.rgnn.text import parse, render
from dataeff.rgnn.tracer import RowCounts
from dataeff.rgnn.verify import verify

GOLDEN = Path(__file__).parent / "golden"


def make_plan(layer, disabled=frozenset()):
    g = torch.Generator().manual_seed(3)
    index = torch.randint(0, 30, (2, 200), generator=g)
    graph = rgnn.Graph(index, torch.randint(0, 4, (200,), generator=g), num_nodes=30)
    x, W = torch.zeros(30, 16), torch.zeros(4, 16, 24)
    a = torch.zeros(4, 24)
    args = {
        rgcn_mean: (x, W, torch.zeros(16, 24), torch.zeros(24)),
        rgat: (x, W, a, a),
        gated: (x, W, torch.zeros(16, 24), torch.zeros(4), torch.zeros(200)),
    }[layer]
    names, statics = layer.bind(graph, args, {})
    spec = repr((tuple(names), statics))
    request = Request.of(layer.id, spec, args, graph.sizes, (1 << len(args)) - 1)
    return graph, args, Plan(request, disabled)


def same_as_file(name, text):
    path = GOLDEN / name
    if os.environ.get("DATAEFF_UPDATE_GOLDEN"):
        path.write_text(text)
    assert path.read_text() == text


@pytest.mark.parametrize("layer", [rgcn_mean, rgat, gated], ids=lambda f: f.name)
def test_kernels_and_memory(layer):
    _, _, plan = make_plan(layer)
    text = ""
    for title, program in (
        ("forward", plan.compiled.forward),
        ("backward", plan.compiled.backward),
    ):
        schedule = Runner(program, torch.float32, "cpu", "cpp", None, plan.sizes).schedule
        text += f"== {title} kernels ==\n{render_schedule(schedule)}"
        text += f"== {title} memory plan ==\n{render_moments(schedule, plan.sizes, 4)}"
        assert parse_schedule(render_schedule(schedule), program) == schedule
    same_as_file(f"{layer.name}.kernels.expected", text)


@pytest.mark.parametrize("layer", [rgcn_mean, rgat, gated], ids=lambda f: f.name)
def test_stages(layer):
    _, _, plan = make_plan(layer)
    text = "\n".join(f"== {name} ==\n{render(program)}" for name, program in plan.compiled.stages)
    same_as_file(f"{layer.name}.expected", text)
    for _, program in plan.compiled.stages:
        assert parse(render(program)) == program


@rgnn.layer
def scaled(g, x, W, s):
    """A product scaled by relation, added up column by column."""
    return g.sum(rgnn.linear(g.src(x), W[g.etype]) * s[g.etype])


def rows_of(**rows):
    """Rows of each domain: of all others one."""
    return dict.fromkeys(("node", "dst", "edge", "src_pair", "dst_pair", "etype", "one"), 1) | rows


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("scale_weights", lambda program: scale_weights(program, rows_of(edge=10**6))),
        ("narrow", lambda program: narrow(compact(program), 2)),
    ],
)
def test_passes_that_these_layers_leave_alone(name, run):
    shapes = {"x": (30, 24), "W": (4, 24, 24), "s": (4,)}
    traced = scaled.trace(shapes, {}, RowCounts(30, 30, 200, 4, 1))
    changed = eliminate_dead_code(verify(run(traced)))
    assert changed != traced
    same_as_file(f"{name}.expected", render(changed))


@pytest.mark.parametrize("layer", [rgcn_mean, rgat, gated], ids=lambda f: f.name)
@pytest.mark.parametrize("name", ["compact", "reorder", "aggregate_first", "reassociate"])
def test_a_pass_left_out_changes_nothing_but_the_program(layer, name):
    from dataeff.rgnn.autodiff import gradient_input
    from dataeff.rgnn.interpret import interpret
    from dataeff.rgnn.view import View

    graph, args, plan = make_plan(layer)
    _, _, without = make_plan(layer, frozenset({name}))
    torch.manual_seed(0)
    names = plan.request.names
    inputs = {
        n: 0.5 * torch.randn_like(a, dtype=torch.float64) for n, a in zip(names, args, strict=True)
    }
    grad = torch.randn(
        30, *plan.compiled.forward[plan.compiled.forward.outputs[0]].type.shape, dtype=torch.float64
    )
    results = []
    for p in (plan, without):
        view = View(graph, p.sizes)
        values = interpret(p.compiled.forward, view, inputs)
        outputs, saved = values[: p.compiled.num_outputs], values[p.compiled.num_outputs :]
        given = {**inputs, gradient_input(0): grad}
        given |= {f"output:{k}": v for k, v in enumerate(outputs)}
        given |= {f"saved:{k}": v for k, v in enumerate(saved)}
        gradients = interpret(p.compiled.backward, view, given)
        by_input = dict(zip(p.compiled.wanted, gradients, strict=True))
        results.append([*outputs, *(by_input[n] for n in sorted(by_input))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_reordering_folds_the_destination_projection():
    """RGAT needs no projected destination row: W and a_dst are multiplied with each other."""
    _, _, plan = make_plan(rgat)
    kinds = [op.kind for op in plan.compiled.forward.ops]
    assert kinds.count("einsum") == 1
    wide = [op for op in plan.compiled.forward.ops if op.kind == "linear" and op.type.numel > 1]
    assert [op.type.domain for op in wide] == ["src_pair"]


def test_compaction_leaves_no_product_on_the_edges():
    _, _, plan = make_plan(rgat)
    for program in (plan.compiled.forward, plan.compiled.backward):
        assert not [op for op in program.ops if op.kind == "linear" and op.type.domain == "edge"]
