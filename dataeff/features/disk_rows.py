"""Rows that stay in files: batches of pages read past the page cache, hot rows kept in memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataeff import _core
from dataeff._ops import check_index, check_rows
from dataeff._threads import loop_threads
from dataeff.features.disk_to_gpu import DirectReads, gather_direct
from dataeff.features.rows import Rows
from dataeff.features.stats import Account, DiskStats
from dataeff.features.table_files import RowFiles, local_path, read_header
from dataeff.ledger import Tier
from dataeff.memory.cuda import refuse_in_capture
from dataeff.memory.scratch import new_on_host
from dataeff.storage import open_engine, uring_refusal

PathLike = str | os.PathLike[str]
ENGINES = ("auto", "io_uring", "threads", "cufile")


@dataclass(frozen=True)
class DiskOptions:
    """How files are read.

    Attributes:
        cache_nbytes: host memory for rows read before; 0 for none.
        queue_depth: reads on their way at one time, per gather.
        engine: `io_uring`, `threads`, or `auto`: io_uring where it is allowed. `cufile`: straight
            into GPU memory for an index there, as `auto` for one on the host.
        faults: faults to inject, for tests.
    """

    cache_nbytes: int
    queue_depth: int
    engine: str = "auto"
    faults: _core.FaultPlan | None = None


class DiskRows(Rows):
    """Rows of one or several files, one after the other, gathered by reading their pages.

    A batch is looked up in the cache; the rows left are sorted by place, those that share or touch
    pages are read together, and each is copied to its place in the output as its pages arrive. In
    GPU memory rows arrive through pinned memory and an asynchronous copy, or by cuFile, which
    passes by the cache.

    Args:
        paths: files of one dtype and row shape.
        name: which tensor of `.safetensors` files.
        options: how they are read.

    Raises:
        As `read_header`; ValueError also when files differ in dtype or row shape, and OSError when
        io_uring was asked for and is refused.
    """

    asynchronous = False
    traceable = False

    def __init__(self, paths: Sequence[PathLike], name: str | None, options: DiskOptions) -> None:
        if options.engine not in ENGINES:
            raise ValueError(f"engine={options.engine!r} is not one of {', '.join(ENGINES)}")
        if not isinstance(options.faults, _core.FaultPlan | None):
            raise TypeError(f"faults={options.faults!r} is no FaultPlan")
        if not paths:
            raise ValueError("no path was given: a table on disk has at least one file")
        self._paths, self._name, self._options = [local_path(p) for p in paths], name, options
        self._tables = [read_header(path, name) for path in self._paths]
        first = self._tables[0]
        for path, table in zip(self._paths, self._tables, strict=True):
            if (table.dtype, table.shape[1:]) != (first.dtype, first.shape[1:]):
                raise ValueError(
                    f"{path} has rows of {table.dtype}, {list(table.shape[1:])}, but "
                    f"{self._paths[0]} of {first.dtype}, {list(first.shape[1:])}"
                )
        self.dtype = first.dtype
        self.shape = torch.Size((sum(t.shape[0] for t in self._tables), *first.shape[1:]))
        self._fds: list[int] = []
        self._idle = threading.Condition()
        self._num_gathers = 0
        self._engine: _core.Engine | None = None
        self._reader: _core.RowReader | None = None
        self._direct: DirectReads | None = None
        try:
            segments = [self._open(table) for table in self._tables]
            self._segments = segments
            self._start()
            if options.engine == "cufile":
                self._open_direct_reads()
        except BaseException:
            self._close_files()
            raise

    def _open(self, table: RowFiles) -> tuple[int, int, int, list[int]]:
        fds = []
        for path in table.paths:
            fds.append(_open_direct(path))
            self._fds.append(fds[-1])
        return table.shape[0], table.rows_per_extent, table.offset, fds

    def _start(self) -> None:
        options = self._options
        # Whoever forks leaves threads and rings behind: the child starts its own over the files.
        self._pid = os.getpid()
        self._idle = threading.Condition()
        self._num_gathers = 0
        self._direct = None
        threads = options.engine == "threads" or (
            options.engine != "io_uring" and uring_refusal() is not None
        )
        if threads:
            num_threads = min(options.queue_depth, 64)
            self._engine = open_engine("threads", num_threads=num_threads, faults=options.faults)
        row_nbytes = self._tables[0].row_nbytes
        self._reader = _core.RowReader(
            self._segments,
            row_nbytes,
            options.queue_depth,
            options.cache_nbytes,
            self._engine,
            options.faults,
        )

    def _open_direct_reads(self) -> DirectReads:
        depth = self._options.queue_depth
        engine = open_engine("cufile", num_threads=min(depth, 64), faults=self._options.faults)
        row_nbytes = self._tables[0].row_nbytes
        self._direct = DirectReads(engine, self._segments, row_nbytes, depth)
        return self._direct

    @contextmanager
    def _gathering(self) -> Iterator[_core.RowReader]:
        if self._reader is not None and os.getpid() != self._pid:
            self._start()
        with self._idle:
            if self._reader is None:
                raise RuntimeError("this table is closed")
            reader = self._reader
            self._num_gathers += 1
        try:
            yield reader
        finally:
            with self._idle:
                self._num_gathers -= 1
                self._idle.notify_all()

    def gather(self, index: Tensor, out: Tensor | None, account: Account) -> Tensor:
        """Reads what the cache lacks; a CUDA index waits for the current stream first.

        Raises:
            OSError: a read failed; names the file, the offset and the cause. `out` is partly
                written then.
            EOFError: a file has become shorter than when it was opened.
            RuntimeError: a CUDA graph is being captured.
        """
        on_host = index.device.type == "cpu"
        if not on_host:
            refuse_in_capture(
                "rows from disk", "let it read a buffer that gather(index, out=buffer) fills before"
            )
        if out is None:
            shape = (*index.shape, *self.shape[1:])
            if on_host:
                out = new_on_host(index, shape, self.dtype)
            else:
                out = index.new_empty(shape, dtype=self.dtype)
        else:
            check_rows(out, self._like(), index, "out")
            if not out.is_contiguous():
                raise ValueError(f"out must be contiguous; got strides {out.stride()}")
        if self._options.engine == "cufile" and not on_host:
            return self._gather_direct(check_index(index), out, account)
        # Pinned memory of torch's allocator is not reused before the copy from it is over.
        rows = out
        if not on_host:
            rows = torch.empty(out.shape, dtype=out.dtype, device="cpu", pin_memory=True)
        with self._gathering() as reader:
            num_hits = self._read(reader, check_index(index.cpu()), rows)
            account.disk = self._stats(reader)
        if not on_host:
            out.copy_(rows, non_blocking=True)
            account.transfer(Tier.HOST, Tier.DEVICE, out.nbytes)
        row_nbytes = self._tables[0].row_nbytes
        account.transfer(Tier.DISK, Tier.HOST, (index.numel() - num_hits) * row_nbytes)
        account.gathered(index.numel(), Tier.HOST, Tier.HOST, num_hits * row_nbytes)
        return out

    def _gather_direct(self, index: Tensor, out: Tensor, account: Account) -> Tensor:
        with self._gathering():
            direct = self._direct or self._open_direct_reads()
            num_read = gather_direct(direct, index, self.shape[0], out)
        row_nbytes = self._tables[0].row_nbytes
        account.gathered(index.numel(), Tier.DISK, Tier.DEVICE, num_read * row_nbytes)
        return out

    @staticmethod
    def _read(reader: _core.RowReader, index: Tensor, rows: Tensor) -> int:
        return reader.gather(
            index.data_ptr(),
            index.numel(),
            index.element_size(),
            rows.data_ptr(),
            loop_threads(),
        )

    @staticmethod
    def _stats(reader: _core.RowReader) -> DiskStats:
        return DiskStats(reader.num_cache_rows, *reader.counts())

    def _like(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def scatter_(self, index: Tensor, rows: Tensor) -> None:
        """Refused.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"the rows of {self._paths[0]} are on disk and read-only: write a new table with "
            "dataeff.convert, or hold them in memory with dataeff.FeatureTable(table[:])"
        )

    def register(self, device: torch.device) -> None:
        """Nothing to prepare: rows reach a GPU through pinned memory."""
        return

    def release(self) -> None:
        """Waits for the gathers under way, then closes the files."""
        if os.getpid() != self._pid:  # the gathers under way are the parent's
            self._idle, self._num_gathers = threading.Condition(), 0
        with self._idle:
            self._reader = None
            self._idle.wait_for(lambda: self._num_gathers == 0)
        if self._direct is not None:
            self._direct.close()
            self._direct = None
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        self._close_files()

    def _close_files(self) -> None:
        while self._fds:
            os.close(self._fds.pop())

    def __del__(self) -> None:
        if hasattr(self, "_fds"):  # reading a header may have failed
            self._close_files()

    def __getstate__(self) -> dict[str, Any]:
        options = self._options
        if options.faults is not None:
            raise TypeError("a table with injected faults does not pickle")
        return {"paths": self._paths, "name": self._name, "options": options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _open_direct(path: Path) -> int:
    """Open past the page cache, or through it where the file system has no direct I/O."""
    with suppress(OSError):
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
