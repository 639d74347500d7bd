"""Plays a plan through, storage by storage: the step time and the peak that it should show.

The planner's inequalities bound a plan from above. Here one step is run on paper, with the queues
and budgets that the tensor cache has: a store begins when its bytes exist and the tier is free,
forward waits when too many are in flight, what has not begun when backward wants it is forwarded,
and reads run ahead of backward within the prefetch budget.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from dataeff.offload.planner import Action, ModuleProfile, TierRate

_NUM_PARTS = 8  # a module whose storages are not known saves its bytes in so many equal parts


@dataclass(frozen=True)
class Forecast:
    """What a plan is predicted to cost.

    Attributes:
        step_s: seconds from the first forward to the end of backward.
        exposed_s: of these, seconds that compute stands still for transfers.
        peak_bytes: the most bytes held for backward at once, however late the stores end: forward
            waits for the oldest where more would be in flight than allowed.
        seen_bytes: the same as `OffloadReport.peak_saved_bytes` counts it: what a recomputed module
            saves while backward runs it is held by the checkpoint, where no hook sees it.
        prompt_bytes: `seen_bytes` if every store ends when the rate of its tier says.
    """

    step_s: float
    exposed_s: float
    peak_bytes: float
    seen_bytes: float
    prompt_bytes: float


@dataclass(frozen=True)
class Room:
    """What forward may hold when it has made the modules that are kept behind all that are moved.

    They take the room of what was on its way before, which has to have left by then.

    Attributes:
        most_bytes: that may be held.
        behind_bytes: of these, bytes of those modules.
        largest_bytes: of their storages.
    """

    most_bytes: float
    behind_bytes: float
    largest_bytes: float

    def before_next(self, nbytes: float) -> float:
        """The most that may be held when `nbytes` behind what moved are kept: more will come."""
        return self.most_bytes - min(self.largest_bytes, max(0.0, self.behind_bytes - nbytes))


@dataclass(eq=False)
class _Part:
    """A stretch of one module's bytes on its way out and back."""

    nbytes: float
    tier: Action
    stored_s: float = 0.0  # when its store ends
    started_s: float = 0.0  # when its store begins
    back_s: float | None = None  # when its load ends, once it is begun


@dataclass
class _Step:
    """The clock, the tiers' queues and the bytes held, as one step goes on."""

    rates: dict[Action, TierRate]
    in_flight: float
    prefetch: float
    late: bool  # whether no store ends before somebody waits for it
    room: Room | None = None
    now_s: float = 0.0
    exposed_s: float = 0.0
    held: float = 0.0
    peak: float = 0.0
    seen: float = 0.0
    unseen: float = 0.0
    free_s: dict[Action, float] = field(default_factory=dict)
    leaving: deque[_Part] = field(default_factory=deque)
    behind: float = 0.0  # bytes that were kept since something was moved
    coming: float = 0.0  # bytes that are in memory, or on their way to it, ahead of backward

    def hold(self, nbytes: float) -> None:
        self.held += nbytes
        self.peak = max(self.peak, self.held)
        self.seen = max(self.seen, self.held - self.unseen)

    def keep(self, nbytes: float) -> None:
        """A module that is kept saves so much; the oldest stores end, if need be."""
        self.hold(nbytes)
        if self.room is not None:
            self.behind += nbytes
            most = self.room.before_next(self.behind)
            while self.leaving and self.held > most:
                self._end_oldest()

    def wait_until(self, when_s: float) -> None:
        if when_s > self.now_s:
            self.exposed_s += when_s - self.now_s
            self.now_s = when_s

    def compute(self, seconds: float) -> None:
        self.now_s += seconds
        self._settle()

    def _settle(self) -> None:
        for part in () if self.late else list(self.leaving):
            if part.stored_s <= self.now_s:
                self._gone(part)

    def _end_oldest(self) -> None:
        oldest = self.leaving[0]
        self.wait_until(oldest.stored_s)
        self._gone(oldest)

    def _gone(self, part: _Part) -> None:
        self.leaving.remove(part)
        self.held -= part.nbytes

    def store(self, part: _Part) -> None:
        """The part exists now; waits while more would be in flight than allowed."""
        self.behind = 0.0
        while self.leaving and sum(p.nbytes for p in self.leaving) + part.nbytes > self.in_flight:
            self._end_oldest()
        part.started_s = max(self.now_s, self.free_s.get(part.tier, 0.0))
        part.stored_s = part.started_s + part.nbytes / self.rates[part.tier].write
        self.free_s[part.tier] = part.stored_s
        self.leaving.append(part)

    def begin_backward(self, parts: Sequence[_Part]) -> None:
        """Stores that have not begun are stopped as backward comes near: the tier only reads."""
        for part in parts:
            if part in self.leaving:
                part.back_s = self.now_s
                self.coming += part.nbytes
                self.leaving.remove(part)
        for tier in self.free_s:
            self.free_s[tier] = min(self.free_s[tier], self.now_s)

    def read_ahead(self, wanted: Sequence[_Part]) -> None:
        """Begins the loads of `wanted`, nearest first, as far as the budget reaches."""
        for part in wanted:
            if part.back_s is not None:
                continue
            if self.coming + part.nbytes > self.prefetch:
                return
            self._load(part)

    def _load(self, part: _Part) -> None:
        start_s = max(self.now_s, self.free_s.get(part.tier, 0.0))
        part.back_s = start_s + part.nbytes / self.rates[part.tier].read
        self.free_s[part.tier] = part.back_s
        self.coming += part.nbytes
        self.hold(part.nbytes)

    def use(self, part: _Part, ahead: Sequence[_Part]) -> None:
        """Backward wants the part now; `ahead` are the next it will want."""
        if part.back_s is None:
            self._load(part)
        self.read_ahead(ahead)
        assert part.back_s is not None
        self.wait_until(part.back_s)

    def done_with(self, part: _Part) -> None:
        """Backward has used the part."""
        self.coming -= part.nbytes
        self.held -= part.nbytes


def simulate(
    profiles: Sequence[ModuleProfile],
    actions: Sequence[Action],
    rates: dict[Action, TierRate],
    *,
    in_flight: float,
    prefetch: float,
    room: Room | None = None,
    other_s: float = 0.0,
    other_bytes: float = 0.0,
) -> Forecast:
    """Predicts a step in which module i is treated by `actions[i]`.

    Args:
        profiles: the modules in the order of forward.
        actions: what to do with each.
        rates: of the tiers that take part.
        in_flight: bytes that may wait for their store to end.
        prefetch: bytes that may be brought back ahead of backward.
        room: what is kept behind all that is moved waits for stores that leave too little of it.
        other_s: seconds of the step outside the modules.
        other_bytes: bytes that what lies outside the modules holds for backward.
    """
    prompt, late = (
        _play(
            _Step(rates, in_flight, prefetch, late, room),
            profiles,
            actions,
            other_s,
            other_bytes,
        )
        for late in (False, True)
    )
    return Forecast(
        prompt.now_s,
        prompt.exposed_s,
        max(prompt.peak, late.peak),
        max(prompt.seen, late.seen),
        prompt.seen,
    )


def _play(
    step: _Step,
    profiles: Sequence[ModuleProfile],
    actions: Sequence[Action],
    other_s: float,
    other_bytes: float,
) -> _Step:
    parts: dict[int, list[_Part]] = {}
    for i, (profile, action) in enumerate(zip(profiles, actions, strict=True)):
        parts[i] = _forward(step, profile, action)
    step.hold(other_bytes)
    step.compute(other_s)
    order = [part for i in reversed(parts) for part in reversed(parts[i])]
    step.begin_backward(order[::-1])
    step.read_ahead(order)  # with the first tensor that backward wants, which lies outside
    if not any(profile.again_bytes for profile in profiles):
        step.held -= other_bytes  # else it is inputs of checkpoints, which stay until these run
    position = 0
    for i in reversed(range(len(profiles))):
        _backward(step, profiles[i], actions[i], parts[i], order, position)
        position += len(parts[i])
    return step


def _forward(step: _Step, profile: ModuleProfile, action: Action) -> list[_Part]:
    if action is Action.KEEP:
        sizes = _sizes(profile)
        step.hold(profile.saved_bytes - sum(sizes))
        for nbytes in sizes:
            step.compute(profile.forward_s * _share(nbytes, profile))
            step.keep(nbytes)
        return []
    step.hold(profile.kept_bytes(action))
    if action is Action.RECOMPUTE:
        step.compute(profile.forward_s)
        return []
    made = []
    # Half of what moving adds falls on either way.
    forward_s = profile.forward_s + profile.added_s(action) / 2
    for nbytes in _sizes(profile):
        step.compute(forward_s * _share(nbytes, profile))
        part = _Part(nbytes, action)
        step.hold(nbytes)
        step.store(part)
        made.append(part)
    return made


def _sizes(profile: ModuleProfile) -> Sequence[float]:
    if not profile.moved_bytes:
        return (0.0,)
    return profile.parts or (profile.moved_bytes / _NUM_PARTS,) * _NUM_PARTS


def _share(nbytes: float, profile: ModuleProfile) -> float:
    """The share of a module's seconds that a part of it takes."""
    return nbytes / profile.moved_bytes if profile.moved_bytes else 1.0


def _backward(
    step: _Step,
    profile: ModuleProfile,
    action: Action,
    parts: list[_Part],
    order: list[_Part],
    position: int,
) -> None:
    ahead = order[position + len(parts) :]
    step.hold(profile.again_bytes)
    if action is Action.RECOMPUTE:
        step.read_ahead(ahead)
        added_s = profile.added_s(action)  # negative where it is moving that is the slow way
        step.compute(max(0.0, added_s))
        step.unseen = profile.saved_bytes
        step.hold(profile.saved_bytes)
        step.compute(profile.backward_s + min(0.0, added_s))
        step.unseen = 0.0
        step.held -= profile.saved_bytes + profile.kept_bytes(action)
    elif action is Action.KEEP:
        step.read_ahead(ahead)
        step.compute(profile.backward_s)
        step.hold(-profile.kept_bytes(action))
    else:
        backward_s = profile.backward_s + profile.added_s(action) / 2
        for k, part in enumerate(reversed(parts)):
            step.use(part, order[position + k + 1 :])
            step.compute(backward_s * _share(part.nbytes, profile))
            step.done_with(part)
        step.hold(-profile.kept_bytes(action))
    step.hold(-profile.again_bytes)
