"""Which module's activations to keep, move or recompute: a small integer program.

SSDTrain (arXiv 2408.10013) keeps everything from the first module on whose bytes cannot be written
and read back by the end of its own backward. That inequality is one family of constraints here;
beside it stand the reads before each backward, two tiers with rates of their own, recomputation,
a memory budget, and the freedom to do nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from importlib.util import find_spec

import numpy as np

_FEW = 8  # modules, of which the solver may try all orders
_MANY = 64  # modules, of which each may be treated by itself
_ALIKE = 1.25  # times the seconds of a module, those of another that is like it may be


class Action(str, Enum):
    """What happens to the activations of one module."""

    KEEP = "keep"
    HOST = "host"
    DISK = "disk"
    RECOMPUTE = "recompute"


@dataclass(frozen=True)
class ModuleProfile:
    """One module of the chain, as measured, in the order of forward.

    Attributes:
        name: its name in the model.
        forward_s: seconds of its forward when it is kept.
        backward_s: seconds of its backward when it is kept.
        saved_bytes: bytes that it saves, each storage counted once.
        input_bytes: bytes that recomputing it would have to keep; None if it cannot be recomputed.
        stuck_bytes: of `saved_bytes`, those that no tier takes (storages that are too small).
        moving_s: seconds that moving it adds to them, waits left out: the processor's share of
            transfers, memory that is mapped anew.
        recompute_s: seconds that recomputing it adds; those of its forward when None. Less, as a
            rule: what comes after the last tensor saved is not run again.
        again_bytes: bytes that it saves only while backward runs it again, for a checkpoint of the
            model's own.
        left_bytes: of `saved_bytes`, those that stay in memory beside a copy on disk.
        parts: bytes of each storage that moving it moves, in the order in which it saves them;
            empty if they are not known.
    """

    name: str
    forward_s: float
    backward_s: float
    saved_bytes: int
    input_bytes: int | None = None
    stuck_bytes: int = 0
    moving_s: float = 0.0
    recompute_s: float | None = None
    again_bytes: int = 0
    left_bytes: int = 0
    parts: tuple[int, ...] = ()

    def added_s(self, action: Action) -> float:
        """Seconds that `action` adds to those of keeping, waits left out."""
        if action is Action.RECOMPUTE:
            return self.forward_s if self.recompute_s is None else self.recompute_s
        return 0.0 if action is Action.KEEP else self.moving_s

    def kept_bytes(self, action: Action) -> int:
        """Bytes that stay in memory from its forward to its backward."""
        if action is Action.KEEP:
            return self.saved_bytes
        if action is Action.RECOMPUTE:
            return self.input_bytes or 0
        return self.stuck_bytes + (self.left_bytes if action is Action.DISK else 0)

    def is_like(self, other: ModuleProfile) -> bool:
        """Whether it saves the same as `other`, in about the same time."""
        pairs = ((self.forward_s, other.forward_s), (self.backward_s, other.backward_s))
        return self._bytes == other._bytes and all(
            max(pair) <= _ALIKE * min(pair) for pair in pairs
        )

    @property
    def _bytes(self) -> tuple[object, ...]:
        kept = (self.input_bytes, self.stuck_bytes, self.left_bytes)
        return self.saved_bytes, self.again_bytes, self.parts, *kept

    @property
    def moved_bytes(self) -> int:
        """Bytes that go to a tier when the module is moved."""
        return self.saved_bytes - self.stuck_bytes

    @property
    def largest_part(self) -> int:
        """Bytes of the largest storage that is moved; of all that is, where they are not known."""
        return max(self.parts, default=self.moved_bytes)

    @property
    def ahead_bytes(self) -> int:
        """Bytes that may be brought back ahead of backward when it is moved: two storages."""
        return max(self.moved_bytes, 2 * self.largest_part)


@dataclass(frozen=True)
class TierRate:
    """What a tier can do, in bytes and bytes per second."""

    write: float
    read: float
    capacity: float = float("inf")


@dataclass(frozen=True)
class Plan:
    """An action per module, and what it is predicted to cost.

    Attributes:
        profiles: the modules.
        actions: what to do with each.
        peak_bytes: predicted bytes held for backward at once.
        keep_bytes: the same when everything is kept.
        step_s: predicted seconds of forward and backward.
        keep_s: the same when everything is kept.
        fits: whether `peak_bytes` is within the budget.
    """

    profiles: tuple[ModuleProfile, ...]
    actions: tuple[Action, ...]
    peak_bytes: float
    keep_bytes: float
    step_s: float
    keep_s: float
    fits: bool

    def action_of(self, scope: str) -> Action:
        """The action for tensors saved in `scope`: that of the module it lies in, else keep."""
        for profile, action in zip(self.profiles, self.actions, strict=True):
            if scope == profile.name or scope.startswith(profile.name + "."):
                return action
        return Action.KEEP

    @property
    def declines(self) -> bool:
        """Whether it is best to do nothing."""
        return all(action is Action.KEEP for action in self.actions)

    def __str__(self) -> str:
        """A table, one module a line, and the prediction."""
        width = max([6, *(len(p.name) for p in self.profiles)])
        lines = [f"{'module':<{width}}  action     saved MiB  forward ms  backward ms"]
        for p, action in zip(self.profiles, self.actions, strict=True):
            lines.append(
                f"{p.name:<{width}}  {action.value:<9} {p.saved_bytes / 2**20:>10.1f}"
                f" {1e3 * p.forward_s:>11.2f} {1e3 * p.backward_s:>12.2f}"
            )
        lines.append(
            f"peak {self.peak_bytes / 2**20:.1f} MiB (keeping: {self.keep_bytes / 2**20:.1f}), "
            f"step {1e3 * self.step_s:.1f} ms (keeping: {1e3 * self.keep_s:.1f})"
            + ("" if self.fits else "; NO plan fits the budget")
        )
        return "\n".join(lines)


def check_solver() -> None:
    """Raises ImportError without scipy: when an offload is made, and not after 17 steps."""
    if find_spec("scipy") is None:
        raise ImportError("policy='auto' needs scipy: pip install 'dataeff[plan]'")


def plan(
    profiles: Sequence[ModuleProfile],
    *,
    host: TierRate | None = None,
    disk: TierRate | None = None,
    memory_budget: float | None = None,
) -> Plan:
    """The plan that adds the least time among those whose peak fits `memory_budget`.

    For module n, with x its bytes that go to a tier of rates W and R, t and u forward and backward
    seconds, and e the exposed seconds to be minimised together with those that actions add:

        sum_{i<n} x_i / W + x_n (1/W + 1/R) <= sum_i t_i + sum_{i>=n} u_i + e     (SSDTrain's rule)
        sum_{i>=n} x_i / R                  <= sum_{i>n} u_i + e                  (reads in time)
        sum kept + inputs of recomputed + working set                <= memory_budget

    Both families hold where module n is moved. The working set is the largest moved, which may be
    on its way out (in), and of it its largest storage in use; or a module recomputed, beside what
    may be brought back meanwhile of those moved.

    Without a budget nothing may be exposed or recomputed, and as many bytes as possible are moved.
    If no plan fits the budget, the one with the least peak is returned and `fits` is false.

    Raises:
        ImportError: scipy, which solves the program, is not installed.
        ValueError: there are no modules.
    """
    if not profiles:
        raise ValueError("profiles: there is no module to plan for")
    program = _Program(tuple(profiles), {Action.HOST: host, Action.DISK: disk})
    if memory_budget is None:
        return program.plan(program.most_hidden(), fits=True)
    actions = program.least_time(memory_budget)
    if actions is not None:
        return program.plan(actions, fits=True)
    return program.plan(program.least_memory(), fits=False)


class _Program:
    """The variables: one 0/1 per module and action, then the three that are no choice.

    Exposed seconds, the working set, and what may be brought back ahead of backward.
    """

    def __init__(
        self,
        profiles: tuple[ModuleProfile, ...],
        rates: dict[Action, TierRate | None],
    ) -> None:
        self.profiles = profiles
        self.rates = {action: rate for action, rate in rates.items() if rate is not None}
        self.choices = [
            (i, action)
            for i, p in enumerate(profiles)
            for action in (Action.KEEP, *self.rates, Action.RECOMPUTE)
            if action is not Action.RECOMPUTE or p.input_bytes is not None
        ]
        self.index = {choice: k for k, choice in enumerate(self.choices)}
        self.exposed, self.working, self.ahead = (len(self.choices) + i for i in range(3))
        self.size = len(self.choices) + 3
        # Solvers like numbers near one: bytes count in units of the total, times alike.
        self.byte = float(sum(p.saved_bytes + p.again_bytes for p in profiles)) or 1.0
        self.second = sum(p.forward_s + p.backward_s for p in profiles) or 1.0
        self.rows: list[tuple[np.ndarray, float, float]] = []
        self._choose_one()
        self._order_alike()
        for tier in self.rates:
            self._hide(tier)
        self._brought_ahead()
        self._working_set()

    def _row(self) -> np.ndarray:
        return np.zeros(self.size)

    def _choose_one(self) -> None:
        for i in range(len(self.profiles)):
            row = self._row()
            for k, (j, _) in enumerate(self.choices):
                row[k] = float(j == i)
            self.rows.append((row, 1.0, 1.0))

    def _order_alike(self) -> None:
        """Of modules that are alike, those that move come first, and those that are kept last.

        The solver would try all orders of one plan. Of modules that are equal, what moves earlier
        has longer to be written and to come back, and more so what moves to the slower tier: to
        put a plan in this order costs it nothing, or a module where two tiers are as fast. Of very
        many, neighbours are treated alike.
        """
        slowest_first = sorted(self.rates, key=self._seconds_a_byte, reverse=True)
        num_together = -(-len(self.profiles) // _MANY)
        for before, after, nth in self._alike() if len(self.profiles) > _FEW else ():
            least = 0.0 if nth % num_together else -np.inf
            row = self._row()
            for action in (*slowest_first, Action.RECOMPUTE):
                if (after, action) in self.index:
                    row[self.index[before, action]] = -1.0
                    row[self.index[after, action]] = 1.0
                self.rows.append((row.copy(), least, 0.0))

    def _seconds_a_byte(self, tier: Action) -> float:
        rate = self.rates[tier]
        return 1 / rate.write + 1 / rate.read

    def _alike(self) -> Iterator[tuple[int, int, int]]:
        """Each module that is like those before it: the last of these, it, and their number."""
        groups: list[list[int]] = []
        for i, profile in enumerate(self.profiles):
            for group in groups:
                if profile.is_like(self.profiles[group[0]]):
                    yield group[-1], i, len(group)
                    group.append(i)
                    break
            else:
                groups.append([i])

    def _hide(self, tier: Action) -> None:
        rate = self.rates[tier]
        forward_s = sum(p.forward_s for p in self.profiles)
        capacity = self._row()
        for n, p in enumerate(self.profiles):
            backward_from_n = sum(q.backward_s for q in self.profiles[n:])
            stored, read = self._row(), self._row()
            for i, q in enumerate(self.profiles):
                k = self.index[i, tier]
                stored[k] = q.moved_bytes / rate.write if i < n else 0.0
                read[k] = q.moved_bytes / rate.read if i >= n else 0.0
            stored[self.index[n, tier]] += p.moved_bytes * (1 / rate.write + 1 / rate.read)
            self._if_moved(stored, n, tier, forward_s + backward_from_n)
            self._if_moved(read, n, tier, backward_from_n - p.backward_s)
            capacity[self.index[n, tier]] = p.moved_bytes / self.byte
        self.rows.append((capacity, -np.inf, rate.capacity / self.byte))

    def _if_moved(self, row: np.ndarray, n: int, tier: Action, limit_s: float) -> None:
        """Row . x <= limit + exposed, when module n goes to `tier`; if not, all others may."""
        big_s = max(0.0, row.sum() - row[self.index[n, tier]] - limit_s)
        row[self.index[n, tier]] += big_s
        row /= self.second
        row[self.exposed] = -1.0
        self.rows.append((row, -np.inf, (limit_s + big_s) / self.second))

    def _brought_ahead(self) -> None:
        for tier in self.rates:
            for n, profile in enumerate(self.profiles):
                row = self._row()
                row[self.index[n, tier]] = profile.ahead_bytes / self.byte
                row[self.ahead] = -1.0
                self.rows.append((row, -np.inf, 0.0))

    def _working_set(self) -> None:
        for k, (i, action) in enumerate(self.choices):
            p = self.profiles[i]
            if action in self.rates:
                self._needs(k, p.again_bytes + p.moved_bytes + p.largest_part)
            run_again = p.again_bytes + p.saved_bytes * (action is Action.RECOMPUTE)
            if run_again:
                self._needs(k, run_again, beside_ahead=1.0)

    def _needs(self, choice: int, nbytes: float, beside_ahead: float = 0.0) -> None:
        """The working set is at least `nbytes`, maybe beside what is brought ahead, if chosen."""
        row = self._row()
        row[choice] = nbytes / self.byte
        row[self.ahead] = beside_ahead
        row[self.working] = -1.0
        self.rows.append((row, -np.inf, 0.0))

    def _memory(self) -> np.ndarray:
        row = self._row()
        for k, (i, action) in enumerate(self.choices):
            row[k] = self.profiles[i].kept_bytes(action) / self.byte
        row[self.working] = 1.0
        return row

    def _time(self) -> np.ndarray:
        row = self._row()
        for k, (i, action) in enumerate(self.choices):
            # Less than nothing is noise, or the slowness of what it was compared with.
            row[k] = max(0.0, self.profiles[i].added_s(action)) / self.second
            if action is Action.RECOMPUTE:
                row[k] += 1e-3 / len(self.profiles)
            if action in self.rates:
                # Of plans that take as long, the one that moves least: disks wear.
                weight = 1e-4 if action is Action.HOST else 2e-4
                row[k] += weight * self.profiles[i].moved_bytes / self.byte
        row[self.exposed] = 1.0
        return row

    def least_time(self, budget: float) -> list[Action] | None:
        """The least added time within `budget` bytes; None when nothing fits."""
        return self._solve(self._time(), [(self._memory(), -np.inf, budget / self.byte)])

    def least_memory(self) -> list[Action]:
        """The least peak, then the least time."""
        return self._solve(self._memory() + 1e-3 * self._time(), []) or self._keep_all()

    def most_hidden(self) -> list[Action]:
        """The least kept with nothing exposed and nothing recomputed."""
        still, cost = self._row(), self._row()
        still[self.exposed] = 1.0
        for k, (i, action) in enumerate(self.choices):
            p = self.profiles[i]
            if action is Action.RECOMPUTE:
                still[k] = 1.0
            elif action is Action.KEEP:
                # Of equal bytes, early ones: they have the longest time to come back.
                cost[k] = p.saved_bytes / self.byte * (1 + 1e-4 * (len(self.profiles) - i))
            elif action is Action.DISK:
                cost[k] = 1e-5 * p.moved_bytes / self.byte
        return self._solve(cost, [(still, -np.inf, 0.0)]) or self._keep_all()

    def _keep_all(self) -> list[Action]:
        """What is always possible, where the solver came to nothing in its time."""
        return [Action.KEEP] * len(self.profiles)

    def _solve(
        self, cost: np.ndarray, more: list[tuple[np.ndarray, float, float]]
    ) -> list[Action] | None:
        from scipy.optimize import Bounds, LinearConstraint, milp

        rows = self.rows + more
        lower, upper = np.zeros(self.size), np.ones(self.size)
        upper[self.exposed :] = np.inf
        integrality = np.ones(self.size)
        integrality[self.exposed :] = 0
        result = milp(
            cost,
            constraints=LinearConstraint(
                np.array([r[0] for r in rows]), [r[1] for r in rows], [r[2] for r in rows]
            ),
            bounds=Bounds(lower, upper),
            integrality=integrality,
            options={"time_limit": 10.0},
        )
        if result.x is None:
            return None
        chosen = {i: action for k, (i, action) in enumerate(self.choices) if result.x[k] > 0.5}
        return [chosen[i] for i in range(len(self.profiles))]

    def plan(self, actions: list[Action], fits: bool) -> Plan:
        """Predicts peak and time of `actions`."""
        x = self._row()
        for i, action in enumerate(actions):
            x[self.index[i, action]] = 1.0
        for row, _, upper in self.rows:
            # Each row bounds one of them from below, by those that rows before it have bounded.
            for variable in self.exposed + np.flatnonzero(row[self.exposed :] < 0):
                x[variable] = max(x[variable], row @ x + x[variable] - upper)
        added_s = sum(p.added_s(a) for p, a in zip(self.profiles, actions, strict=True))
        keep_s = sum(p.forward_s + p.backward_s for p in self.profiles)
        return Plan(
            profiles=self.profiles,
            actions=tuple(actions),
            peak_bytes=float(self._memory() @ x) * self.byte,
            keep_bytes=float(
                sum(p.saved_bytes for p in self.profiles)
                + max(p.again_bytes for p in self.profiles)
            ),
            step_s=keep_s + added_s + float(x[self.exposed]) * self.second,
            keep_s=keep_s,
            fits=fits,
        )
