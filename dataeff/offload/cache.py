"""The tensor cache: what each saved storage costs in memory, when it leaves, when it comes back.

The two entry points are the hooks of `torch.autograd.graph.saved_tensors_hooks`: `pack` is called
when forward saves a tensor, `unpack` when backward wants it. Transfers end whenever they end; the
cache looks for finished ones at the start of every hook, so memory falls while forward runs and no
thread of its own is needed. Its parts: `outgoing` stores, `incoming` loads and prefetches, `passes`
knows the order of backward, `held` the memory, `account` the books.

One lock guards everything. It may be held while a transfer is awaited: the engine that completes
the transfer never takes it, so that wait always ends.
"""

from __future__ import annotations

import threading

import torch

from dataeff.ledger import Ledger, Tier
from dataeff.memory.cuda import capturing, capturing_anywhere
from dataeff.offload.account import Account
from dataeff.offload.exclude import Exclusions
from dataeff.offload.held import HeldBytes
from dataeff.offload.identity import Spread, StorageTable, VersionProbe, View, revive
from dataeff.offload.incoming import Incoming
from dataeff.offload.kept import MOST_NOTES, Alive, Direct, Kept, KeptBooks, KeptRef
from dataeff.offload.kinds import counts_for_itself, is_parameter, is_part_of_data, is_plain
from dataeff.offload.lifetime import Process, close_at_exit
from dataeff.offload.outgoing import Outgoing
from dataeff.offload.passes import Budgets, Passes, in_backward
from dataeff.offload.policy import Selection
from dataeff.offload.regions import CompiledRegions
from dataeff.offload.saved import Grave, Handle, SavedStorage
from dataeff.offload.schedule import Tape
from dataeff.offload.scopes import Scopes
from dataeff.offload.transfer import Tiers
from dataeff.offload.wrapped import Wrapped, is_wrapper

Packed = Handle | Alive | Direct | Wrapped

CAPTURED = (
    "a CUDA graph is being captured: its replays would use the same memory again, but not wait for "
    "the transfers. Capture outside of `with offload:`"
)
_put_off: list[TensorCache] = []  # collected while a CUDA graph was captured


class TensorCache:
    """Keeps or stores what autograd saves, and gives back the same bits.

    Args:
        tiers: where storages go; closed with the cache.
        wants: whether a tensor is to be stored; asked once per storage that is not too small.
        excluded: storages that are alive anyway and are left alone.
        scopes: knows which module is running.
        budgets: bounds on memory in flight.
        ledger: where transfers are entered.
        keeps_last: whether what backward wants first stays, within half of what may be in flight.
    """

    def __init__(
        self,
        tiers: Tiers,
        wants: Selection,
        excluded: Exclusions,
        scopes: Scopes,
        budgets: Budgets,
        ledger: Ledger,
        keeps_last: bool = True,
    ) -> None:
        self._keeps_last = keeps_last
        self._tiers, self._wants, self._excluded = tiers, wants, excluded
        self._scopes = scopes
        self._lock = threading.RLock()
        self._process = Process()
        self._table = StorageTable()
        self._grave = Grave()
        self.account = Account(ledger, tiers.moment)
        self.counters = self.account.counters
        self.held = HeldBytes(self.counters, tiers)
        self._kept = KeptBooks(tiers, self.account, self.held)
        self.passes = Passes(self.counters)
        self.regions = CompiledRegions()
        self._outgoing = Outgoing(tiers, self.held, self.passes, budgets.in_flight, self.account)
        self._incoming = Incoming(
            self._table, self.held, self._outgoing, self.passes, budgets.prefetch, self.account
        )
        self._moves = False  # whether anything was ever sent to a tier
        self.num_moved = 0  # storages that were
        self.closed = False
        close_at_exit(self)
        while _put_off and not capturing_anywhere(_put_off[-1]._tiers.devices):
            _put_off.pop().close()

    # ---- the two hooks ---------------------------------------------------------------------

    def pack(self, tensor: torch.Tensor) -> Packed:
        """Takes charge of a tensor that forward saves."""
        if self._process.is_other:
            raise self._process.error()
        excluded = self._excluded
        kind = type(tensor)
        if kind is not torch.Tensor:
            nbytes = excluded.parameters.get(id(tensor))
            if nbytes is not None:
                self._kept.excluded.append(nbytes)
                return Alive(tensor, tensor._version)
            if kind is not torch.nn.Parameter:
                return self._pack_other(tensor)
        try:
            storage, version = tensor.untyped_storage(), tensor._version
        except (
            RuntimeError
        ):  # what is sparse has no storage, what was made for inference no version
            return self._leave_alone(tensor)
        address = storage._cdata
        if address in excluded.own or address in excluded.inputs:
            self._kept.excluded.append(storage.nbytes())
            return Alive(tensor.detach(), version)
        with self._lock:
            if self._moves or self._grave.dead:
                self._poll()
            ref = self._kept.known.get((address, version))
            first = None if ref is None else ref()
            if ref is not None and first is not None:
                self._kept.again.append(ref.nbytes)
                return Kept(tensor.detach(), version, first, self._beside())
            return self._admit(tensor, storage, version)

    def unpack(self, handle: Packed) -> torch.Tensor:
        """Gives back a saved tensor, as often and in whatever order it is asked for.

        Raises RuntimeError when the tensor was changed in place since, OSError when its bytes
        cannot be read back.
        """
        if self._process.is_other:
            raise self._process.error()
        if isinstance(handle, Alive):
            if type(handle) is Kept:
                with self._lock:
                    self.counters.num_unpacked += 1
                    if self._moves:
                        self._poll()
                        if handle.beside is not None and handle.beside.announce():
                            self._incoming.prefetch(handle.beside)
            return handle.unpack()
        if isinstance(handle, Wrapped):
            return handle.rebuild(self.unpack)
        if isinstance(handle, Direct):
            return handle.unpack()
        handle.check_version()
        with self._lock:
            saved = handle.saved
            if self.closed and saved.storage is None:
                raise RuntimeError("backward wants a tensor of an ActivationOffload that is closed")
            self.counters.num_unpacked += 1
            self._poll()
            tensor = handle.rebuild(self._bring(saved))
            if saved.see(handle):
                self.held.reached(saved)
                if saved.writing:
                    self._outgoing.used(saved)
            return tensor

    # ---- deciding --------------------------------------------------------------------------

    def _pack_other(self, tensor: torch.Tensor) -> Packed:
        """A tensor of a class of its own."""
        if is_wrapper(tensor):
            return Wrapped.of(tensor, self.pack)
        return self._leave_alone(tensor)

    def _leave_alone(self, tensor: torch.Tensor) -> Direct:
        nbytes = tensor.numel() * tensor.element_size() if tensor.layout == torch.strided else 0
        with self._lock:
            self._poll()
            self.counters.num_packed += 1
            self.counters.bytes_packed += nbytes
            self.counters.bytes_kept += nbytes
            self.held.add(nbytes)
        return Direct(tensor, nbytes, self._grave)

    def _admit(self, tensor: torch.Tensor, storage: torch.UntypedStorage, version: int) -> Packed:
        """A tensor whose storage, at this version, is not among those kept."""
        nbytes = storage.nbytes()
        if nbytes < self._wants.min_bytes:
            if nbytes == 0:  # given up by its owner, who will fill it again
                return self._leave_alone(tensor)
            return self._keep(tensor, storage, version, nbytes, self._scopes.current)
        known = self._table.find(storage._cdata) if self._moves else None
        saved = None if known is None else known.find(version)
        if counts_for_itself(tensor, nbytes if saved is None else saved.nbytes):
            return self._admit_alone(tensor, storage, version, nbytes)
        if known is not None and saved is not None and is_plain(tensor):
            self._kept.again.append(nbytes)
            return Handle(saved, tensor, known.shift)
        if is_parameter(tensor) or is_part_of_data(tensor, nbytes):
            self._kept.excluded.append(nbytes)
            return Alive(tensor.detach(), version)
        scope = self._scopes.current
        wanted = is_plain(tensor) and self._wanted(tensor, nbytes, scope)
        if not wanted:
            return self._keep(tensor, storage, version, nbytes, scope)
        return self._move(tensor, storage, nbytes, scope, wanted)

    def _wanted(self, tensor: torch.Tensor, nbytes: int, scope: str) -> bool | Tier:
        """Whether a tensor is to be stored; not what is saved for a backward that comes at once."""
        if in_backward() and self._scopes.run_again:
            return False
        return self._wants(tensor, nbytes, scope)

    def _admit_alone(
        self, tensor: torch.Tensor, storage: torch.UntypedStorage, version: int, nbytes: int
    ) -> Packed:
        """A tensor whose version tells nothing of the rest of its storage: moved as a clone.

        What the storage holds beside it may change before it is written, without a trace.
        """
        own, scope = tensor.numel() * tensor.element_size(), self._scopes.current
        if own >= self._wants.min_bytes and is_plain(tensor) and 0 not in tensor.stride():
            wanted = self._wanted(tensor, own, scope)
            if wanted:
                try:
                    alone = tensor.detach().clone()
                except torch.OutOfMemoryError:  # to keep it takes no memory
                    return self._keep(tensor, storage, version, nbytes, scope)
                handle = self._move(alone, alone.untyped_storage(), own, scope, wanted)
                handle.probe = VersionProbe(tensor)
                handle.view = Spread.of(tensor, View.of(alone))
                return handle
        return self._keep(tensor, storage, version, nbytes, scope)

    def _move(
        self,
        tensor: torch.Tensor,
        storage: torch.UntypedStorage,
        nbytes: int,
        scope: str,
        to: bool | Tier,
    ) -> Handle:
        if not self._moves:  # else `pack` has polled
            self._moves = True
            self._poll()
        self.num_moved += 1
        self.counters.num_packed += 1
        self.counters.bytes_packed += nbytes
        self.held.add(nbytes)
        known = self._table.lookup(storage)
        saved = SavedStorage(known.generation, tensor._version, storage, self._grave)
        known.add(saved)
        known.shift = 0
        saved.tape = self.passes.saving()
        saved.position = saved.tape.append(saved)
        if self._keeps_last and saved.tape.soon(self._share_of_last(saved.tape)):
            self.held.stay(saved)
            self.counters.bytes_kept += nbytes
            stored = False
        else:
            stored = True
            self._outgoing.begin(saved, storage, to if isinstance(to, Tier) else None)
        left = 0 if saved.copy is None else saved.copy.host_nbytes
        self.account.module(scope).enter(nbytes, in_backward(), stored, left)
        return Handle(saved, tensor, 0)

    def _share_of_last(self, tape: Tape) -> int:
        """Bytes that may stay because backward wants them first: half of what may be in flight."""
        budgets = (self._outgoing.budget, self._incoming.budget)
        return min(self.passes.limit(budget, tape) for budget in budgets) // 2

    def _keep(
        self,
        tensor: torch.Tensor,
        storage: torch.UntypedStorage,
        version: int,
        nbytes: int,
        scope: str,
    ) -> Kept:
        books = self._kept
        kept = Kept(tensor.detach(), version, None, self._beside())
        ref = KeptRef(kept, books.notes.append)
        ref.key, ref.nbytes, ref.held = (storage._cdata, version), nbytes, False
        ref.scope, ref.device, ref.again = scope, tensor.device, in_backward()
        books.known[ref.key] = ref
        books.notes.append((ref,))
        if len(books.notes) > MOST_NOTES:
            self._poll()
        return kept

    def _beside(self) -> Tape | None:
        """What was moved in this pass: it is announced when backward wants what lies beside it."""
        return self.passes.current if self._moves else None

    # ---- bringing back ---------------------------------------------------------------------

    def _bring(self, saved: SavedStorage) -> torch.UntypedStorage:
        """The bytes in memory; begins to read what backward is expected to want after them."""
        if saved.tape is not None:
            self.passes.asked(saved.tape)
            saved.tape.ask(saved.position)
            self.regions.see(saved.tape, saved.position, saved.nbytes)
        storage = self._at_hand(saved)
        if storage is None and saved.load is None:
            self._incoming.fetch(saved)
        if saved.tape is not None:
            self._incoming.prefetch(saved.tape)
        if storage is None or not (saved.arrival is None or saved.arrival.done()):
            with self.account.exposed("wait for load", saved.device):
                if storage is None:
                    storage = self._incoming.wait_for(saved)
                if saved.arrival is not None:
                    saved.arrival.order()  # on the stream of this caller, which may be another one
        return storage

    def _at_hand(self, saved: SavedStorage) -> torch.UntypedStorage | None:
        """The bytes if they are in memory, without waiting; a queued store is then cancelled."""
        if saved.storage is not None:
            if saved.writing:
                self.counters.bytes_forwarded += saved.nbytes
                self._outgoing.cancel(saved)
            return saved.storage
        if saved.load is not None:
            return None
        alive = revive(saved.weak, saved.shift + saved.nbytes)
        if alive is not None:
            self.counters.bytes_forwarded += saved.nbytes
        return alive

    def expect_backward(self, microbatch: int) -> None:
        """Begins to bring back what the backward of `microbatch` will want first."""
        with self._lock:
            self._poll()
            tape = self.passes.forward_of(microbatch)
            if tape is not None:
                tape.announce()
                self._incoming.prefetch(tape)

    def set_budgets(self, budgets: Budgets) -> None:
        """Bounds what is in flight from now on."""
        with self._lock:
            self._outgoing.budget, self._incoming.budget = budgets.in_flight, budgets.prefetch

    def make_room(self, most_nbytes: int, device: torch.device) -> None:
        """Waits for the oldest stores of `device` while more than `most_nbytes` are held."""
        with self._lock:
            self._kept.settle()
            while len(self._outgoing) and self.held.here_nbytes > most_nbytes:
                with self.account.exposed("wait for store", device):
                    self._outgoing._end_oldest()

    # ---- housekeeping ----------------------------------------------------------------------

    def poll(self) -> None:
        """Settles the transfers that have ended and frees what the graph has let go."""
        with self._lock:
            self._poll()
            self.account.settle()

    def recount(self) -> None:
        """Counts anew what is held: an interrupt may have come between a change and its entry."""
        with self._lock:
            self._poll()
            self.held.recount(self._grave, self._kept.held_nbytes, self._incoming.loading_nbytes)
            self._outgoing.recount()

    @property
    def new_nbytes(self) -> int:
        """Bytes of the storages that were saved so far, each counted once."""
        with self._lock:
            self._kept.settle()
            return self.counters.bytes_packed - self.counters.bytes_deduplicated

    def wanted_nbytes(self) -> int:
        """Bytes of what was saved and may still be asked for, wherever they are."""
        with self._lock:
            self._poll()
            return self._grave.wanted_nbytes + self._kept.held_nbytes

    @property
    def checkpointed(self) -> set[str]:
        """Names of the modules that a checkpoint of the model's own runs."""
        return self._scopes.checkpointed

    def exposed_wait_s(self) -> float:
        """The counter, with what a device has done by now."""
        self.poll()
        return self.counters.exposed_wait_s

    def drain(self) -> None:
        """Waits for every transfer under way. Failed reads are left to whoever asks for them."""
        with self._lock:
            self._outgoing.drain()
            self._incoming.drain()
            self._tiers.drain()
            self._poll()
            self.account.settle()

    def close(self) -> None:
        """Waits for every transfer and gives the tier back; what is only there is lost."""
        if self.closed or self._process.is_other:
            return
        try:
            self.drain()
        finally:  # a device may be lost
            with self._lock:
                self.closed = True
            self._tiers.close()

    def __del__(self) -> None:
        # The engine reads and writes memory that the queues of this object keep alive.
        if not hasattr(self, "closed"):
            return
        if not self.closed and capturing_anywhere(self._tiers.devices):
            _put_off.append(self)  # to wait for its transfers would end the capture
        else:
            self.close()

    def _poll(self) -> None:
        # At every hook once something moves, so what has nothing to do must cost next to nothing.
        self._kept.settle()
        if self._grave.dead:
            self._bury()
        if not self._moves:
            return
        if capturing():  # what follows asks events, and queues copies that a replay would repeat
            raise RuntimeError(CAPTURED)
        self._outgoing.settle()
        if len(self._incoming):
            self._incoming.settle()
        if self._grave.dead:
            self._bury()

    def _bury(self) -> None:
        while self._grave.dead:
            remains = self._grave.bury()
            self.held.add(-remains.held_nbytes)
            self.held.cached_nbytes -= remains.cached_nbytes
            self.held.last_nbytes -= remains.last_nbytes
            if remains.copy is not None:
                self.held.add(-remains.copy.host_nbytes)
                if not self.closed:
                    remains.copy.release()
