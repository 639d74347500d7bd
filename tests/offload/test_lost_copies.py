"""What an interrupt cuts loose of a device's copies, before anybody holds it."""

import sys
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import torch
from torch import nn

from dataeff.offload import ActivationOffload
from dataeff.offload.disk import SpillSet
from dataeff.offload.staging import DeviceCopy, PinnedPool

NBYTES = 1 << 16


def refused_or_late(pool):
    """Whether the pool refuses its memory; else it comes, after what is under way."""
    try:
        pool.acquire(NBYTES).release()
    except OSError as error:
        assert "no room" in str(error)
        return True
    return False


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("way", ["out", "in"])
def test_memory_is_not_used_again_before_what_moves_it_has_ended(late_streams, tmp_path, tier, way):
    """And nothing of Python runs where it goes: there a signal's handler would raise in vain."""
    storage = torch.arange(NBYTES).to(torch.uint8).untyped_storage()
    pool, spills = PinnedPool(NBYTES, late_streams), SpillSet([tmp_path])
    ran = []
    with ThreadPoolExecutor(1) as writer:
        spill = None if tier == "host" else (spills, writer)
        if way == "out":
            late_streams.open.clear()
        lost = DeviceCopy(storage, pool, late_streams, spill, checksum=False)
        if way == "in":
            lost.finish()
            lost.settle(wait=True)
            late_streams.open.clear()
            load = lost.load()
            while load.event is None:  # from disk, to be sent to the device
                load.done()
            lost = (lost, load)
            del load
        sys.setprofile(lambda frame, event, arg: ran.append(frame.f_code))
        try:
            del lost
        finally:
            sys.setprofile(None)
        with ThreadPoolExecutor(1) as other:
            again = other.submit(refused_or_late, pool)
            wait([again], timeout=0.05)
            assert not again.done() or again.result()
            late_streams.open.set()
    assert [code.co_qualname for code in ran if code.co_name == "__del__"] == []
    pool.wait_for_copies()
    assert pool.used_nbytes == spills._striped.used_nbytes == 0
    pool.acquire(NBYTES).release()
    pool.close()
    spills.close()


def test_forward_goes_on_behind_the_end_of_an_offload_through_staging(
    late_streams, tmp_path, gradients, assert_same
):
    """What it saves then stays in memory."""
    net, x = nn.Sequential(nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 96)), torch.randn(64, 96)
    expected = gradients(net, lambda: net(x).square().sum().backward())
    offload = ActivationOffload(net, tmp_path, min_bytes=0, streams_of=lambda device: late_streams)

    def step():
        with offload:
            net(x).square().sum().backward()
            net.zero_grad()
            offload.close()
            offload._cache.drain()
            with pytest.warns(RuntimeWarning, match="no room"):
                net(x).square().sum().backward()

    assert_same(gradients(net, step), expected)
    assert offload.report().bytes_failed > 0
