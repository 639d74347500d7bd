import errno

import pytest
import torch

from dataeff.memory import HostBuffer
from dataeff.storage import FaultPlan, SpillFile, open_engine

NBYTES = 3 * (1 << 20) + 4096


@pytest.fixture(params=[True, False], ids=["direct", "cached"])
def spill(request, tmp_path):
    with SpillFile(tmp_path, direct=request.param) as spill:
        yield spill


@pytest.fixture
def source():
    buffer = HostBuffer(NBYTES)
    buffer.tensor(torch.int32).copy_(torch.arange(NBYTES // 4, dtype=torch.int32))
    return buffer


def round_trip(kind, faults, spill, source):
    extent = spill.allocate(source.nbytes)
    target = HostBuffer(source.nbytes)
    with open_engine(kind, faults=faults) as engine:
        engine.write(spill.fd, source.data_ptr, source.nbytes, extent.offset).wait()
        engine.read(spill.fd, target.data_ptr, source.nbytes, extent.offset).wait()
    return target.tensor()


@pytest.mark.parametrize(
    "fault",
    [
        {"max_nbytes": 65_536},
        {"max_nbytes": 70_001},
        {"max_nbytes": 4096, "every": 3},
        {"max_nbytes": 100, "every": 2},
        {"error": errno.EINTR, "every": 2},
        {"error": errno.EAGAIN, "times": 20},
        {"delay_s": 0.001},
    ],
    ids=str,
)
@pytest.mark.parametrize("op", ["read", "write"])
def test_what_an_engine_must_survive(kind, spill, source, op, fault):
    faults = FaultPlan().add(op, **fault)
    assert torch.equal(round_trip(kind, faults, spill, source), source.tensor())
    assert faults.num_injected > 0


@pytest.mark.parametrize("op", ["read", "write"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_what_an_engine_must_report(kind, spill, source, op, code):
    faults = FaultPlan().add(op, error=code, nth=2)
    with pytest.raises(OSError, match=f"{op} of {NBYTES} bytes at offset 0 of ") as error:
        round_trip(kind, faults, spill, source)
    assert error.value.errno == code


def test_a_disk_that_is_never_ready_is_given_up(kind, spill, source):
    with open_engine(kind, faults=FaultPlan().add("read", error=errno.EAGAIN)) as engine:
        transfer = engine.read(spill.fd, source.data_ptr, 4096, spill.allocate(4096).offset)
        with pytest.raises(OSError, match="read of 4096 bytes") as error:
            transfer.wait()
        assert error.value.errno == errno.EAGAIN


def test_an_error_spares_other_transfers(kind, spill, source):
    faults = FaultPlan().add("write", error=errno.EIO, nth=3, times=1)
    extents = [spill.allocate(4096) for _ in range(6)]
    with open_engine(kind, num_threads=1, queue_depth=1, faults=faults) as engine:
        transfers = [
            engine.write(spill.fd, source.data_ptr, 4096, extent.offset) for extent in extents
        ]
    assert [transfer.failed() for transfer in transfers] == [False, False, True, *[False] * 3]


def test_corruption_flips_one_bit(kind, spill, source):
    got = round_trip(kind, FaultPlan().add("read", corrupt=True, times=1), spill, source)
    assert (got != source.tensor()).sum() == 1


def test_counters_and_schedule(kind, spill, source):
    faults = FaultPlan().add("read", error=errno.EINTR, nth=2, every=2, times=2)
    buffer = HostBuffer(4096)
    extent = spill.allocate(4096)
    with open_engine(kind, num_threads=1, queue_depth=1, faults=faults) as engine:
        engine.write(spill.fd, source.data_ptr, 4096, extent.offset).wait()
        for _ in range(5):
            engine.read(spill.fd, buffer.data_ptr, 4096, extent.offset).wait()
    assert (faults.num_writes, faults.num_reads, faults.num_injected) == (1, 7, 2)


def test_misuse():
    with pytest.raises(ValueError, match="op='seek'"):
        FaultPlan().add("seek")
    with pytest.raises(ValueError, match="count from 1"):
        FaultPlan().add("any", nth=0)
    with pytest.raises(ValueError, match="max_nbytes must be at least 1"):
        FaultPlan().add("any", max_nbytes=0)
