"""Finds ids that are out of range and names them; however many columns, a device is read once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class IdColumn:
    """Ids that must be in [0, limit).

    Attributes:
        ids: [rows], int32 or int64, any device.
        limit: how many there are.
        complaint: the message about a wrong id, given the id and its row.
    """

    ids: Tensor
    limit: int
    complaint: Callable[[int, int], str]


def check_ids(columns: Sequence[IdColumn]) -> None:
    """Raises for the first column with an id out of range.

    Raises:
        IndexError: says which id, and where.
    """
    filled = [column for column in columns if column.ids.numel()]
    if not filled:
        return
    # One copy to the host for all: each one waits for the device.
    ends = torch.cat([torch.stack(column.ids.aminmax()).long() for column in filled]).tolist()
    for column, low, high in zip(filled, ends[::2], ends[1::2], strict=True):
        if low < 0 or high >= column.limit:
            wrong = low if low < 0 else high
            row = int((column.ids == wrong).nonzero()[0])
            raise IndexError(column.complaint(wrong, row))


def refuse_meta(name: str, ids: Tensor) -> None:
    """Refuse ids on the meta device: index structures hang on their values.

    Raises:
        ValueError: names the device.
    """
    if ids.device.type == "meta":
        raise ValueError(
            f"{name} is on the meta device, which holds no values; a graph is made of its edges:"
            " keep them on a cpu or cuda device"
        )
