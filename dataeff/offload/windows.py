"""How much of a plan may be on its way at once: what the budget has room for.

The planner's program lets a whole module be on its way beside all that is kept. Less will do, as
little as two storages, and on the way out it may be more: what is kept behind the modules that are
moved takes the room of their stores as these end. How long a step takes then is played (`simulate`)
with several windows, of several plans: some were made for more than the budget, by as much as
narrow windows save.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from dataeff.offload.passes import Budgets
from dataeff.offload.planner import Action, ModuleProfile, Plan, TierRate, plan
from dataeff.offload.simulate import Forecast, Room, simulate

_MOVES = (Action.HOST, Action.DISK)
_NUM_WIDTHS = 6  # from two storages to what there is room for
_NUM_PLANS = 3  # from one whole module on its way to two storages
_LEAST_GAIN = 2e-3  # of a step, for which windows are made narrower, or wider, than a module


@dataclass(frozen=True)
class Windowed:
    """A plan, what may be on its way while it is followed, and what a step then shows.

    Attributes:
        room: for what is kept behind all that is moved, if that is to be looked after.
    """

    plan: Plan
    budgets: Budgets
    room: Room | None
    forecast: Forecast


@dataclass(frozen=True)
class Setting:
    """What a plan is made for.

    Attributes:
        rates: of the tiers.
        budget: the most bytes held for backward at once; None where there is no bound.
        given: what the user bounds.
        other_s: seconds of a step outside the modules.
        other_bytes: bytes that what lies outside the modules holds for backward.
    """

    rates: dict[Action, TierRate]
    budget: float | None = None
    given: Budgets = field(default_factory=Budgets)
    other_s: float = 0.0
    other_bytes: float = 0.0

    def play(self, made: Plan, budgets: Budgets, room: Room | None = None) -> Windowed:
        """A step of the plan within `budgets` and `room`."""
        forecast = simulate(
            made.profiles,
            made.actions,
            self.rates,
            in_flight=budgets.in_flight or 0,
            prefetch=budgets.prefetch or 0,
            room=room,
            other_s=self.other_s,
            other_bytes=self.other_bytes,
        )
        return Windowed(made, budgets, room, forecast)


def plan_in(setting: Setting, profiles: Sequence[ModuleProfile]) -> Windowed:
    """The plan that adds the least time within the budget, and its windows.

    Where none keeps within it, the one with the least peak; its `fits` says so.
    """
    found = [windowed(setting, made) for made in _plans(setting, profiles)]
    best = _best(found, setting.budget)
    if setting.budget is None:
        return best
    peak = best.forecast.peak_bytes
    made = replace(
        best.plan,
        peak_bytes=min(best.plan.peak_bytes, max(0.0, peak - setting.other_bytes)),
        fits=peak <= setting.budget,
    )
    return replace(best, plan=made)


def windowed(setting: Setting, made: Plan) -> Windowed:
    """The plan with windows as wide as a module, if the budget has room for that.

    With others where they save time, or where it has not. The peak is the same, whether the stores
    end in time or as late as they may: forward holds no more than backward does when all that is
    kept is in memory beside what comes back.
    """
    moved = _moved(made)
    if not moved:
        return setting.play(made, setting.given)
    module = max(profile.ahead_bytes for profile in moved)
    if setting.budget is None:
        return setting.play(made, _budgets(setting, made, module, module))
    kept = sum(p.kept_bytes(a) for p, a in zip(made.profiles, made.actions, strict=True))
    room = int(setting.budget - setting.other_bytes - kept)
    least = 2 * max(profile.largest_part for profile in moved)
    most = max(least, min(room, sum(profile.moved_bytes for profile in moved)))
    between = {least + (most - least) * i // _NUM_WIDTHS for i in range(_NUM_WIDTHS + 1)}
    found = {width: _within(setting, made, width) for width in sorted({*between, module})}
    as_wide = [one for width, one in found.items() if width >= module]
    fits = any(one.forecast.peak_bytes <= setting.budget for one in as_wide)
    return _best(as_wide if fits else list(found.values()), setting.budget)


def _plans(setting: Setting, profiles: Sequence[ModuleProfile]) -> Iterator[Plan]:
    """Plans that may be the best: the program's, and those for more room than there is."""
    host, disk = (setting.rates.get(tier) for tier in _MOVES)
    if setting.budget is None:
        yield plan(profiles, host=host, disk=disk)
        return
    budget = max(0.0, setting.budget - setting.other_bytes)
    whole = max(p.moved_bytes + p.largest_part for p in profiles)
    saved = max(0, whole - 2 * max(p.largest_part for p in profiles))
    seen = set[tuple[Action, ...]]()
    for i in range(_NUM_PLANS):
        more = saved * i / (_NUM_PLANS - 1)
        made = plan(profiles, host=host, disk=disk, memory_budget=budget + more)
        if made.actions not in seen:
            seen.add(made.actions)
            yield made


def _best(found: Sequence[Windowed], budget: float | None) -> Windowed:
    """The first of those that take hardly longer than the fastest that keeps within `budget`."""
    within = [one for one in found if budget is None or one.forecast.peak_bytes <= budget]
    if not within:
        return min(found, key=lambda one: one.forecast.peak_bytes)
    least_s = min(one.forecast.step_s for one in within)
    return next(one for one in within if one.forecast.step_s <= (1 + _LEAST_GAIN) * least_s)


def _moved(made: Plan) -> list[ModuleProfile]:
    return [p for p, a in zip(made.profiles, made.actions, strict=True) if a in _MOVES]


def _within(setting: Setting, made: Plan, width: int) -> Windowed:
    """The plan with a window of `width` bytes beside all that it keeps.

    While forward has not come to what is kept behind the last module that is moved, there is room
    for as much more on its way out.
    """
    actions = made.actions
    last_moved = max(i for i, action in enumerate(actions) if action in _MOVES)
    behind = [i for i, action in enumerate(actions) if action is Action.KEEP and i > last_moved]
    if not behind:
        return setting.play(made, _budgets(setting, made, width, width))
    upto = zip(made.profiles[: behind[-1] + 1], actions, strict=False)
    room = Room(
        width + sum(profile.kept_bytes(action) for profile, action in upto),
        sum(made.profiles[i].moved_bytes for i in behind),
        max(made.profiles[i].largest_part for i in behind),
    )
    budgets = _budgets(setting, made, width + int(room.behind_bytes), width)
    return setting.play(made, budgets, room)


def _budgets(setting: Setting, made: Plan, out: int, back: int) -> Budgets:
    """What may be in flight: as given, or so much.

    On the way out the storage that forward has just made comes on top, so that one less may be on
    its way. Without a budget what is given is the user's; within one there is room for no more.
    """
    largest = max(profile.largest_part for profile in _moved(made))
    given = setting.given
    return Budgets(
        *(
            own if nbytes is None else nbytes if setting.budget is None else min(nbytes, own)
            for nbytes, own in ((given.in_flight, out - largest), (given.prefetch, back))
        )
    )
