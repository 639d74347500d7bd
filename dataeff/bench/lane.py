"""One provider in a running case, and how its calls are timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from dataeff.bench.case import Provider, Step


@dataclass
class Lane:
    """One provider in a running case: its step and the seconds per call sampled so far.

    `long`: its calls take so long that one is timed.
    """

    provider: Provider
    step: Step
    num_calls: int = 1
    samples: list[float] = field(default_factory=list)
    long: bool = False

    @property
    def median_s(self) -> float:
        """Median seconds per call."""
        return statistics.median(self.samples)

    @property
    def quartile_distance_s(self) -> float:
        """Seconds between the first and the third quartile of the samples; 0 of one sample."""
        if len(self.samples) == 1:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return high - low

    def rate(self, amount: int) -> float:
        """`amount` per second: at the median, or, of a ceiling, at the best sample.

        A ceiling is what the machine can do, so what disturbed its other samples does not count.
        """
        ceiling = self.provider.role == "ceiling"
        return amount / (min(self.samples) if ceiling else self.median_s)

    def sample(self, device: torch.device) -> float:
        """Seconds per call over `num_calls` calls; the device is idle at both ends.

        A step that tells its own seconds is taken at its word, that of the last call.
        """
        if self.step.before is not None:
            self.step.before()
        synchronize(device)
        start_ns = time.perf_counter_ns()
        for _ in range(self.num_calls):
            self.step.call()
        synchronize(device)
        if self.step.seconds is not None:
            return self.step.seconds()
        return (time.perf_counter_ns() - start_ns) / 1e9 / self.num_calls


def peak_device_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most memory of a GPU that one call takes at once, beyond what was held before it."""
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - held


def synchronize(device: torch.device) -> None:
    """Waits until a GPU is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
