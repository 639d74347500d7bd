"""Rows in host memory that are kept small, partly in GPU memory, or read in sorted order."""

from __future__ import annotations

import threading
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from dataeff import _core
from dataeff.features.bits import pickled, unpickled
from dataeff.features.gather import scatter_
from dataeff.features.gather_stored import Source, deliveries, gather_stored
from dataeff.features.hot import HotRows, HotTier, copier
from dataeff.features.quantised import ELEMENTS, FORMATS, STORED_DTYPES, Store, quantise
from dataeff.features.registration import RegisteredMemory
from dataeff.features.rows import HostRows, Rows, check_source, shared_rows, storages
from dataeff.features.stats import Account
from dataeff.ledger import Tier
from dataeff.memory import SharedTensor, share_, share_all_among_ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Sort: TypeAlias = Literal["auto"] | bool

# From where on `sort="auto"` sorts: a table whose pages outnumber what address translation keeps at
# hand, rows short enough that a row is less than the look-up it needs, and enough of them that
# sorting brings neighbours together. Set from others' measurements (19.9 against 4.6 GB/s at
# 18.8 GB and 188-byte rows, no gain on small tables: dgl#6635, dgl#6590).
SORT_TABLE_NBYTES = 8 << 30
SORT_ROW_NBYTES = 1 << 10
SORT_NUM_ROWS = 1 << 14


class StoredRows(Rows):
    """Rows of a host tensor with any of: a smaller format, hot copies on GPUs, sorted reading.

    Args:
        x: [num_rows, ...], as for `HostRows`.
        store: the format to keep the rows in (then they are copied), or None: in place.
        hot: which rows GPUs keep in their own memory.
        sort: whether CUDA gathers read rows in the order of the table.
        huge_pages: as for `FeatureTable`, for rows that stay in place.
    """

    def __init__(
        self,
        x: Tensor,
        store: Store | None,
        hot: HotRows | None,
        sort: Sort = "auto",
        huge_pages: bool | None = None,
    ) -> None:
        narrow = store is not None and x.dtype != STORED_DTYPES.get(store)
        # For its checks; rows that are copied come on huge pages by themselves.
        plain = HostRows(x, False if narrow else huge_pages).host_tensor()
        table, scales = (plain, None) if store is None or not narrow else quantise(plain, store)
        self._begin(table, scales, x.dtype, hot, sort, store)

    @classmethod
    def among_ranks(
        cls,
        make: Callable[[], Tensor],
        group: ProcessGroup | None,
        store: Store,
        hot: HotRows | None,
    ) -> StoredRows:
        """Rows that the first rank of each machine makes small and its other ranks map."""

        def parts() -> tuple[Tensor, ...]:
            x = make()
            check_source(x)
            table, scales, dtype, *_ = cls(x, store, None, huge_pages=False)._parts()
            of_x = torch.empty(0, dtype=dtype, device="cpu")  # only its dtype counts
            return (table, of_x) if scales is None else (table, of_x, scales)

        table, of_x, *scales = share_all_among_ranks(parts, group)
        rows = cls.__new__(cls)
        rows._begin(table, scales[0] if scales else None, of_x.dtype, hot, "auto", store)
        return rows

    def _begin(
        self,
        table: Tensor,
        scales: Tensor | None,
        dtype: torch.dtype,
        hot: HotRows | None,
        sort: Sort,
        store: Store | None,
    ) -> None:
        if hot is not None:
            if not isinstance(hot, HotRows):
                raise TypeError(f"hot={hot!r} is no HotRows: dataeff.HotRows(n, score)")
            hot.chosen(table.shape[0])  # a score of another length is refused here
        self._memory = RegisteredMemory(table)
        self._scales, self._hot, self._sort, self._store = scales, hot, sort, store
        self._held = storages(table, scales)
        self.shape, self.dtype = table.shape, dtype
        self._like = torch.empty(0, dtype=dtype, device="cpu")
        self._forget_devices()

    def _forget_devices(self) -> None:
        self._lock = threading.Lock()
        self._sources: dict[torch.device, Source] = {}
        self._tiers: dict[torch.device, HotTier] = {}
        self._settled: dict[torch.device, tuple[int, int, int]] = {}
        self._asked: dict[torch.device, int] = {}

    @property
    def row_nbytes(self) -> int:
        """Bytes of a row as it is kept, its scale included."""
        table = self._memory.x
        scale = 0 if self._scales is None else self._scales.element_size()
        return table.shape[1:].numel() * table.element_size() + scale

    @property
    def deliveries(self) -> tuple[torch.dtype, ...]:
        """All that rows of a smaller format are widened to; of others their own dtype."""
        return deliveries(self._memory.x, self._scales)

    # --- where the rows are -------------------------------------------------------------------

    def _source(self, device: torch.device) -> Source:
        with self._lock:
            if device not in self._sources:
                scales = None if self._scales is None else self._scales.to(device)
                source = Source(self._memory.x, scales)
                if self._hot is not None:
                    self._tiers[device] = HotTier(self._hot, source, device)
                self._sources[device] = source
            tier = self._tiers.get(device)
            return self._sources[device] if tier is None else tier.source()

    def register(self, device: torch.device) -> None:
        """Registers the memory with CUDA and copies scales and hot rows there."""
        with self._memory.readable(device):
            self._source(device)

    def host_tensor(self) -> Tensor:
        """The tensor the rows are in; TypeError when they are kept in another format."""
        if self._store is not None and self._memory.x.dtype != self.dtype:
            raise TypeError(
                f"the rows are kept as {self._store}, not as the tensor the table was made of: "
                "table[:] gives them"
            )
        return self._memory.x

    # --- reading ------------------------------------------------------------------------------

    def gather(self, index: Tensor, out: Tensor | None, account: Account) -> Tensor:
        """From the hot rows and the others in one kernel on CUDA, by threads on the CPU."""
        if index.is_cuda:
            # Of two threads on two streams neither may see the other move hot rows.
            with self._memory.readable(index.device):
                rows = self._gather(index, out)
                self._count(index)
        else:
            held = self._held
            rows = self._gather(index, out)
            del held
            self._count(index)
        account.counted(index.numel())
        if self._hot is None:
            self._moved(account, index.device, index.numel(), 0)
        return rows

    def _count(self, index: Tensor) -> None:
        with self._lock:
            self._asked[index.device] = self._asked.get(index.device, 0) + index.numel()

    def gather_at_once(self, index: Any, out: Tensor | None, account: Account) -> Tensor | None:
        """By threads on the CPU, in one call of the core, where no hot rows are to be counted."""
        if self._hot is not None:
            return None
        held, table, scales = self._held, self._memory.x, self._scales
        dtype = self.dtype if out is None else out.dtype
        if scales is None and dtype == table.dtype:
            rows = _core.gather_tensors(table, index, out, account.tally)
        elif table.dtype not in FORMATS or dtype not in ELEMENTS:
            return None
        else:
            numbers = (FORMATS[table.dtype], ELEMENTS[dtype])
            rows = _core.gather_stored_tensors(
                table, scales, index, out, self._like, *numbers, account.tally
            )
        del held
        return rows

    def _gather(self, index: Tensor, out: Tensor | None) -> Tensor:
        source = self._source(index.device)
        tier = self._tiers.get(index.device)
        if tier is None:
            return self._gather_from(source, index, out)
        tier.before(index)
        rows = self._gather_from(source, index, out)
        tier.after(index)
        return rows

    def _gather_from(self, source: Source, index: Tensor, out: Tensor | None) -> Tensor:
        if not self._sorts(index):
            return gather_stored(source, index, self.dtype, out)
        ids, places = index.reshape(-1).sort()
        shape = (*index.shape, *self.shape[1:])
        if out is None:
            out = index.new_empty(shape, dtype=self.dtype)
        if tuple(out.shape) != shape:
            raise ValueError(f"out has shape {tuple(out.shape)}; the index needs {shape}")
        if not out.is_contiguous():
            raise ValueError(f"out must be contiguous; got strides {out.stride()}")
        flat = out.view(index.numel(), *self.shape[1:])
        gather_stored(source, ids, self.dtype, flat, places)
        return out

    def _sorts(self, index: Tensor) -> bool:
        # A CPU hides the look-ups behind its prefetches: only the gather over the bus gains.
        if index.device.type == "cpu" or self._sort is False or index.dim() == 0:
            return False
        return self._sort is True or (
            index.numel() >= SORT_NUM_ROWS and sorting_could_pay(self._memory.x)
        )

    def gather_traced(self, index: Tensor, out: Tensor | None) -> Tensor:
        """The operator alone; the hot rows are those of the time of tracing.

        Raises:
            RuntimeError: nothing is prepared for this CUDA device.
        """
        if out is None:
            # Inductor (torch 2.13) cannot lower an operator whose only mutable argument, the count
            # of hits, is None; of one that also writes a buffer it can.
            out = index.new_empty((*index.shape, *self.shape[1:]), dtype=self.dtype)
        return gather_stored(self._traced_source(index.device), index, self.dtype, out)

    def _traced_source(self, device: torch.device) -> Source:
        if device.type == "cpu":  # no hot rows, and the scales are here
            return Source(self._memory.x, self._scales)
        if device not in self._sources:
            raise RuntimeError(
                f"a compiled function gathers on {device}: call table.register() before it"
            )
        tier = self._tiers.get(device)
        return self._sources[device] if tier is None else tier.source()

    # --- writing ------------------------------------------------------------------------------

    def scatter_(self, index: Tensor, rows: Tensor) -> None:
        """Narrows the rows and writes them, after the gathers under way, hot copies too."""
        index, rows = index.cpu(), rows.cpu()
        if rows.dtype != self.dtype:
            raise TypeError(f"rows is {rows.dtype} but the table is {self.dtype}")
        shape = (*index.shape, *self.shape[1:])
        if tuple(rows.shape) != shape:
            raise ValueError(f"rows has shape {tuple(rows.shape)}; the index needs {shape}")
        codes, scales = rows, None
        if self._memory.x.dtype != self.dtype:
            assert self._store is not None
            flat = rows.reshape(index.numel(), *self.shape[1:])
            codes, scales = quantise(flat.contiguous(), self._store)
        with self._memory.written():  # nobody may see half a row
            copiers = self._copiers(index)  # what a device refuses, it refuses before all writes
            scatter_(self._memory.x, index, codes.view(shape))
            if scales is not None:
                assert self._scales is not None
                scatter_(self._scales, index, scales.view(index.shape))
            for copy in copiers:
                copy()
            for device in self._sources if copiers else ():
                if device.type == "cuda":
                    torch.cuda.synchronize(device)

    def _copiers(self, index: Tensor) -> list[Callable[[], None]]:
        """What brings scales and hot rows of the devices up to date once the rows are written."""
        if not index.numel() or not len(self._memory.x):
            return []
        copiers = []
        # An index out of range is refused by the write.
        ids = index.reshape(-1).long() % len(self._memory.x)
        for device, source in self._sources.items():
            if source.scales is not None and source.scales is not self._scales:
                assert self._scales is not None
                copiers.append(copier(self._scales, ids, source.scales, ids.to(device)))
            if device in self._tiers:
                copiers.append(self._tiers[device].copier(ids))
        return copiers

    # --- the account --------------------------------------------------------------------------

    def _moved(self, account: Account, device: torch.device, num_cold: int, num_hot: int) -> None:
        target = Tier.HOST if device.type == "cpu" else Tier.DEVICE
        if num_cold:
            account.transfer(Tier.HOST, target, num_cold * self.row_nbytes)
        if num_hot:  # a CPU has no other tier: the row came from host memory all the same
            account.transfer(target, target, num_hot * self.row_nbytes)

    def settle(self, account: Account) -> None:
        """Enters what the devices have counted since; waits for them."""
        for device, tier in list(self._tiers.items()):
            with self._memory.unread(), self._lock:  # what is asked for has been looked for
                now = (self._asked.get(device, 0), tier.num_hits(), tier.num_moved())
                before = self._settled.get(device, (0, 0, 0))
                self._settled[device] = now
            asked, hits, moved = (a - b for a, b in zip(now, before, strict=True))
            self._moved(account, device, asked - hits, hits)
            account.found_hot(hits)
            if device.type != "cpu" and moved:
                account.transfer(Tier.HOST, Tier.DEVICE, moved * self.row_nbytes)

    # --- the end ------------------------------------------------------------------------------

    def release(self) -> None:
        """Gives the registration and the devices' memory back."""
        with self._memory.unread():
            self._memory.release()
            self._sources.clear()
            self._tiers.clear()

    # --- other processes ----------------------------------------------------------------------

    def share_(self) -> None:
        """Moves the rows and their scales, in place."""
        with self._memory.unread():
            self._memory.x = x = shared_rows(self._memory.x)
            with self._lock:
                for device, source in self._sources.items():
                    self._sources[device] = source._replace(table=x)
                for tier in self._tiers.values():
                    tier.moved(x)
        if self._scales is not None:
            share_(self._scales)
        self._held = storages(self._memory.x, self._scales)

    def forked(self) -> None:
        """Leaves the parent's devices alone; rows are read by the CPU here, or registered anew."""
        self._parents = (self._sources, self._tiers)  # freed here, they would call CUDA
        self._forget_devices()

    def _parts(self) -> tuple[Any, ...]:
        """What `_begin` takes."""
        table, hot, sort, store = self._memory.x, self._hot, self._sort, self._store
        return table, self._scales, self.dtype, hot, sort, store

    def __getstate__(self) -> dict[str, Any]:
        table, *rest = self._parts()
        return {"table": pickled(table), "rest": rest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._begin(unpickled(*state["table"]), *state["rest"])


def _receive(table: SharedTensor, scales: SharedTensor | None, rest: list[Any]) -> StoredRows:
    rows = StoredRows.__new__(StoredRows)
    rows._begin(table.tensor(), None if scales is None else scales.tensor(), *rest)
    return rows


def _send(rows: StoredRows) -> tuple[Any, ...]:
    rows.share_()
    table, scales, *rest = rows._parts()
    return _receive, (
        SharedTensor(table),
        None if scales is None else SharedTensor(scales),
        rest,
    )


# Between processes rows travel as descriptors; pickle alone, as in a file, copies them.
ForkingPickler.register(StoredRows, _send)


def sorting_could_pay(table: Tensor) -> bool:
    """Whether the table is of the kind whose gathers `sort="auto"` sorts when they are long."""
    if table.dim() == 0 or not table.shape[0]:
        return False
    row_nbytes = table.shape[1:].numel() * table.element_size()
    table_nbytes = abs(table.stride(0)) * table.element_size() * table.shape[0]
    return table_nbytes >= SORT_TABLE_NBYTES and row_nbytes <= SORT_ROW_NBYTES
