"""What an interrupt cuts loose of a device's copies, before anybody holds it."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dataeff.offload.disk import SpillSet
from dataeff.offload.staging import DeviceCopy, PinnedPool

NBYTES = 1 << 16


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
        with pytest.raises(OSError, match="no room"):
            pool.acquire(NBYTES)
        late_streams.open.set()
    assert [code.co_qualname for code in ran if code.co_name == "__del__"] == []
    pool.wait_for_copies()
    assert pool.used_nbytes == spills._striped.used_nbytes == 0
    pool.acquire(NBYTES).release()
    pool.close()
    spills.close()
