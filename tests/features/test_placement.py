"""The placement rule, case by case."""

import pytest
import torch

from dataeff.features.placement import Operand, placement

CPU, GPU, OTHER = torch.device("cpu"), torch.device("cuda", 1), torch.device("cuda", 0)
U = Operand(CPU, 2, unified=True)
PLAIN, SCALAR = Operand(CPU, 2, unified=False), Operand(CPU, 0, unified=False)
ON_GPU, GPU_SCALAR = Operand(GPU, 2, unified=False), Operand(GPU, 0, unified=False)


@pytest.mark.parametrize(
    ("operands", "plainly", "propagating"),
    [
        ([U], CPU, OTHER),
        ([U, U], CPU, OTHER),
        ([U, SCALAR], CPU, OTHER),
        ([U, PLAIN], CPU, CPU),
        ([U, PLAIN, SCALAR], CPU, CPU),
        ([U, ON_GPU], GPU, GPU),
        ([ON_GPU, U], GPU, GPU),
        ([U, SCALAR, ON_GPU], GPU, GPU),
        ([U, PLAIN, ON_GPU], GPU, GPU),
        ([U, GPU_SCALAR], GPU, GPU),
    ],
)
def test_where_it_runs(operands, plainly, propagating):
    assert placement(operands) == plainly
    assert placement(operands, propagate=OTHER) == propagating
