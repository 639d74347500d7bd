"""Tiers, and the account of what moved between them.

Every transfer of bytes between two tiers is entered in the ledger of the object that ordered it
(`FeatureTable.stats()` and `ActivationOffload.report()` read it), and, while a timeline is kept,
with its start and end, so that a report can draw transfers against compute.
"""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path


class Tier(str, Enum):
    """Where bytes are: GPU memory, host memory, or files."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"

    __hash__ = str.__hash__  # Enum's own is Python code, and every transfer looks tiers up


@dataclass(frozen=True, slots=True)
class Span:
    """One stretch of time on one track, in nanoseconds of `time.perf_counter_ns`.

    Attributes:
        track: what it is drawn beside, e.g. `store`, `load`, `gather`, `compute`, `wait`.
        name: what it was for.
        start_ns: when it began.
        end_ns: when it ended.
        nbytes: bytes moved; 0 for compute and waits.
    """

    track: str
    name: str
    start_ns: int
    end_ns: int
    nbytes: int = 0


class Ledger:
    """Counts transfers by (source tier, target tier); thread-safe.

    Args:
        max_spans: how many spans the timeline holds at most; 0 keeps none. Later ones are counted
            in `num_dropped_spans`.
    """

    def __init__(self, max_spans: int = 0) -> None:
        self.max_spans = max_spans
        self.spans: list[Span] = []
        self.num_dropped_spans = 0
        self._lock = threading.Lock()
        # Of each way: bytes and transfers.
        self._moved: defaultdict[tuple[Tier, Tier], list[int]] = defaultdict(lambda: [0, 0])

    def transfer(self, source: Tier, target: Tier, nbytes: int) -> None:
        """Enters a finished transfer of `nbytes`."""
        with self._lock:
            self._enter(source, target, nbytes)

    def _enter(self, source: Tier, target: Tier, nbytes: int) -> None:
        moved = self._moved[source, target]
        moved[0] += nbytes
        moved[1] += 1

    def nbytes(self, source: Tier, target: Tier) -> int:
        """Bytes moved from `source` to `target` so far."""
        with self._lock:
            return self._moved[source, target][0] if (source, target) in self._moved else 0

    def count(self, source: Tier, target: Tier) -> int:
        """Transfers from `source` to `target` so far."""
        with self._lock:
            return self._moved[source, target][1] if (source, target) in self._moved else 0

    def span(self, track: str, name: str, start_ns: int, end_ns: int, nbytes: int = 0) -> None:
        """Draws one span on the timeline, when one is kept."""
        if not self.max_spans:
            return
        with self._lock:
            if len(self.spans) < self.max_spans:
                self.spans.append(Span(track, name, start_ns, end_ns, nbytes))
            else:
                self.num_dropped_spans += 1

    @contextmanager
    def timed(self, track: str, name: str) -> Iterator[None]:
        """Draws the time its block takes (host clock: asynchronous device work is not awaited)."""
        start_ns = time.perf_counter_ns()
        try:
            yield
        finally:
            self.span(track, name, start_ns, time.perf_counter_ns())

    def chrome_trace(self, path: str | Path) -> None:
        """Writes the timeline in Chrome's trace-event format (`chrome://tracing`, Perfetto).

        A track has as many rows as it has spans at one time: viewers take spans that overlap in a
        row for calls, one within the other. `otherData` says how many spans were dropped.
        """
        with self._lock:
            spans, metadata = list(self.spans), {"num_dropped_spans": self.num_dropped_spans}
        placed = _in_rows(spans)
        names = {track: i for i, track in enumerate(dict.fromkeys(span.track for span in spans))}
        rows = sorted({(names[span.track], row, span.track) for span, row in placed})
        tids = {(track, row): tid for tid, (_, row, track) in enumerate(rows)}
        events: list[dict[str, object]] = [
            {
                "ph": "M",
                "name": "thread_name",
                "pid": 0,
                "tid": tid,
                "args": {"name": track if row == 0 else f"{track} {row + 1}"},
            }
            for (track, row), tid in tids.items()
        ]
        events += [
            {
                "ph": "X",
                "name": span.name,
                "cat": span.track,
                "pid": 0,
                "tid": tids[span.track, row],
                "ts": span.start_ns / 1e3,
                "dur": (span.end_ns - span.start_ns) / 1e3,
                "args": {"nbytes": span.nbytes},
            }
            for span, row in placed
        ]
        Path(path).write_text(json.dumps({"traceEvents": events, "otherData": metadata}))


def _in_rows(spans: list[Span]) -> list[tuple[Span, int]]:
    """Each span with a row of its track in which no other one overlaps it, in order of begin."""
    ends: defaultdict[str, list[int]] = defaultdict(list)  # of each row, when its last span ends
    placed = []
    for span in sorted(spans, key=lambda span: span.start_ns):
        rows = ends[span.track]
        row = next((i for i, end_ns in enumerate(rows) if end_ns <= span.start_ns), len(rows))
        rows[row : row + 1] = [span.end_ns]
        placed.append((span, row))
    return placed
