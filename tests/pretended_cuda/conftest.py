"""These tests run under `run.py` only, where streams are late in a way that a seed chooses."""

import ctypes
import os

import pytest

PRETENDED = "PRETENDED_CUDA" in os.environ


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="needs the pretended device: tests/pretended_cuda/run.py")
    for item in items:
        if "pretended_cuda" in item.path.parts and not PRETENDED:
            item.add_marker(skip)


@pytest.fixture
def late():
    """`late(seed)`: from now on streams are late as the seed says; 0 is not at all."""
    set_seed = ctypes.CDLL(None).pretended_cuda_seed

    def late(seed):
        set_seed(ctypes.c_uint64(seed))

    yield late
    late(int(os.environ["PRETENDED_CUDA_SEED"]))
