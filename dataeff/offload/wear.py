"""How fast a running job wears its disks, and when to say so.

Disks are sold with an endurance in terabytes written (TBW). A job that spills activations writes as
much in days as others in years, so it counts what it writes, tells the rate per day, and warns once
when the stated endurance will be, or is, spent.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from dataeff._reals import checked_real

TB = 1e12
SECONDS_PER_DAY = 86_400.0
_WARN_AT = 0.9  # of the endurance
_SETTLED_S = 60.0  # a rate measured over less says little


class StepClock:
    """Counts steps and the time from the first one's beginning to the last one's end."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._first_s: float | None = None
        self._last_s = 0.0
        self.num_steps = 0

    def begin(self) -> None:
        """A step begins."""
        if self._first_s is None:
            self._first_s = self._now_s()

    def end(self) -> None:
        """A step ends."""
        self._last_s = self._now_s()
        self.num_steps += 1

    @property
    def step_s(self) -> float:
        """Mean seconds per step, what lies between steps included; 0 before the first ends."""
        if self._first_s is None or not self.num_steps:
            return 0.0
        return (self._last_s - self._first_s) / self.num_steps


@dataclass(frozen=True)
class Endurance:
    """What the disks may take.

    Attributes:
        tbw: terabytes (1e12 bytes) that this job may write in all; None for no bound. The rated
            TBW of the disks, less what their SMART counters say is spent.
        write_cap_tb: terabytes that it may write per day; None for no bound.
    """

    tbw: float | None = None
    write_cap_tb: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("endurance_tbw", self.tbw), ("write_cap_tb", self.write_cap_tb)):
            if value is not None and not checked_real(name, value):
                raise ValueError(f"{name}={value} is not positive")


class Wear:
    """Follows the bytes written; thread-safe as its caller is.

    `allows` turns false while the day's cap is spent, and for good once the endurance is: what
    would be written then stays in memory, or goes to the host tier.

    Args:
        endurance: what the disks may take.
        now_s: the clock, in seconds.
    """

    def __init__(self, endurance: Endurance, now_s: Callable[[], float] = time.monotonic) -> None:
        self.endurance, self._now_s = endurance, now_s
        self._start_s = self._day_s = now_s()
        self._before_day = 0.0
        self._warned: set[str] = set()

    def written_tb_per_day(self, nbytes: float) -> float:
        """The rate at which `nbytes` were written since the start, in TB per day."""
        elapsed_s = self._now_s() - self._start_s
        return nbytes / TB / elapsed_s * SECONDS_PER_DAY if elapsed_s > 0 else 0.0

    def days_left(self, nbytes: float) -> float:
        """Days until the endurance is spent at this rate; infinite without a bound or a rate."""
        rate = self.written_tb_per_day(nbytes)
        if self.endurance.tbw is None or rate <= 0:
            return float("inf")
        return max(0.0, self.endurance.tbw - nbytes / TB) / rate

    def allows(self, nbytes: float, more: float) -> bool:
        """Whether `more` bytes may be written after `nbytes`; warns when a bound comes near."""
        tbw, cap = self.endurance.tbw, self.endurance.write_cap_tb
        if tbw is not None and nbytes + more > _WARN_AT * tbw * TB:
            self._warn_of_endurance(nbytes)
            if nbytes + more > tbw * TB:
                return False
        if cap is None:
            return True
        now_s = self._now_s()
        if now_s - self._day_s >= SECONDS_PER_DAY:
            self._day_s += (now_s - self._day_s) // SECONDS_PER_DAY * SECONDS_PER_DAY
            self._before_day = nbytes
        if nbytes + more - self._before_day <= cap * TB:
            return True
        self._warn(
            "cap",
            f"activation offload: {cap:g} TB, the most it may write in a day, are written; until "
            "the next day tensors stay in memory or go to the host tier.",
        )
        return False

    def foresee(self, nbytes: float) -> None:
        """Warns once when the endurance will be spent within 30 days at the rate so far."""
        if self._now_s() - self._start_s < _SETTLED_S or self.endurance.tbw is None:
            return
        left = self.days_left(nbytes)
        if left < 30:
            rate = self.written_tb_per_day(nbytes)
            self._warn(
                "rate",
                f"activation offload: at {rate:.3g} TB per day the endurance of "
                f"{self.endurance.tbw:g} TB is spent in {left:.1f} days. Offload less (policy=, "
                "memory_budget=), give it host_bytes, or bound it with write_cap_tb=.",
            )

    def _warn_of_endurance(self, nbytes: float) -> None:
        self._warn(
            "spent",
            f"activation offload: {nbytes / TB:.3g} of the {self.endurance.tbw:g} TB that the "
            "disks may take are written; beyond that, tensors stay in memory.",
        )

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(text, RuntimeWarning, stacklevel=3)
