"""Stable sorts and runs of ids: the core's parallel counting sorts on CPU, torch's on a GPU.

    order, ptr = sort_ids(key, num_keys, first)
    runs = find_runs(a, b, order)       # of rows that are sorted by (a, b)

Both have one right answer, so results do not depend on the device or the number of threads.
A hundred thousand ids with 60 thousand keys take 0.25 ms on one Zen 4 core, `torch.sort` 0.65 ms.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dataeff import _core


@dataclass(frozen=True)
class Sorted:
    """The result of a sort.

    Attributes:
        order: rows in ascending order of their key, [rows].
        ptr: where each key's rows begin in `order`, and their number, [keys + 1].
    """

    order: Tensor
    ptr: Tensor


@dataclass(frozen=True)
class Runs:
    """Rows with equal (a, b), numbered in their order.

    Attributes:
        run_of: the run of each row, [rows].
        ptr: the position where each run begins, and the number of rows, [runs + 1].
        a, b: what the rows of each run have in common, [runs].
    """

    run_of: Tensor
    ptr: Tensor
    a: Tensor
    b: Tensor


def by_torch(ids: Tensor) -> bool:
    """Whether torch sorts these; the core sorts host memory alone."""
    return ids.is_cuda


def sort_ids(key: Tensor, num_keys: int, first: Tensor | None = None) -> Sorted:
    """Sorts rows by a key, rows of one key in the order they come.

    Args:
        key: the key of each row, [rows], int32 or int64, contiguous.
        num_keys: keys are in [0, num_keys).
        first: the order in which rows come, [rows], dtype of `key`; None for 0, 1, 2 ... Sorting
            by b, and then by a with that order as `first`, sorts by (a, b).

    Raises:
        IndexError: on CPU, a key that is out of range. On a GPU nothing waits to find out: rows of
            such keys stand before `ptr[0]` and from `ptr[num_keys]` on.
    """
    if by_torch(key):
        keys, order = torch.sort(key if first is None else key.index_select(0, first), stable=True)
        if first is not None:
            order = first.index_select(0, order)
        return Sorted(order.to(key.dtype), _pointers(keys, num_keys))
    found = Sorted(torch.empty_like(key), key.new_empty(num_keys + 1))
    _core_sort(key, num_keys, first, order=found.order, ptr=found.ptr)
    return found


def rank_ids(key: Tensor, num_keys: int) -> tuple[Sorted, Tensor]:
    """`sort_ids(key, num_keys)`, and each row's position in its order, [rows]."""
    rank = torch.empty_like(key)
    if by_torch(key):
        found = sort_ids(key, num_keys)
        rank[found.order] = torch.arange(rank.numel(), device=key.device, dtype=rank.dtype)
        return found, rank
    found = Sorted(torch.empty_like(key), key.new_empty(num_keys + 1))
    _core_sort(key, num_keys, order=found.order, rank=rank, ptr=found.ptr)
    return found, rank


def count_ids(key: Tensor, num_keys: int) -> Tensor:
    """The `ptr` of `sort_ids(key, num_keys)` of keys that ascend already, [num_keys + 1]."""
    if by_torch(key):
        return _pointers(key, num_keys)
    ptr = key.new_empty(num_keys + 1)
    _core_sort(key, num_keys, ptr=ptr)
    return ptr


def _core_sort(
    key: Tensor,
    num_keys: int,
    first: Tensor | None = None,
    *,
    order: Tensor | None = None,
    rank: Tensor | None = None,
    ptr: Tensor | None = None,
) -> None:
    _core.counting_sort(
        key.element_size(),
        key.data_ptr(),
        0 if first is None else first.data_ptr(),
        key.numel(),
        num_keys,
        0 if order is None else order.data_ptr(),
        0 if rank is None else rank.data_ptr(),
        0 if ptr is None else ptr.data_ptr(),
        torch.get_num_threads(),
    )


def _pointers(sorted_keys: Tensor, num_keys: int) -> Tensor:
    bounds = torch.arange(num_keys + 1, device=sorted_keys.device, dtype=sorted_keys.dtype)
    return torch.searchsorted(sorted_keys, bounds).to(sorted_keys.dtype)


def find_runs(a: Tensor, b: Tensor, order: Tensor | None = None) -> Runs:
    """Finds the distinct (a, b) of rows that are sorted by both.

    Args:
        a: the first column of each row, [rows], int32 or int64, contiguous.
        b: the second, like a.
        order: rows in sorted order, [rows], dtype of a; None when they stand so.
    """
    if by_torch(a):
        return _find_by_torch(a, b, order)
    if order is not None:  # looked up once: both loops below read each row and the one before
        a, b = (ids.index_select(0, order) for ids in (a, b))
    columns = (a.element_size(), a.data_ptr(), b.data_ptr())
    where = 0 if order is None else order.data_ptr()
    threads = torch.get_num_threads()
    num_runs = _core.count_runs(*columns, a.numel(), threads)
    runs = Runs(
        torch.empty_like(a),
        a.new_empty(num_runs + 1),
        a.new_empty(num_runs),
        a.new_empty(num_runs),
    )
    _core.number_runs(
        *columns,
        where,
        a.numel(),
        runs.run_of.data_ptr(),
        runs.ptr.data_ptr(),
        runs.a.data_ptr(),
        runs.b.data_ptr(),
        threads,
    )
    return runs


def _find_by_torch(a: Tensor, b: Tensor, order: Tensor | None) -> Runs:
    left = a if order is None else a.index_select(0, order)
    right = b if order is None else b.index_select(0, order)
    starts = torch.ones(left.numel(), dtype=torch.bool, device=a.device)
    starts[1:] = (left[1:] != left[:-1]) | (right[1:] != right[:-1])
    begin = starts.nonzero().squeeze(1)  # the one wait for the device: how many there are
    number = (starts.cumsum(0) - 1).to(a.dtype)
    run_of = number
    if order is not None:
        run_of = torch.empty_like(number)
        run_of[order] = number
    ptr = torch.cat([begin, begin.new_full((1,), left.numel())]).to(a.dtype)
    return Runs(run_of, ptr, left[begin], right[begin])
