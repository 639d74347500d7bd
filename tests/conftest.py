"""Fixtures that every room's tests share."""

import pytest
import torch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request):
    """Each device of this machine that a test can run on."""
    return torch.device(request.param)


@pytest.fixture
def generator():
    """A seeded source of random numbers, on the CPU."""
    return torch.Generator().manual_seed(20260217)
