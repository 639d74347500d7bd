"""How much of a plan is on its way at once: what there is room for, and no less than hides it."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataeff.offload.passes import Budgets
from dataeff.offload.planner import Action, ModuleProfile, TierRate, plan
from dataeff.offload.windows import Setting, plan_in, windowed

KEEP, HOST, DISK, RECOMPUTE = Action.KEEP, Action.HOST, Action.DISK, Action.RECOMPUTE
SSDTRAIN = ((8192, 4), (12288, 3), (16384, 2))  # width and layers


def blocks(num, forward_s, unit=1000):
    """Of a transformer, whose storages are so many times one of [batch, tokens, hidden]."""
    parts = tuple(unit * size for size in (1, 1, 3, 1, 1, 1, 4, 4))
    block = ModuleProfile("", forward_s, 2 * forward_s, 16 * unit, unit, recompute_s=forward_s)
    return [replace(block, name=f"blocks.{i}", parts=parts) for i in range(num)]


@pytest.mark.parametrize(("width", "layers"), SSDTRAIN)
def test_half_of_the_activations_hide_behind_blocks_as_large_as_the_paper_s(width, layers):
    """A GPU that computes 600 Tflop/s beside a bus of 55 GB/s either way: assumed, not measured."""
    tokens, bus = 16 * 1024, TierRate(55e9, 55e9)
    flops = 24 * tokens * width**2 + 2 * tokens * 1024 * width
    profiles = blocks(layers, flops / 600e12, unit=2 * width * tokens)
    outside = 2 * width * tokens
    keep_bytes = outside + sum(p.saved_bytes for p in profiles)
    found = plan_in(Setting({HOST: bus}, 0.53 * keep_bytes, other_bytes=outside), profiles)
    assert found.plan.fits and RECOMPUTE not in found.plan.actions
    assert found.forecast.peak_bytes <= 0.53 * keep_bytes
    assert found.forecast.step_s <= 1.005 * found.plan.keep_s


def test_less_than_a_module_is_on_its_way_where_there_is_no_room_for_more():
    profiles, fast = blocks(3, 1.0), {HOST: TierRate(1e6, 1e6)}
    roomy = plan_in(Setting(fast, 40_000), profiles)
    assert roomy.plan.actions == (HOST, HOST, KEEP)
    assert roomy.budgets == Budgets(16_000 + 16_000 - 4000, 16_000)
    scarce = windowed(Setting(fast, 25_000), roomy.plan)
    assert scarce.budgets.prefetch == 8000 and scarce.budgets.in_flight == 16_000 + 8000 - 4000
    assert scarce.forecast.peak_bytes == 24_000
    assert scarce.forecast.step_s <= 1.01 * roomy.plan.keep_s
    assert windowed(Setting(fast, 23_000), roomy.plan).forecast.peak_bytes > 23_000


def test_stores_have_the_room_of_what_is_kept_until_that_comes():
    """Forward alone can store three blocks of four; at no time do they and the last one fit."""
    profiles, rates = blocks(4, 1.0), {HOST: TierRate(12_500, 1e6)}
    made = replace(plan(profiles), actions=(HOST, HOST, HOST, KEEP))
    found = windowed(Setting(rates, 33_000), made)
    assert found.room is not None and found.room.most_bytes <= 33_000
    assert found.budgets.in_flight > found.budgets.prefetch
    assert found.forecast.peak_bytes <= 33_000
    assert found.forecast.exposed_s < 0.01 * found.plan.keep_s


def test_wider_windows_are_for_what_they_gain():
    profiles, rates = blocks(4, 1.0), {HOST: TierRate(12_500, 12_500)}
    narrow, wide = (plan_in(Setting(rates, n), profiles) for n in (33_000, 60_000))
    assert wide.forecast.step_s <= narrow.forecast.step_s
    fast = plan_in(Setting({HOST: TierRate(1e9, 1e9)}, 60_000), profiles)
    assert fast.budgets.prefetch == 16_000


def test_without_a_budget_windows_are_modules():
    profiles = blocks(4, 1.0)
    found = plan_in(Setting({DISK: TierRate(1e6, 1e6)}), profiles)
    assert found.budgets == Budgets(12_000, 16_000) and found.room is None
    assert found.plan == plan(profiles, disk=TierRate(1e6, 1e6))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(1, 1000), min_size=1, max_size=6), min_size=1, max_size=5),
    stuck=st.integers(0, 50),
    seconds=st.floats(0.1, 4.0),
    rate=st.floats(100, 1e5),
    share=st.floats(0.0, 1.1),
    outside=st.integers(0, 500),
)
def test_what_fits_does_and_takes_no_longer_than_windows_of_a_module(
    sizes, stuck, seconds, rate, share, outside
):
    profiles = [
        ModuleProfile(
            f"m{i}", seconds, 2 * seconds, sum(parts) + stuck, min(parts), stuck, parts=tuple(parts)
        )
        for i, parts in enumerate(sizes)
    ]
    rates = {HOST: TierRate(rate, rate), DISK: TierRate(rate / 2, rate / 3)}
    budget = share * (outside + sum(p.saved_bytes for p in profiles))
    setting = Setting(rates, budget, other_bytes=outside)
    found = plan_in(setting, profiles)
    assert found.plan.fits == (found.forecast.peak_bytes <= budget)
    assert found.forecast.prompt_bytes <= found.forecast.peak_bytes
    most = max(0.0, budget - outside)
    program = plan(profiles, host=rates[HOST], disk=rates[DISK], memory_budget=most)
    moved = [p for p, a in zip(profiles, program.actions, strict=True) if a in (HOST, DISK)]
    window = max((p.ahead_bytes for p in moved), default=0)
    largest = max((p.largest_part for p in moved), default=0)
    plain = setting.play(program, Budgets(window - largest, window))
    if plain.forecast.peak_bytes <= budget:
        assert found.plan.fits
        assert found.forecast.step_s <= 1.005 * plain.forecast.step_s
