"""Host tier, disk by way of staging, and both: over a device whose copies happen late."""

import errno
import gc
import multiprocessing
import sys
import threading
import warnings
import weakref

import pytest
import torch
from torch import nn

from dataeff.ledger import Tier
from dataeff.offload import ActivationOffload
from dataeff.offload.incoming import Incoming
from dataeff.offload.staging import DeviceCopy
from dataeff.storage import FaultPlan

MIB = 1 << 20


@pytest.fixture
def offload_of(tmp_path, late_streams):
    made = []

    def make(model, disk=True, **kwargs):
        options = {"min_bytes": 0, "streams_of": lambda device: late_streams, **kwargs}
        made.append(ActivationOffload(model, tmp_path if disk else None, **options))
        return made[-1]

    yield make
    for offload in made:
        offload.close()
    assert late_streams.pinned == 0


def twice(offload, loss):
    for _ in range(2):
        with offload:
            loss().backward()


KINDS = {
    "host": {"disk": False, "host_bytes": 64 * MIB},
    "disk": {"staging_bytes": 64 * MIB},
    "disk through little staging": {"staging_bytes": MIB // 2},
    "host, then disk": {"host_bytes": MIB // 2, "staging_bytes": MIB // 2},
    "host too small": {"disk": False, "host_bytes": MIB // 2},
}


def test_what_is_still_on_its_way_is_waited_for_by_all_who_unpack_it(offload_of, late_streams):
    """Also when the first of them has given it up, and holds it: the next may be on its stream."""
    offload = offload_of(nn.Identity(), disk=False, host_bytes=MIB)
    with offload:
        y = torch.zeros(1 << 14, requires_grad=True).exp()
    node, orders = y.grad_fn, []
    offload._cache.drain()
    del y
    offload._cache.poll()
    late_streams.order_after = orders.append
    late_streams.open.clear()
    try:
        first, second = node._saved_result, node._saved_result
    finally:
        late_streams.open.set()
    assert first.data_ptr() == second.data_ptr() and len(orders) == 2


def test_what_is_open_at_the_interpreters_exit_is_closed(gpt_and_loss, offload_of, monkeypatch):
    """Executors have ended by then, and take nothing more."""
    model, loss = gpt_and_loss
    offload = offload_of(model, **KINDS["disk"])
    twice(offload, loss)
    offload._cache.drain()
    monkeypatch.setattr("concurrent.futures.thread._shutdown", True)
    offload.close()


@pytest.mark.parametrize("kind", ["host", "disk"])
def test_after_a_lost_device_all_is_given_back(offload_of, late_streams, monkeypatch, kind):
    """Whatever is asked of a device raises then, for good."""
    model, x = make_chain()
    offload = offload_of(model, in_flight_bytes=64 * MIB, **KINDS[kind])
    spills = offload._tiers._spills

    def lost(*_):
        raise RuntimeError("the device is lost")

    late_streams.open.clear()
    with pytest.raises(ValueError, match="by the user"), offload:
        loss = model(x)
        monkeypatch.setattr(late_streams, "order_after", lost)
        for ask in ("query", "synchronize"):
            monkeypatch.setattr(type(late_streams.mark()), ask, lost)
        raise ValueError("what is seen by the user")
    late_streams.open.set()
    with pytest.raises(RuntimeError, match="the device is lost"):
        offload.close()
    offload.close()
    assert spills is None or spills.files[0].fd == -1
    assert not model._forward_pre_hooks and loss.requires_grad


@pytest.mark.filterwarnings("ignore:activation offload. a tier is full")
@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("in_flight_bytes", [None, 0])
def test_gradients_are_bit_identical(
    gpt_and_loss, offload_of, gradients, assert_same, kind, in_flight_bytes
):
    model, loss = gpt_and_loss

    def plainly():
        loss().backward()
        loss().backward()

    expected = gradients(model, plainly)
    offload = offload_of(model, in_flight_bytes=in_flight_bytes, **KINDS[kind])
    assert_same(gradients(model, lambda: twice(offload, loss)), expected)
    gc.collect()
    offload._cache.drain()
    report = offload.report()
    assert (report.bytes_host > 0) == ("host" in kind)
    assert (report.bytes_written > 0) == ("disk" in kind)
    assert (report.bytes_failed > 0) == (kind == "host too small")
    assert report.saved_bytes == 0


def make_chain(layers=8):
    model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(layers)])
    return model, torch.randn(1024, 256)  # each activation is 1 MiB


def test_host_tier_frees_the_device_and_is_counted(offload_of):
    model, x = make_chain()
    offload = offload_of(model, disk=False, host_bytes=16 * MIB, in_flight_bytes=2 * MIB)
    with offload:
        loss = model(x).sum()
        offload._cache.drain()
        report = offload.report()
        assert report.bytes_host == 7 * MIB == report.saved_bytes
        assert report.peak_held_bytes <= 3 * MIB < report.peak_saved_bytes
        assert report.peak_host_bytes == 7 * MIB and report.peak_disk_bytes == 0
        loss.backward()
    report = offload.report()  # on a busy machine a stream may hold on to what it copied
    assert report.bytes_read + report.bytes_forwarded == 7 * MIB
    assert report.saved_bytes == 0


def test_staging_is_given_back_when_written(offload_of):
    model, x = make_chain()
    offload = offload_of(model, staging_bytes=2 * MIB)
    with offload:
        loss = model(x).sum()
        offload._cache.drain()
        gc.collect()
        offload._cache._tiers._staging.wait_for_copies()
        assert offload.report().saved_bytes == 0  # everything is on disk
        assert offload.report().bytes_written == 7 * MIB
        loss.backward()


def test_full_host_tier_spills_over_to_disk(offload_of):
    model, x = make_chain()
    offload = offload_of(model, host_bytes=3 * MIB)
    with offload:
        loss = model(x).sum()
        offload._cache.drain()
    assert (offload.report().bytes_host, offload.report().bytes_written) == (3 * MIB, 4 * MIB)
    loss.backward()
    assert offload.report().bytes_failed == 0


def test_retained_graph_reads_again(gpt_and_loss, offload_of, gradients, assert_same):
    model, loss = gpt_and_loss

    def run(offload=None):
        if offload is None:
            value = loss()
        else:
            with offload:
                value = loss()
                offload._cache.drain()
        value.backward(retain_graph=True)
        value.backward()

    expected = gradients(model, run)
    offload = offload_of(model)
    assert_same(gradients(model, lambda: run(offload)), expected)
    assert offload.report().bytes_read > 1.5 * offload.report().bytes_written


@pytest.fixture
def no_collector():
    """What dies must die when its last user goes, not when the collector finds a cycle."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_failed_write_leaves_the_bytes_in_host_memory(
    no_collector, gpt_and_loss, offload_of, gradients, assert_same
):
    model, loss = gpt_and_loss
    expected = gradients(model, lambda: loss().backward())
    faults = FaultPlan().add("write", error=errno.EIO, nth=2, every=3)
    offload = offload_of(model, faults=faults)

    def step():
        with offload:
            value = loss()
            offload._cache.drain()
            value.backward()

    with pytest.warns(RuntimeWarning, match="failing"):
        assert_same(gradients(model, step), expected)
    offload._cache.drain()
    assert offload.report().num_store_errors > 1
    assert offload.report().saved_bytes == 0


def test_failed_read_raises_with_file_and_offset(offload_of, tmp_path):
    model, x = make_chain()
    faults = FaultPlan().add("read", error=errno.EIO)
    offload = offload_of(model, faults=faults)
    with offload:
        loss = model(x).sum()
        offload._cache.drain()
        with pytest.raises(OSError, match=r"at offset \d+ of the spill file") as caught:
            loss.backward()
    assert str(tmp_path) in str(caught.value)
    del loss
    gc.collect()
    offload._cache.drain()
    assert offload.report().saved_bytes == 0


def test_corruption_through_staging_is_found(offload_of):
    model, x = make_chain()
    offload = offload_of(model, faults=FaultPlan().add("read", corrupt=True), checksum=True)
    with offload:
        loss = model(x).sum()
        offload._cache.drain()
        with pytest.raises(OSError, match="checksum mismatch"):
            loss.backward()


def test_graph_that_dies_early_gives_everything_back(offload_of):
    model, x = make_chain()
    offload = offload_of(model, faults=FaultPlan().add("write", delay_s=0.05))
    for _ in range(2):
        with offload:
            model(x)
    gc.collect()
    offload._cache.drain()
    tiers = offload._cache._tiers
    tiers._staging.wait_for_copies()
    assert tiers.used_nbytes == 0 and tiers._spills.files[0].used_nbytes == 0


def test_host_tensors_need_a_disk():
    model = nn.Linear(64, 64)
    offload = ActivationOffload(model, host_bytes=MIB, min_bytes=0)
    with offload:
        model(torch.randn(512, 64)).exp().sum().backward()
    report = offload.report()
    assert report.bytes_host == 0 and "host memory already" in report.reason


class SlowWayBack:
    """Notes which copies into the device somebody waits for, all of them slow."""

    def __init__(self, streams):
        self.streams, self.incoming, self.waited_for = streams, [], []

    def __getattr__(self, name):
        return getattr(self.streams, name)

    def copy_in(self, source, target):
        self.incoming.append(self.streams.copy_in(source, target))
        return self.incoming[-1]

    def order_after(self, event):
        if event in self.incoming and event not in self.waited_for:
            self.waited_for.append(event)
        self.streams.order_after(event)


@pytest.mark.parametrize("kind", ["host", "disk"])
def test_nobody_waits_for_a_prefetch_before_it_is_wanted(offload_of, late_streams, kind):
    """A stream that waits for what was only sent for early computes nothing beside the copy."""
    late_streams.delay_s = 0.05
    model, x = make_chain()
    streams = SlowWayBack(late_streams)
    offload = offload_of(
        model, prefetch_bytes=4 * MIB, streams_of=lambda device: streams, **KINDS[kind]
    )
    counts = []

    def note(grad):
        # Waits go in the order of the tape: one for each tensor that was unpacked, no more.
        counts.append((offload._cache.counters.num_unpacked, len(streams.waited_for)))

    with offload:
        y = x
        for layer in model:
            y = layer(y)
            y.register_hook(note)
        loss = y.sum()
        offload._cache.drain()
        loss.backward()
    assert len(streams.incoming) >= 5
    assert all(waits <= unpacked for unpacked, waits in counts), counts


def test_memory_of_a_load_that_nobody_wants_is_kept_until_it_has_arrived(offload_of, late_streams):
    model, x = make_chain()
    offload = offload_of(model, disk=False, host_bytes=16 * MIB, prefetch_bytes=3 * MIB)
    with offload:
        loss = model(x).sum()
        offload._cache.drain()
        arrive = threading.Event()
        late_streams.queues["in"].submit(arrive.wait)
        offload.expect_backward()  # sends for the last ones
    cache = offload._cache
    memory = [weakref.ref(saved.load) for saved in cache._incoming._loading]
    assert len(memory) == 3
    del loss
    gc.collect()
    cache.poll()
    assert all(load() is not None for load in memory)  # it is still being written
    arrive.set()
    cache.drain()
    cache.poll()
    gc.collect()
    assert not any(load() is not None for load in memory)
    assert offload.report().saved_bytes == 0


@pytest.mark.filterwarnings("ignore:activation offload. a tier is full")
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_transfers_take_as_long_as_the_device_says(gpt_and_loss, offload_of, late_streams, kind):
    model, loss = gpt_and_loss
    offload = offload_of(model, **KINDS[kind])
    twice(offload, loss)
    num_copies = late_streams.num_out + late_streams.num_in
    offload._cache.drain()
    report = offload.report()
    assert num_copies > 8
    assert report.transfer_s >= num_copies * late_streams.delay_s
    assert not offload._cache.account._pending


def test_a_queued_write_is_cancelled_when_backward_comes_first(
    offload_of, late_streams, until_running
):
    """The device's copy cannot be stopped; the write that waits for it, or behind it, can."""
    late_streams.delay_s = 0.1
    faults = FaultPlan()
    tiers = offload_of(nn.Identity(), faults=faults)._tiers
    storages = [torch.zeros(1 << 16, dtype=torch.uint8).untyped_storage() for _ in range(2)]
    weak = weakref.ref(storages[1])

    def alive():
        return weak() is not None

    first, second = (tiers.store(storage) for storage in storages)
    del storages
    until_running(first._spilled)
    assert second.cancel() and not first.cancel()
    second.release()
    tiers.poll()
    assert alive()  # the device still reads it
    first.finish()
    tiers.drain()
    late_streams.queues["out"].submit(int).result()  # its thread has let go of what it copied
    assert not alive() and faults.num_writes == 1
    first.release()
    tiers.poll()
    assert tiers.used_nbytes == 0 and tiers._spills.files[0].used_nbytes == 0


def test_what_backward_wants_at_once_is_not_written(
    gpt_and_loss, offload_of, gradients, assert_same, late_streams
):
    late_streams.delay_s = 0.02
    model, loss = gpt_and_loss
    expected = gradients(model, lambda: loss().backward())
    faults = FaultPlan()
    offload = offload_of(model, faults=faults, in_flight_bytes=64 * MIB)

    def step():
        with offload:
            loss().backward()

    assert_same(gradients(model, step), expected)
    offload._cache.drain()
    report = offload.report()
    assert report.bytes_cancelled > 0 and report.saved_bytes == 0
    assert offload._tiers.disk_nbytes == report.bytes_written


FULL = {
    "no room": {"spill_bytes": 2 * MIB},
    "worn": {"endurance_tbw": 2.5e-6},
    "failing": {"faults": FaultPlan().add("write", error=errno.EIO, nth=3)},
}


@pytest.mark.filterwarnings("ignore:activation offload")
@pytest.mark.parametrize("why", FULL)
def test_what_is_to_go_to_disk_and_cannot_goes_to_the_host_tier(
    offload_of, gradients, assert_same, why
):
    model, x = make_chain()
    expected = gradients(model, lambda: model(x).sum().backward())
    offload = offload_of(
        model, host_bytes=16 * MIB, staging_bytes=MIB, policy=lambda info: Tier.DISK, **FULL[why]
    )

    def step():
        with offload:
            loss = model(x).sum()
            offload._cache.drain()
            loss.backward()

    assert_same(gradients(model, step), expected)
    offload._cache.drain()
    report = offload.report()
    # One that fails when it is written stays where it was to be written from: staging is full then.
    assert report.bytes_failed == (0 if why == "worn" else MIB)
    assert report.bytes_host == 5 * MIB - report.bytes_failed
    assert report.bytes_written == 2 * MIB and report.bytes_capped == report.saved_bytes == 0


def test_a_prefetch_for_which_there_is_no_memory_waits_until_it_is_wanted(
    gpt_and_loss, offload_of, gradients, assert_same, monkeypatch
):
    model, loss = gpt_and_loss
    expected = gradients(model, lambda: loss().backward())
    offload = offload_of(model, disk=False, host_bytes=64 * MIB)
    prefetch, load, early, refused = Incoming.prefetch, DeviceCopy.load, [], []

    def noted(self, tape):
        early.append(tape)
        prefetch(self, tape)
        early.pop()

    def scarce(self):
        if early:
            refused.append(self)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return load(self)

    monkeypatch.setattr(Incoming, "prefetch", noted)
    monkeypatch.setattr(DeviceCopy, "load", scarce)

    def step():
        with offload:
            value = loss()
            offload._cache.drain()
            value.backward()

    for _ in range(2):
        assert_same(gradients(model, step), expected)
    assert refused and offload.report().bytes_read > 0 and offload.report().saved_bytes == 0


@pytest.mark.parametrize("disk", [False, True])
def test_what_was_brought_ahead_makes_room_for_what_backward_wants(
    gpt_and_loss, offload_of, gradients, assert_same, monkeypatch, disk
):
    """A device may have no room for it that it had for the prefetches."""
    model, loss = gpt_and_loss
    expected = gradients(model, lambda: loss().backward())
    offload = offload_of(model, disk=disk, host_bytes=64 * MIB, prefetch_bytes=MIB)
    fetch, load, wanted, given_up = Incoming.fetch, DeviceCopy.load, [], []

    def noted(self, saved):
        wanted.append(saved)
        fetch(self, saved)
        wanted.pop()

    def scarce(self):
        cached = offload._cache.held.cached_nbytes
        if wanted and cached:
            given_up.append(cached)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return load(self)

    monkeypatch.setattr(Incoming, "fetch", noted)
    monkeypatch.setattr(DeviceCopy, "load", scarce)

    def step(backwards):
        with offload:
            value = loss()
            offload._cache.drain()
            offload.expect_backward()  # brings the last of them, and the head is wanted before
            for again in backwards:
                value.backward(retain_graph=again)

    for backwards in ([False], [True, False], [False]):
        want = [g * len(backwards) for g in expected]
        assert_same(gradients(model, lambda b=backwards: step(b)), want)
    assert given_up and offload.report().saved_bytes == 0


class Unpinnable:
    """A system that gives no locked memory."""

    def __init__(self, streams):
        self.streams = streams

    def __getattr__(self, name):
        return getattr(self.streams, name)

    def pin(self, buffer):
        raise RuntimeError("the process may lock 65536 bytes: raise the limit (ulimit -l)")


@pytest.mark.parametrize("kind", ["host", "disk"])
def test_memory_that_may_not_be_locked_is_said_and_the_rest_goes_on(
    offload_of, late_streams, gradients, assert_same, kind
):
    model, x = make_chain()
    expected = gradients(model, lambda: model(x).sum().backward())
    streams = Unpinnable(late_streams)
    offload = offload_of(model, streams_of=lambda device: streams, **KINDS[kind])

    def step():
        with offload:
            model(x).sum().backward()

    for _ in range(2):
        with pytest.raises(RuntimeError, match="ulimit -l"):
            step()
    streams.pin = late_streams.pin  # the limit was raised
    assert_same(gradients(model, step), expected)
    offload._cache.drain()
    report = offload.report()
    assert report.bytes_offloaded > 0 and report.saved_bytes == 0


@pytest.mark.parametrize("staging_bytes", [MIB // 4, 2 * MIB])
def test_a_storage_larger_than_staging_goes_to_disk_through_twice_its_size(
    offload_of, gradients, assert_same, staging_bytes
):
    model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(3)], nn.Linear(256, 768), nn.Tanh())
    x = torch.randn(1024, 256)  # of the storages the last is of 3 MiB, the others of 1
    expected = gradients(model, lambda: model(x).sum().backward())
    offload = offload_of(model, staging_bytes=staging_bytes, in_flight_bytes=64 * MIB)

    def step():
        with offload:
            loss = model(x).sum()
            offload._cache.drain()
            loss.backward()

    assert_same(gradients(model, step), expected)
    report = offload.report()
    assert report.bytes_written == 6 * MIB and report.bytes_failed == 0
    assert offload._tiers._staging.nbytes == 6 * MIB


@pytest.mark.timeout(60)  # nothing ends while it waits
def test_staging_that_cannot_grow_is_said_and_nothing_waits_for_it(
    offload_of, late_streams, monkeypatch
):
    tiers = offload_of(nn.Identity(), staging_bytes=MIB)._tiers
    small, large = (torch.zeros(n, dtype=torch.uint8).untyped_storage() for n in (MIB, 2 * MIB))
    late_streams.open.clear()
    try:
        copy, tried = tiers.store(small), []
        monkeypatch.setattr(late_streams, "pin", _refuse(tried))
        for _ in range(2):
            with pytest.raises(OSError, match=f"staging_bytes={MIB}"):
                tiers.store(large)
        assert len(tried) == 1 and copy.trailing
    finally:
        late_streams.open.set()
    tiers.drain()
    copy.release()


def _refuse(tried):
    def pin(buffer):
        tried.append(buffer)
        raise RuntimeError("raise the limit (ulimit -l)")

    return pin


def test_a_prefetch_takes_no_more_than_staging_has(offload_of, monkeypatch):
    model, x = make_chain()
    offload = offload_of(model, staging_bytes=2 * MIB, prefetch_bytes=16 * MIB)
    with offload:
        loss = model(x).sum()
        offload._cache.drain()
        gc.collect()
        offload._tiers._staging.wait_for_copies()
        offload.expect_backward()
        assert len(offload._cache._incoming) == 2
        loss.backward()
        assert not offload._tiers._staging._pageable
    assert offload.report().bytes_read > 2 * MIB


def _exit_without(address):
    gc.collect()
    with open("/proc/self/maps") as maps:
        spans = [[int(part, 16) for part in line.split()[0].split("-")] for line in maps]
    sys.exit(any(first <= address < last for first, last in spans))


@pytest.mark.parametrize("kind", ["host", "disk"])
def test_a_forked_child_has_no_copy_of_pinned_memory_and_exits(offload_of, kind):
    """Linux copies pinned pages at the fork: each worker of a loader would have all of them."""
    model, x = make_chain()
    offload = offload_of(model, **KINDS[kind])
    with offload:
        loss = model(x).sum()
        pool = offload._tiers._pools()[0]._pool
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads
            child = multiprocessing.get_context("fork").Process(
                target=_exit_without, args=(pool.buffer.data_ptr,)
            )
            child.start()
        child.join(60)
        assert child.exitcode == 0
        loss.backward()
    assert offload.report().bytes_offloaded > 0
