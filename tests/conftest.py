"""Fixtures that every room's tests share."""

import gc
import getpass
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from multiprocessing.util import Finalize
from pathlib import Path

# Before torch maps libgomp. Two processes whose threads spin for each other's work on two cores
# run tests of many small operations up to 40 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))  # for the doubles

# A run that a script started in the background inherits an ignored SIGINT, and so would every
# process it starts: the tests of Ctrl-C need it as a terminal leaves it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long a draw or an example takes says how busy the machine is, not whether a test passes. What
# decides about a change draws the same examples each time; everybody else looks for new ones.
settings.register_profile(
    "untimed",
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("untimed")


def pytest_configure(config):
    """Gives the run a temporary folder of its own: PyG and torchrun leave files in theirs.

    What pytest keeps of the last runs, and what Inductor keeps for the next one, stay where they
    were.
    """
    config.add_cleanup(gc.unfreeze)  # libraries count what is left of theirs at exit
    if hasattr(config, "workerinput"):  # a process of xdist's: it has the folder of the first
        return
    usual = tempfile.gettempdir()
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", usual)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{usual}/torchinductor_{getpass.getuser()}")
    own = tempfile.mkdtemp(prefix="dataeff-")
    os.environ["TMPDIR"], tempfile.tempdir = own, own

    def leave():
        os.environ["TMPDIR"], tempfile.tempdir = usual, usual

    config.add_cleanup(leave)
    # After multiprocessing has removed its own folder in there, which has the priority -100.
    Finalize(None, shutil.rmtree, (own, True), exitpriority=-200)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish():
    """Ends a worker whose CUDA context an error has ended, for xdist to start another.

    Every later test of that process would fail with the same error, whatever it tests.
    """
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(70)


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request):
    """Each device of this machine that a test can run on."""
    return torch.device(request.param)


@pytest.fixture
def generator():
    """A seeded source of random numbers, on the CPU."""
    return torch.Generator().manual_seed(20260217)


@pytest.fixture
def cuda_double(monkeypatch):
    """The streams of `torch.cuda`, replaced by some that write down what they are told."""
    from cuda_double import Cuda

    return Cuda(monkeypatch)


@pytest.fixture(scope="session")
def cuda_kernels(tmp_path_factory):
    """The core's CUDA kernels and their launches, compiled for the host."""
    from cuda_kernels import build

    return build(tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="session")
def cufile_path(tmp_path_factory):
    """Path of a libcufile that makes system calls."""
    from fake_cufile import build

    return build(tmp_path_factory.mktemp("cufile"))


@pytest.fixture
def fake_cufile(cufile_path):
    """That library's counts and switches; these are off again afterwards."""
    from fake_cufile import FakeCufile

    fake = FakeCufile(cufile_path)
    yield fake
    fake.reset()
    gc.collect()
    assert fake.num_open == 0 and fake.num_registered == 0  # everything was given back


@pytest.fixture(scope="session")
def rank_context():
    """Starts ranks out of a process of one thread that has torch loaded.

    A fork of this process may catch a lock of another of its threads, and the rank then waits for
    it for ever; a spawn imports torch anew for every rank.
    """
    context = multiprocessing.get_context("forkserver")
    # DistributedDataParallel imports torch's compiler: seconds, here once for all ranks.
    context.set_forkserver_preload(["torch._dynamo", "torch.distributed", "dataeff"])
    return context


@pytest.fixture(autouse=True, scope="module")
def _garbage_is_looked_for_in_what_is_new():
    """All that the tests import is a million objects, which every collection would walk."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _back_on_the_default_stream():
    """A capture that fails leaves its own stream the current one, in torch 2.11."""
    yield
    if torch.cuda.is_initialized():
        torch.cuda.set_stream(torch.cuda.default_stream())
