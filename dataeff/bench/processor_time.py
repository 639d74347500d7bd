"""Processor time of this program and of all others, to tell a calm machine from a busy one."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

STAT = Path("/proc/stat")
IDLE = (3, 4)  # of the fields of /proc/stat: idle, and idle waiting for a disk
NUM_FIELDS = 8  # the later ones, of virtual machines run here, are counted in the first as well


@dataclass(frozen=True)
class ProcessorTime:
    """Seconds since some moment: of the clock, of all processors busy, of them for this program.

    The latter two are zero where the system does not tell (not Linux).
    """

    clock_s: float
    busy_s: float
    own_s: float

    @classmethod
    def now(cls) -> ProcessorTime:
        """As it is now."""
        clock_s = time.monotonic()
        if not STAT.exists():
            return cls(clock_s, 0.0, 0.0)
        ticks = [int(field) for field in STAT.read_text().split("\n", 1)[0].split()[1:]][
            :NUM_FIELDS
        ]
        busy = sum(ticks) - sum(ticks[field] for field in IDLE)
        own = os.times()
        own_s = own.user + own.system + own.children_user + own.children_system
        return cls(clock_s, busy / os.sysconf("SC_CLK_TCK"), own_s)

    def elsewhere_since(self, before: ProcessorTime) -> float:
        """The share of all processors' time since `before` that other programs took, 0 to 1."""
        elapsed_s = (self.clock_s - before.clock_s) * (os.cpu_count() or 1)
        others_s = (self.busy_s - before.busy_s) - (self.own_s - before.own_s)
        return min(max(others_s / elapsed_s, 0.0), 1.0) if elapsed_s > 0 else 0.0
