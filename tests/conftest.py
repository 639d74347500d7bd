"""Fixtures that every room's tests share."""

import signal

import pytest
import torch

# A run that a script started in the background inherits an ignored SIGINT, and so would every
# process it starts: the tests of Ctrl-C need it as a terminal leaves it.
signal.signal(signal.SIGINT, signal.default_int_handler)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request):
    """Each device of this machine that a test can run on."""
    return torch.device(request.param)


@pytest.fixture
def generator():
    """A seeded source of random numbers, on the CPU."""
    return torch.Generator().manual_seed(20260217)
