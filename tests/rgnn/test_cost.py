import torch
from rgnn_layers import rgcn

from dataeff import rgnn
from dataeff.rgnn.cost import step_cost
from dataeff.rgnn.kernels_ir import Gemm, Traversal


def test_a_product_and_a_sum_are_counted_by_hand():
    index = torch.tensor([[0, 1, 2, 3], [0, 0, 1, 1]])
    graph = rgnn.Graph(index, torch.tensor([0, 1, 0, 1]), num_nodes=4)
    plan = rgcn.plan(graph, torch.randn(4, 16), torch.randn(2, 16, 32))
    schedule = plan.compiled.forward_runner.schedule
    costs = {type(s): step_cost(schedule, n, plan.sizes, 4) for n, s in enumerate(schedule.steps)}
    rows = 4  # pairs on either side, as many as edges
    assert costs[Gemm].flops == 2 * rows * 16 * 32
    assert costs[Gemm].nbytes == 4 * (rows * 16 + 2 * 16 * 32 + rows * 32)
    assert costs[Traversal].nbytes == 4 * (4 * 32 + 4 * 32)  # read per edge, written per node
