import errno
import shutil
import time
import weakref

import numpy as np
import pytest
import torch

from dataeff.memory import HostBuffer
from dataeff.storage import FaultPlan, StripedSpill

CHUNK = 64 << 10


def filled(nbytes, seed=0):
    buffer = HostBuffer(nbytes)
    generator = torch.Generator().manual_seed(seed)
    buffer.tensor().copy_(torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator))
    return buffer


@pytest.fixture
def directories(tmp_path):
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.mkdir()
    return paths


def round_trip(spill, source):
    stripe = spill.write(source.data_ptr, source.nbytes)
    stripe.wait()
    target = HostBuffer(source.nbytes)
    stripe.read(target.data_ptr).wait()
    assert torch.equal(target.tensor(), source.tensor())
    return stripe


@pytest.mark.parametrize("chunk", [CHUNK, None])
@pytest.mark.parametrize("nbytes", [0, 1, CHUNK - 1, CHUNK, 10 * CHUNK + 77])
def test_round_trip_and_reuse(kind, directories, nbytes, chunk):
    with StripedSpill(directories, kind=kind, chunk_nbytes=chunk, num_threads=1) as spill:
        for step in range(3):
            stripe = round_trip(spill, filled(nbytes, step))
            assert stripe.done() and 0 <= stripe.start_ns <= stripe.end_ns
            stripe.free()
            assert spill.used_nbytes == 0
        assert all(lane.in_flight_nbytes == 0 for lane in spill.lanes)


def test_chunks_go_to_every_directory(directories):
    with StripedSpill(directories, chunk_nbytes=CHUNK, num_threads=1) as spill:
        source = filled(30 * CHUNK)
        round_trip(spill, source)
        assert sum(lane.written_nbytes for lane in spill.lanes) == 30 * CHUNK
        assert all(lane.written_nbytes > 0 for lane in spill.lanes)
    assert all(not list(path.iterdir()) for path in directories)


def test_a_slow_directory_gets_less(directories):
    slow = [FaultPlan().add("write", delay_s=0.05), None, None]
    with StripedSpill(directories, chunk_nbytes=CHUNK, num_threads=1, faults=slow) as spill:
        source = filled(12 * CHUNK)
        for _ in range(3):
            round_trip(spill, source).free()
        lane, *others = spill.lanes
        assert all(lane.written_nbytes < other.written_nbytes for other in others)


def test_a_full_directory_is_passed_over(directories):
    with StripedSpill(directories, capacity_bytes=4 * CHUNK, chunk_nbytes=CHUNK) as spill:
        stripe = round_trip(spill, filled(12 * CHUNK))
        with pytest.raises(OSError, match="no directory takes 1 bytes more") as error:
            spill.write(filled(1).data_ptr, 1)
        assert error.value.errno == errno.ENOSPC
        assert all(
            f"{directory}: 4096 bytes more than" in str(error.value) for directory in directories
        )
        used = spill.used_nbytes
        stripe.free()
        more_than_there_is = filled(13 * CHUNK)
        with pytest.raises(OSError, match="no directory takes"):
            spill.write(more_than_there_is.data_ptr, more_than_there_is.nbytes)
        assert (used, spill.used_nbytes) == (12 * CHUNK, 0)
        assert all(lane.in_flight_nbytes == 0 for lane in spill.lanes)
        assert not any(lane.retired for lane in spill.lanes)


def test_a_failing_directory_is_retired_and_nothing_is_lost(kind, directories):
    broken = [None, FaultPlan().add("write", error=errno.EIO), None]
    with StripedSpill(directories, kind=kind, chunk_nbytes=CHUNK, faults=broken) as spill:
        source = filled(20 * CHUNK)
        with pytest.warns(RuntimeWarning, match="nothing more is spilled to .*b: ") as warned:
            round_trip(spill, source).free()
        assert len(warned) == 1
        assert spill.lanes[1].retired and spill.lanes[1].written_nbytes == 0
        round_trip(spill, source).free()  # and no second warning, which would be an error here
        assert spill.used_nbytes == 0


def test_one_bad_moment_does_not_retire(directories):
    moment = [FaultPlan().add("write", error=errno.EIO, times=1), None, None]
    with StripedSpill(directories, chunk_nbytes=CHUNK, faults=moment) as spill:
        round_trip(spill, filled(9 * CHUNK))
        assert not spill.lanes[0].retired


def test_when_all_fail_the_cause_is_raised(directories):
    broken = [FaultPlan().add("write", error=errno.EIO) for _ in directories]
    with StripedSpill(directories, chunk_nbytes=CHUNK, faults=broken) as spill:
        source = filled(20 * CHUNK)
        with pytest.warns(RuntimeWarning, match="nothing more is spilled"):
            stripe = spill.write(source.data_ptr, source.nbytes)
            with pytest.raises(OSError, match=r"write of .* failed") as error:
                stripe.wait()
        assert error.value.errno == errno.EIO and stripe.done()
        with pytest.raises(OSError, match="failed"):
            stripe.wait()
        stripe.free()
        assert spill.used_nbytes == 0


def test_a_failed_read_raises(directories):
    broken = [FaultPlan().add("read", error=errno.EIO), None, None]
    with StripedSpill(directories, chunk_nbytes=CHUNK, faults=broken) as spill:
        source = filled(9 * CHUNK)
        stripe = spill.write(source.data_ptr, source.nbytes)
        stripe.wait()
        read = stripe.read(source.data_ptr)
        with pytest.raises(OSError, match="read of 65536 bytes at offset"):
            read.wait()
        assert read.done()


def test_cancel_is_all_or_nothing(directories):
    slow = [FaultPlan().add("write", delay_s=0.2, times=1) for _ in directories]
    with StripedSpill(directories, chunk_nbytes=CHUNK, num_threads=1, faults=slow) as spill:
        source, other = filled(30 * CHUNK), filled(CHUNK, 1)
        first = spill.write(source.data_ptr, source.nbytes)
        while not first.start_ns:
            pass
        queued = spill.write(other.data_ptr, other.nbytes)
        assert not first.cancel()
        if queued.cancel():
            with pytest.raises(OSError, match="cancelled"):
                queued.wait()
            queued.free()
        first.wait()
        target = HostBuffer(source.nbytes)
        first.read(target.data_ptr).wait()
        assert torch.equal(target.tensor(), source.tensor())
        assert all(lane.in_flight_nbytes == 0 for lane in spill.lanes)


def test_timeout_then_success(directories):
    slow = [FaultPlan().add("any", delay_s=0.2) for _ in directories]
    with StripedSpill(directories, faults=slow) as spill:
        source = filled(CHUNK)
        stripe = spill.write(source.data_ptr, source.nbytes)
        with pytest.raises(TimeoutError):
            stripe.wait(timeout_s=0.01)
        stripe.wait()
        read = stripe.read(source.data_ptr)
        with pytest.raises(TimeoutError):
            read.wait(timeout_s=0.01)
        read.wait()


def test_directories_that_cannot_be_used(directories):
    shutil.rmtree(directories[1])
    with (
        pytest.warns(RuntimeWarning, match="nothing is spilled to .*b: No such file"),
        StripedSpill(directories) as spill,
    ):
        assert len(spill.lanes) == 2
        round_trip(spill, filled(3 * CHUNK))
    with pytest.raises(FileNotFoundError):
        StripedSpill([directories[1]])
    with pytest.raises(ValueError, match="at least one"):
        StripedSpill([])
    with pytest.raises(ValueError, match="chunk_nbytes=100 "):
        StripedSpill(directories, chunk_nbytes=100)


def noted(nbytes, events):
    """A numpy array, to be the target or source of a transfer, whose end is noted in `events`."""
    array = np.zeros(nbytes, np.uint8)
    weakref.finalize(array, events.append, "memory")
    return array


def test_a_read_that_is_dropped_ends_before_its_memory_goes(kind, directories):
    """As when an interrupt comes before anybody holds it."""
    slow = [FaultPlan().add("read", delay_s=0.1) for _ in directories]
    with StripedSpill(directories, kind=kind, chunk_nbytes=CHUNK, faults=slow) as spill:
        source = filled(3 * CHUNK)
        stripe = spill.write(source.data_ptr, source.nbytes)
        stripe.wait()
        target, events = np.zeros(2 * source.nbytes, np.uint8), []
        part = target[: source.nbytes]
        address, held = part.ctypes.data, noted(1, events)
        read = stripe.read(address, held)
        del held
        assert events == [] and not read.done()
        del read  # nothing holds it: it ends here
        assert events == ["memory"]
        now = target.copy()
        time.sleep(0.25)
        assert (target == now).all()


def test_a_write_that_is_dropped_ends_before_its_memory_and_its_space_go(kind, directories):
    slow = [FaultPlan().add("write", delay_s=0.1, times=1) for _ in directories]
    with StripedSpill(directories, kind=kind, chunk_nbytes=CHUNK, num_threads=1, faults=slow) as s:
        source, events = filled(9 * CHUNK), []
        held = noted(1, events)
        stripe = s.write(source.data_ptr, source.nbytes, held)
        del held
        while not stripe.start_ns:
            pass
        assert events == [] and s.used_nbytes == 9 * CHUNK
        del stripe
        assert events == ["memory"] and s.used_nbytes == 0
        assert all(lane.in_flight_nbytes == 0 for lane in s.lanes)
        round_trip(s, source)


def test_what_was_written_lets_go_of_its_source(directories):
    with StripedSpill(directories) as spill:
        events = []
        buffer, held = filled(CHUNK), noted(1, events)
        stripe = spill.write(buffer.data_ptr, buffer.nbytes, held)
        del held
        stripe.wait()
        assert events == ["memory"] and spill.used_nbytes == CHUNK


def test_transfers_outlive_the_object_that_made_them(directories):
    source = filled(3 * CHUNK)
    stripe = StripedSpill(directories).write(source.data_ptr, source.nbytes)
    stripe.wait()
    target = HostBuffer(source.nbytes)
    read = stripe.read(target.data_ptr)
    del stripe
    read.wait()
    assert torch.equal(target.tensor(), source.tensor())
