"""What training holds at once: one wide value of the pairs at a time, and what the plan says."""

import pytest
import torch
from rgnn_layers import rgat, rgcn_mean

from dataeff import nn, rgnn
from dataeff.bench.rgnn.workload import peak_host_bytes
from dataeff.rgnn.kernels_ir import Traversal, verify_schedule
from dataeff.rgnn.lower import is_wide
from dataeff.rgnn.memory_plan import moments, overwritten, peak
from dataeff.rgnn.plan import watched_plans

NODES, EDGES, RELATIONS, WIDTH = 400, 12_000, 8, 64


def typed_case():
    g = torch.Generator().manual_seed(0)
    edges = {
        ("n", f"r{r}", "n"): torch.randint(NODES, (2, EDGES // RELATIONS), generator=g)
        for r in range(RELATIONS)
    }
    graph = rgnn.Graph.from_typed(edges, {"n": NODES}, edge_types=list(edges)).prepare()
    conv = nn.HGTConv(WIDTH, WIDTH, (["n"], list(edges)))
    return lambda x: conv({"n": x}, graph)["n"]


def untyped_case(layer, weights):
    g = torch.Generator().manual_seed(0)
    index = torch.randint(NODES, (2, EDGES), generator=g)
    types = torch.randint(RELATIONS, (EDGES,), generator=g)
    graph = rgnn.Graph(index, types, num_nodes=NODES).prepare()
    tensors = [torch.randn(*shape, generator=g).requires_grad_() for shape in weights]
    return lambda x: layer(graph, x, *tensors)


@rgnn.layer
def tanh_max(g, x, W):
    return g.max(rgnn.tanh(rgnn.linear(g.src(x), W[g.etype])))


CASES = {
    "rgcn": lambda: untyped_case(rgcn_mean, [(RELATIONS, WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH,)]),
    "rgat": lambda: untyped_case(
        rgat, [(RELATIONS, WIDTH, WIDTH), (RELATIONS, WIDTH), (RELATIONS, WIDTH)]
    ),
    "hgt": typed_case,
    "tanh_max": lambda: untyped_case(tanh_max, [(RELATIONS, WIDTH, WIDTH)]),
}


@pytest.mark.parametrize("name", CASES)
def test_one_wide_value_of_the_pairs_at_a_time(name):
    call = CASES[name]()
    with watched_plans() as plans:
        call(torch.randn(NODES, WIDTH, requires_grad=True))
    (plan,) = plans
    for runner in (plan.compiled.forward_runner, plan.compiled.backward_runner):
        schedule = verify_schedule(runner.schedule)
        program = schedule.program
        for moment in moments(schedule, plan.sizes, 4):
            wide = [v for v, n in moment.alive.items() if n and is_wide(program[v])]
            assert len(wide) <= 1, (moment, wide)
    saved = plan.compiled.forward.outputs[plan.compiled.num_outputs :]
    kept = [v for v in saved if is_wide(plan.compiled.forward[v])]
    assert len(kept) == (name == "tanh_max")  # the gradient of a maximum compares its rows


@rgnn.layer
def gate(g, x, W):
    z = rgnn.linear(g.at_dst(x), W)
    return rgnn.sigmoid(z) * z


@rgnn.layer
def swap(g, x, W):
    first, last = rgnn.split(rgnn.linear(g.at_dst(x), W), [8, 8])
    return rgnn.concat(last, first) + 1.0


@rgnn.layer
def scale(g, x, W):
    z = rgnn.linear(g.at_dst(x), W)
    return z * rgnn.dot(z, z)


@rgnn.layer
def twice(g, x, W):
    z = rgnn.linear(g.at_dst(x), W)
    return rgnn.tanh(z), rgnn.linear(z, W)


@pytest.mark.parametrize(
    ("layer", "taken", "formula"),
    [
        (gate, True, lambda z, W: z.sigmoid() * z),
        (swap, False, lambda z, W: z.roll(8, 1) + 1),
        (scale, False, lambda z, W: z * (z * z).sum(1, keepdim=True)),
        (twice, None, lambda z, W: torch.stack([z.tanh(), z @ W])),
    ],
    ids=lambda p: getattr(p, "name", ""),
)
def test_an_elementwise_value_takes_the_memory_of_its_operand(layer, taken, formula, small):
    x, W = torch.randn(20, 16), torch.randn(16, 16)
    with watched_plans() as plans:
        found = layer(small, x, W)
    schedule = plans[0].compiled.forward_runner.schedule
    traversals = [n for n, s in enumerate(schedule.steps) if isinstance(s, Traversal)]
    if taken is not None:
        assert [n in overwritten(schedule) for n in traversals] == [taken]
    found = torch.stack(found) if isinstance(found, tuple) else found
    torch.testing.assert_close(found, formula(x @ W, W))


@rgnn.layer
def add_sum(g, x, W):
    return rgnn.linear(g.at_dst(x), W) + g.sum(g.src(x))


@rgnn.layer
def add_sum_of_both(g, x, W):
    z = rgnn.linear(g.at_dst(x), W)
    return z + g.sum(g.src(x) * g.dst(z))


@pytest.mark.parametrize(("layer", "taken"), [(add_sum, True), (add_sum_of_both, False)])
def test_a_sum_over_edges_takes_the_memory_of_what_it_is_added_to(layer, taken, small):
    x, W = torch.randn(20, 16).double(), torch.randn(16, 16).double()
    with watched_plans() as plans:
        found = layer(small, x, W)
    schedule = plans[0].compiled.forward_runner.schedule
    (walk,) = (n for n, s in enumerate(schedule.steps) if isinstance(s, Traversal) and s.map)
    assert (walk in overwritten(schedule)) == taken
    src, dst = small.edge_index
    message = x[src] if taken else x[src] * (x @ W)[dst]
    torch.testing.assert_close(found, (x @ W).index_add(0, dst, message))


@pytest.mark.parametrize("name", CASES)
def test_a_training_step_takes_little_more_than_planned(name):
    call = CASES[name]()
    x = torch.randn(NODES, WIDTH, requires_grad=True)
    with watched_plans() as plans:
        call(x)
    (plan,) = plans
    program = plan.compiled.forward

    def step():
        x.grad = None
        call(x).sum().backward()

    kept = program.outputs[plan.compiled.num_outputs :]
    saved = sum(
        4 * program[v].type.numel * (plan.sizes[3] if "pair" in program[v].type.domain else EDGES)
        for v in kept
    )
    planned = max(
        peak(runner.schedule, plan.sizes, 4).nbytes
        for runner in (plan.compiled.forward_runner, plan.compiled.backward_runner)
    )
    tensors = 8 * NODES * WIDTH * 4 + 4 * RELATIONS * WIDTH * WIDTH * 4
    assert peak_host_bytes(step) < planned + saved + tensors
