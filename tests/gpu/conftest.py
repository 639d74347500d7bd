"""What tests of CUDA share."""

import contextlib
import warnings

import pytest
import torch


@contextlib.contextmanager
def _waits_are_errors():
    try:
        with warnings.catch_warnings():
            # Said once a process, after the mode is set: as an error it would leave it set.
            warnings.filterwarnings("ignore", "Synchronization debug mode", UserWarning)
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def waits_are_errors():
    """`with waits_are_errors():` has torch refuse what makes the host wait for the device."""
    return _waits_are_errors
