"""Parameter initialisation as PyTorch Geometric's relational layers do it."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def glorot(value: Tensor | None) -> None:
    """Uniform in ±sqrt(6 / (fan in + fan out)) of the last two axes (Glorot and Bengio, 2010)."""
    if value is not None:
        bound = math.sqrt(6.0 / (value.size(-2) + value.size(-1)))
        with torch.no_grad():
            value.uniform_(-bound, bound)


def zeros(value: Tensor | None) -> None:
    """All zero."""
    if value is not None:
        torch.nn.init.zeros_(value)
