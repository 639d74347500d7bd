"""Which training steps are large enough for their memory to be asked about."""

import pytest
import torch
from rgnn_layers import rgcn, tensors

from dataeff import rgnn
from dataeff.memory.scratch import SMALLEST_LENT_NBYTES
from dataeff.rgnn.step_memory import is_large

MANY = 1 << 40


def schedule_of(layer, graph, width):
    named = tensors(layer, 20, 60, 4, torch.float32, width, width)
    return layer.plan(graph, **named).compiled.forward_runner.schedule


@pytest.mark.parametrize("item_size", [4, 8])
def test_the_bytes_of_a_wide_value_of_pairs_decide(small, item_size):
    schedule = schedule_of(rgcn, small, 64)  # stores rows of nodes, pairs, weights and destinations
    enough = SMALLEST_LENT_NBYTES // (64 * item_size)
    for pairs, large in ((enough - 1, False), (enough, True), (enough + 1, True)):
        sizes = (MANY, MANY, MANY, pairs, MANY, MANY, MANY)
        assert is_large(schedule, sizes, item_size) == large


@rgnn.layer
def of_edges(g, x, u):
    z = g.src(x) * g.dst(u)
    return g.sum(rgnn.edge_softmax(rgnn.dot(z, z)))


def test_numbers_of_pairs_and_edges_are_never_large(small):
    x = torch.randn(20, 64)
    schedule = of_edges.plan(small, x=x, u=x).compiled.forward_runner.schedule
    assert any(schedule.program[v].type.domain == "edge" for v in schedule.stored)
    assert not is_large(schedule, (MANY,) * 7, 4)


def test_a_layer_without_pairs_is_not_large(small):
    layer = rgnn.layer(lambda g, x, W: rgnn.linear(g.at_dst(x), W))
    plan = layer.plan(small, x=torch.randn(20, 64), W=torch.randn(64, 64))
    assert not is_large(plan.compiled.forward_runner.schedule, (MANY,) * 7, 4)
