"""Row gather and scatter: what they mean, and the calls that do them fast."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from dataeff import _core
from dataeff._ops import gather_on_host, runs_at_once

_is_compiling = torch.compiler.is_compiling


def gather_reference(table: Tensor, index: Tensor) -> Tensor:
    """`out[i] = table[index[i]]`, on the index's device: the definition in plain PyTorch.

    Args:
        table: [num_rows, ...], any dtype.
        index: any shape, int32 or int64, each in [-num_rows, num_rows).

    Returns:
        [*index.shape, *table.shape[1:]], the table's dtype.
    """
    return table[index.to(table.device).long()].to(index.device)


def scatter_reference(table: Tensor, index: Tensor, rows: Tensor) -> None:
    """`table[index[i]] = rows[i]`, in order, so that the last of several rows for one place stays.

    Args:
        table: [num_rows, ...], written in place.
        index: any shape, int32 or int64, each in [-num_rows, num_rows).
        rows: [*index.shape, *table.shape[1:]], the table's dtype.
    """
    flat = rows.reshape(index.numel(), *table.shape[1:])
    for position, row in enumerate(index.reshape(-1).tolist()):
        table[row] = flat[position].to(table.device)


def gather(table: Tensor, index: Tensor, out: Tensor | None = None) -> Tensor:
    """Gathers rows to where the index is: `out[i] = table[index[i]]`.

    Args:
        table: [num_rows, ...], any dtype; each row contiguous, rows at any stride. Host memory; for
            an index on a CUDA device, registered host memory (`FeatureTable` sees to that) or
            memory of that device.
        index: any shape, int32 or int64, each in [-num_rows, num_rows).
        out: where to write, contiguous, [*index.shape, *table.shape[1:]], the table's dtype, on the
            index's device; a new tensor by default.

    Returns:
        `out`, or the new tensor.

    Raises:
        IndexError: an index is out of range (named, with the table's size); nothing is written
            then. On CUDA a later call raises it, and the row of a wrong index is zero.
        TypeError: an index or out of the wrong dtype.
        ValueError: a wrong shape, device or layout, or an out that lies in the memory of the table
            or the index.
    """
    if not _is_compiling():
        rows = _core.gather_tensors(table, index, out, 0)
        if rows is not None:
            return rows
    if runs_at_once(table, index):
        return gather_on_host(table, index, out)
    if out is None:
        return torch.ops.dataeff.gather(table, index)  # type: ignore[no-any-return]
    torch.ops.dataeff.gather_out(table, index, out)
    return out


def scatter_(table: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Writes rows into a table in host memory: `table[index[i]] = rows[i]`.

    Where an index occurs twice, the later row stays, whatever the number of threads.

    Args:
        table: [num_rows, ...], host memory, written in place; each row contiguous.
        index: any shape, int32 or int64, host memory, each in [-num_rows, num_rows).
        rows: [*index.shape, *table.shape[1:]], the table's dtype, host memory.

    Returns:
        `table`.

    Raises:
        IndexError: an index is out of range; nothing is written then.
        TypeError: a wrong dtype.
        ValueError: a wrong shape, device or layout.
    """
    torch.ops.dataeff.scatter_rows_(table, index, rows)
    increment_version(table)  # autograd may have saved what was there
    return table
