"""Saved tensors that stay in memory, and their books.

Most of what a model saves is small and stays, in many steps all of it, so this is what a hook costs
where there is nothing to offload. A hook runs with the processor's caches full of the model's data:
each line of Python costs several times what it does in a loop. What can wait is therefore only
noted, in queues that C code appends to, and entered into the books later, all at once.
"""

from __future__ import annotations

import weakref
from collections import deque
from typing import TYPE_CHECKING

import torch

from dataeff.offload.identity import changed_in_place

if TYPE_CHECKING:
    from dataeff.offload.account import Account
    from dataeff.offload.held import HeldBytes
    from dataeff.offload.saved import Grave
    from dataeff.offload.schedule import Tape
    from dataeff.offload.transfer import Tiers

MOST_NOTES = 4096  # a `with` block around a whole run is settled now and then


class Alive:
    """What autograd keeps of a tensor that is alive anyway: parameters and inputs.

    Attributes:
        tensor: it, or an alias that shares its version counter: changes in place are seen.
    """

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: torch.Tensor, version: int) -> None:
        self.tensor, self.version = tensor, version

    def unpack(self) -> torch.Tensor:
        """The tensor. Raises RuntimeError when it was changed in place after it was saved."""
        tensor = self.tensor
        if tensor._version != self.version:
            raise changed_in_place(tuple(tensor.shape), self.version, tensor._version)
        return tensor


class Kept(Alive):
    """What autograd keeps of a tensor whose storage stays in memory for backward.

    Attributes:
        first: the first one of this storage and version; the storage is held until that is gone.
            None in the first itself.
        beside: what was moved in the same pass, if anything was.
    """

    __slots__ = ("__weakref__", "beside", "first")

    def __init__(
        self, tensor: torch.Tensor, version: int, first: Kept | None, beside: Tape | None
    ) -> None:
        self.tensor, self.version, self.first, self.beside = tensor, version, first, beside


class KeptRef(weakref.ref[Kept]):
    """Knows a storage that is kept while the first `Kept` of it lives.

    Attributes:
        key: address and version of the storage.
        nbytes: of the whole storage.
        scope: the module that saved it.
        device: where it is.
        held: whether it was entered into the books.
        again: whether backward saved it.
    """

    __slots__ = ("again", "device", "held", "key", "nbytes", "scope")

    again: bool
    device: torch.device
    held: bool
    key: tuple[int, int]
    nbytes: int
    scope: str


class KeptBooks:
    """Counts what is kept.

    Attributes:
        known: what is kept, by address and version; may hold the dead for a while.
        notes: each `KeptRef`, in a tuple when it is made, and by itself when it has died.
        again: bytes of a storage for each further tensor saved of it.
        excluded: bytes of a storage for each tensor of it that is alive anyway.
    """

    def __init__(self, tiers: Tiers, account: Account, held: HeldBytes) -> None:
        self._tiers, self._account, self._held = tiers, account, held
        self.known: dict[tuple[int, int], KeptRef] = {}
        self.notes: deque[KeptRef | tuple[KeptRef]] = deque()
        self.again: deque[int] = deque()
        self.excluded: deque[int] = deque()

    def settle(self) -> None:
        """Enters what was noted, in its order; guarded by the cache's lock."""
        counters, again, excluded = self._account.counters, self.again, self.excluded
        while self.notes:
            note = self.notes.popleft()
            if isinstance(note, tuple):
                note[0].held = True
                self._enter(note[0])
                continue
            # An interrupt may have come before it was complete, and entered.
            if getattr(note, "held", False):
                note.held = False
                self._held.add(-note.nbytes)
            key = getattr(note, "key", None)
            if key is not None and self.known.get(key) is note:
                del self.known[key]
        while again:
            nbytes = again.popleft()
            counters.num_packed += 1
            counters.bytes_packed += nbytes
            counters.bytes_deduplicated += nbytes
        while excluded:
            counters.bytes_excluded += excluded.popleft()

    @property
    def held_nbytes(self) -> int:
        """Bytes of the storages that are kept now and are in the books."""
        return sum(ref.nbytes for ref in self.known.values() if ref.held)

    def _enter(self, ref: KeptRef) -> None:
        nbytes, counters = ref.nbytes, self._account.counters
        counters.num_packed += 1
        counters.bytes_packed += nbytes
        counters.bytes_kept += nbytes
        if not self._tiers.moves(ref.device):
            counters.bytes_unmovable += nbytes
        self._account.module(ref.scope).enter(nbytes, ref.again)
        self._held.add(nbytes)


class Direct:
    """A saved tensor that is left alone, of a kind that is not understood."""

    __slots__ = ("__weakref__", "_tensor", "_version", "nbytes")

    wanted = True

    def __init__(self, tensor: torch.Tensor, held_nbytes: int, grave: Grave) -> None:
        self.nbytes = held_nbytes
        self._tensor = tensor.detach()
        self._version = None if tensor.is_inference() else tensor._version
        if held_nbytes:
            grave.watch(self, held_nbytes)

    def unpack(self) -> torch.Tensor:
        """The tensor. Raises RuntimeError when it was changed in place after it was saved."""
        if self._version is not None and self._tensor._version != self._version:
            now = self._tensor._version
            raise changed_in_place(tuple(self._tensor.shape), self._version, now)
        return self._tensor
