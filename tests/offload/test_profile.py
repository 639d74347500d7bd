"""What the planner is told of the blocks: every action is measured by itself."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dataeff.offload.exclude import Exclusions
from dataeff.offload.followed import Followed
from dataeff.offload.planner import Action
from dataeff.offload.profile import BlockProfiler, trials
from dataeff.offload.report import ModuleBytes
from dataeff.offload.simulate import Forecast, simulate

KEEP, DISK, RECOMPUTE = Action.KEEP, Action.DISK, Action.RECOMPUTE
NAMES = ["a", "b", "c", "d"]


@pytest.mark.parametrize("num_kept", [0, 1, 2, 4])
@pytest.mark.parametrize("recompute", [False, True])
def test_trials_are_of_one_kind_and_keep_no_more_than_fits(num_kept, recompute):
    found = trials(NAMES, num_kept, set(NAMES) if recompute else set(), 6)
    assert len(found) == 6 and all(list(trial) == NAMES for trial in found)
    kinds = [set(trial.values()) for trial in found]
    assert {DISK} in kinds and ({RECOMPUTE} in kinds or not recompute)
    kept = [[name for name in NAMES if trial[name] is KEEP] for trial in found]
    assert max(map(len, kept)) == num_kept
    if num_kept == 2:
        assert {name for names in kept for name in names} == set(NAMES)
    for trial in found:  # what is not kept for lack of room is not moved beside what is
        if KEEP in trial.values() and recompute:
            assert DISK not in trial.values()


def profiler_of(steps):
    """A profiler that has seen `steps`: {block: (action, forward_s, backward_s)}, a second else."""
    profiler = BlockProfiler(
        dict.fromkeys(NAMES, nn.Identity()), torch.device("cpu"), Exclusions(nn.Identity())
    )
    for step in steps:
        seconds = {}
        for name, (_, forward_s, backward_s) in step.items():
            seconds["forward", name], seconds["backward", name] = forward_s, backward_s
        trial = {name: action for name, (action, _, _) in step.items()}
        profiler._steps.append((trial, seconds, sum(seconds.values()) + 1.0))
    return profiler


SAVED = {name: ModuleBytes(100, 90) for name in NAMES}
MOVED = dict.fromkeys(NAMES, (DISK, 1.1, 2.2))
AGAIN = dict.fromkeys(NAMES, (RECOMPUTE, 1.0, 2.6))
TWO_KEPT = {**AGAIN, "a": (KEEP, 1.0, 2.0), "b": (KEEP, 1.0, 2.0)}


def test_what_moving_and_recomputing_add_is_measured():
    profiler = profiler_of([MOVED, AGAIN, TWO_KEPT])
    profiles = profiler.profiles(SAVED)
    for profile in profiles:  # also of the two that were never kept
        assert profile.forward_s == pytest.approx(1.0)
        assert profile.backward_s == pytest.approx(2.0)
        assert profile.moving_s == pytest.approx(0.3)
        assert profile.recompute_s == pytest.approx(0.6)
        assert (profile.saved_bytes, profile.stuck_bytes) == (100, 10)
    assert profiler.other_s() == pytest.approx(1.0)
    for action, seconds in ((KEEP, 12.0), (RECOMPUTE, 14.4)):
        assert simulate(
            profiles, [action] * 4, {}, in_flight=0, prefetch=0
        ).step_s == pytest.approx(seconds)


def test_where_nothing_could_be_kept_the_two_others_are_still_right():
    slow = dict.fromkeys(NAMES, (DISK, 1.5, 3.0))  # moving is slower than running again
    profiles = profiler_of([slow, AGAIN]).profiles(SAVED)
    again = simulate(profiles, [RECOMPUTE] * 4, {}, in_flight=0, prefetch=0)
    assert again.step_s == pytest.approx(4 * 3.6)
    assert all(p.moving_s == 0 and p.forward_s == 1.5 for p in profiles)


def test_without_trials_of_recomputing_it_costs_a_forward():
    kept = dict.fromkeys(NAMES, (KEEP, 1.0, 2.0))
    profiles = profiler_of([MOVED, kept]).profiles(SAVED)
    assert all(p.recompute_s is None and p.added_s(RECOMPUTE) == p.forward_s for p in profiles)


@pytest.mark.parametrize("slow", range(9))
def test_one_disturbed_step_does_no_harm(slow):
    """Three steps of each kind; one takes twice as long, all of it or only its first block."""
    kept = [dict(AGAIN), dict(AGAIN), dict(AGAIN)]
    for i, trial in enumerate(kept):
        trial[NAMES[i]] = (KEEP, 1.0, 2.0)
    steps = [step for trial in kept for step in (MOVED, AGAIN, trial)]

    def slower(step, names):
        return {
            n: (a, f * (1 + (n in names)), b * (1 + (n in names))) for n, (a, f, b) in step.items()
        }

    for names in (NAMES, NAMES[:1]):
        disturbed = [slower(s, names) if i == slow else s for i, s in enumerate(steps)]
        for profile in profiler_of(disturbed).profiles(SAVED):
            assert profile.forward_s == pytest.approx(1.0)
            assert profile.backward_s == pytest.approx(2.0)
            assert profile.moving_s == pytest.approx(0.3)
            assert profile.recompute_s == pytest.approx(0.6)


def test_an_input_is_counted_once_and_not_where_it_is_alive_anyway():
    class Block(nn.Module):
        def forward(self, x, weight, mask=None):
            return x @ weight if mask is None else x * mask

    model = nn.Linear(8, 8, bias=False)
    a, b = Block(), Block()
    exclusions = Exclusions(model)
    exclusions.refresh()
    profiler = BlockProfiler({"a": a, "b": b}, torch.device("cpu"), exclusions)
    profiler.install(lambda: 0.0)
    given, mask = torch.randn(4, 8), torch.ones(64, 8)
    exclusions.set_inputs((given,), {})
    for _ in range(2):  # the second counts as the first did
        profiler.begin()
        y = a(given, model.weight, mask=mask[:4])
        y = b(y, model.weight, mask=mask[4:8])
        a(y.detach(), model.weight)  # as a checkpoint does that runs it again, with what is known
        b(y, model.weight)
        profiler.end(dict.fromkeys("ab", RECOMPUTE))
    profiler.remove()
    nbytes = {"a": 64 * 8 * 4, "b": 4 * 8 * 4}
    # `b` gets what `a` returned, and `a` in its second call what `b` returned.
    expected = {"a": [nbytes["a"] + 4 * 8 * 4] * 2, "b": [nbytes["b"]] * 2}
    assert profiler._input_bytes == expected


def test_inputs_are_those_of_a_step_of_the_usual_size():
    block, exclusions = nn.Identity(), Exclusions(nn.Identity())
    profiler = BlockProfiler({"": block}, torch.device("cpu"), exclusions)
    profiler.install(lambda: 0.0)
    for num_rows in (8, 64, 48, 64, 16):
        profiler.begin()
        block(torch.randn(num_rows, 4))
        profiler.end({"": Action.DISK})
    profiler.remove()
    (profile,) = profiler.profiles({})
    assert profile.input_bytes == 48 * 4 * 4


def test_a_block_lasts_until_its_stream_is_done_and_not_the_copies_beside_it(monkeypatch):
    waited = []

    def current_stream(device):
        return SimpleNamespace(synchronize=lambda: waited.append(device))

    def whole_device(device=None):
        raise AssertionError("waits for the copies too")

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    monkeypatch.setattr(torch.cuda, "synchronize", whole_device)
    device, block = torch.device("cuda", 1), nn.Linear(4, 4)
    profiler = BlockProfiler({"": block}, device, Exclusions(block))
    profiler.install(lambda: 0.0)
    profiler.begin()
    block(torch.randn(2, 4)).sum().backward()
    profiler.end({"": DISK})
    profiler.remove()
    assert waited == [device] * 5  # the step, forward, between, backward, the end


@pytest.mark.parametrize(("peak", "told"), [(90, "+0 %"), (110, "+10 %"), (60, "-25 %")])
def test_a_peak_between_those_of_prompt_and_of_late_stores_is_as_foreseen(peak, told):
    mib = 1 << 20
    followed = Followed(0.0)
    followed._step_s, followed._peak = [1.0], peak * mib
    foreseen = Forecast(1.0, 0.0, peak_bytes=100 * mib, seen_bytes=100 * mib, prompt_bytes=80 * mib)
    assert f"measured since: peak {peak}.0 MiB ({told})" in "".join(followed.explain(foreseen))
