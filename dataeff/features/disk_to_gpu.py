"""Rows from files straight into GPU memory, by cuFile (GPUDirect Storage)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from dataeff import _core

# num_rows, rows_per_extent, offset of the first row, one descriptor per file
Segment = tuple[int, int, int, list[int]]


class DirectReads:
    """Reads of whole rows into any memory, `depth` on their way at one time.

    Args:
        engine: one that takes device memory; closed with this.
        segments: where the rows are.
        row_nbytes: bytes of a row.
        depth: reads on their way, per call.
    """

    def __init__(
        self, engine: _core.Engine, segments: Sequence[Segment], row_nbytes: int, depth: int
    ) -> None:
        self._engine, self._segments = engine, segments
        self._row_nbytes, self._depth = row_nbytes, depth

    def read(self, ids: Tensor, address: int) -> None:
        """Puts row `ids[i]` at `address + i * row_nbytes`; every read has ended when it returns.

        Args:
            ids: [n], int64, host memory, each in [0, num_rows).
            address: of n rows.

        Raises:
            OSError: a read failed; names the file and the offset. Others of the call may be done.
            EOFError: a file has become shorter.
        """
        under_way: deque[_core.Transfer] = deque()
        failure: Exception | None = None
        try:
            for fd, offset in self._places(ids):
                if len(under_way) == self._depth:
                    failure = _outcome(under_way.popleft())
                if failure is not None:
                    break
                under_way.append(self._engine.read(fd, address, self._row_nbytes, offset))
                address += self._row_nbytes
        finally:  # the memory is the caller's: nothing may write to it later, not after Ctrl-C
            for transfer in under_way:
                ended = _outcome(transfer)
                failure = failure or ended
        if failure is not None:
            raise failure

    def _places(self, ids: Tensor) -> list[tuple[int, int]]:
        """The descriptor and the offset of each row."""
        places: list[tuple[int, int]] = []
        first = 0
        ids, order = ids.sort()
        for num_rows, rows_per_extent, begin, fds in self._segments:
            mine = ids[(ids >= first) & (ids < first + num_rows)] - first
            extent = mine // rows_per_extent
            row = extent // len(fds) * rows_per_extent + mine % rows_per_extent
            offsets = (begin + row * self._row_nbytes).tolist()
            files = (extent % len(fds)).tolist()
            places += [(fds[file], offset) for file, offset in zip(files, offsets, strict=True)]
            first += num_rows
        return [places[i] for i in order.argsort().tolist()]

    def close(self) -> None:
        """Waits for what is under way."""
        self._engine.close()


def _outcome(transfer: _core.Transfer) -> Exception | None:
    try:
        transfer.wait()
    except (OSError, EOFError) as error:
        return error
    return None


def gather_direct(reads: DirectReads, index: Tensor, num_rows: int, out: Tensor) -> int:
    """`out[i] = rows[index[i]]` on the index's device, each different row read once.

    Returns:
        How many rows were read.

    Raises:
        IndexError: an index is out of range; nothing is read then.
        OSError, EOFError: as `DirectReads.read`.
    """
    flat = index.reshape(-1).long()
    wrong = flat[(flat < -num_rows) | (flat >= num_rows)]
    if len(wrong):
        raise IndexError(
            f"index {int(wrong[0])} is out of range for a table of {num_rows} rows: "
            f"valid are {-num_rows} to {num_rows - 1}"
        )
    if not out.numel():
        return 0
    ids, place = torch.unique(flat.remainder(num_rows), return_inverse=True)
    rows = out.view(len(flat), *out.shape[index.dim() :])
    few = rows.new_empty((len(ids), *rows.shape[1:]))
    # cuFile is ordered with no stream, and the memory was in use: the copy of the ids waits for the
    # current stream.
    reads.read(ids.cpu(), few.data_ptr())
    torch.index_select(few, 0, place, out=rows)
    return len(ids)
