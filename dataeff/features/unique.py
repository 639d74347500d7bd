"""A gather that fetches a row once, however often the index names it."""

from __future__ import annotations

import torch
from torch import Tensor

from dataeff._ops import check_index
from dataeff.features.bits import as_bits
from dataeff.features.rows import Rows
from dataeff.features.stats import Account
from dataeff.memory.cuda import refuse_in_capture


def gather_once(rows: Rows, index: Tensor, out: Tensor | None, account: Account) -> Tensor:
    """`rows.gather(index, out, account)`, each different row of a non-empty index fetched once.

    The different rows are gathered in the order of the table, then spread by a gather within the
    memory of the index's device.

    Raises:
        TypeError, ValueError: as `rows.gather` does, before anything is fetched.
        RuntimeError: a CUDA graph is being captured.
    """
    if index.is_cuda:
        refuse_in_capture("the number of different rows", "gather without unique=True")
    shape = (*index.shape, *rows.shape[1:])
    if out is None:
        out = index.new_empty(shape, dtype=rows.dtype)
    if tuple(out.shape) != shape or out.device != index.device or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous, {shape} on {index.device}; got {tuple(out.shape)} with "
            f"strides {out.stride()} on {out.device}"
        )
    ids, place = torch.unique(check_index(index), return_inverse=True)
    few = rows.gather(ids, index.new_empty((len(ids), *rows.shape[1:]), dtype=out.dtype), account)
    flat = out.view(-1, *rows.shape[1:])
    # Of uint16 and some others torch selects nothing.
    torch.index_select(as_bits(few), 0, place.reshape(-1), out=as_bits(flat))
    return out
