"""The order in which a device's memory is used and given back, when a model runs on two streams.

What was saved on one stream is wanted there; that backward fetches it early from another stream, or
that a hook of a third one settles it, must not matter.
"""

import contextlib
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch
from device_double import Device, Stream

from dataeff import _core
from dataeff.memory import HostBuffer
from dataeff.offload import streams
from dataeff.offload.direct import DirectCopy
from dataeff.offload.disk import SpillSet
from dataeff.offload.staging import DeviceCopy, PinnedPool
from dataeff.offload.streams import CudaStreams

NBYTES = 1 << 16


class Unpinned(CudaStreams):
    """Host memory is good enough for a device that is host memory."""

    def pin(self, buffer):
        pass

    def unpin(self, buffer):
        pass

    def share(self, memory):
        pass  # host memory is nobody's stream's


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch)


@pytest.fixture
def owners(device, monkeypatch):
    """The stream that was current at each allocation of so many bytes."""
    empty, found = torch.empty, []

    def noted(*sizes, **options):
        if sizes == (NBYTES,):
            found.append(device.current)
        return empty(*sizes, **options)

    monkeypatch.setattr(torch, "empty", noted)
    return found


def saved_on(device, stream):
    stream.now_ms = 50.0  # what made the bytes, and what used the memory before them, runs so long
    return device.on(stream)


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_bytes_come_back_on_the_stream_that_saved_them(device, owners, tmp_path, tier):
    side, theirs = Unpinned(torch.device("cpu")), Stream()
    storage = torch.arange(NBYTES).to(torch.uint8).untyped_storage()
    expected = bytes(storage)
    pool, spills = PinnedPool(8 * NBYTES, side), SpillSet([tmp_path])
    at_once = SimpleNamespace(submit=lambda function, *args: _done(function(*args)))
    spill = None if tier == "host" else (spills, at_once)
    with saved_on(device, theirs):
        copy = DeviceCopy(storage, pool, side, spill, checksum=False)
    assert copy._copied.begin.event.at_ms == 50.0
    device.reached_ms = 1e6
    copy.finish()
    copy.settle(wait=True)
    theirs.now_ms = 90.0
    load = copy.load()  # while another stream is current
    load.finish()
    assert owners == [theirs]
    assert load.event.stream is theirs and load.event.begin.event.at_ms == 90.0
    theirs.now_ms = device.compute.now_ms = 0.0
    load.arrival.order()
    assert theirs.now_ms == device.compute.now_ms == load.event.end.event.at_ms
    assert bytes(load.storage) == expected
    copy.release()
    pool.close()
    spills.close()


def test_a_thread_that_waits_for_a_device_starts_no_other(device, monkeypatch):
    """A new thread has the first for its current one, where CUDA may start a context for a call."""
    chosen, during = [], []
    side = Unpinned(torch.device("cuda", 1))
    device.current.device = torch.device("cuda", 1)
    event = side.mark()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    @contextlib.contextmanager
    def choose(which):
        chosen.append(which)
        yield
        chosen.pop()

    monkeypatch.setattr(torch.cuda, "device", choose)
    monkeypatch.setattr(event.end.event, "synchronize", lambda: during.extend(chosen))
    event.synchronize()
    assert during == [torch.device("cuda", 1)]


def test_bytes_that_go_by_cufile_come_back_on_the_stream_that_saved_them(device, owners, tmp_path):
    side, theirs = Unpinned(torch.device("cpu")), Stream()
    storage = torch.arange(NBYTES).to(torch.uint8).untyped_storage()
    begun = []
    written = SimpleNamespace(
        done=lambda: True, finish=lambda: (0, 1), release=lambda: None, check_read=lambda read: None
    )
    path = SimpleNamespace(
        write=lambda after, source, nbytes: _done(begun.append(after) or written),
        read=lambda after, place, target: _done(begun.append(after)),
    )
    with saved_on(device, theirs):
        copy = DirectCopy(storage, path, side)
    copy.finish()
    theirs.now_ms = 90.0
    copy.load()
    assert owners == [theirs]
    assert [after.end.event.at_ms for after in begun] == [50.0, 90.0]
    assert begun[1].stream is theirs


def _done(result):
    future = Future()
    future.set_result(result)
    return future


def test_what_is_pinned_asks_first_for_memory_of_the_node_that_the_device_hangs_on(
    device, monkeypatch
):
    asked = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(streams, "node_of", lambda device: 3)
    monkeypatch.setattr(_core, "cuda_built", True)
    monkeypatch.setattr(_core, "HostRegistration", lambda *span: asked.append(("pin", *span)))
    monkeypatch.setattr(_core, "prefer_node", lambda *wish: asked.append(("prefer", *wish)))
    with HostBuffer(NBYTES) as buffer:
        CudaStreams(torch.device("cpu")).pin(buffer)
        assert asked == [
            ("prefer", buffer.data_ptr, NBYTES, 3),
            ("pin", buffer.data_ptr, NBYTES),
        ]
