"""What a plan is predicted to show, worked out by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataeff.offload.planner import Action, ModuleProfile, TierRate
from dataeff.offload.simulate import simulate

KEEP, HOST, DISK, RECOMPUTE = Action.KEEP, Action.HOST, Action.DISK, Action.RECOMPUTE


def modules(n, nbytes=800):
    return [ModuleProfile(f"m{i}", 1.0, 2.0, nbytes, 100) for i in range(n)]


def test_keeping_holds_everything_and_waits_for_nothing():
    found = simulate(
        modules(4), [KEEP] * 4, {}, in_flight=0, prefetch=0, other_s=0.5, other_bytes=70
    )
    assert (found.step_s, found.exposed_s, found.peak_bytes) == (12.5, 0.0, 3270)


def test_recomputing_costs_a_forward_and_holds_inputs_and_one_module():
    found = simulate(modules(4), [RECOMPUTE] * 4, {}, in_flight=0, prefetch=0)
    assert found.step_s == 16.0 and found.peak_bytes == 4 * 100 + 800
    assert found.seen_bytes == 4 * 100  # the module that runs again is the checkpoint's


def test_a_fast_tier_costs_nothing_and_holds_what_is_in_flight():
    found = simulate(
        modules(4), [DISK] * 4, {DISK: TierRate(1e9, 1e9)}, in_flight=200, prefetch=200
    )
    assert found.step_s == pytest.approx(12.0, abs=1e-4)
    assert found.peak_bytes <= 300  # the limit, and the part being made or used


def test_a_slow_tier_is_waited_for_within_the_limit():
    # 3200 bytes at 100 bytes/s take 32 s out, of which 4 s pass beside the forward and the
    # last 200 bytes need not move.
    found = simulate(
        modules(4), [DISK] * 4, {DISK: TierRate(100.0, 1e9)}, in_flight=200, prefetch=200
    )
    assert found.step_s == pytest.approx(8.0 + (3200 - 200) / 100 + 1 / 8, rel=0.02)
    assert found.peak_bytes <= 400  # in flight still, and read ahead
    roomy = simulate(
        modules(4), [DISK] * 4, {DISK: TierRate(100.0, 1e9)}, in_flight=3200, prefetch=3200
    )
    assert roomy.exposed_s == 0.0 and roomy.peak_bytes > 2500


def test_what_leaves_and_what_comes_back_have_bounds_of_their_own():
    def peak(in_flight, prefetch):
        rates = {DISK: TierRate(1e9, 1e9)}
        return simulate(modules(4), [DISK] * 4, rates, in_flight=in_flight, prefetch=prefetch)

    assert peak(100, 100).prompt_bytes <= 200
    assert peak(1000, 100).prompt_bytes <= 200  # a fast tier has nothing waiting
    assert peak(100, 1000).peak_bytes == 1000
    # Nothing may come ahead: what is used is there alone.
    assert peak(100, 0).prompt_bytes == 100


def test_late_stores_fill_what_may_be_in_flight_and_what_is_made_comes_on_top():
    def peak(in_flight, write=1e9, **options):
        rates = {DISK: TierRate(write, 1e9)}
        return simulate(modules(4), [DISK] * 4, rates, in_flight=in_flight, prefetch=100, **options)

    assert peak(300).peak_bytes == 300 + 100
    assert peak(0).peak_bytes == 100 + 100  # one is always on its way
    assert peak(10_000).peak_bytes == 4 * 800  # never more than there is
    assert peak(300, other_bytes=150).peak_bytes == 300 + 150
    # However slow it is, and in the same time.
    for write in (10.0, 1e3):
        assert peak(300, write).peak_bytes == 300 + 100
    assert peak(300).exposed_s < 1e-4


def test_reads_that_are_late_are_exposed():
    found = simulate(
        modules(4), [DISK] * 4, {DISK: TierRate(1e9, 100.0)}, in_flight=200, prefetch=200
    )
    assert found.exposed_s == pytest.approx(3200 / 100 - 8.0, rel=0.1)


def test_stuck_bytes_stay():
    profile = [ModuleProfile("m", 1.0, 2.0, 800, None, 300)]
    found = simulate(profile, [DISK], {DISK: TierRate(1e9, 1e9)}, in_flight=100, prefetch=100)
    assert profile[0].moved_bytes == 500
    assert 300 < found.peak_bytes <= 500


@pytest.mark.parametrize(("tier", "left"), [(DISK, 50), (HOST, 0)])
def test_ends_that_fill_no_block_of_the_disk_stay_too(tier, left):
    def peak(left_bytes):
        profiles = [ModuleProfile(f"m{i}", 1.0, 2.0, 800, left_bytes=left_bytes) for i in range(9)]
        return simulate(
            profiles, [tier] * 9, {tier: TierRate(1e9, 1e9)}, in_flight=100, prefetch=100
        ).peak_bytes

    assert peak(50) - peak(0) == 9 * left


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 10_000), min_size=1, max_size=6),
    data=st.data(),
    rate=st.floats(10, 1e6),
    limit=st.integers(1, 20_000),
)
def test_never_faster_than_compute_nor_larger_than_keeping(sizes, data, rate, limit):
    profiles = [ModuleProfile(f"m{i}", 1.0, 2.0, n, n // 4) for i, n in enumerate(sizes)]
    action = st.sampled_from((KEEP, HOST, DISK, RECOMPUTE))
    actions = data.draw(st.lists(action, min_size=len(sizes), max_size=len(sizes)))
    rates = {HOST: TierRate(2 * rate, 2 * rate), DISK: TierRate(rate, rate)}
    found = simulate(profiles, actions, rates, in_flight=limit, prefetch=limit)
    compute_s = 3.0 * len(sizes) + actions.count(RECOMPUTE)
    assert found.step_s == pytest.approx(compute_s + found.exposed_s)
    assert found.exposed_s >= 0
    inputs = sum(n // 4 for n, a in zip(sizes, actions, strict=True) if a is RECOMPUTE)
    assert found.peak_bytes <= sum(sizes) + inputs + max(sizes) + 1e-6


def test_what_lies_outside_is_still_held_when_the_first_loads_begin():
    fast = {DISK: TierRate(write=1e9, read=1e9)}
    outside = {"other_s": 0.1, "other_bytes": 70}
    profiles = [ModuleProfile(f"m{i}", 1.0, 2.0, 800, parts=(25,) * 32) for i in range(4)]
    found = simulate(profiles, [DISK] * 4, fast, in_flight=50, prefetch=50, **outside)
    assert found.peak_bytes == 70 + 50


def test_storages_are_moved_one_by_one_as_large_as_they_are():
    """A block of small storages has few bytes on their way, beside one of large ones."""
    large = ModuleProfile("large", 1.0, 2.0, 1000, parts=(500, 500))
    small = ModuleProfile("small", 1.0, 2.0, 1000, parts=(100,) * 10)
    fast = {DISK: TierRate(1e9, 1e9)}

    def peaks(*profiles):
        found = simulate(profiles, [DISK] * len(profiles), fast, in_flight=0, prefetch=0)
        return found.prompt_bytes, found.peak_bytes

    assert peaks(large) == (500, 1000) and peaks(small) == (100, 200)
    assert peaks(small, large) == (500, 1000)
