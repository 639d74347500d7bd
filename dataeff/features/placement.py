"""Where an operation with a unified operand runs: the placement rule, as a function of devices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

CPU = torch.device("cpu")


class Operand(NamedTuple):
    """What the rule looks at in a tensor operand."""

    device: torch.device
    dim: int
    unified: bool


def placement(operands: Iterable[Operand], propagate: torch.device | None = None) -> torch.device:
    """The device that an operation runs on, and so where its result is.

    1. Some operand is on a GPU: there. The GPU can read unified memory; the CPU cannot read the
       GPU's.
    2. Otherwise on the CPU;
    3. but on `propagate`, if that is given and no operand is a plain CPU tensor with dimensions.

    CPU scalars (no dimensions) and Python numbers decide nothing: either device takes them.

    Source: PyTorch-Direct (arXiv 2101.07956); its unified tensors follow rule 3 when they are made
    to propagate.

    Args:
        operands: every tensor among the arguments.
        propagate: the GPU that operations on unified tensors alone run on; default: the CPU.
    """
    plain = [operand for operand in operands if not operand.unified]
    for operand in plain:
        if operand.device.type != "cpu":
            return operand.device
    if propagate is not None and not any(operand.dim for operand in plain):
        return propagate
    return CPU
