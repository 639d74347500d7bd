"""The tensor cache: what each saved storage costs in memory, when it leaves, when it comes back.

The two entry points are the hooks of `torch.autograd.graph.saved_tensors_hooks`: `pack` is called
when forward saves a tensor, `unpack` when backward wants it. Transfers end whenever they end; the
cache looks for finished ones at the start of every hook, so memory falls while forward runs and no
thread of its own is needed.

One lock guards everything. It may be held while a transfer is awaited: the engine that completes
the transfer never takes it, so that wait always ends.
"""

from __future__ import annotations

import atexit
import errno
import functools
import os
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from dataeff.ledger import Ledger, Tier
from dataeff.offload.identity import KnownStorage, StorageTable, revive
from dataeff.offload.report import Counters, ModuleBytes
from dataeff.offload.saved import Copy, Direct, Grave, Handle, SavedStorage
from dataeff.offload.schedule import Orders, Tape
from dataeff.offload.scopes import Scopes


class Tiers(Protocol):
    """What the cache asks of the tiers below it (`dataeff.offload.tiers`)."""

    @property
    def used_nbytes(self) -> int:
        """Host memory that copies take now."""

    def moves(self, device: torch.device) -> bool:
        """Whether there is a tier that would free memory of `device`."""

    def store(self, storage: torch.UntypedStorage, prefer: Tier | None) -> Copy:
        """Begins the copy of a storage. Raises OSError when there is no room."""

    def poll(self) -> list[tuple[int, OSError]]:
        """Copies that were counted as stored and failed later, with their bytes."""

    def drain(self) -> None:
        """Waits for the writes under way."""

    def close(self) -> None:
        """Gives everything back."""


@dataclass(frozen=True)
class Budgets:
    """Bounds on memory, in bytes; None lets the cache choose.

    Attributes:
        in_flight: bytes waiting for their store to finish; more, and forward waits for the oldest.
        prefetch: bytes brought back, or being brought back, before backward has asked for them.
    """

    in_flight: int | None = None
    prefetch: int | None = None


_open_caches: weakref.WeakSet[TensorCache] = weakref.WeakSet()


@functools.cache
def _close_at_exit() -> None:
    """Registers the close of all caches; late, because it must run before the engines' own."""

    @atexit.register
    def close_all() -> None:
        for cache in list(_open_caches):
            cache.close()


class TensorCache:
    """Keeps or stores what autograd saves, and gives back the same bits.

    Args:
        tiers: where storages go; closed with the cache.
        wants: whether a tensor is to be stored; asked once per storage.
        excluded: storages that are alive anyway and are left alone.
        scopes: knows which module is running.
        budgets: bounds on memory in flight.
        ledger: where transfers are entered.
    """

    def __init__(
        self,
        tiers: Tiers,
        wants: Callable[[torch.Tensor, int, str], bool | Tier],
        excluded: Container[torch.UntypedStorage],
        scopes: Scopes,
        budgets: Budgets,
        ledger: Ledger,
    ) -> None:
        self._tiers, self._wants, self._excluded = tiers, wants, excluded
        self._budgets, self.ledger = budgets, ledger
        self._scopes = scopes
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._table = StorageTable()
        self._grave: Grave = deque()
        self._orders = Orders()
        self._tapes: dict[tuple[int, int], Tape] = {}
        self._last_tape: Tape | None = None
        self._writing: deque[SavedStorage] = deque()
        self._loading: list[SavedStorage] = []
        self._cached: dict[int, weakref.ref[SavedStorage]] = {}
        self._writing_nbytes = self._cached_nbytes = self._held_nbytes = 0
        self._warned: set[str] = set()
        self.counters = Counters()
        self.by_module: dict[str, ModuleBytes] = {}
        self.recent_peak = 0  # like `peak_saved_bytes`, since somebody last set it to 0
        self.microbatch = 0
        self.closed = False
        _open_caches.add(self)
        _close_at_exit()

    # ---- the two hooks ---------------------------------------------------------------------

    def pack(self, tensor: torch.Tensor) -> Handle | Direct:
        """Takes charge of a tensor that forward saves."""
        self._check_process()
        if not _is_plain(tensor):
            return self._leave_alone(tensor)
        storage = tensor.untyped_storage()
        with self._lock:
            self._poll()
            if storage in self._excluded:
                self.counters.bytes_excluded += storage.nbytes()
                return Direct(tensor, 0, self._grave)
            self.counters.num_packed += 1
            self.counters.bytes_packed += storage.nbytes()
            known = self._table.lookup(storage)
            saved = known.find(tensor._version)
            if saved is None:
                saved = self._admit(tensor, storage, known)
            else:
                self.counters.bytes_deduplicated += storage.nbytes()
            return Handle(saved, tensor, known.shift)

    def unpack(self, handle: Handle | Direct) -> torch.Tensor:
        """Gives back a saved tensor, as often and in whatever order it is asked for.

        Raises RuntimeError when the tensor was changed in place since, OSError when its bytes
        cannot be read back.
        """
        self._check_process()
        if isinstance(handle, Direct):
            return handle.unpack()
        handle.check_version()
        with self._lock:
            if self.closed and handle.saved.storage is None:
                raise RuntimeError("backward wants a tensor of an ActivationOffload that is closed")
            self.counters.num_unpacked += 1
            self._poll()
            saved = handle.saved
            if saved.tape is not None:
                saved.tape.ask(saved.position)
            storage = self._at_hand(saved)
            if storage is None and saved.load is None:
                self._begin_load(saved)
            if saved.tape is not None:
                self._prefetch(saved.tape)
            if storage is None:
                storage = self._await_load(saved)
            if saved.arrived is not None:
                saved.arrived.order()  # the stream of this caller may be another one
            tensor = handle.rebuild(storage)
            if saved.see(handle) and saved.cached:
                self._drop(saved)
            return tensor

    # ---- storing ---------------------------------------------------------------------------

    def _leave_alone(self, tensor: torch.Tensor) -> Direct:
        nbytes = tensor.numel() * tensor.element_size() if tensor.layout == torch.strided else 0
        with self._lock:
            self._poll()
            self.counters.num_packed += 1
            self.counters.bytes_packed += nbytes
            self.counters.bytes_kept += nbytes
            self._hold(nbytes)
        return Direct(tensor, nbytes, self._grave)

    def _admit(
        self, tensor: torch.Tensor, storage: torch.UntypedStorage, known: KnownStorage
    ) -> SavedStorage:
        saved = SavedStorage(known.generation, tensor._version, storage, self._grave)
        known.saved[saved.version] = weakref.ref(saved)
        known.shift = 0
        self._hold(saved.nbytes)
        scope = self._scopes.current
        account = self.by_module.setdefault(scope, ModuleBytes())
        account.bytes_saved += saved.nbytes
        wanted = self._wants(tensor, saved.nbytes, scope)
        if wanted:
            account.bytes_stored += saved.nbytes
            saved.tape = self._tape_for_pack()
            saved.position = saved.tape.append(saved)
            self._begin_store(saved, storage, wanted if isinstance(wanted, Tier) else None)
        else:
            self.counters.bytes_kept += saved.nbytes
            if not self._tiers.moves(saved.device):
                self.counters.bytes_unmovable += saved.nbytes
        return saved

    def _begin_store(
        self, saved: SavedStorage, storage: torch.UntypedStorage, prefer: Tier | None
    ) -> None:
        limit = self._limit(self._budgets.in_flight, saved.tape)
        while self._writing and self._writing_nbytes + saved.nbytes > limit:
            with self._exposed("wait for store"):
                self._end_store(self._writing.popleft())
        try:
            saved.copy = self._tiers.store(storage, prefer)
        except OSError as error:
            self._store_failed(saved.nbytes, error)
            return
        self._hold(saved.copy.host_nbytes)
        saved.writing = True
        self._writing.append(saved)
        self._writing_nbytes += saved.nbytes

    def _end_store(self, saved: SavedStorage) -> None:
        """Settles a store that was taken off the queue, waiting for it if need be."""
        assert saved.copy is not None
        saved.writing = False
        self._writing_nbytes -= saved.nbytes
        try:
            times_ns = saved.copy.finish()
        except OSError as error:
            self._discard_copy(saved)
            self._store_failed(saved.nbytes, error)
            return
        if saved.copy.tier is Tier.DISK:
            self.counters.bytes_written += saved.nbytes
        else:
            self.counters.bytes_host += saved.nbytes
        self._moved("store", times_ns, saved.nbytes)
        self.ledger.transfer(_tier_of(saved.device), saved.copy.tier, saved.nbytes)
        if saved.storage is not None:
            self._cache(saved)
            if not saved.in_use:
                self._drop(saved)

    def _cancel_store(self, saved: SavedStorage) -> bool:
        assert saved.copy is not None
        if not saved.copy.cancel():
            return False
        self._writing.remove(saved)
        saved.writing = False
        self._writing_nbytes -= saved.nbytes
        self.counters.bytes_cancelled += saved.nbytes
        self._discard_copy(saved)
        return True

    def _discard_copy(self, saved: SavedStorage) -> None:
        assert saved.copy is not None
        self._hold(-saved.copy.host_nbytes)
        saved.copy.release()
        saved.copy = None

    def _store_failed(self, nbytes: int, error: OSError) -> None:
        self.counters.bytes_failed += nbytes
        self.counters.num_store_errors += 1
        kind = "full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "failing"
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(
                f"activation offload: a tier is {kind} ({error}); the tensors that do not get in "
                "stay in memory, and results do not change. This is said once; report() counts.",
                RuntimeWarning,
                stacklevel=2,
            )

    # ---- bringing back ---------------------------------------------------------------------

    def _at_hand(self, saved: SavedStorage) -> torch.UntypedStorage | None:
        """The bytes if they are in memory, without waiting; a queued store is then cancelled."""
        if saved.storage is not None:
            if saved.writing:
                self.counters.bytes_forwarded += saved.nbytes
                self._cancel_store(saved)
            return saved.storage
        if saved.load is not None:
            return None
        alive = revive(saved.weak, saved.shift + saved.nbytes)
        if alive is not None:
            self.counters.bytes_forwarded += saved.nbytes
        return alive

    def _begin_load(self, saved: SavedStorage) -> None:
        assert saved.copy is not None
        self._evict(saved)
        saved.load = saved.copy.load()
        self._loading.append(saved)
        self._hold(saved.nbytes)
        self._cached_nbytes += saved.nbytes

    def _await_load(self, saved: SavedStorage) -> torch.UntypedStorage:
        if saved.storage is None:
            with self._exposed("wait for load"):
                self._end_load(saved)
        assert saved.storage is not None
        return saved.storage

    def _end_load(self, saved: SavedStorage) -> None:
        assert saved.load is not None
        load, saved.load = saved.load, None
        self._loading.remove(saved)
        self._cached_nbytes -= saved.nbytes
        try:
            times_ns = load.finish()
        except OSError:
            self._hold(-saved.nbytes)
            raise
        saved.restore(load)
        self._table.adopt(load.storage, saved, load.shift)
        self._cache(saved)
        self.counters.bytes_read += saved.nbytes
        self._moved("load", times_ns, saved.nbytes)
        assert saved.copy is not None
        self.ledger.transfer(saved.copy.tier, _tier_of(saved.device), saved.nbytes)

    def _prefetch(self, tape: Tape) -> None:
        limit = self._limit(self._budgets.prefetch, tape)
        for saved in tape.upcoming():
            if saved.storage is not None or saved.load is not None:
                # What is wanted this soon need not be written: the disk is free for reads.
                if saved.writing and not self._cancel_store(saved):
                    break
                continue
            if self._cached_nbytes + saved.nbytes > limit:
                break
            if revive(saved.weak, saved.shift + saved.nbytes) is None:
                self._begin_load(saved)

    # ---- memory ----------------------------------------------------------------------------

    def _hold(self, nbytes: int) -> None:
        self._held_nbytes += nbytes
        counters = self.counters
        counters.peak_held_bytes = max(counters.peak_held_bytes, self._held_nbytes)
        counters.peak_saved_bytes = max(counters.peak_saved_bytes, self.held_nbytes)
        self.recent_peak = max(self.recent_peak, self.held_nbytes)

    @property
    def held_nbytes(self) -> int:
        """Bytes of memory held for backward now, host memory of the tiers included."""
        return self._held_nbytes + self._tiers.used_nbytes

    def _cache(self, saved: SavedStorage) -> None:
        """Notes that `saved` is in memory beside a complete copy: it can be dropped at will."""
        saved.cached = True
        self._cached[id(saved)] = weakref.ref(saved)
        self._cached_nbytes += saved.nbytes

    def _drop(self, saved: SavedStorage) -> None:
        saved.storage = saved.arrived = None
        saved.cached = False
        del self._cached[id(saved)]
        self._cached_nbytes -= saved.nbytes
        self._hold(-saved.nbytes)

    def _evict(self, wanted: SavedStorage) -> None:
        """Drops cached bytes, oldest first, until `wanted` fits the prefetch budget."""
        limit = self._limit(self._budgets.prefetch, wanted.tape)
        for key, ref in list(self._cached.items()):
            if self._cached_nbytes + wanted.nbytes <= limit:
                return
            saved = ref()
            if saved is None:
                del self._cached[key]
            else:
                self._drop(saved)

    def _limit(self, budget: int | None, tape: Tape | None) -> int:
        """`budget`, or an eighth of a pass, but never less than twice its largest storage."""
        if budget is not None:
            return budget
        tapes = [t for t in (tape, self._last_tape) if t is not None]
        return max((max(t.nbytes // 8, 2 * t.largest) for t in tapes), default=0)

    # ---- housekeeping ----------------------------------------------------------------------

    def poll(self) -> None:
        """Settles the transfers that have ended and frees what the graph has let go."""
        with self._lock:
            self._poll()

    def drain(self) -> None:
        """Waits for every transfer under way. Failed reads are left to whoever asks for them."""
        with self._lock:
            while self._writing:
                self._end_store(self._writing.popleft())
            for saved in list(self._loading):
                self._settle_load(saved)
            self._tiers.drain()
            self._poll()

    def close(self) -> None:
        """Waits for every transfer and gives the tier back; what is only there is lost."""
        if self.closed or os.getpid() != self._pid:
            return
        self.drain()
        with self._lock:
            self.closed = True
        self._tiers.close()

    def __del__(self) -> None:
        # The engine reads and writes memory that the queues of this object keep alive.
        if hasattr(self, "closed"):
            self.close()

    def _poll(self) -> None:
        self._bury()
        for nbytes, error in self._tiers.poll():
            self.counters.bytes_written -= nbytes
            self._store_failed(nbytes, error)
        for saved in [s for s in self._writing if s.copy is not None and s.copy.done()]:
            self._writing.remove(saved)
            self._end_store(saved)
        for saved in [s for s in self._writing if not s.wanted]:
            self._cancel_store(saved)
        for saved in [s for s in self._loading if s.load is not None and s.load.done()]:
            self._settle_load(saved)
        self._bury()

    def _settle_load(self, saved: SavedStorage) -> None:
        try:
            self._end_load(saved)
        except OSError:
            # Nobody is waiting for these bytes yet. The copy is still there: whoever unpacks the
            # tensor reads again, and gets the error if it persists.
            self.counters.num_load_errors += 1

    def _bury(self) -> None:
        while self._grave:
            remains = self._grave.popleft()
            self._hold(-remains.held_nbytes)
            self._cached_nbytes -= remains.cached_nbytes
            if remains.copy is not None:
                self._hold(-remains.copy.host_nbytes)
                if not self.closed:
                    remains.copy.release()

    def _tape_for_pack(self) -> Tape:
        """The tape of this pass: a new one when backward has begun to read the last.

        Packs inside a backward (a recomputing checkpoint, a double backward) have a tape of
        their own, so that they do not disturb the order of the pass around them.
        """
        task = torch._C._current_graph_task_id()
        key = (self.microbatch, task)
        tape = self._tapes.get(key)
        if tape is None or tape.started:
            self._tapes = {k: old for k, old in self._tapes.items() if k[1] in (-1, task)}
            if tape is not None:
                self._finish_tape(tape, key)
            tape = self._tapes[key] = Tape(self._orders)
        return tape

    def _finish_tape(self, tape: Tape, key: tuple[int, int]) -> None:
        tape.finish()
        self.counters.num_replans += tape.num_replans
        if key[1] == -1:
            self._last_tape = tape

    def expect_backward(self, microbatch: int) -> None:
        """Begins to bring back what the backward of `microbatch` will want first."""
        with self._lock:
            self._poll()
            tape = self._tapes.get((microbatch, -1))
            if tape is not None:
                tape.expect()
                self._prefetch(tape)

    @contextmanager
    def _exposed(self, name: str) -> Iterator[None]:
        start_ns = time.perf_counter_ns()
        try:
            yield
        finally:
            end_ns = time.perf_counter_ns()
            self.counters.exposed_wait_s += (end_ns - start_ns) / 1e9
            self.ledger.span("wait", name, start_ns, end_ns)

    def _moved(self, track: str, times_ns: tuple[int, int], nbytes: int) -> None:
        self.counters.transfer_s += (times_ns[1] - times_ns[0]) / 1e9
        self.ledger.span(track, track, *times_ns, nbytes)

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError(
                "this ActivationOffload was made in another process: the threads that move its "
                "bytes do not survive fork(). Make a new one in the child."
            )


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether the tensor is nothing but strided bytes in a storage that can be moved."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.device.type in ("cpu", "cuda")
        and tensor.numel() > 0
        and not (tensor.is_quantized or tensor.is_nested or tensor.is_conj() or tensor.is_neg())
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and tensor.untyped_storage().nbytes() > 0
    )


def _tier_of(device: torch.device) -> Tier:
    return Tier.HOST if device.type == "cpu" else Tier.DEVICE
