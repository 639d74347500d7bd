"""Which storage a saved tensor lives in, and how to lay a tensor over it again.

Two saved tensors are one transfer when they share a storage at the same version; they are the same
tensor only when dtype, size, stride and offset agree too. A storage is known by a generation
number handed out when it is first seen. The table holds a weak reference to each storage: while
that is held, the address that identifies the storage cannot be given to another one, so neither
a clock nor a reused `id()` can make two storages look alike.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

if TYPE_CHECKING:
    from dataeff.offload.saved import SavedStorage


_MOST_VERSIONS = 8
_LINE_NBYTES = 64  # what torch aligns host memory to, and the widest vector


class View(NamedTuple):
    """How a tensor lies over its storage; `offset`, `size` and `stride` count elements."""

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: torch.Tensor, shift: int = 0) -> View:
        """The view that `tensor` is of the bytes from `shift` on."""
        offset = int(tensor.storage_offset()) - shift // tensor.element_size()
        return cls(tensor.dtype, tuple(tensor.size()), tensor.stride(), offset)

    def over(self, storage: torch.UntypedStorage, shift: int = 0) -> torch.Tensor:
        """Lays this view over `storage`, which begins at byte `shift` of it."""
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        offset = self.offset + shift // self.dtype.itemsize
        return empty.set_(storage, offset, self.size, self.stride)


class Spread(NamedTuple):
    """How a tensor lay whose storage holds a clone of it: with its gaps, at its alignment.

    A kernel may round otherwise where it strides or begins otherwise. Each call copies.
    """

    clone: View
    size: tuple[int, ...]
    stride: tuple[int, ...]
    lead: int  # elements between a multiple of `_LINE_NBYTES` and the first

    @classmethod
    def of(cls, tensor: torch.Tensor, clone: View) -> Spread:
        """The layout of `tensor`, which `clone` is a view of a clone of."""
        lead = tensor.data_ptr() % _LINE_NBYTES // tensor.element_size()
        return cls(clone, tuple(tensor.size()), tensor.stride(), lead)

    def over(self, storage: torch.UntypedStorage, shift: int = 0) -> torch.Tensor:
        """What the clone in `storage`, which begins at byte `shift` of it, is a clone of."""
        clone = self.clone.over(storage, shift)
        steps = zip(self.size, self.stride, strict=True)
        span = 1 + sum((length - 1) * stride for length, stride in steps)
        room = torch.empty(self.lead + span, dtype=clone.dtype, device=clone.device)
        return room.as_strided(self.size, self.stride, self.lead).copy_(clone)


class VersionProbe:
    """Watches a tensor's version counter without keeping its memory alive.

    A detached alias shares the counter; its data is then swapped for an empty tensor. A tensor
    rebuilt through the probe counts its in-place changes on the same counter, so that a change
    to any alias, before or after the memory was given up, is seen by all of them.
    """

    __slots__ = ("_alias", "version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.version = tensor._version
        self._alias = tensor.detach()
        self._alias.data = _nothing(tensor.device)

    @property
    def current(self) -> int:
        """The version now."""
        return self._alias._version

    def attach(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns `tensor`'s data under the watched version counter."""
        alias = self._alias.detach()
        alias.data = tensor
        return alias


@functools.cache
def _nothing(device: torch.device) -> torch.Tensor:
    """What aliases without memory have for data."""
    return torch.empty(0, device=device)


def changed_in_place(size: tuple[int, ...], expected: int, current: int) -> RuntimeError:
    """The error for a saved tensor whose version counter moved on."""
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace "
        f"operation: a saved tensor of size {list(size)} is at version {current}; expected version "
        f"{expected} instead. Use an out-of-place operation, or save a clone."
    )


@dataclass
class KnownStorage:
    """One storage: its generation, what was saved of it by version, and where that begins."""

    generation: int
    weak: StorageWeakRef
    shift: int = 0
    saved: dict[int, weakref.ref[SavedStorage]] = field(default_factory=dict)

    def find(self, version: int) -> SavedStorage | None:
        """What was saved of this storage at `version`, while any of it is still needed."""
        ref = self.saved.get(version)
        return None if ref is None else ref()

    def add(self, saved: SavedStorage) -> None:
        """Notes what is saved of this storage, and forgets what is needed no more."""
        if len(self.saved) >= _MOST_VERSIONS:  # one for every step that changes it in place
            self.saved = {v: ref for v, ref in self.saved.items() if ref() is not None}
        self.saved[saved.version] = weakref.ref(saved)


class StorageTable:
    """Every storage seen whose memory, or whose saved bytes, are still in use."""

    def __init__(self) -> None:
        self._known: dict[int, KnownStorage] = {}
        self._next_generation = 0
        self._sweep_at = 256

    def __len__(self) -> int:
        return len(self._known)

    def find(self, address: int) -> KnownStorage | None:
        """The record of the storage at `address` (its `_cdata`), if there is one."""
        known = self._known.get(address)
        return None if known is None or known.weak.expired() else known

    def lookup(self, storage: torch.UntypedStorage) -> KnownStorage:
        """The record of `storage`, made when it is new."""
        known = self.find(storage._cdata)
        if known is None:
            known = self._add(storage, self._next_generation)
            self._next_generation += 1
        return known

    def adopt(self, storage: torch.UntypedStorage, saved: SavedStorage, shift: int) -> None:
        """Enters `storage` as holding `saved` from `shift` on: saving it again moves nothing."""
        known = self._add(storage, saved.generation)
        known.shift = shift
        known.add(saved)

    def _add(self, storage: torch.UntypedStorage, generation: int) -> KnownStorage:
        if len(self._known) >= self._sweep_at:
            self._known = {k: v for k, v in self._known.items() if not v.weak.expired()}
            self._sweep_at = max(256, 2 * len(self._known))
        known = KnownStorage(generation, StorageWeakRef(storage))
        self._known[storage._cdata] = known
        return known


def revive(weak: StorageWeakRef, nbytes: int) -> torch.UntypedStorage | None:
    """The storage behind `weak` if somebody still holds it, and at least `nbytes` of it."""
    storage: torch.UntypedStorage | None = torch.UntypedStorage._new_with_weak_ptr(weak.cdata)
    return storage if storage is not None and storage.nbytes() >= nbytes else None
