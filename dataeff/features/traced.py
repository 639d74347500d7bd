"""A table's gather as one operator, which `torch.compile` calls and does not look into.

It is for rows that no tensor holds, on disk say: a graph names the table by a number.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from dataeff._ops import NO_REPLAY, check_index, library


class Gathers(Protocol):
    """What the operator needs of a table."""

    def gather(self, index: Tensor, out: Tensor | None = None, *, unique: bool = False) -> Tensor:
        """As `FeatureTable.gather`."""


library.define(
    "gather_table(Tensor index, int table, SymInt[] row_shape, ScalarType dtype, bool unique)"
    " -> Tensor",
    tags=NO_REPLAY,
)
library.define(
    "gather_table_out(Tensor index, int table, bool unique, Tensor(a!) out) -> ()", tags=NO_REPLAY
)

_numbers = itertools.count()
_tables: weakref.WeakValueDictionary[int, Gathers] = weakref.WeakValueDictionary()


def number_of(table: Gathers) -> int:
    """A number by which the operator finds the table, as long as it lives."""
    number = next(_numbers)
    _tables[number] = table
    return number


def gather_traced(
    number: int,
    row_shape: Sequence[int],
    dtype: torch.dtype,
    index: Tensor,
    out: Tensor | None,
    unique: bool,
) -> Tensor:
    """`table.gather(index, out, unique=unique)` of the table of that number, as one operator.

    Raises:
        RuntimeError: by the graph, when the table is closed or gone.
    """
    if out is None:
        return torch.ops.dataeff.gather_table(  # type: ignore[no-any-return]
            index, number, row_shape, dtype, unique
        )
    torch.ops.dataeff.gather_table_out(index, number, unique, out)
    return out


def _table(number: int) -> Gathers:
    table = _tables.get(number)
    if table is None:
        raise RuntimeError("the table that this graph gathers from is gone: keep a reference to it")
    return table


def _gather(
    index: Tensor, number: int, row_shape: Sequence[int], dtype: torch.dtype, unique: bool
) -> Tensor:
    return _table(number).gather(index, unique=unique)


def _gather_out(index: Tensor, number: int, unique: bool, out: Tensor) -> None:
    _table(number).gather(index, out, unique=unique)


def _gather_fake(
    index: Tensor, number: int, row_shape: Sequence[int], dtype: torch.dtype, unique: bool
) -> Tensor:
    check_index(index)
    return index.new_empty((*index.shape, *row_shape), dtype=dtype)


def _gather_out_fake(index: Tensor, number: int, unique: bool, out: Tensor) -> None:
    check_index(index)


library.impl("gather_table", _gather, "CompositeExplicitAutograd")
library.impl("gather_table_out", _gather_out, "CompositeExplicitAutograd")
torch.library.register_fake("dataeff::gather_table", _gather_fake, lib=library)
torch.library.register_fake("dataeff::gather_table_out", _gather_out_fake, lib=library)
