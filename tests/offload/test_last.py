"""What backward wants at once stays in memory, from the second step on and within the budgets."""

import gc

import pytest
import torch
from torch import nn

from dataeff.offload import ActivationOffload
from dataeff.offload.schedule import Past
from dataeff.storage import FaultPlan

STORAGE = 2**18


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(8) for m in (nn.Linear(256, 256), nn.Tanh())])
    return model, torch.randn(256, 256)


@pytest.fixture
def offload(net, tmp_path):
    budget = {"in_flight_bytes": 4 * STORAGE, "prefetch_bytes": 4 * STORAGE}
    made = ActivationOffload(net[0], tmp_path, min_bytes=0, **budget)
    yield made
    made.close()


def bytes_of(offload, run):
    """Bytes written and kept while `run` runs, in storages."""
    before = offload.report()
    run()
    after = offload.report()
    written = after.bytes_written - before.bytes_written
    return written / STORAGE, (after.bytes_kept - before.bytes_kept) / STORAGE


def test_the_last_stay_and_are_not_written(net, offload, gradients, assert_same):
    model, x = net
    expected = gradients(model, lambda: model(x).square().sum().backward())

    def step():
        with offload:
            loss = model(x).square().sum()
            offload._cache.drain()
            loss.backward()

    moved = [bytes_of(offload, lambda: assert_same(gradients(model, step), expected))]
    for _ in range(4):
        moved.append(bytes_of(offload, lambda: assert_same(gradients(model, step), expected)))
    # Half of what may be in flight; and no more from step to step.
    assert moved == [(8, 0), (6, 2), (6, 2), (6, 2), (6, 2)]
    report = offload.report()
    assert report.bytes_packed == (
        report.bytes_deduplicated + report.bytes_kept + report.bytes_written
    )
    assert report.saved_bytes == 0 and offload._cache.held.last_nbytes == 0
    # What may be in flight, where the disk is slow, and what stays beside it.
    assert report.peak_saved_bytes <= (4 + 2) * STORAGE + 8 * 8192


def test_what_stays_outlives_a_backward_that_keeps_its_graph(net, offload, gradients, assert_same):
    model, x = net

    def twice(context):
        with context:
            loss = model(x).square().sum()
            loss.backward(retain_graph=True)
            loss.backward()

    expected = gradients(model, lambda: twice(torch.enable_grad()))
    for _ in range(3):
        assert_same(gradients(model, lambda: twice(offload)), expected)
    gc.collect()
    assert offload.report().saved_bytes == 0 and offload._cache.held.last_nbytes == 0


def test_nothing_stays_where_other_forwards_come_first(net, offload):
    model, x = net

    def step():
        with offload:
            losses = []
            for i in range(3):
                with offload.microbatch(i):
                    losses.append(model(x).square().sum())
            offload._cache.drain()
            for loss in losses:
                loss.backward()

    for _ in range(3):
        # Of the three, only the last one's backward could follow at once: it does not.
        assert bytes_of(offload, step) == (24, 0)


def test_what_stays_of_inputs_of_another_length(net, offload, gradients, assert_same):
    model, x = net

    def step(rows):
        with offload:
            loss = model(x[:rows]).square().sum()
            offload._cache.drain()
            loss.backward()

    expected = gradients(model, lambda: model(x[:128]).square().sum().backward())
    assert bytes_of(offload, lambda: step(256)) == (8, 0)
    assert bytes_of(offload, lambda: step(256)) == (6, 2)
    half = lambda: assert_same(gradients(model, lambda: step(128)), expected)  # noqa: E731
    assert bytes_of(offload, half) == (2, 2)
    for rows in (256, 160, 192, 128):
        _, kept = bytes_of(offload, lambda rows=rows: step(rows))
        assert kept == 512 // rows * rows / 256  # as many of this size as fit
    # Not of one that is shorter by more: it may be another pass.
    assert bytes_of(offload, lambda: step(16)) == (0.5, 0)


def test_a_pass_that_goes_another_way_is_moved_whole(net, offload):
    model, x = net

    def step(way):
        with offload:
            loss = way(x).square().sum()
            offload._cache.drain()
            loss.backward()

    for _ in range(2):
        step(model)
    longer = nn.Sequential(nn.Linear(256, 2048), nn.Tanh(), nn.Linear(2048, 256), *model)
    assert bytes_of(offload, lambda: step(longer))[1] == 0


def test_without_room_nothing_stays(net, tmp_path):
    model, x = net
    offload = ActivationOffload(model, tmp_path, min_bytes=0, in_flight_bytes=STORAGE)

    def step():
        with offload:
            loss = model(x).square().sum()
            offload._cache.drain()
            loss.backward()

    for _ in range(3):
        assert bytes_of(offload, step) == (8, 0)
    offload.close()


def test_the_first_that_backward_asked_for_within_so_many_bytes():
    past = Past([5, 1, 2, 4], [2, 3, 0])

    def first(nbytes, factor=1):
        upto = [factor * n for n in (5, 6, 8, 12)]
        return {i for i in range(4) if past.wanted_first(i, upto[i], nbytes)}

    assert first(1) == set()
    assert first(6) == {2, 3} == first(10) == first(12, factor=2)
    assert first(11) == {0, 2, 3} == first(12)
    assert past.alike(3, 1) and past.alike(3, 16)
    assert not past.alike(0, 1) and not past.alike(3, 17) and not past.alike(4, 4)


def test_what_is_not_written_when_backward_begins_counts_as_brought_back(net, tmp_path):
    """Four storages wait for a slow disk: with four read beside them, twice the budget was held."""
    model, x = net
    faults, budget = FaultPlan(), 4 * STORAGE
    offload = ActivationOffload(
        model, tmp_path, min_bytes=0, num_threads=1, faults=faults,
        in_flight_bytes=budget, prefetch_bytes=budget,
    )  # fmt: skip
    cache, counters = offload._cache, offload._cache.counters
    with offload:
        half = model[:8](x)
        cache.drain()
        faults.add("write", delay_s=0.2, times=1)
        slow = cache._tiers._spills.begin_write(torch.empty(STORAGE).data_ptr(), STORAGE)
        out = model[8:](half)
        loss = out.sum()
        counters.peak_saved_bytes = 0
        loss.backward()
    slow.finish()
    slow.release()
    cancelled = offload.report().bytes_cancelled
    assert cancelled >= 3 * STORAGE and counters.peak_saved_bytes <= budget + STORAGE
    offload.close()
