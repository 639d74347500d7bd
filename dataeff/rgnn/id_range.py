"""What may be ids, and which of them are out of range: named, with one wait for a device in all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dataeff._ops import with_memory
from dataeff.rgnn.batched import is_batched


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


def as_edge_index(name: str, ids: Any) -> Tensor:
    """Sources and destinations of edges, [2, num_edges], as `as_ids` has them.

    Raises:
        TypeError, ValueError: names what was given.
    """
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(ids).__name__}")
    if ids.dim() != 2 or ids.shape[0] != 2:
        raise ValueError(f"{name} must be [2, num_edges], got {list(ids.shape)}")
    return as_ids(name, ids)


def as_ids(name: str, ids: Any) -> Tensor:
    """The ids, out of a wrapper like PyG's `EdgeIndex`, when they may be ids.

    Raises:
        TypeError: they are not dense int32 or int64.
        ValueError: they differ between the samples of a `vmap`.
    """
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(ids).__name__}")
    if is_batched(ids):
        raise ValueError(
            f"{name} is batched by vmap, whose samples share one graph: give it in_dims=None, or"
            " join the samples' graphs into one whose nodes are numbered through"
        )
    if ids.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got {ids.layout}: turn sparse adjacencies into ids")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, not {ids.dtype}: use .long()")
    return with_memory(ids, name)


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
