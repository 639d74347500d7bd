"""Size profiles: sampled blocks of about one size run through one `torch.compile`d program.

What the passes choose depends on a graph's row counts, and a compiled program fixes the choice. So
under `torch.compile` a layer is compiled for the *profile* of its graph, a string that Dynamo
guards on: graphs share one unless a row count differs by more than a factor of two.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

NUM_COUNTS = 5  # node, dst, edge, src_pair, dst_pair

_known: list[tuple[int, ...]] = []
_lock = threading.Lock()


def nearby(num_rows: int) -> int:
    """The nearest of the row counts 0, 1, 1.4, 2, 2.8, 4 ... that programs are compiled for."""
    return round(2 ** (round(2 * math.log2(num_rows)) / 2)) if num_rows else 0


def statistics_of(sizes: Sequence[int]) -> str:
    """The row counts of a graph, each rounded to the nearest that programs are compiled for."""
    return ",".join(str(nearby(n)) for n in sizes[:NUM_COUNTS])


def profile_of(sizes: Sequence[int]) -> str:
    """The profile of a graph of these sizes: the first met in this process that is near enough."""
    counts = tuple(sizes[:NUM_COUNTS])
    with _lock:
        for known in _known:
            if all(_near(a, b) for a, b in zip(known, counts, strict=True)):
                return ",".join(map(str, known))
        made = tuple(map(nearby, counts))
        _known.append(made)
    return ",".join(map(str, made))


def counts_of(profile: str) -> tuple[int, ...]:
    """The row counts that a profile stands for."""
    return tuple(map(int, profile.split(",")))


def _near(a: int, b: int) -> bool:
    return max(a, b) <= 2 * min(a, b)
