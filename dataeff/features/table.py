"""`FeatureTable`: rows gathered to where the index lives."""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from dataeff._core import FaultPlan
from dataeff._flags import checked_bool
from dataeff._integers import checked_int
from dataeff.features.among_tensors import AmongTensors
from dataeff.features.disk_rows import DiskOptions, DiskRows, PathLike
from dataeff.features.gather_cuda import check_devices
from dataeff.features.hot import HotRows
from dataeff.features.index import RowSelection, checked_tensor, row_index
from dataeff.features.prefetch import Prefetch, Prefetcher
from dataeff.features.quantised import Store
from dataeff.features.rows import HostRows, Rows, check_source
from dataeff.features.stats import Account, TableStats
from dataeff.features.stored import Sort, StoredRows, sorting_could_pay
from dataeff.features.traced import gather_traced, number_of
from dataeff.features.unique import gather_once
from dataeff.memory import share_among_ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MOST_READS = 4096  # on their way at one time

_is_compiling = torch.compiler.is_compiling
_tables: weakref.WeakSet[FeatureTable] = weakref.WeakSet()


def _after_fork() -> None:
    for table in _tables:
        table._forked()


os.register_at_fork(after_in_child=_after_fork)


class FeatureTable(AmongTensors):
    """A table of rows in host memory whose gathers run where the index lives.

    `table[index]` is `x[index]`, whatever the device of the index: on the CPU by a threaded gather,
    on CUDA by a kernel that reads the rows in place over the bus, so that the CPU touches no row
    and no staging copy is made. `x` is neither copied nor moved; the table keeps it alive, and what
    is written into `x` is seen by later gathers. Before its first CUDA gather the memory is
    registered with the driver (pinned in place), and released by `close()` or with the table.

    With `store` the rows are copied into a smaller format and widened inside the gather, so that
    fewer bytes cross the bus; `dataeff.features.quantise` gives the formats and their error bounds.
    With `hot` some rows are also in GPU memory, and one kernel reads both tiers.

    Source: PyTorch-Direct (arXiv 2101.07956), section 4; Data Tiering (KDD 2022) for `hot`.

    Args:
        x: features, [num_rows, ...], any dtype, host memory; each row contiguous, rows at any
            stride.
        store: `"fp16"`, `"bf16"`, `"int8"` or `"fp8"` (floating-point `x` alone), or None: as they
            are, in place. Rows that have the format already stay in place too.
        hot: `HotRows(n, score)`, or None.
        sort: whether CUDA gathers read rows in the order of the table, for locality of address
            translation; `"auto"`: of large tables of short rows. CPU gathers never do.
        huge_pages: whether to move the memory of `x` into 2 MiB pages, in place, which spares most
            page-table walks of random rows on the CPU (1.3 to 1.8 times the speed, measured at rows
            of 256 bytes to 2 KiB) and takes about as long as `x.clone()`, once. Pages never written
            are committed by it; mapped files are left alone. Default: when `x` has 64 MiB or more
            and there is no GPU to gather instead.

    Raises:
        TypeError: `x` is no tensor, or not of a dtype that `store` takes; `hot` is no `HotRows`; a
            flag is no bool.
        ValueError: `x` is not in host memory, not dense, has no dimension, or has rows that are not
            contiguous; it asks for gradients, which a gather of features does not pass on; a row is
            not finite and `store` is int8 or fp8; or `hot` has a score of another length.

    Example:
        >>> table = dataeff.FeatureTable(torch.arange(6.0).view(3, 2))
        >>> table[torch.tensor([2, -3])]
        tensor([[4., 5.],
                [0., 1.]])
    """

    def __init__(
        self,
        x: Tensor,
        *,
        store: Store | None = None,
        hot: HotRows | None = None,
        sort: Sort = "auto",
        huge_pages: bool | None = None,
    ) -> None:
        if sort != "auto":
            sort = checked_bool("sort", sort)
        if huge_pages is not None:
            huge_pages = checked_bool("huge_pages", huge_pages)
        check_source(x)
        plain = store is None and hot is None
        if plain and sort is not True and not (sort == "auto" and sorting_could_pay(x)):
            self._begin(HostRows(x, huge_pages))
        else:
            self._begin(StoredRows(x, store, hot, sort, huge_pages))

    def _begin(self, rows: Rows) -> None:
        self._rows: Rows | None = rows
        self._account = Account()
        self._lock = threading.Lock()  # a prefetch begins before a close or after it
        self._prefetcher = Prefetcher()
        self._number = number_of(self)
        _tables.add(self)

    @classmethod
    def shared(
        cls,
        x: Tensor | Callable[[], Tensor],
        group: ProcessGroup | None = None,
        *,
        store: Store | None = None,
        hot: HotRows | None = None,
    ) -> FeatureTable:
        """A table whose rows the processes of this machine hold once between them.

        Under an initialised `torch.distributed` every rank calls it: the first rank of each machine
        takes its `x` and the others map that memory, without looking at their own. A callable is
        run by that one rank only. Sent to other processes by `multiprocessing` or a data loader, by
        fork or spawn, the table is a descriptor. The memory has no name: the size of /dev/shm does
        not matter, and it is gone with the last process that holds it.

        Args:
            x: features as in `FeatureTable`, or what loads them.
            group: default: all ranks.
            store: as in `FeatureTable`; the first rank makes the rows small, and what it holds
                besides them then (`x` itself) is its own affair.
            hot: as in `FeatureTable`: the rows that this rank's GPU keeps.

        Raises:
            RuntimeError: `x` or `store` failed in the machine's first rank (which raises what it
                was).
            TimeoutError: a rank of this machine did not take part.
            OSError: the kernel has no such memory.
        """
        make = x if callable(x) else lambda: x
        if store is None:
            return cls(share_among_ranks(make, group), hot=hot)
        return cls._over(StoredRows.among_ranks(make, group, store, hot))

    def share_(self) -> FeatureTable:
        """Moves the rows into memory that other processes of the machine can map, in place.

        The tensor the table was made of moves along; views and arrays made of it before keep the
        old memory. What sends a table to another process does this by itself.

        Raises:
            TypeError: the rows are in no host tensor.
            RuntimeError: the table is closed.
            OSError: the kernel has no such memory.
        """
        self._open_rows().share_()
        return self

    def _forked(self) -> None:
        # A child has none of the parent's threads and streams, and its locks may stand locked.
        self._lock = threading.Lock()
        self._prefetcher = Prefetcher()
        self._account = Account()
        if self._rows is not None:
            self._rows.forked()

    @classmethod
    def _over(cls, rows: Rows) -> FeatureTable:
        """A table over rows that are in no tensor."""
        table = cls.__new__(cls)
        table._begin(rows)
        return table

    @classmethod
    def open(
        cls,
        paths: PathLike | Sequence[PathLike],
        *,
        name: str | None = None,
        cache_bytes: int = 64 << 20,
        queue_depth: int = 128,
        engine: str = "auto",
        faults: FaultPlan | None = None,
    ) -> FeatureTable:
        """A table whose rows stay on disk; larger than memory is fine.

        A gather reads the pages of its rows past the page cache, many at a time, each page once,
        and keeps rows in a cache of its own (S3-FIFO, which `stats().disk` counts). The files must
        not change while the table is open. A CUDA index gets its rows through pinned memory;
        `prefetch` reads in a thread. Pickled, and in forked workers, the table opens the files
        anew, with an empty cache.

        Args:
            paths: `.npy`, `.safetensors`, or the `.json` index of a striped table that
                `dataeff.convert` wrote; of several files the rows follow one another.
            name: which tensor of `.safetensors` files that hold more than one.
            cache_bytes: host memory for rows read before, bookkeeping included; 0 for none.
            queue_depth: reads on their way at one time.
            engine: `io_uring`, `threads`, or `auto`: io_uring where it is allowed. `cufile` reads
                rows that a CUDA index asks for straight into GPU memory (GPUDirect Storage), each
                by itself and past the cache: for rows of whole pages.
            faults: faults to inject, for tests.

        Raises:
            FileNotFoundError: a file is missing.
            IsADirectoryError: a path is a directory's.
            TypeError: a path is none, or an option no integer.
            ValueError: a file is no table, a pipe or device, damaged, truncated, in Fortran order
                or of another byte order; or files differ in dtype or row shape; or an option is out
                of bounds.
            KeyError: a `.safetensors` file has no tensor of that name.
            OSError: a file cannot be read, or io_uring or cuFile was asked for and is refused.

        Source: pages as in Ginex (arXiv 2208.09151); S3-FIFO (SOSP 2023).
        """
        cache_bytes = checked_int("cache_bytes", cache_bytes, least=0, most=sys.maxsize)
        queue_depth = checked_int("queue_depth", queue_depth, least=1, most=MOST_READS)
        if isinstance(paths, (str, bytes, os.PathLike)) or not isinstance(paths, Iterable):
            paths = [paths]
        options = DiskOptions(cache_bytes, queue_depth, engine, faults)
        return cls._over(DiskRows(list(paths), name, options))

    # --- what it is ---------------------------------------------------------------------------

    @property
    def x(self) -> Tensor:
        """The tensor the table was made of.

        Raises:
            RuntimeError: the table is closed.
            TypeError: its rows are in no tensor.
        """
        return self._open_rows().host_tensor()

    def _open_rows(self) -> Rows:
        if self._rows is None:
            raise RuntimeError("this table is closed")
        return self._rows

    @property
    def shape(self) -> torch.Size:
        """[num_rows, ...]."""
        return self._open_rows().shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows."""
        return self._open_rows().dtype

    def __len__(self) -> int:
        return self._open_rows().shape[0]

    def __repr__(self) -> str:
        what = "closed" if self._rows is None else f"{list(self.shape)}, {self.dtype}"
        return f"{type(self).__name__}({what})"

    # --- reading and writing ------------------------------------------------------------------

    def __getitem__(self, selection: RowSelection) -> Tensor:
        """Rows by number, mask, slice or list, as `x[selection]`, but always a new tensor."""
        rows = self._open_rows()
        if not _is_compiling():
            found = rows.gather_at_once(selection, None, self._account)
            if found is not None:
                return found
        return self.gather(row_index(selection, rows.shape[0]))

    def gather(
        self,
        index: Tensor,
        out: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        unique: bool = False,
    ) -> Tensor:
        """Gathers rows to where the index is: `out[i] = x[index[i]]`.

        Args:
            index: any shape, int32 or int64, each in [-num_rows, num_rows).
            out: contiguous, [*index.shape, *x.shape[1:]], the table's dtype, on the index's
                device; new by default. With `store`, float16, bfloat16, float32 or float64.
            dtype: of the new tensor, where there is no `out`; with `store` the same four, else the
                table's alone.
            unique: fetch a row that is asked for several times once. Worth it where rows repeat
                across a bus or on disk and the sampler has not made them unique (a CPU finds
                repeated rows of host memory in its caches sooner than it sorts the index). On CUDA
                the host waits for the number of different rows.

        Returns:
            `out`, or the new tensor. One of 32 MiB or more in host memory stands where one that is
            gone stood, which spares the system's clearing of new pages; it cannot be resized.

        Raises:
            IndexError: an index is out of range; nothing is written then. On CUDA it is raised by a
                later call on the device, and the row of the wrong index is zero.
            TypeError: an index, out or `dtype` of the wrong dtype; an index or `out` that is no
                tensor; a `unique` that is no bool.
            ValueError: a wrong shape, device or layout; both `out` and `dtype`; an `out` that asks
                for gradients or, without `unique`, lies in the memory of the table or the index.
            RuntimeError: the table is closed, or its memory cannot be registered with CUDA (it
                says why and what helps).
        """
        rows = self._open_rows()
        if out is not None and not isinstance(out, Tensor):
            raise TypeError(f"out is a tensor, got {type(out).__name__}: torch.as_tensor(out)")
        if unique is not False:
            unique = checked_bool("unique", unique)
        as_it_is = dtype is None and not unique
        if as_it_is and not (_is_compiling() or (out is not None and out.requires_grad)):
            found = rows.gather_at_once(index, out, self._account)
            if found is not None:
                if out is not None:  # autograd may have saved what was there
                    increment_version(out)
                return found
        index = checked_tensor(index)
        if dtype is not None:
            if out is not None:
                raise ValueError("give out or dtype, not both: out has a dtype of its own")
            if dtype not in rows.deliveries:
                kinds = ", ".join(map(str, rows.deliveries))
                raise TypeError(
                    f"dtype={dtype!r}: these rows are delivered as {kinds}; .to() converts them"
                )
            out = index.new_empty((*index.shape, *rows.shape[1:]), dtype=dtype)
        if _is_compiling():
            if rows.traceable and not unique:
                return rows.gather_traced(index, out)
            return gather_traced(self._number, rows.shape[1:], rows.dtype, index, out, unique)
        if out is not None and out.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "out asks for gradients, which a gather passes on to nobody: out.detach()"
            )
        if unique and index.numel():
            found = gather_once(rows, index, out, self._account)
        else:
            found = rows.gather(index, out, self._account)
        if out is not None:
            increment_version(out)
        return found

    def register(self, device: torch.device | str | int = "cuda") -> FeatureTable:
        """Registers the memory with CUDA now instead of at the first gather.

        A compiled function or a captured graph that gathers on CUDA needs this before it.

        Raises:
            RuntimeError: CUDA refuses or is not there; says why and what helps.
        """
        if not torch.cuda.is_available():
            raise RuntimeError(
                "this torch finds no CUDA device: gathers run on the CPU, with CPU indices"
            )
        self._open_rows().register(torch.empty(0, device=device).device)
        return self

    def scatter_(self, index: Tensor, rows: Tensor) -> FeatureTable:
        """Writes rows into the table: `x[index[i]] = rows[i]`; of equal indices the last one stays.

        Args:
            index: any shape, int32 or int64, any device.
            rows: [*index.shape, *x.shape[1:]], the table's dtype, on the index's device. From CUDA
                both are first copied to the host, which waits for the current stream.

        Returns:
            The table.

        Raises:
            IndexError: an index is out of range; nothing is written then.
            TypeError: a wrong dtype, or rows that cannot be written, as those on disk.
            ValueError: a wrong shape or device, or memory that is mapped read-only.
            RuntimeError: the table is closed.
        """
        index = checked_tensor(index)
        if not isinstance(rows, Tensor):
            raise TypeError(f"rows are a tensor, got {type(rows).__name__}: torch.as_tensor(rows)")
        if rows.device != index.device:
            raise ValueError(f"rows is on {rows.device} but the index is on {index.device}")
        self._open_rows().scatter_(index, rows)
        return self

    def prefetch(self, index: Tensor, *, unique: bool = False) -> Prefetch:
        """Starts a gather that runs beside the caller: in a thread, or on a CUDA stream of its own.

        Args:
            index: as in `gather`; not to be changed before `wait()`.
            unique: as in `gather`; on CUDA a thread waits for the number of different rows.

        Returns:
            A `Prefetch`; its `wait()` gives the rows or raises what the gather raised.

        Raises:
            RuntimeError: the table is closed.
        """
        index, unique = checked_tensor(index), checked_bool("unique", unique)
        with self._lock:
            return self._prefetcher.begin(self._open_rows(), self._account, index, unique)

    # --- the account --------------------------------------------------------------------------

    def stats(self) -> TableStats:
        """What the table has delivered so far, and from which tier.

        With hot rows on a GPU it waits for the gathers under way, which count what they find.
        """
        if self._rows is not None:
            self._rows.settle(self._account)
        return self._account.stats()

    # --- the end ------------------------------------------------------------------------------

    def close(self) -> None:
        """Waits for the gathers under way, cancels prefetches not begun, and lets go of `x`."""
        with self._lock:
            rows, self._rows = self._rows, None
        self._prefetcher.close()
        if rows is not None:
            rows.settle(self._account)
            rows.release()

    def check(self) -> None:
        """Waits for the CUDA gathers under way and raises the wrong indices they met, if any.

        Raises:
            IndexError: names one of them, how many there were and the table's size.
        """
        check_devices()

    def __enter__(self) -> FeatureTable:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()
        if error is None:
            self.check()

    def __getstate__(self) -> dict[str, Any]:
        return {"rows": self._open_rows()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._begin(state["rows"])
