"""From what a user writes between brackets to row numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from dataeff._ops import with_memory

_NUMBERS = (torch.int32, torch.int64)

RowSelection: TypeAlias = "Tensor | int | slice | range | Sequence[int] | Sequence[bool] | Any"


def row_index(selection: RowSelection, num_rows: int) -> Tensor:
    """Turns a selection of rows into row numbers, reading it as `torch.Tensor.__getitem__` does.

    Args:
        selection: an int32 or int64 tensor of any shape; a bool tensor [num_rows]; an int; a slice;
            a range, list or NumPy array of these.
        num_rows: rows of the table.

    Returns:
        Row numbers, still unchecked against the table, on the selection's device.

    Raises:
        TypeError: a dtype or kind that selects no rows.
        IndexError: a mask whose length is not the number of rows, or a number that no row can have.
    """
    if isinstance(selection, Tensor) and selection.dtype in _NUMBERS:
        return selection
    if isinstance(selection, slice):
        return torch.arange(*_slice_bounds(selection, num_rows), device="cpu")
    if selection is None or selection is Ellipsis or isinstance(selection, (tuple, str)):
        raise TypeError(
            "a table is indexed by rows alone, with a tensor, int, slice or list; "
            f"got {selection!r}"
        )
    if isinstance(selection, (list, range)) and not len(selection):
        return torch.empty(0, dtype=torch.int64, device="cpu")
    index = selection if isinstance(selection, Tensor) else _as_index(selection, num_rows)
    if index.dtype == torch.bool:
        return _mask_rows(checked_tensor(index), num_rows)
    if index.dtype not in _NUMBERS:
        raise TypeError(
            f"an index is int32, int64 or a bool mask, got {index.dtype}: use .long() of row "
            "numbers, .bool() of a mask"
        )
    return index


def _as_index(selection: Any, num_rows: int) -> Tensor:
    if isinstance(selection, np.ndarray):
        selection = np.ascontiguousarray(selection)  # torch refuses negative strides
    try:
        return torch.as_tensor(selection, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        if "Overflow" in str(error):
            raise IndexError(
                f"index {selection} is out of range for a table of {num_rows} rows"
            ) from None
        raise TypeError(
            "a table is indexed by rows alone, with a tensor, int, slice or list of one shape; got "
            f"a {type(selection).__name__} ({error})"
        ) from None


def _slice_bounds(selection: slice, num_rows: int) -> tuple[int, int, int]:
    start, stop, step = selection.indices(num_rows)
    if step < 0:
        raise ValueError(f"slice step must be positive, as in torch; got {step}")
    return start, max(start, stop), step


def _mask_rows(mask: Tensor, num_rows: int) -> Tensor:
    if tuple(mask.shape) != (num_rows,):
        raise IndexError(
            f"the mask has shape {tuple(mask.shape)} but the table has {num_rows} rows: "
            f"a mask needs shape ({num_rows},)"
        )
    return mask.nonzero().squeeze(1)


def checked_tensor(index: Tensor) -> Tensor:
    """The index; TypeError unless it is a dense tensor, ValueError unless a CPU or CUDA has it."""
    if not isinstance(index, Tensor):
        raise TypeError(
            f"an index is an int32 or int64 tensor, got {type(index).__name__}: "
            "torch.as_tensor(index); table[...] also takes lists, slices and masks"
        )
    if index.layout != torch.strided:
        raise TypeError(f"an index is a dense tensor, got {index.layout}: index.to_dense()")
    if not (index.is_cpu or index.is_cuda):
        raise ValueError(f"rows go to a CPU or a CUDA device, and the index is on {index.device}")
    return index if type(index) is Tensor else with_memory(index, "the index")
