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
import weakref
from collections import deque
from collections.abc import Callable, Container

import torch

from dataeff.ledger import Ledger, Tier
from dataeff.offload.account import Account
from dataeff.offload.held import HeldBytes
from dataeff.offload.identity import StorageTable, revive
from dataeff.offload.incoming import Incoming
from dataeff.offload.lifetime import Process, close_at_exit
from dataeff.offload.outgoing import Outgoing
from dataeff.offload.passes import Budgets, Passes
from dataeff.offload.regions import CompiledRegions
from dataeff.offload.saved import Direct, Grave, Handle, Kept, KeptStorage, SavedStorage
from dataeff.offload.scopes import Scopes
from dataeff.offload.transfer import Tiers
from dataeff.offload.wrapped import Wrapped, is_wrapper

Packed = Handle | Kept | Direct | Wrapped

_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)
_plain_by_keys: dict[int, bool] = {}


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
        self._scopes = scopes
        self._lock = threading.RLock()
        self._process = Process()
        self._table = StorageTable()
        self._kept: dict[tuple[int, int], weakref.ref[KeptStorage]] = {}  # by address and version
        self._sweep_kept_at = 256
        self._grave: Grave = deque()
        self.account = Account(ledger)
        self.counters = self.account.counters
        self.held = HeldBytes(self.counters, tiers)
        self.passes = Passes(self.counters)
        self.regions = CompiledRegions()
        self._outgoing = Outgoing(tiers, self.held, self.passes, budgets.in_flight, self.account)
        self._incoming = Incoming(
            self._table, self.held, self._outgoing, self.passes, budgets.prefetch, self.account
        )
        self._moves = False  # whether anything was ever sent to a tier
        self.closed = False
        close_at_exit(self)

    # ---- the two hooks ---------------------------------------------------------------------

    def pack(self, tensor: torch.Tensor) -> Packed:
        """Takes charge of a tensor that forward saves."""
        # Runs for every saved tensor with the caches full of the model's data, not of this code:
        # each line of Python costs several times what it does in a loop.
        self._process.check()
        if not _is_plain(tensor):
            if is_wrapper(tensor):
                return Wrapped.of(tensor, self.pack)
            return self._leave_alone(tensor)
        storage = tensor.untyped_storage()
        nbytes = storage.nbytes()
        if nbytes == 0:  # given up by its owner, who will fill it again
            return self._leave_alone(tensor)
        counters = self.counters
        with self._lock:
            self._poll()
            if storage in self._excluded:
                counters.bytes_excluded += nbytes
                return Kept(None, tensor)
            counters.num_packed += 1
            counters.bytes_packed += nbytes
            address, version = storage._cdata, tensor._version
            known = self._table.find(address)
            saved = None if known is None else known.find(version)
            if known is not None and saved is not None:
                counters.bytes_deduplicated += nbytes
                return Handle(saved, tensor, known.shift)
            kept_ref = self._kept.get((address, version))
            kept = None if kept_ref is None else kept_ref()
            if kept is not None:
                counters.bytes_deduplicated += nbytes
                return Kept(kept, tensor, self.passes.current)
            return self._admit(tensor, storage, nbytes)

    def unpack(self, handle: Packed) -> torch.Tensor:
        """Gives back a saved tensor, as often and in whatever order it is asked for.

        Raises RuntimeError when the tensor was changed in place since, OSError when its bytes
        cannot be read back.
        """
        self._process.check()
        if isinstance(handle, Kept):
            if handle.held is not None:
                with self._lock:
                    self.counters.num_unpacked += 1
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
            if saved.see(handle) and saved.cached:
                self.held.drop(saved)
            return tensor

    # ---- deciding --------------------------------------------------------------------------

    def _leave_alone(self, tensor: torch.Tensor) -> Direct:
        nbytes = tensor.numel() * tensor.element_size() if tensor.layout == torch.strided else 0
        with self._lock:
            self._poll()
            self.counters.num_packed += 1
            self.counters.bytes_packed += nbytes
            self.counters.bytes_kept += nbytes
            self.held.add(nbytes)
        return Direct(tensor, nbytes, self._grave)

    def _admit(self, tensor: torch.Tensor, storage: torch.UntypedStorage, nbytes: int) -> Packed:
        """The first tensor saved of a storage at this version."""
        self.held.add(nbytes)
        scope = self._scopes.current
        module = self.account.module(scope)
        module.bytes_saved += nbytes
        wanted = self._wants(tensor, nbytes, scope)
        if not wanted:
            return self._keep(tensor, storage, nbytes)
        module.bytes_stored += nbytes
        known = self._table.lookup(storage)
        saved = SavedStorage(known.generation, tensor._version, storage, self._grave)
        known.saved[saved.version] = weakref.ref(saved)
        known.shift = 0
        saved.tape = self.passes.saving()
        saved.position = saved.tape.append(saved)
        self._moves = True
        self._outgoing.begin(saved, storage, wanted if isinstance(wanted, Tier) else None)
        return Handle(saved, tensor, 0)

    def _keep(self, tensor: torch.Tensor, storage: torch.UntypedStorage, nbytes: int) -> Kept:
        # What stays needs no rebuilding: most saved tensors of a model are small and stay.
        self.counters.bytes_kept += nbytes
        if not self._tiers.moves(tensor.device):
            self.counters.bytes_unmovable += nbytes
        if len(self._kept) >= self._sweep_kept_at:
            self._kept = {key: ref for key, ref in self._kept.items() if ref() is not None}
            self._sweep_kept_at = max(256, 2 * len(self._kept))
        kept = KeptStorage(storage, nbytes, self._grave)
        self._kept[storage._cdata, tensor._version] = weakref.ref(kept)
        return Kept(kept, tensor, self.passes.current)

    # ---- bringing back ---------------------------------------------------------------------

    def _bring(self, saved: SavedStorage) -> torch.UntypedStorage:
        """The bytes in memory; begins to read what backward is expected to want after them."""
        if saved.tape is not None:
            saved.tape.ask(saved.position)
            self.regions.see(saved.tape, saved.position, saved.nbytes)
        storage = self._at_hand(saved)
        if storage is None and saved.load is None:
            self._incoming.begin(saved)
        if saved.tape is not None:
            self._incoming.prefetch(saved.tape)
        if storage is None:
            storage = self._incoming.wait_for(saved)
        if saved.arrived is not None:
            saved.arrived.order()  # the stream of this caller may be another one
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

    # ---- housekeeping ----------------------------------------------------------------------

    def poll(self) -> None:
        """Settles the transfers that have ended and frees what the graph has let go."""
        with self._lock:
            self._poll()

    def drain(self) -> None:
        """Waits for every transfer under way. Failed reads are left to whoever asks for them."""
        with self._lock:
            self._outgoing.drain()
            self._incoming.drain()
            self._tiers.drain()
            self._poll()

    def close(self) -> None:
        """Waits for every transfer and gives the tier back; what is only there is lost."""
        if self.closed or not self._process.is_this:
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
        # At every hook, so what has nothing to do must cost next to nothing.
        if self._grave:
            self._bury()
        if not self._moves:
            return
        self._outgoing.settle()
        if len(self._incoming):
            self._incoming.settle()
        if self._grave:
            self._bury()

    def _bury(self) -> None:
        while self._grave:
            remains = self._grave.popleft()
            if isinstance(remains, int):
                self.held.add(-remains)
                continue
            self.held.add(-remains.held_nbytes)
            self.held.cached_nbytes -= remains.cached_nbytes
            if remains.copy is not None:
                self.held.add(-remains.copy.host_nbytes)
                if not self.closed:
                    remains.copy.release()


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether the tensor is nothing but strided bytes in a storage that can be moved."""
    if type(tensor) not in _PLAIN_TYPES or tensor.numel() == 0:
        return False
    keys = torch._C._dispatch_keys(tensor).raw_repr()
    plain = _plain_by_keys.get(keys)
    if plain is None:
        plain = _plain_by_keys[keys] = _is_plain_kind(tensor)
    return plain


def _is_plain_kind(tensor: torch.Tensor) -> bool:
    """The same of all tensors with these dispatch keys: one for each thing asked here."""
    return (
        tensor.layout == torch.strided
        and tensor.device.type in ("cpu", "cuda")
        and not (tensor.is_quantized or tensor.is_nested or tensor.is_conj() or tensor.is_neg())
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and not tensor.is_inference()  # has no version
    )
