"""The CUDA side of the gather: rows of registered host memory, read in place by a kernel."""

from __future__ import annotations

import os
import threading

import torch
from torch import Tensor

from dataeff import _core
from dataeff._ops import check_index, check_rows, library, new_rows, row_span, row_table
from dataeff.memory.cuda import capturing_anywhere, current_device, refuse_in_capture

BLOCKS = "DATAEFF_GATHER_BLOCKS"
MOST_BLOCKS = 1 << 16  # of 512 threads; a GPU runs some hundreds at once


class BadIndices:
    """Where the kernels of one device report wrong indices, and the check that raises them.

    The kernel counts in device memory and leaves one of the values in pinned host memory, where the
    host looks at the next call without waiting for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.count = torch.zeros(1, dtype=torch.int64, device=device)
        self.seen = torch.zeros(3, dtype=torch.int64, device="cpu", pin_memory=True)
        # The next gather may be on another stream than the one that the zeros are written on.
        torch.cuda.current_stream(device).synchronize()
        self._begin()

    def _begin(self) -> None:
        self._seen = self.seen.numpy()
        self._num_raised = 0
        self._lock = threading.Lock()

    def check(self) -> None:
        """Raises IndexError when a finished gather met a wrong index, once for all of them."""
        if not self._seen[0] or capturing_anywhere((self.device,)):
            return  # the next call raises: to wait for the device would end the capture
        with self._lock:
            torch.cuda.synchronize(self.device)
            value, num_rows = int(self._seen[1]), int(self._seen[2])
            # In this order, and the count only ever grows: what another thread's gather meets
            # meanwhile is raised now or by the next check.
            self._seen[0] = 0
            total = int(self.count)
            count, self._num_raised = total - self._num_raised, total
        if not count:
            return
        raise IndexError(
            f"{count} wrong indices in earlier gathers on {self.device}, among them {value} for a "
            f"table of {num_rows} rows; their rows are zero"
        )


_bad_indices: dict[torch.device, BadIndices] = {}


def bad_indices(device: torch.device) -> BadIndices:
    """The device's own, made at its first gather."""
    if device not in _bad_indices:  # of two threads' only one may be written to
        _bad_indices.setdefault(device, BadIndices(device))
    return _bad_indices[device]


def check_devices() -> None:
    """Waits for every device that has gathered and raises the wrong indices they met."""
    if torch.cuda._is_in_bad_fork():  # what has gathered was the parent, who is told
        return
    refuse_in_capture("the gathers under way", "check after it")
    for bad in list(_bad_indices.values()):
        torch.cuda.synchronize(bad.device)
        bad.check()


def check_readable(table: Tensor, index: Tensor) -> None:
    """RuntimeError or ValueError unless kernels of the index's device can read the table."""
    if table.device.type == "cpu":
        if not _core.is_registered(*row_span(table)):
            raise RuntimeError(
                "the table's memory is not registered with CUDA: gather through "
                "dataeff.FeatureTable(table), which registers it in place"
            )
    elif table.device != index.device:
        raise ValueError(f"the table is on {table.device} but the index is on {index.device}")


def launch_gather(table: Tensor, index: Tensor, out: Tensor, **options: int) -> None:
    """Queues a gather on the current stream of the index's device; `out` fits it.

    Args:
        table: [num_rows, ...], registered host memory, or on the device.
        index: int32 or int64.
        out: contiguous, on the device.
        **options: of `_core.gather_cuda`, from `places` on.

    Raises:
        IndexError: an earlier gather met a wrong index.
        RuntimeError, ValueError: as `check_readable`.
    """
    index = check_index(index)
    device = index.device
    with current_device(device):
        check_readable(table, index)
        bad = bad_indices(device)
        bad.check()
        _core.gather_cuda(
            *row_table(table),
            index.data_ptr(),
            index.numel(),
            index.element_size(),
            out.data_ptr(),
            bad.count.data_ptr(),
            bad.seen.data_ptr(),
            device.index,
            torch.cuda.current_stream(device).cuda_stream,
            num_blocks=_num_blocks(table),
            **options,
        )


def _num_blocks(table: Tensor) -> int:
    """Blocks of a gather: 0 takes as few as fill the bus, which the device's own memory outruns.

    Raises:
        ValueError: DATAEFF_GATHER_BLOCKS, which is for gathers over the bus, is no number of them.
    """
    if table.is_cuda:
        return int(torch.cuda.get_device_properties(table.device).multi_processor_count)
    asked = os.environ.get(BLOCKS, "")
    if asked and not (asked.isascii() and asked.isdigit() and 0 < int(asked) <= MOST_BLOCKS):
        raise ValueError(
            f"{BLOCKS}={asked!r} is no number of blocks from 1 to {MOST_BLOCKS}: unset it for as "
            "few as fill the bus"
        )
    return int(asked or 0)


def _gather(table: Tensor, index: Tensor) -> Tensor:
    out = new_rows(table, index)
    launch_gather(table, index, out)
    return out


def _gather_out(table: Tensor, index: Tensor, out: Tensor) -> None:
    check_rows(out, table, index, "out")
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous; got strides {out.stride()}")
    launch_gather(table, index, out)


library.impl("gather", _gather, "CUDA")
library.impl("gather_out", _gather_out, "CUDA")
