"""What training holds at once: one wide value of the pairs at a time, and what the plan says."""

import pytest
import torch
from rgnn_layers import rgat, rgcn_mean

from dataeff import nn, rgnn
from dataeff.bench.rgnn.workload import peak_host_bytes
from dataeff.rgnn.kernels_ir import verify_schedule
from dataeff.rgnn.lower import is_wide
from dataeff.rgnn.memory_plan import moments, peak
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


CASES = {
    "rgcn": lambda: untyped_case(rgcn_mean, [(RELATIONS, WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH,)]),
    "rgat": lambda: untyped_case(
        rgat, [(RELATIONS, WIDTH, WIDTH), (RELATIONS, WIDTH), (RELATIONS, WIDTH)]
    ),
    "hgt": typed_case,
}


@pytest.mark.parametrize("name", ["rgat", "hgt"])
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
    assert not any(is_wide(plan.compiled.forward[v]) for v in saved)


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
