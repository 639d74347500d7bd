"""These tests run under `run.py` only, where streams are late in a way that a seed chooses."""

import contextlib
import ctypes
import os
import threading

import pytest
import torch

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


@contextlib.contextmanager
def _held(stream=None):
    stream, end = stream or torch.cuda.current_stream(), threading.Event()
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: end.wait(60))
    launch = ctypes.CDLL(None).cudaLaunchHostFunc
    launch.argtypes = [ctypes.c_void_p] * 3
    with torch.cuda.device(stream.device):
        assert launch(stream.cuda_stream, call, None) == 0
    try:
        yield
    finally:
        end.set()
        stream.synchronize()


@pytest.fixture
def held():
    """`with held(stream):` what the block queues on the stream runs after the block."""
    return _held


@pytest.fixture
def cufile(fake_cufile, monkeypatch):
    """A cuFile whose device memory is the pretended device's."""
    for module in ("cufile", "engine"):
        name = f"dataeff.storage.{module}.cufile_library"
        monkeypatch.setattr(name, lambda: fake_cufile.path)
    return fake_cufile
