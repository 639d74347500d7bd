"""Waits and transfers of a device are told by its own time stamps, once it has reached them."""

import json

import pytest
import torch
from device_double import Device, Slow

from dataeff.ledger import Ledger
from dataeff.offload.account import Account
from dataeff.offload.moments import HostMoment, span_of
from dataeff.offload.streams import CudaStreams

DEVICE = torch.device("cpu")  # what the doubles are given instead of one


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch)


def test_compute_that_stands_still_is_seen_although_the_host_never_waits(device):
    streams = CudaStreams(DEVICE)
    ledger = Ledger(max_spans=10)
    account = Account(ledger, lambda _: streams.moment())
    device.compute.now_ms = 10.0
    copy = streams.copy_in(None, Slow(device, 5.0))  # from 10 to 15
    device.compute.now_ms = 12.0
    with account.exposed("wait for load", DEVICE):
        streams.order_after(copy)
    account.moved("load", copy.span, 100)
    account.settle()
    assert not ledger.spans and account.counters.exposed_wait_s == 0
    device.reached_ms = 14.0
    account.settle()
    assert not ledger.spans
    device.reached_ms = 15.0
    account.settle()
    assert account.counters.exposed_wait_s == pytest.approx(0.003)
    assert account.counters.transfer_s == pytest.approx(0.005)
    wait, load = ledger.spans
    assert (wait.track, wait.name, load.nbytes) == ("wait", "wait for load", 100)
    assert wait.end_ns == load.end_ns
    account.settle()
    assert len(ledger.spans) == 2


def test_a_copy_that_hid_behind_compute_was_not_waited_for(device):
    streams = CudaStreams(DEVICE)
    account = Account(Ledger(), lambda _: streams.moment())
    copy = streams.copy_out(None, Slow(device, 5.0))
    device.compute.now_ms = 20.0
    with account.exposed("wait for store", DEVICE):
        streams.order_after(copy)
    device.reached_ms = 20.0
    account.moved("store", copy.span, 1)
    account.settle()
    assert account.counters.exposed_wait_s == 0
    assert account.counters.transfer_s == pytest.approx(0.005)


def test_what_a_device_never_reaches_is_looked_at_now_and_then(device):
    asked = []
    account = Account(Ledger(), lambda _: HostMoment())
    for _ in range(2000):
        account.moved("store", lambda: asked.append(1), 1)
    assert account.counters.transfer_s == 0
    assert len(asked) < 15_000  # not all of them each time


def test_from_the_host_to_the_device(device):
    streams = CudaStreams(DEVICE)
    streams.moment()  # starts the clock, which waits for the device
    begin = HostMoment()
    device.compute.now_ms = 1000.0
    end = streams.moment()
    assert span_of(begin, end) is None
    device.reached_ms = 1000.0
    begin_ns, end_ns = span_of(begin, end)
    assert begin_ns == begin.ns()
    assert 0.9e9 < end_ns - begin_ns < 1.1e9


def test_a_moment_of_the_host_is_never_after_its_end():
    begin, end = HostMoment(), HostMoment()
    assert span_of(end, begin) == (begin.ns(), begin.ns())


def test_spans_that_overlap_are_drawn_in_rows_of_their_own(tmp_path):
    ledger = Ledger(max_spans=10)
    for track, start_us, end_us in (
        ("store", 0, 30), ("store", 10, 20), ("load", 5, 40), ("store", 15, 50), ("store", 20, 25),
        ("store", 30, 35),
    ):  # fmt: skip
        ledger.span(track, track, start_us * 1000, end_us * 1000, end_us - start_us)
    ledger.chrome_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    assert list(names.values()) == ["store", "store 2", "store 3", "load"]
    rows = {}
    for event in events:
        if event["ph"] == "X":
            assert event["dur"] == event["args"]["nbytes"]
            rows.setdefault(names[event["tid"]], []).append(
                (event["ts"], event["ts"] + event["dur"])
            )
    assert rows == {
        "store": [(0, 30), (30, 35)], "store 2": [(10, 20), (20, 25)], "store 3": [(15, 50)],
        "load": [(5, 40)],
    }  # fmt: skip
