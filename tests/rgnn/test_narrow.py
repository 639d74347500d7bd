"""Products of pairs some columns at a time: the same results and gradients, in less memory."""

import pytest
import torch
from rgnn_layers import gated, rgat, rgcn_mean

from dataeff import nn, rgnn
from dataeff.bench.rgnn.workload import peak_host_bytes
from dataeff.rgnn import arena, plan
from dataeff.rgnn.interpret import interpret
from dataeff.rgnn.passes.dce import eliminate_dead_code
from dataeff.rgnn.passes.narrow import narrow
from dataeff.rgnn.plan import disabled_passes, watched_plans
from dataeff.rgnn.view import View

NODES, EDGES, RELATIONS, WIDTH = 3000, 30_000, 12, 64


@pytest.fixture
def tight(monkeypatch):
    """A bound that no step keeps, at any size; programs compiled meanwhile are forgotten."""
    monkeypatch.setattr(plan, "MOST_SHARE", 0.0)
    monkeypatch.setattr(plan, "is_large", lambda *_: True)
    monkeypatch.setattr(plan, "_COMPILED", {})
    plan._plan_for.cache_clear()
    yield
    plan._plan_for.cache_clear()


def _edges():
    g = torch.Generator().manual_seed(0)
    ends = torch.randint(NODES, (2, EDGES), generator=g)
    return ends, torch.randint(RELATIONS, (EDGES,), generator=g)


def _hgt(heads, dtype=torch.float32):
    ends, types = _edges()
    names = [("n", f"r{r}", "n") for r in range(RELATIONS)]
    edges = {name: ends[:, types == r] for r, name in enumerate(names)}
    graph = rgnn.Graph.from_typed(edges, {"n": NODES}, edge_types=names).prepare()
    torch.manual_seed(1)
    conv = nn.HGTConv(WIDTH, WIDTH, (["n"], names), heads=heads).to(dtype)
    return lambda x: conv({"n": x}, graph)["n"], list(conv.parameters())


def _train(call, parameters, dtype=torch.float32):
    torch.manual_seed(2)
    x = torch.randn(NODES, WIDTH, dtype=dtype).requires_grad_()
    with watched_plans() as plans:
        y = call(x)
    return plans[0], [y, *torch.autograd.grad(y.square().sum(), [x, *parameters])]


def _stages(found):
    return [name for name, _ in found.compiled.stages]


@pytest.mark.parametrize("heads", [1, 2])
def test_a_narrowed_layer_gives_the_same_results_and_gradients(heads, tight):
    call, parameters = _hgt(heads, torch.float64)
    narrowed, found = _train(call, parameters, torch.float64)
    assert "narrow" in _stages(narrowed)
    with disabled_passes("narrow"):
        whole, want = _train(call, parameters, torch.float64)
    assert "narrow" not in _stages(whole)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_dense_graph_is_narrowed_to_take_less_memory(monkeypatch):
    call, parameters = _hgt(1)
    monkeypatch.setattr(arena, "SMALLEST_NBYTES", 1)
    monkeypatch.setattr(plan, "is_large", lambda *_: True)
    monkeypatch.setattr(plan, "_COMPILED", {})
    plan._plan_for.cache_clear()
    found, _ = _train(call, parameters)
    assert "narrow" in _stages(found)
    narrow_peak = peak_host_bytes(lambda: _train(call, parameters))
    with disabled_passes("narrow"):
        _train(call, parameters)
        assert narrow_peak < 0.85 * peak_host_bytes(lambda: _train(call, parameters))
    plan._plan_for.cache_clear()


@rgnn.layer
def several_ends(g, x, W, b):
    z = rgnn.tanh(rgnn.linear(g.src(x), W[g.etype]) + b[g.etype])
    return g.max(z), g.sum(g.dst(x) * z), g.sum(rgnn.dot(z, g.dst(x)))


@rgnn.layer
def needed_whole(g, x, W, U):
    return g.sum(rgnn.linear(rgnn.tanh(rgnn.linear(g.src(x), W[g.etype])), U))


@rgnn.layer
def rows_by_rows(g, x, W, U):
    """Both factors are products of pairs."""
    return g.sum(rgnn.linear(g.src(x), W[g.etype]) * rgnn.linear(g.dst(x), U[g.etype]))


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize(
    ("layer", "shapes", "splits"),
    [
        (several_ends, [(RELATIONS, WIDTH, WIDTH), (RELATIONS, WIDTH)], True),
        (rows_by_rows, [(RELATIONS, WIDTH, WIDTH)] * 2, True),
        (needed_whole, [(RELATIONS, WIDTH, WIDTH), (WIDTH, 16)], False),
    ],
    ids=["several_ends", "rows_by_rows", "needed_whole"],
)
def test_programs_mean_the_same(layer, shapes, splits, parts):
    ends, types = _edges()
    graph = rgnn.Graph(ends, types, num_nodes=NODES)
    torch.manual_seed(3)
    tensors = [torch.randn(NODES, WIDTH, dtype=torch.float64)]
    tensors += [torch.randn(*s, dtype=torch.float64) for s in shapes]
    made = layer.plan(graph, *tensors)
    stages = [p for name, p in made.compiled.stages if name != "differentiate"]
    whole = next(p for p in reversed(stages) if len(p.outputs) == len(made.traced.outputs))
    parted = eliminate_dead_code(narrow(whole, parts))
    assert (parted != whole) == splits
    named = dict(zip(made.request.names, tensors, strict=True))
    view = View(graph, made.sizes)
    for a, b in zip(interpret(whole, view, named), interpret(parted, view, named), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layer", [rgat, rgcn_mean, gated], ids=lambda f: f.name)
def test_other_layers_under_a_bound_that_nothing_keeps(layer, tight):
    ends, types = _edges()
    graph = rgnn.Graph(ends, types, num_nodes=NODES)
    g = torch.Generator().manual_seed(3)
    x, W = torch.randn(NODES, 32, generator=g), torch.randn(RELATIONS, 32, 32, generator=g) / 6
    a, root, edge = (torch.randn(n, generator=g) for n in ((RELATIONS, 32), (32, 32), (EDGES,)))
    rest = {
        rgcn_mean: (root / 6, a[0]),
        rgat: (a, a + 1),
        gated: (root / 6, a[:, 0].contiguous(), edge),
    }[layer]
    inputs = [t.double().requires_grad_() for t in (x, W, *rest)]

    def train():
        y = layer(graph, *inputs)
        return [y, *torch.autograd.grad(y.square().sum(), inputs)]

    found = train()
    with disabled_passes("narrow"):
        want = train()
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_small_step_is_left_as_it_is():
    call, parameters = _hgt(1)
    found, _ = _train(call, parameters)
    assert "narrow" not in _stages(found)
