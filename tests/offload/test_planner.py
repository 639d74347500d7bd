"""The plan is the best there is, and doing nothing is one of the plans."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataeff.offload import ActivationOffload, planner
from dataeff.offload.planner import Action, ModuleProfile, Plan, TierRate, plan
from dataeff.offload.simulate import simulate as play

KEEP, HOST, DISK, RECOMPUTE = Action.KEEP, Action.HOST, Action.DISK, Action.RECOMPUTE


def equal_modules(n, input_bytes=None):
    return [ModuleProfile(f"blocks.{i}", 1.0, 2.0, 1000, input_bytes) for i in range(n)]


def test_golden_case_of_the_paper():
    # 4 equal scopes ask for 2/12, 3/10, 4/8, 5/6 bytes per second: 0.4 offloads two, keeps two.
    found = plan(equal_modules(4), disk=TierRate(write=400.0, read=400.0))
    assert found.actions == (DISK, DISK, KEEP, KEEP)
    assert found.step_s == pytest.approx(found.keep_s)


@pytest.mark.parametrize(
    ("bandwidth", "moved"), [(100.0, 0), (170.0, 1), (340.0, 2), (510.0, 3), (840.0, 3)]
)
def test_the_rule_at_other_bandwidths(bandwidth, moved):
    # The paper's rule alone would move the second at 300 and the last at 833; but reads must be in
    # time too, and nothing of backward runs before the last is wanted.
    found = plan(equal_modules(4), disk=TierRate(bandwidth, bandwidth))
    assert found.actions == (DISK,) * moved + (KEEP,) * (4 - moved)


def test_declines_when_everything_fits():
    found = plan(
        equal_modules(4, 10), disk=TierRate(1e9, 1e9), host=TierRate(1e9, 1e9), memory_budget=4000
    )
    assert found.declines and found.fits and found.peak_bytes == 4000


def test_recomputes_when_the_disk_is_too_slow():
    found = plan(equal_modules(6, 10), disk=TierRate(1.0, 1.0), memory_budget=4000)
    assert DISK not in found.actions and RECOMPUTE in found.actions
    assert found.peak_bytes <= 4000
    assert found.step_s == pytest.approx(found.keep_s + found.actions.count(RECOMPUTE) * 1.0)


def test_prefers_host_to_disk_until_it_is_full():
    fast = TierRate(1e6, 1e6)
    found = plan(equal_modules(8), host=TierRate(1e6, 1e6, 2000), disk=fast, memory_budget=4500)
    assert found.actions.count(HOST) == 2 and found.actions.count(DISK) >= 1
    assert found.peak_bytes <= 4500


def test_a_module_that_is_moved_storage_by_storage_takes_less_than_two_of_it():
    fast, budget = TierRate(1e6, 1e6), 1500
    assert not plan(equal_modules(4), disk=fast, memory_budget=budget).fits
    in_parts = [replace(module, parts=(250,) * 4) for module in equal_modules(4)]
    found = plan(in_parts, disk=fast, memory_budget=budget)
    assert found.fits and found.actions == (DISK,) * 4 and found.peak_bytes == 1250


def test_what_comes_back_while_a_module_is_recomputed_counts():
    fast = TierRate(1e6, 1e6)
    moved = [replace(module, parts=(250,) * 4) for module in equal_modules(2)]
    last = ModuleProfile("last", 0.01, 2.0, 1000, 10, moving_s=5.0, parts=(250,) * 4)
    found = plan([*moved, last], disk=fast, memory_budget=2100)
    assert found.actions == (DISK, DISK, RECOMPUTE)
    assert found.peak_bytes == pytest.approx(10 + 1000 + 1000)
    rates, bounds = {DISK: fast}, {"in_flight": 750, "prefetch": 1000}
    played = play(found.profiles, found.actions, rates, **bounds)
    assert played.peak_bytes == pytest.approx(found.peak_bytes)
    within = plan([*moved, last], disk=fast, memory_budget=1500)
    assert within.actions == (DISK,) * 3


def test_ends_that_fill_no_block_of_the_disk_count():
    fast = TierRate(1e6, 1e6)
    profiles = [ModuleProfile(f"m{i}", 1.0, 2.0, 1000, left_bytes=100) for i in range(4)]
    found = plan(profiles, disk=fast, memory_budget=2300)
    assert not found.fits and found.peak_bytes == 2400
    assert plan(profiles, host=fast, memory_budget=2300).peak_bytes == 2000


def test_says_when_nothing_fits():
    found = plan(equal_modules(4, 900), disk=TierRate(1e6, 1e6), memory_budget=100)
    assert not found.fits and "NO plan fits" in str(found)
    assert found.peak_bytes == 2000  # all moved: one on its way, one in use


def test_table_and_lookup_by_scope():
    found = plan(equal_modules(4), disk=TierRate(400.0, 400.0))
    assert found.action_of("blocks.1.mlp.up") is DISK
    assert found.action_of("blocks.3") is KEEP and found.action_of("blocks.10") is KEEP
    assert str(found).splitlines()[1].split()[:2] == ["blocks.0", "disk"]


def test_no_modules_are_refused():
    with pytest.raises(ValueError, match="no module"):
        plan([])


def test_many_equal_modules_are_planned_for_in_one_order():
    module = ModuleProfile("m", 0.01, 0.02, 100_000, 8_000, 2_000, recompute_s=0.009)
    module = replace(module, parts=(16_000,) * 5 + (18_000,), moving_s=0.0009)
    found = plan(
        [replace(module, name=f"blocks.{i}") for i in range(32)],
        host=TierRate(3e6, 3e6, 960_000),
        disk=TierRate(0.9e6, 1.5e6),
        memory_budget=1_280_000,
    )
    assert found.fits
    assert found.actions == (DISK,) * 7 + (HOST,) * 9 + (RECOMPUTE,) * 6 + (KEEP,) * 10


def test_very_many_equal_modules_are_planned_for_as_well_as_a_few():
    def planned(num_blocks):
        module = ModuleProfile("m", 0.01, 0.02, 100_000, 8_000, 2_000, recompute_s=0.009)
        module = replace(module, parts=(16_000,) * 5 + (18_000,), moving_s=0.0009)
        found = plan(
            [replace(module, name=f"blocks.{i}") for i in range(num_blocks)],
            host=TierRate(3e6, 3e6, 30_000 * num_blocks),
            disk=TierRate(0.9e6, 1.5e6),
            memory_budget=20_000 * num_blocks,
        )
        assert found.fits
        return found.step_s / found.keep_s

    assert planned(250) <= planned(25) * 1.01


def test_modules_that_take_other_times_are_not_alike():
    module = ModuleProfile("m", 1.0, 2.0, 1000, 10)
    slow = replace(module, forward_s=5.0, backward_s=10.0)
    found = plan([slow, module] * 8, disk=TierRate(1.0, 1.0), memory_budget=12_000)
    assert found.fits and found.actions.count(RECOMPUTE) == 6
    assert all(a is KEEP for a in found.actions[::2])


def simulate(profiles, actions, rates):
    """Exposed seconds and peak of `actions`, straight from the formulas of `plan`'s docstring."""
    exposed = 0.0
    for tier, rate in rates.items():
        moved = [p.saved_bytes * (a is tier) for p, a in zip(profiles, actions, strict=True)]
        if sum(moved) > rate.capacity:
            return None
        for n, p in enumerate(profiles):
            if not moved[n]:
                continue
            tail = sum(q.backward_s for q in profiles[n:])
            store = sum(moved[:n]) / rate.write + moved[n] * (1 / rate.write + 1 / rate.read)
            read = sum(moved[n:]) / rate.read
            exposed = max(exposed, store - sum(q.forward_s for q in profiles) - tail)
            exposed = max(exposed, read - (tail - p.backward_s))
    peak = working = added = 0.0
    pairs = list(zip(profiles, actions, strict=True))
    ahead = max((2 * p.saved_bytes for p, a in pairs if a in (HOST, DISK)), default=0.0)
    for p, action in zip(profiles, actions, strict=True):
        if action is KEEP:
            peak += p.saved_bytes
        elif action is RECOMPUTE:
            peak, working, added = (
                peak + p.input_bytes,
                max(working, p.saved_bytes + ahead),
                added + p.forward_s,
            )
        else:
            working = max(working, 2 * p.saved_bytes)
    return exposed + added, peak + working


profiles_strategy = st.lists(
    st.builds(
        ModuleProfile,
        name=st.just("m"),
        forward_s=st.floats(0.1, 2.0),
        backward_s=st.floats(0.1, 4.0),
        saved_bytes=st.integers(1, 1000),
        input_bytes=st.integers(0, 100),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=40, deadline=None)
@given(
    profiles=profiles_strategy,
    host=st.builds(TierRate, st.floats(50, 5000), st.floats(50, 5000), st.floats(0, 2000)),
    disk=st.builds(TierRate, st.floats(50, 5000), st.floats(50, 5000)),
    share=st.floats(0.05, 1.1),
)
def test_no_plan_is_better(profiles, host, disk, share):
    rates = {HOST: host, DISK: disk}
    budget = share * sum(p.saved_bytes for p in profiles)
    best = None
    for actions in itertools.product((KEEP, HOST, DISK, RECOMPUTE), repeat=len(profiles)):
        outcome = simulate(profiles, actions, rates)
        if outcome is not None and outcome[1] <= budget:
            best = outcome[0] if best is None else min(best, outcome[0])
    found = plan(profiles, host=host, disk=disk, memory_budget=budget)
    assert isinstance(found, Plan) and found.fits == (best is not None)
    added, peak = simulate(profiles, found.actions, rates)
    assert found.peak_bytes == pytest.approx(peak)
    assert found.step_s - found.keep_s == pytest.approx(added, abs=1e-6)
    if best is not None:
        # The solver's tolerance, and the weight that prefers moving less.
        total_s = sum(p.forward_s + p.backward_s for p in profiles)
        assert added <= best + 1e-3 * total_s


def test_without_scipy_an_offload_is_refused_before_it_measures(monkeypatch, tmp_path):
    monkeypatch.setattr(planner, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"dataeff\[plan\]"):
        ActivationOffload(torch.nn.Linear(4, 4), tmp_path, policy="auto")
