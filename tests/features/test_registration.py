"""RegisteredMemory: when memory is registered with CUDA, and until when. CUDA is a double here."""

import contextlib
import gc
import os
import threading
import weakref
from unittest import mock

import numpy as np
import pytest
import torch

from dataeff import _core
from dataeff.features.registration import RegisteredMemory
from dataeff.features.rows import HostRows
from dataeff.features.stats import Account
from dataeff.features.stored import StoredRows
from dataeff.memory.cuda import POOLED_STREAMS

GPU = torch.device("cuda", 0)


@pytest.fixture
def registered(monkeypatch):
    """The doubles of `_core.HostRegistration` that have been made, in order."""
    made = []

    def register(*span):
        made.append(mock.Mock(span=span, closed=False))
        made[-1].close = lambda one=made[-1]: setattr(one, "closed", True)
        return made[-1]

    monkeypatch.setattr("dataeff.features.registration.bad_indices", mock.Mock())
    monkeypatch.setattr(_core, "HostRegistration", register)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return made


def test_memory_forked_after_cuda_is_the_cpus_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with pytest.raises(RuntimeError, match=r"forked after CUDA .* CPU tensor, or .*'spawn'"):
        RegisteredMemory(torch.ones(3)).register(torch.device("cuda"))


def test_a_child_leaves_its_parents_registration_alone():
    memory = RegisteredMemory(torch.ones(3))
    closed = []
    memory._registration = type("Registration", (), {"close": lambda self: closed.append(1)})()
    memory._devices.add(torch.device("cuda"))  # would be synchronised, which a child cannot
    memory._pid = os.getppid()
    memory.release()
    assert closed == [] and not memory._devices


def test_registering_makes_at_once_what_a_captured_graph_may_not_allocate(monkeypatch):
    made, gpu = [], torch.device("cuda", 0)
    monkeypatch.setattr("dataeff.features.registration.bad_indices", made.append)
    monkeypatch.setattr(_core, "HostRegistration", lambda *span: mock.Mock())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    memory = RegisteredMemory(torch.ones(3))
    for _ in range(2):
        memory.register(gpu)
    assert made == [gpu]
    memory.release()


def test_memory_that_the_tensor_gives_up_stays_until_it_is_registered_no_more(registered):
    array = np.ones(3, np.float32)
    alive, x = weakref.ref(array), torch.from_numpy(array)
    memory = RegisteredMemory(x)
    memory.register(GPU)
    del array
    x.data = torch.zeros(5)  # as sharing with another process, or a cast of a module, does
    gc.collect()
    assert alive() is not None
    memory.register(GPU)
    assert [(one.span[1], one.closed) for one in registered] == [(12, True), (20, False)]
    gc.collect()
    assert alive() is None
    memory.release()
    assert registered[1].closed


def test_a_release_waits_for_the_devices_that_read_the_memory(registered, monkeypatch):
    awaited = []
    monkeypatch.setattr(
        torch.cuda, "synchronize", lambda device: awaited.append((device, registered[0].closed))
    )
    memory = RegisteredMemory(torch.ones(3))
    memory.register(GPU)
    memory.release()
    assert awaited == [(GPU, False)] and registered[0].closed


class OnGpu:
    """An index on a GPU, as far as rows look at it before they gather."""

    is_cuda, device = True, GPU

    def numel(self):
        return 1


@pytest.mark.parametrize("kind", ["plain", "sorted"])
def test_a_release_waits_until_a_gather_is_under_way(registered, monkeypatch, kind):
    x = torch.ones(4, 2)
    rows = HostRows(x) if kind == "plain" else StoredRows(x, None, None, sort=False)
    other = threading.Thread(target=rows.release)

    def gather(*arguments):
        other.start()
        other.join(0.2)  # the kernel would read memory that is gone
        assert other.is_alive() and not registered[0].closed
        return x[:1]

    monkeypatch.setattr("dataeff.features.rows.gather", gather)
    monkeypatch.setattr("dataeff.features.stored.gather_stored", gather)
    monkeypatch.setattr(rows, "_sorts", lambda index: False, raising=False)
    rows.gather(OnGpu(), None, Account())
    other.join(30)
    assert not other.is_alive() and registered[0].closed and len(registered) == 1


@pytest.fixture
def capturing(monkeypatch):
    """Whether the current stream is being captured, as torch is made to say.

    The second says so of the last stream of torch's pool, whoever asks.
    """
    state, made, current = [False, False], [], [None]

    def stream(device, priority):
        assert device == GPU
        made.append(priority)
        return len(made) % (2 * POOLED_STREAMS)

    @contextlib.contextmanager
    def on(stream):
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(
        torch.cuda,
        "is_current_stream_capturing",
        lambda: state[current[-1] == 0] if current[-1] in (None, 0) else False,
    )
    return state


def test_a_capture_registers_nothing(registered, capturing):
    memory = RegisteredMemory(torch.ones(3))
    capturing[0] = True
    with pytest.raises(RuntimeError, match=r"call register\(\), before the capture"):
        memory.register(GPU)
    assert registered == []
    capturing[0] = False
    memory.register(GPU)
    capturing[0] = True
    memory.register(GPU)  # is there already
    with pytest.raises(RuntimeError, match="before the capture"):
        memory.register(torch.device("cuda", 1))  # which has no memory for its reports yet
    capturing[0] = False
    memory.release()


@pytest.mark.parametrize("thread", ["own", "another"])
def test_memory_collected_during_a_capture_is_released_after_it(
    registered, capturing, monkeypatch, thread
):
    """A wait for the device in `__del__` would end the capture that the collector fell into."""
    awaited, which = [], thread != "own"

    def synchronize(device):
        assert not any(capturing)
        awaited.append(device)

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    array = np.ones(3, np.float32)
    alive, x = weakref.ref(array), torch.from_numpy(array)
    memory = RegisteredMemory(x)
    memory.register(GPU)
    capturing[which] = True
    del memory, x, array
    gc.collect()
    assert not registered[0].closed and alive() is not None and awaited == []
    capturing[which] = False
    other = RegisteredMemory(torch.ones(5))
    other.register(GPU)
    gc.collect()
    assert registered[0].closed and alive() is None and awaited == [GPU]
    other.release()
