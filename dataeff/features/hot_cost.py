"""How many rows to keep hot: what a row in GPU memory costs, and what it saves."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from dataeff._integers import checked_int

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


def check_score(score: Tensor) -> None:
    """Says what is wrong with a score of rows.

    Raises:
        TypeError: it is complex or no tensor.
        ValueError: it is not [num_rows], or holds a NaN.
    """
    if not isinstance(score, Tensor):
        raise TypeError(
            f"score must be a torch.Tensor, got {type(score).__name__}: torch.as_tensor(score)"
        )
    if score.is_complex():
        raise TypeError(f"score must be real, got {score.dtype}")
    if score.dim() != 1:
        raise ValueError(f"score must be [num_rows], got shape {tuple(score.shape)}")
    if score.is_floating_point() and bool(score.isnan().any()):
        raise ValueError("score holds a NaN, which is neither hot nor cold")


def hit_rate_curve(score: Tensor) -> Tensor:
    """`H[n]`: share of the accesses that the n hottest rows serve, [num_rows + 1], float64.

    Accesses are taken as proportional to the score: `H[n] = sum of the n largest / sum of all`.

    Args:
        score: [num_rows], not negative.

    Raises:
        TypeError, ValueError: as in `check_score`; or a score is negative or not finite.
    """
    check_score(score)
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

    which, where D > L, never grows with n, so memory is the bound:

        n <= (budget - 4 num_rows) / b

    4 bytes being a row's entry in the map of places. Filling a place costs b / L once, and each hit
    saves b (1/L - 1/D): when the number of accesses A of the whole run is given, only rows are kept
    whose expected accesses p A exceed 1 / (1 - L/D). Rows that nobody asks for are never kept, and
    none at all where D <= L.

    Args:
        score: [num_rows], expected accesses, up to a factor; not negative.
        row_nbytes: bytes of a row as kept (`store=` makes them fewer, so more rows fit).
        budget_nbytes: GPU memory to spend.
        link_gbs: bandwidth from host memory, GB/s; the ceiling `host_to_device` of
            `dataeff bench gather`.
        device_gbs: bandwidth of GPU memory, GB/s; the ceiling `device_copy` of
            `dataeff bench rgnn`.
        num_accesses: rows gathered in the whole run; None for "very many".

    Raises:
        TypeError: a score that is no tensor of real numbers, or a size that is no integer.
        ValueError: a negative score or size, or a bandwidth that is not positive.
    """
    row_nbytes = checked_int("row_nbytes", row_nbytes, least=0)
    budget_nbytes = checked_int("budget_nbytes", budget_nbytes, least=0)
    accesses = inf
    if num_accesses is not None:
        accesses = checked_int("num_accesses", num_accesses, least=0)
    if not (link_gbs > 0 and device_gbs > 0):
        raise ValueError(f"bandwidths must be positive, got {link_gbs} and {device_gbs} GB/s")
    curve = hit_rate_curve(score)
    share = curve.diff()  # descending
    saved = 1 - link_gbs / device_gbs
    worth = (share > 0) & (share * accesses * saved > 1)
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
