"""Rows as integers of their size, for what torch does not do with every dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Of these torch (2.13) pickles tensors, and does not read them again; `torch.save` does both.
_NOT_PICKLED = ("float8_", "uint16", "uint32", "uint64")


def as_bits(rows: Tensor) -> Tensor:
    """The same memory of a dtype that torch computes with; complex numbers as they are."""
    if rows.dtype.is_complex:
        return rows
    return rows.view(_INTEGERS[rows.dtype.itemsize])


def pickled(rows: Tensor) -> tuple[Any, ...]:
    """What `unpickled` makes the rows of again."""
    if str(rows.dtype).removeprefix("torch.").startswith(_NOT_PICKLED):
        return as_bits(rows), rows.dtype
    return (rows,)


def unpickled(rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The rows of `pickled`."""
    return rows if dtype is None else rows.view(dtype)
