"""A pass of many storages costs each of them what it costs in a pass of few."""

import sys

import pytest
import torch
from torch import nn

from dataeff.offload import ActivationOffload
from dataeff.storage import FaultPlan

FEW, MANY = 200, 800


def num_calls(run):
    """Functions that Python enters in `run`: work that no clock and no other process disturbs."""
    entered = 0

    def count(frame, event, argument):
        nonlocal entered
        entered += event == "call"

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return entered


def chain(length):
    """A storage of 20 KB for each of `length` operations."""
    h = torch.ones(5000).requires_grad_() * 1.0
    for _ in range(length):
        h = torch.sin(h)
    return h.sum()


def slices(length):
    """A handle on one storage for each of `length` operations."""
    h = torch.ones(64)
    for row in (torch.ones(length, 64).requires_grad_() * 1.0).unbind(0):
        h = torch.sin(row) + h
    return h.sum()


@pytest.mark.parametrize("graph", [chain, slices])
@pytest.mark.parametrize("delay_s", [0.0, 1e-3], ids=["fast", "slow"])
def test_work_per_storage_does_not_grow_with_their_number(tmp_path, graph, delay_s):
    def work(length):
        disk = FaultPlan().add("any", delay_s=delay_s)
        offload = ActivationOffload(
            nn.Linear(1, 1), tmp_path, min_bytes=0, in_flight_bytes=1 << 30,
            prefetch_bytes=1 << 30, faults=disk,
        )  # fmt: skip
        with offload:
            value = graph(length)
            if not delay_s:  # nothing is in memory, so that all is prefetched at once
                offload._cache.drain()
            value.backward()
            del value
            calls = num_calls(lambda: step(offload, length, bool(delay_s)))
        offload.close()
        return calls / length

    def step(offload, length, in_flight):
        value = graph(length)
        if not in_flight:
            offload._cache.drain()
        value.backward()

    assert work(MANY) < 1.5 * work(FEW)


@pytest.mark.parametrize("ends", [False, True], ids=["nothing ends", "all ends"])
@pytest.mark.parametrize("kind", ["host", "disk"])
def test_work_per_storage_of_a_device_does_not_grow(tmp_path, late_streams, kind, ends):
    """At two paces that no load of the machine changes.

    What a hook does depends on how many of the 16 transfers that it looks at have ended, so two
    passes can be compared only if nothing ends in either, or all has before backward begins and
    few are read at a time.
    """

    def work(length):
        tier = {"host_bytes": 1 << 26} if kind == "host" else {"spill": tmp_path}
        late_streams.delay_s = 0.0
        offload = ActivationOffload(
            nn.Linear(1, 1), **tier, min_bytes=0, in_flight_bytes=1 << 30,
            prefetch_bytes=1 << 16 if ends else 1 << 30, streams_of=lambda device: late_streams,
        )  # fmt: skip
        values = []
        with offload:
            late_streams.open.clear()
            calls = num_calls(lambda: values.append(chain(length)))
            if ends:
                late_streams.open.set()
                offload._cache.drain()
            calls += num_calls(values.pop().backward)
            late_streams.open.set()
        offload.close()
        report = offload.report()
        assert (report.bytes_read > 0) == ends and (report.bytes_forwarded > 0) != ends
        return calls / length

    assert work(MANY) < 1.5 * work(FEW)


def test_a_buffer_that_every_step_changes_leaves_nothing_behind(tmp_path):
    state, scale = torch.ones(8192), torch.ones(8192, requires_grad=True)
    offload = ActivationOffload(
        nn.Linear(1, 1), tmp_path, min_bytes=0, in_flight_bytes=0, prefetch_bytes=0
    )
    for _ in range(40):
        with offload:
            value = (scale * state).sum()
            offload._cache.drain()
            value.backward()
        state.add_(1)
    assert offload.report().bytes_written >= 40 * state.nbytes
    assert len(offload._cache._table.find(state.untyped_storage()._cdata).saved) < 10
    offload.close()
