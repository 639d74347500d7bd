"""The host is far ahead of the device: no event is reached when it asks, forward or backward."""

import pytest
import torch
from virtual_device import Chain, VirtualDevice

from dataeff.offload import ActivationOffload
from dataeff.offload.staging import PinnedPool

MIB = 1 << 20
LAYER_S = 0.010
NUM_LAYERS = 16


@pytest.fixture
def run():
    """run(bandwidth, num_steps, ...): the device and the offload, and when each step began."""
    opened = []

    def steps(bandwidth, num_steps, keeps_last=True, forwards=1, **options):
        device = VirtualDevice(bandwidth)
        torch.manual_seed(0)
        model = Chain(device, NUM_LAYERS, MIB, LAYER_S)
        options = {"host_bytes": 64 * MIB, **options}
        offload = ActivationOffload(model, min_bytes=0, streams_of=lambda _: device, **options)
        offload._cache._keeps_last = keeps_last
        opened.append(offload)
        began_s = []
        for _ in range(num_steps):
            began_s.append(device.compute_s)
            with offload:
                for _ in range(forwards):
                    model().backward()
        return device, offload, began_s

    yield steps
    for offload in opened:
        offload.close()


@pytest.mark.parametrize("keeps_last", [True, False])
@pytest.mark.parametrize("budget", [{}, {"in_flight_bytes": 4 * MIB, "prefetch_bytes": 4 * MIB}])
def test_compute_never_waits_for_a_tier_that_is_faster(run, keeps_last, budget):
    """Copies take half as long as the layer they run beside: they end before anybody needs them."""
    device, _, began_s = run(2 * MIB / LAYER_S, 4, keeps_last, **budget)
    assert len(device.loads) > 2 * NUM_LAYERS
    assert device.stalled_s(began_s[2]) == 0.0, [s for s in device.stalls if s[0] >= began_s[2]]
    assert device.num_waits == 0


def test_memory_stays_within_what_may_be_in_flight(run):
    """Memory is what the streams hold: what backward has used is given up before more comes."""
    device, offload, _ = run(
        MIB / LAYER_S / 4, 4, False, in_flight_bytes=4 * MIB, prefetch_bytes=4 * MIB
    )
    report = offload.report()
    assert device.num_waits == 0 and report.bytes_read > 0
    assert report.peak_held_bytes <= 5 * MIB


@pytest.mark.parametrize("forwards", [1, 3])
def test_a_host_tier_as_large_as_a_step_holds_every_step(run, forwards):
    """What the last step had there is written again in the order of the streams."""
    nbytes = run(2 * MIB / LAYER_S, 1, forwards=1)[1].report().bytes_host
    device, offload, _ = run(2 * MIB / LAYER_S, 4, False, forwards, host_bytes=nbytes)
    assert offload.report().bytes_host == 4 * forwards * nbytes
    assert offload.report().bytes_failed == 0 and device.num_waits == 0


def test_loads_begin_when_backward_is_announced(run):
    """Before compute comes to it, and past what is still on its way out."""
    device, offload, _ = run(
        2 * MIB / LAYER_S, 1, False, in_flight_bytes=2 * MIB, prefetch_bytes=6 * MIB
    )
    with offload:
        loss = offload._model()
        said_s = device.compute_s
        offload.expect_backward()
        device.compute(10 * LAYER_S)  # of others
        began_s = device.compute_s
        loss.backward()
    assert [begin_s < began_s for begin_s in device.loads if begin_s >= said_s].count(True) == 4


def test_memory_that_the_device_still_copies_is_used_again_behind_that():
    device = VirtualDevice(MIB)
    pool = PinnedPool(MIB, device)
    memory = torch.zeros(MIB, dtype=torch.uint8)
    buffer = pool.acquire(MIB)
    load = device.copy_in(buffer.tensor(), memory)
    pool.release_after(load, buffer)
    again = pool.acquire(MIB)
    store = device.copy_out(memory.clone(), again.tensor())
    assert store.begin_s >= load.end_s and device.num_waits == 0
    pool.release_after(store, again)
    with pytest.raises(OSError, match="no room"):
        pool.acquire(2 * MIB)
    pool.close()


def test_a_hook_asks_for_one_transfer_of_each_stream(run):
    """What was queued behind it has not ended either, and to ask takes microseconds."""
    device, offload, _ = run(
        2 * MIB / LAYER_S, 3, False, in_flight_bytes=64 * MIB, prefetch_bytes=64 * MIB
    )
    num_hooks = 3 * 2 * (NUM_LAYERS + 1)
    assert offload.report().bytes_forwarded > 0
    assert device.num_queries <= 4 * num_hooks
