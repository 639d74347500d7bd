"""A failing, full, slow or lying disk: no wrong bits, no lost step, nothing left behind."""

import errno
import os
import subprocess
import sys
import textwrap
import warnings
from contextlib import suppress

import pytest
import torch
from torch import nn

from dataeff.offload import ActivationOffload
from dataeff.storage import FaultPlan


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(256, 256), nn.Tanh())])
    return model, torch.randn(256, 256)


@pytest.fixture
def run_step(net, gradients):
    """run_step(offload): gradients of a step during whose forward every write comes to its end."""
    model, x = net

    def run(offload=None):
        def step():
            if offload is None:
                return model(x).square().sum().backward()
            with offload:
                loss = model(x).square().sum()
                offload._cache.drain()
                loss.backward()
            return None

        return gradients(model, step)

    return run


def test_eio_on_store_keeps_the_tensor(net, run_step, assert_same, tmp_path):
    expected = run_step()
    faults = FaultPlan().add("write", error=errno.EIO, nth=2, every=2)
    offload = ActivationOffload(net[0], tmp_path, min_bytes=0, faults=faults)
    with pytest.warns(RuntimeWarning, match="failing") as caught:
        assert_same(run_step(offload), expected)
        assert_same(run_step(offload), expected)
    assert len(caught) == 1 and str(tmp_path) in str(caught[0].message)
    report = offload.report()
    assert report.num_store_errors > 2 and report.bytes_failed == report.num_store_errors * 2**18
    assert report.bytes_written > 0 and report.saved_bytes == 0


def test_full_disk_keeps_the_rest_with_one_warning(net, run_step, assert_same, tmp_path):
    expected = run_step()
    faults = FaultPlan().add("write", error=errno.ENOSPC, nth=3)
    offload = ActivationOffload(net[0], tmp_path, min_bytes=0, faults=faults)
    with pytest.warns(RuntimeWarning, match="full") as caught:
        assert_same(run_step(offload), expected)
        assert_same(run_step(offload), expected)
    assert len(caught) == 1
    assert "memory" in str(caught[0].message)
    assert offload.report().bytes_written == 2 * 2**18


def test_no_room_at_allocation(net, run_step, assert_same, tmp_path):
    expected = run_step()
    offload = ActivationOffload(net[0], tmp_path, min_bytes=0, spill_bytes=3 * 2**18)
    with pytest.warns(RuntimeWarning, match="full"):
        assert_same(run_step(offload), expected)
    assert 0 < offload.report().bytes_written <= 3 * 2**18
    assert offload._tiers.disk_nbytes == offload.report().bytes_written  # what wears the disk
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(run_step(offload), expected)


def test_a_second_directory_takes_what_the_first_cannot(net, run_step, assert_same, tmp_path):
    expected = run_step()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    directories = [tmp_path / "a", tmp_path / "b"]
    offload = ActivationOffload(net[0], directories, min_bytes=0, spill_bytes=2 * 2**18)
    assert_same(run_step(offload), expected)
    assert offload.report().bytes_failed == 0
    assert offload.report().bytes_written == 4 * 2**18


def test_eio_on_load_raises_with_file_and_offset_and_leaves_it_usable(
    net, run_step, assert_same, tmp_path
):
    expected = run_step()
    faults = FaultPlan().add("read", error=errno.EIO, times=50)
    offload = ActivationOffload(net[0], tmp_path, min_bytes=0, faults=faults)
    with pytest.raises(OSError, match=r"cannot read \d+ bytes at offset \d+") as caught:
        run_step(offload)
    assert caught.value.errno == errno.EIO and str(tmp_path) in str(caught.value)
    while faults.num_reads < 50:
        with suppress(OSError):  # raised unless the last faults meet prefetches, to be read again
            run_step(offload)
    assert_same(run_step(offload), expected)


def test_a_prefetch_that_fails_is_read_again(net, run_step, assert_same, tmp_path):
    expected = run_step()
    faults = FaultPlan().add("read", error=errno.EIO, nth=3, times=1)
    offload = ActivationOffload(net[0], tmp_path, min_bytes=0, faults=faults)
    try:
        assert_same(run_step(offload), expected)
        assert offload.report().num_load_errors == 1
    except OSError:  # backward was faster: it waited for that very read
        assert offload.report().num_load_errors == 0


def test_corruption_is_found_with_a_checksum(net, run_step, tmp_path):
    faults = FaultPlan().add("read", corrupt=True, nth=2)
    offload = ActivationOffload(net[0], tmp_path, min_bytes=0, faults=faults, checksum=True)
    with pytest.raises(OSError, match=r"offset \d+.*checksum mismatch"):
        run_step(offload)


def test_checksum_of_sound_bytes_passes(net, run_step, assert_same, tmp_path):
    expected = run_step()
    offload = ActivationOffload(net[0], tmp_path, min_bytes=0, checksum=True)
    assert_same(run_step(offload), expected)
    assert offload.report().bytes_read > 0


def test_short_transfers_are_continued(net, run_step, assert_same, tmp_path):
    expected = run_step()
    faults = FaultPlan().add("any", max_nbytes=8192)
    offload = ActivationOffload(net[0], tmp_path, min_bytes=0, faults=faults)
    assert_same(run_step(offload), expected)
    assert offload.report().bytes_read > 0


def test_slow_disk_bounds_memory_and_forwards(net, gradients, assert_same, tmp_path):
    model, x = net
    expected = gradients(model, lambda: model(x).square().sum().backward())
    faults = FaultPlan().add("write", delay_s=0.4)
    budget = 3 * 2**18
    offload = ActivationOffload(
        model, tmp_path, min_bytes=0, faults=faults, num_threads=1, in_flight_bytes=budget
    )

    def step():
        with offload:
            model(x).square().sum().backward()

    assert_same(gradients(model, step), expected)
    report = offload.report()
    assert report.bytes_forwarded > 0 and report.bytes_cancelled > 0
    assert report.exposed_wait_s > 0
    ends = 8 * 8192
    assert report.peak_saved_bytes <= budget + 2**18 + max(2 * 2**18, 2**18) + ends


EXITS = """
import sys, torch
from torch import nn
from dataeff.offload import ActivationOffload
from dataeff.storage import FaultPlan
model = nn.Sequential(*[nn.Linear(512, 512) for _ in range(8)])
slow = FaultPlan().add("write", delay_s=0.2)
offload = ActivationOffload(model, sys.argv[1], min_bytes=0, num_threads=1, faults=slow)
with offload:
    loss = model(torch.randn(1024, 512)).sum()
assert len(offload._cache._outgoing)
"""


def test_interpreter_exit_with_work_in_flight(tmp_path):
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(EXITS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert os.listdir(tmp_path) == []


def test_fork_is_refused_clearly(net, tmp_path):
    model, x = net
    offload = ActivationOffload(model, tmp_path, min_bytes=0)
    read_end, write_end = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads, on purpose
        pid = os.fork()
    if pid == 0:
        try:
            with offload:
                model(x)
        except RuntimeError as error:
            os.write(write_end, str(error).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    os.waitpid(pid, 0)
    with os.fdopen(read_end) as pipe:
        assert "another process" in pipe.read()


def test_a_storage_is_striped_over_directories_and_a_broken_one_does_no_harm(
    net, run_step, assert_same, tmp_path, monkeypatch
):
    expected = run_step()
    monkeypatch.setattr("dataeff.offload.disk.CHUNK_BYTES", 2**16)  # four to a storage
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    faults = FaultPlan().add("write", error=errno.EIO, nth=2, times=2)
    offload = ActivationOffload(
        net[0], [tmp_path / "a", tmp_path / "b"], min_bytes=0, faults=faults
    )
    for _ in range(2):
        assert_same(run_step(offload), expected)
    a, b = offload._cache._tiers._spills.files
    assert a.peak_nbytes >= 2**17 and b.peak_nbytes >= 2**17
    report = offload.report()
    assert report.num_store_errors == 0  # what one directory refused, the other took
    assert faults.num_writes >= 2 + report.bytes_written // 2**16
    offload.close()
