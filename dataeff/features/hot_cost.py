"""How many rows to keep hot: what a row in GPU memory costs, and what it saves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PLACE_NBYTES = 4  # of the slot map, per row of the table


@dataclass(frozen=True)
class HotSuggestion:
    """A number of hot rows, and what is to be expected of it.

    Attributes:
        num_rows: rows to keep hot, `HotRows(num_rows, score)`.
        nbytes: GPU memory that they and the map of places take.
        hit_rate: share of the accesses that find their row in GPU memory.
        speedup: time of gathering without hot rows over the time with them, bandwidths alone.
    """

    num_rows: int
    nbytes: int
    hit_rate: float
    speedup: float


def hit_rate_curve(score: Tensor) -> Tensor:
    """`H[n]`: share of the accesses that the n hottest rows serve, [num_rows + 1], float64.

    Accesses are taken as proportional to the score: `H[n] = sum of the n largest / sum of all`.

    Args:
        score: [num_rows], not negative.

    Raises:
        ValueError: a score is negative or not finite.
    """
    values = score.detach().cpu().double()
    if bool((values < 0).any()) or not bool(values.isfinite().all()):
        raise ValueError("a score of accesses is finite and not negative")
    served = torch.cat([values.new_zeros(1), values.sort(descending=True).values.cumsum(0)])
    return served / served[-1] if served[-1] > 0 else served


def suggest_hot_rows(
    score: Tensor,
    row_nbytes: int,
    budget_nbytes: int,
    *,
    link_gbs: float,
    device_gbs: float,
    num_accesses: int | None = None,
) -> HotSuggestion:
    """Says how many rows to keep hot in the memory given.

    With row bytes b, link bandwidth L, device-memory bandwidth D and the hit-rate curve H,
    gathering a row takes on average

        T(n) = b ((1 - H(n)) / L + H(n) / D)

    which never grows with n, so memory is the bound: n <= (budget - 4 num_rows) / b, the 4 bytes
    being a row's entry in the map of places. Filling a place costs b / L once, and each hit saves
    b (1/L - 1/D): when the number of accesses A of the whole run is given, only rows are kept whose
    expected accesses p A exceed 1 / (1 - L/D). Rows that nobody asks for are never kept.

    Args:
        score: [num_rows], expected accesses, up to a factor; not negative.
        row_nbytes: bytes of a row as kept (`store=` makes them fewer, so more rows fit).
        budget_nbytes: GPU memory to spend.
        link_gbs: bandwidth from host memory, GB/s; `dataeff bench gather` measures it.
        device_gbs: bandwidth of GPU memory, GB/s.
        num_accesses: rows gathered in the whole run; None for "very many".

    Raises:
        ValueError: a negative score or size, or a bandwidth that is not positive.
    """
    if row_nbytes < 0 or budget_nbytes < 0 or (num_accesses is not None and num_accesses < 0):
        raise ValueError("row_nbytes, budget_nbytes and num_accesses must not be negative")
    if link_gbs <= 0 or device_gbs <= 0:
        raise ValueError(f"bandwidths must be positive, got {link_gbs} and {device_gbs} GB/s")
    curve = hit_rate_curve(score)
    share = curve.diff()  # descending
    worth = share > 0
    if num_accesses is not None:
        saved = 1 - link_gbs / device_gbs
        worth &= share * num_accesses * saved > 1
    places = PLACE_NBYTES * len(score)
    fit = max(budget_nbytes - places, 0) // max(row_nbytes, 1)
    num_rows = min(int(worth.sum()), fit)
    hits = float(curve[num_rows])
    time_s = (1 - hits) / link_gbs + hits / device_gbs
    return HotSuggestion(
        num_rows,
        places + num_rows * row_nbytes if num_rows else 0,
        hits,
        1 / (link_gbs * time_s),
    )
