"""The intra-operator IR: its text parses back, and the verifier finds what cannot run."""

import dataclasses

import pytest
import torch
from rgnn_layers import gated, heads, rgat, rgcn, rgcn_mean

from dataeff import rgnn
from dataeff.rgnn.kernels_ir import (
    Dense,
    Gemm,
    Traversal,
    parse_schedule,
    render_schedule,
    verify_schedule,
)
from dataeff.rgnn.lower import lower
from dataeff.rgnn.triton.backend import DENSE_KINDS


def programs(small):
    x, W, a = torch.randn(20, 5), torch.randn(4, 5, 12), torch.randn(4, 12)
    for plan in (
        rgat.plan(small, x, W, a, a),
        rgcn_mean.plan(small, x, W, torch.randn(5, 12), torch.randn(12)),
        gated.plan(small, x, W, torch.randn(5, 12), torch.randn(4), torch.randn(60)),
        heads.plan(small, x, W, torch.randn(24, 24), torch.randn(4, 24)),
    ):
        yield from (plan.compiled.forward, plan.compiled.backward)


@pytest.mark.parametrize("dense", [(), DENSE_KINDS])
def test_text_parses_back(small, dense):
    for program in programs(small):
        schedule = lower(program, dense)
        again = parse_schedule(render_schedule(schedule), program)
        assert again.steps == schedule.steps
        numbers = [n for n, step in enumerate(again.steps) if isinstance(step, Traversal)]
        assert all(again.kept(n) == schedule.kept(n) for n in numbers)
        assert all(again.reads(s) == schedule.reads(s) for s in schedule.steps)


def test_text_of_no_step_parses_back(small):
    """The gradient of what is given back unchanged is the gradient that was given."""
    layer = rgnn.layer(lambda g, x: g.node(x))
    program = layer.plan(small, torch.randn(20, 5)).compiled.backward
    schedule = lower(program)
    assert not schedule.steps
    assert parse_schedule(render_schedule(schedule), program) == schedule


def test_text_of_sums_of_products_parses_back(small):
    few = small.edge_index.clone()
    few[1] %= 2  # so that rows are added up before they are multiplied
    few = rgnn.Graph(few, small.edge_type, num_nodes=20)
    seen = set()
    added_first = rgcn.plan(few, torch.randn(20, 5), torch.randn(4, 5, 12)).compiled.forward
    for program in (*programs(small), added_first):
        schedule = lower(program, scatter=True)
        again = parse_schedule(render_schedule(schedule), program)
        assert again.steps == schedule.steps and again.stored == schedule.stored
        for step in schedule.steps:
            if isinstance(step, Gemm) and step.scatter:
                product = schedule.product(step)
                assert product.id not in schedule.stored  # it is never in memory
                seen.add((product.kind, step.scatter, schedule.onto(step) is not None))
    assert {kind for kind, _, _ in seen} == {"linear", "linear_t"}
    assert {onto for _, _, onto in seen} == {True, False}


def test_the_verifier_finds_a_sum_along_another_map(small):
    schedule = next(
        s
        for s in (lower(p, scatter=True) for p in programs(small))
        if any(isinstance(step, Gemm) and step.scatter for step in s.steps)
    )
    steps = [
        dataclasses.replace(s, scatter="edge.dst") if isinstance(s, Gemm) and s.scatter else s
        for s in schedule.steps
    ]
    with pytest.raises(ValueError, match=r"adds up along edge\.dst, which .* does not"):
        verify_schedule(dataclasses.replace(schedule, steps=tuple(steps)))


@pytest.fixture
def schedule(small):
    return lower(next(programs(small)))


def test_the_parser_names_the_line(schedule):
    text = render_schedule(schedule)
    with pytest.raises(ValueError, match="head of step 0: 'k1:"):
        parse_schedule(text.replace("k0:", "k1:", 1), schedule.program)
    with pytest.raises(ValueError, match=r"not an operation of the program: '.*relu"):
        parse_schedule(text.replace("logsum[", "relu[", 1), schedule.program)
    with pytest.raises(ValueError, match="to be stored"):
        parse_schedule(text.replace("  store ", "  hold ", 1), schedule.program)


def test_the_verifier_finds_steps_that_cannot_run(schedule):
    def refused(steps, message):
        with pytest.raises(ValueError, match=message):
            verify_schedule(dataclasses.replace(schedule, steps=tuple(steps)))

    steps = list(schedule.steps)
    assert verify_schedule(schedule) is schedule
    refused(steps[1:], "no earlier step made")
    refused([*steps, steps[0]], "a second time")
    refused(steps[:-1], "no step makes the output")
    number = next(n for n, s in enumerate(steps) if isinstance(s, Traversal) and s.map)
    moved = dataclasses.replace(steps[number], center="node")
    refused([*steps[:number], moved, *steps[number + 1 :]], "does not lead")
    assert any(isinstance(s, Gemm | Dense) for s in steps)
