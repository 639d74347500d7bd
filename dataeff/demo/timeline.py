"""Cuts a readable stretch out of a ledger's spans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dataeff.ledger import Span


def middle_stretch(spans: Sequence[Span], track: str, num_spans: int) -> list[dict[str, Any]]:
    """The spans around `num_spans` consecutive ones of `track`, from the middle of the run.

    Returns:
        One dictionary per span: track, name, start_ms, end_ms (from the stretch's start), nbytes.
        Spans that overlap the edges are cut.
    """
    chosen = sorted((s for s in spans if s.track == track), key=lambda s: s.start_ns)
    if not chosen:
        return []
    begin = max(0, (len(chosen) - num_spans) // 2)
    begin -= begin % num_spans  # where each step has `num_spans` spans: whole steps
    first, last = chosen[begin], chosen[min(begin + num_spans, len(chosen)) - 1]
    return [
        {
            "track": span.track,
            "name": span.name,
            "start_ms": (max(span.start_ns, first.start_ns) - first.start_ns) / 1e6,
            "end_ms": (min(span.end_ns, last.end_ns) - first.start_ns) / 1e6,
            "nbytes": span.nbytes,
        }
        for span in sorted(spans, key=lambda s: s.start_ns)
        if span.end_ns > first.start_ns and span.start_ns < last.end_ns
    ]
