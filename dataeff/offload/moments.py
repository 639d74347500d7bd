"""When something happened: by the host's clock, also on a device that the host does not wait for.

What is queued on a device has a time only once the device has reached it. So a transfer there is
noted by two events with time stamps, and looked at later.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch

Span = tuple[int, int]  # begin and end, in nanoseconds of `time.perf_counter_ns`
Times = Callable[[], "Span | None"]  # None while it has not ended


class Moment(Protocol):
    """A point in time, perhaps one still to come."""

    def ns(self) -> int | None:
        """When it was; None while it is not reached."""


class HostMoment:
    """Now, for the host."""

    def __init__(self) -> None:
        self._ns = time.perf_counter_ns()

    def ns(self) -> int:
        """When it was made."""
        return self._ns


def _event() -> torch.cuda.Event:
    # Blocking: a thread that waits for it sleeps, and would keep a processor busy otherwise.
    return torch.cuda.Event(enable_timing=True, blocking=True)


class DeviceClock:
    """Tells when events of one CUDA device were reached."""

    def __init__(self, device: torch.device) -> None:
        self._anchor = _event()
        self._anchor.record(torch.cuda.current_stream(device))
        self._anchor.synchronize()
        self._anchor_ns = time.perf_counter_ns()

    def moment(self, stream: torch.cuda.Stream) -> DeviceMoment:
        """When `stream` has run what is queued on it now."""
        event = _event()
        event.record(stream)
        return DeviceMoment(event, self)

    def ns(self, event: torch.cuda.Event) -> int:
        """When the event was reached. In float32 milliseconds: 0.1 ms off after half an hour."""
        return self._anchor_ns + int(self._anchor.elapsed_time(event) * 1e6)


class DeviceMoment:
    """When a stream reached an event with a time stamp."""

    def __init__(self, event: torch.cuda.Event, clock: DeviceClock) -> None:
        self.event, self._clock = event, clock

    def ns(self) -> int | None:
        """When it was; None while the device has not reached it."""
        return self._clock.ns(self.event) if self.event.query() else None

    def seconds_since(self, begin: DeviceMoment) -> float:
        """From `begin`, which both were reached; to half a microsecond."""
        return float(begin.event.elapsed_time(self.event)) / 1e3


def span_of(begin: Moment, end: Moment) -> Span | None:
    """From one to the other; None while the second is not reached."""
    end_ns = end.ns()
    if end_ns is None:
        return None
    if isinstance(begin, DeviceMoment) and isinstance(end, DeviceMoment):
        # Their distance is exact where their times are not.
        return end_ns - int(end.seconds_since(begin) * 1e9), end_ns
    begin_ns = begin.ns()
    assert begin_ns is not None  # what was queued before has been reached before
    return min(begin_ns, end_ns), end_ns
