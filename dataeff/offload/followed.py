"""What the steps under a plan show, beside what was foreseen of them."""

from __future__ import annotations

import statistics
from typing import Any

from dataeff.offload.likeness import Likeness
from dataeff.offload.moments import Moment, span_of
from dataeff.offload.simulate import Forecast

_ALIKE = 0.01  # of a peak, by which another may differ and need not be told


class Followed:
    """The steps since a plan was made: how long they took and waited, and the most they held.

    Those count that are like the steps that the plan was made from.

    Args:
        exposed_s: seconds waited before the first of them.
    """

    def __init__(self, exposed_s: float) -> None:
        self._before_s = exposed_s  # what was waited in steps that do not count
        self._exposed_s = 0.0
        self._step_s: list[float] = []
        self._under_way: list[tuple[Moment, Moment]] = []  # steps that a device is in the midst of
        self._peak = self._num_others = 0

    def begin(self, cache: Any, now: Moment) -> None:
        """A step begins."""
        cache.held.recent_peak = 0
        self._begin, self._begin_s = now, cache.exposed_wait_s()

    def end(self, cache: Any, now: Moment, likeness: Likeness) -> None:
        """The step ends, with its backward."""
        exposed_s = cache.exposed_wait_s()
        if not likeness.usual:
            self._num_others += likeness.trains
            self._before_s += exposed_s - self._begin_s
            return
        self._under_way.append((self._begin, now))
        self._settle()
        # Of all such steps together: a device comes to the waits of one after the host has left it.
        self._exposed_s = exposed_s - self._before_s
        self._peak = max(self._peak, cache.held.recent_peak)

    def _settle(self) -> None:
        """Enters the steps that the device has come to the end of: the host runs ahead of it."""
        while self._under_way:
            span = span_of(*self._under_way[0])
            if span is None:
                return
            self._step_s.append((span[1] - span[0]) / 1e9)
            del self._under_way[0]

    def measured(self) -> Forecast | None:
        """What they showed, in the terms of a forecast; None before one has ended.

        The median seconds of a step, of a device by its own clock; the peak of what was held where
        the model is: what a budget is for.
        """
        self._settle()
        if not self._step_s:
            return None
        exposed_s, peak = self._exposed_s / len(self._step_s), float(self._peak)
        return Forecast(statistics.median(self._step_s), exposed_s, peak, peak, peak)

    def explain(self, foreseen: Forecast) -> list[str]:
        """Lines on what was foreseen, and what was measured since."""
        lines = [f"predicted: peak {_peak_of(foreseen)}, step {1e3 * foreseen.step_s:.1f} ms"]
        measured = self.measured()
        if measured is not None:
            # Late stores or none, the peak is foreseen to lie between the two.
            nearest = max(foreseen.prompt_bytes, min(measured.peak_bytes, foreseen.seen_bytes))
            lines.append(
                f"measured since: peak {measured.peak_bytes / 2**20:.1f} MiB "
                f"({_percent(measured.peak_bytes, nearest)}), "
                f"step {1e3 * measured.step_s:.1f} ms "
                f"({_percent(measured.step_s, foreseen.step_s)}; median of {len(self._step_s)})"
            )
        if self._num_others:
            lines.append(f"not counted: {self._num_others} steps with inputs of other sizes")
        return lines


def _peak_of(forecast: Forecast) -> str:
    notes = []
    if forecast.prompt_bytes < (1 - _ALIKE) * forecast.seen_bytes:
        prompt_bytes = forecast.peak_bytes - forecast.seen_bytes + forecast.prompt_bytes
        notes.append(f"at most, {prompt_bytes / 2**20:.1f} if no store is late")
    if forecast.seen_bytes < (1 - _ALIKE) * forecast.peak_bytes:
        counted = f"{forecast.seen_bytes / 2**20:.1f} MiB"
        notes.append(f"{counted} are counted: no hook sees what recomputing holds")
    return f"{forecast.peak_bytes / 2**20:.1f} MiB" + (f" ({'; '.join(notes)})" if notes else "")


def _percent(measured: float, predicted: float) -> str:
    return f"{100 * (measured / predicted - 1):+.0f} %" if predicted else "nothing predicted"
