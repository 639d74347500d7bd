"""Device memory goes straight to the spill file by cuFile, and comes back the same.

The library is a fake of system calls; "device" memory is host memory, with late streams.
"""

import errno
import gc
import threading
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from dataeff.ledger import Tier
from dataeff.offload import ActivationOffload
from dataeff.offload.direct import DirectCopy, DirectPath
from dataeff.offload.disk import SpillSet
from dataeff.storage import Choice, FaultPlan, choose_engine, probe


@pytest.fixture
def fake(fake_cufile, monkeypatch):
    """The fake, as the library that is found on this system."""
    for module in ("cufile", "engine"):
        name = f"dataeff.storage.{module}.cufile_library"
        monkeypatch.setattr(name, lambda: fake_cufile.path)
    return fake_cufile


@pytest.fixture
def opened(fake, late_streams, tmp_path):
    """opened(model, ...): an offload by cuFile."""
    made = []

    def open_offload(model, directories=tmp_path, **options):
        options = {"min_bytes": 0, "streams_of": lambda device: late_streams, **options}
        made.append(ActivationOffload(model, directories, engine="cufile", **options))
        return made[-1]

    yield open_offload
    while made:
        made.pop().close()


def steps(offload, loss, model, gradients, num_steps=3):
    """Backward overtakes what is written, but in the last step."""

    def step(is_last):
        with offload:
            value = loss()
            if is_last:
                offload._cache.drain()
            value.backward()

    last = [i == num_steps - 1 for i in range(num_steps)]
    return [gradients(model, partial(step, is_last)) for is_last in last]


@pytest.mark.parametrize("num_directories", [1, 2])
def test_bits_are_the_same_and_nothing_is_staged(
    model_and_loss, gradients, assert_same, opened, fake, late_streams, tmp_path, num_directories
):
    model, loss = model_and_loss
    directories = [tmp_path / name for name in "ab"[:num_directories]]
    for directory in directories:
        directory.mkdir()
    expected = gradients(model, lambda: loss().backward())
    offload = opened(model, directories)
    num_writes, num_reads = fake.num_writes, fake.num_reads  # of the probe
    for got in steps(offload, loss, model, gradients):
        assert_same(got, expected)
    offload._cache.drain()  # nothing is given up while it is written
    report = offload.report()
    assert report.bytes_written > 0 and report.bytes_read > 0
    assert fake.num_writes > num_writes and fake.num_reads > num_reads
    assert late_streams.num_out == late_streams.num_in == late_streams.pinned == 0
    assert report.saved_bytes == 0 and offload._tiers._spills.files[0].used_nbytes == 0


def test_transfers_wait_for_the_device(opened, fake, late_streams):
    tiers = opened(nn.Identity())._tiers
    late_streams.delay_s = 0.1
    made = torch.arange(40_001).to(torch.uint8)
    source = torch.zeros_like(made)
    num_writes, num_reads = fake.num_writes, fake.num_reads
    late_streams.copy_in(made[:-33], source[:-33])  # queued: the bytes are not there yet
    copy = tiers.store(source.untyped_storage(), None)
    assert fake.num_writes == num_writes and not copy.done()
    copy.finish()
    assert copy.done() and copy.tier is Tier.DISK and copy.host_nbytes == 40_001 % 4096
    load = copy.load()  # into memory that the device may still be using
    assert fake.num_reads == num_reads and not load.done()
    load.finish()
    got = torch.empty(0, dtype=torch.uint8).set_(load.storage)
    assert torch.equal(got[:-4096], made[:-4096])
    copy.release()


def test_a_write_that_has_not_begun_is_cancelled(opened, fake, late_streams, until_running):
    tiers = opened(nn.Identity())._tiers
    late_streams.delay_s = 0.1
    storages = [torch.zeros(1 << 16, dtype=torch.uint8).untyped_storage() for _ in range(2)]
    num_writes = fake.num_writes
    first, second = (tiers.store(storage, None) for storage in storages)
    until_running(first._begun)
    assert second.cancel() and not first.cancel()  # one waits for the device, one behind it
    second.release()
    first.finish()
    assert fake.num_writes == num_writes + 1
    first.release()
    assert tiers._spills.files[0].used_nbytes == 0


def test_transfers_that_stop_short_go_on(gpt_and_loss, gradients, assert_same, opened, fake):
    model, loss = gpt_and_loss
    expected = gradients(model, lambda: loss().backward())
    offload = opened(model)
    fake.set(most=8192)
    for got in steps(offload, loss, model, gradients):
        assert_same(got, expected)
    assert fake.num_writes > offload.report().bytes_written // 16384


def test_a_write_that_fails_keeps_the_tensor(gpt_and_loss, gradients, assert_same, opened, fake):
    model, loss = gpt_and_loss
    expected = gradients(model, lambda: loss().backward())
    offload = opened(model)
    fake.set(result=-5030)
    with pytest.warns(RuntimeWarning, match="failing"):
        assert_same(*steps(offload, loss, model, gradients, 1), expected)
    report = offload.report()
    assert report.bytes_failed > 0 and report.bytes_written == 0
    assert offload._tiers._spills.files[0].used_nbytes == 0


def test_a_read_that_fails_names_file_and_offset(gpt_and_loss, assert_same, opened, fake, tmp_path):
    model, loss = gpt_and_loss
    offload = opened(model)
    with offload:
        value = loss()
        offload._cache.drain()
        fake.set(result=-1, errno=errno.EIO)
        with pytest.raises(OSError, match=r"cannot read \d+ bytes at offset \d+") as caught:
            value.backward()
    assert caught.value.errno == errno.EIO and str(tmp_path) in str(caught.value)


def test_what_has_no_room_stays(gpt_and_loss, gradients, assert_same, opened, fake):
    model, loss = gpt_and_loss
    expected = gradients(model, lambda: loss().backward())
    offload = opened(model, spill_bytes=1 << 17)
    with pytest.warns(RuntimeWarning, match="full"):
        found = steps(offload, loss, model, gradients)
    for got in found:
        assert_same(got, expected)
    assert offload.report().bytes_failed > 0 and offload.report().bytes_written > 0


@pytest.mark.parametrize("why", ["full", "failing"])
def test_what_cannot_be_written_goes_to_the_host_tier(
    gpt_and_loss, gradients, assert_same, opened, fake, late_streams, why
):
    """The disk says so behind forward, from its own thread."""
    model, loss = gpt_and_loss
    expected = gradients(model, lambda: loss().backward())
    room = {"spill_bytes": 1 << 17} if why == "full" else {}
    offload = opened(model, host_bytes=64 << 20, policy=lambda info: Tier.DISK, **room)
    if why == "failing":
        fake.set(result=-5030)

    def step():
        with offload:
            value = loss()
            offload._cache.drain()
            value.backward()

    with pytest.warns(RuntimeWarning, match=why) as caught:
        found = [gradients(model, step) for _ in range(3)]
    for got in found:
        assert_same(got, expected)
    assert len(caught) == 1
    gc.collect()
    offload._cache.poll()  # buffers go back when the last copies out of them have ended
    offload._cache.drain()
    report = offload.report()
    assert report.bytes_failed == 0 < report.bytes_host and late_streams.num_in > 0
    assert (report.bytes_written > 0) == (why == "full")
    assert report.num_store_errors > 0 and report.saved_bytes == 0
    assert offload._tiers.disk_nbytes == report.bytes_written
    assert offload._tiers._spills.files[0].used_nbytes == offload._tiers.used_nbytes == 0


def test_the_host_tier_comes_first(gpt_and_loss, gradients, assert_same, opened, late_streams):
    model, loss = gpt_and_loss
    expected = gradients(model, lambda: loss().backward())
    offload = opened(model, host_bytes=1 << 18)
    for got in steps(offload, loss, model, gradients):
        assert_same(got, expected)
    report = offload.report()
    assert report.bytes_host > 0 and report.bytes_written > 0 and late_streams.num_out > 0


def test_a_plan_is_made_with_its_rates(gpt_and_loss, gradients, assert_same, opened, fake):
    pytest.importorskip("scipy")
    model, loss = gpt_and_loss
    expected = gradients(model, lambda: loss().backward())
    offload = opened(model, policy="auto")
    rates = offload._tiers.measure(torch.device("cpu"))
    assert rates[Tier.DISK].write > 0 and rates[Tier.DISK].read > 0
    for got in steps(offload, loss, model, gradients, 14):
        assert_same(got, expected)
    assert offload.plan is not None


def test_it_is_refused_with_the_reason(fake, late_streams, tmp_path):
    model = nn.Linear(4, 4)
    late = {"engine": "cufile", "streams_of": lambda device: late_streams}
    with pytest.raises(ValueError, match="model is on cpu"):
        ActivationOffload(model, tmp_path, engine="cufile")
    with pytest.raises(ValueError, match="never pass through host memory"):
        ActivationOffload(model, tmp_path, checksum=True, **late)
    with pytest.raises(ValueError, match="faults"):
        ActivationOffload(model, tmp_path, faults=FaultPlan(), **late)
    fake.set(nvfs_major=0)
    with pytest.raises(OSError, match="compatibility mode"):
        ActivationOffload(model, tmp_path, **late)


def test_host_tensors_beside_it_stay(fake, late_streams, tmp_path):
    """cuFile serves one device's memory here; tensors of the host are none of its."""
    model = nn.Linear(64, 64)
    offload = ActivationOffload(
        model, tmp_path, engine="cufile", min_bytes=0, streams_of=lambda device: late_streams
    )
    offload._tiers._streams[torch.device("cpu")] = None
    assert not offload._tiers.moves(torch.device("cpu"))
    offload.close()


def test_it_is_measured_beside_the_others(fake, monkeypatch, tmp_path):
    made = probe(tmp_path, 8 << 20, max_seconds=0.02, kind="cufile")
    assert made.engine == "cufile" and made.read_gbs > 0 and made.write_gbs > 0
    measured = []

    def fast(directory, nbytes, *, kind, device, **options):
        measured.append((kind, device))
        rate = 9.0 if kind == "cufile" else 1.0
        return replace(made, engine=kind, read_gbs=rate, write_gbs=rate)

    monkeypatch.setattr("dataeff.storage.choice.probe", fast)
    monkeypatch.setattr("dataeff.storage.choice.cufile_refusal", lambda directory, device: None)
    chosen = choose_engine(tmp_path, device="cuda:0")
    assert chosen.kind == "cufile" and "9.00 times" in chosen.reason
    assert ("cufile", "cuda:0") in measured and ("threads", "cpu") in measured
    monkeypatch.setattr(
        "dataeff.storage.choice.cufile_refusal", lambda directory, device: "no nvidia-fs"
    )
    chosen = choose_engine(tmp_path, device="cuda:0")
    assert chosen.kind == "threads" and chosen.refusals["cufile"] == "no nvidia-fs"


@pytest.mark.parametrize(
    ("device", "options", "asked"),
    [
        ("cpu", {}, "cpu"),
        ("cuda:0", {}, "cuda:0"),
        ("cuda:0", {"checksum": True}, "cpu"),
        ("cuda:0", {"faults": FaultPlan()}, "cpu"),
    ],
)
def test_auto_asks_for_what_cufile_can_serve(monkeypatch, tmp_path, device, options, asked):
    devices = []

    def choose(directory, *, num_threads, device):
        devices.append(str(device))
        return Choice("threads", {}, {}, "")

    monkeypatch.setattr("dataeff.offload.opening.choose_engine", choose)
    monkeypatch.setattr(
        "dataeff.offload.activation_offload.device_of", lambda model: torch.device(device)
    )
    ActivationOffload(nn.Linear(4, 4), tmp_path, engine="auto", **options).close()
    assert devices == [asked]


@pytest.mark.parametrize("way", ["out", "in"])
def test_device_memory_that_an_interrupt_lets_go_stays_until_cufile_is_done_with_it(
    fake, late_streams, tmp_path, way
):
    """Else the allocator gives it to others, and the bytes come there."""
    spills = SpillSet([tmp_path], kind="cufile")
    path, begins = DirectPath(spills), threading.Event()
    storage = torch.arange(1 << 16).to(torch.uint8).untyped_storage()
    lost = DirectCopy(storage, path, late_streams) if way == "in" else None
    if lost is not None:
        lost.finish()
        path._in.submit(begins.wait, 10)
        load = lost.load()
        memory = StorageWeakRef(load.storage)
        del load
    else:
        memory = StorageWeakRef(storage)
        path._out.submit(begins.wait, 10)
        lost = DirectCopy(storage, path, late_streams)
        lost = None
        del storage
    assert not memory.expired()
    begins.set()
    path.close()
    gc.collect()
    assert memory.expired()
    if lost is not None:
        lost.release()
    del lost
    assert spills._striped.used_nbytes == 0
    spills.close()
