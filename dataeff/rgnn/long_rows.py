"""Which rows have many that lead to them, and the pieces that the longest are cut into.

Both are lists on the device with room for as many entries as there can be, which shapes alone tell:
finding out how many there are would wait for the device. What is left over is -1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LongRows:
    """Rows that many lead to.

    Attributes:
        rows: their numbers, ascending, then -1, [at most so many].
        count: how many they are, [1].
    """

    rows: Tensor
    count: Tensor


@dataclass(frozen=True)
class Pieces:
    """Hubs cut into pieces of `hub` of their rows and a rest, hub after hub, then -1.

    Attributes:
        rows: the hub that each piece is of, [pieces].
        first: number of the first piece of that hub, [pieces].
    """

    rows: Tensor
    first: Tensor


def list_long_rows(counts: Tensor, longer_than: int, at_most: int, items: int) -> LongRows:
    """The rows with a count in (`longer_than`, `at_most`].

    Args:
        counts: rows that lead to each row, [rows].
        longer_than: counts up to this are left out.
        at_most: and those beyond this.
        items: the sum of all counts at most, as the host knows it.
    """
    bound = min(counts.numel(), items // (longer_than + 1))
    upto = ((counts > longer_than) & (counts <= at_most)).cumsum(0)
    slots = torch.arange(1, bound + 1, device=counts.device)
    rows = torch.searchsorted(upto, slots, out_int32=counts.dtype == torch.int32)
    count = upto[-1:].to(counts.dtype, copy=True)  # without what it is the end of
    return LongRows(rows.masked_fill_(slots > count, -1), count)


def cut_hubs(counts: Tensor, hub: int, items: int) -> Pieces:
    """Cuts the rows with a count of more than `hub` into pieces; see `list_long_rows`."""
    hubs = min(counts.numel(), items // (hub + 1))
    pieces = torch.where(counts > hub, (counts + (hub - 1)).div(hub, rounding_mode="floor"), 0)
    upto = pieces.cumsum(0)
    # The last piece of a hub may hold a single row; all others are full.
    slots = torch.arange((items - hubs) // hub + hubs, device=counts.device)
    rows = torch.searchsorted(upto, slots, right=True).clamp_(max=counts.numel() - 1)
    first = (upto - pieces)[rows].to(counts.dtype)
    return Pieces(rows.to(counts.dtype).masked_fill_(slots >= upto[-1], -1), first)
