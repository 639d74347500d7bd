"""The bytes of memory held for backward, and those among them that can be dropped at will."""

from __future__ import annotations

import weakref
from collections import OrderedDict

from dataeff.offload.report import Counters
from dataeff.offload.saved import Grave, SavedStorage
from dataeff.offload.transfer import Tiers


class HeldBytes:
    """Counts what is held, and drops what is *cached*: in memory beside a complete copy.

    Args:
        counters: where the peaks are kept.
        tiers: whose host memory counts too.
    """

    def __init__(self, counters: Counters, tiers: Tiers) -> None:
        self._counters, self._tiers = counters, tiers
        self._nbytes = 0
        self._cached: OrderedDict[int, weakref.ref[SavedStorage]] = OrderedDict()
        self.cached_nbytes = 0  # cached, or being read
        self.last_nbytes = 0  # what stayed because backward wants it first
        self.recent_peak = 0  # like `peak_held_bytes`, since somebody last set it to 0

    @property
    def nbytes(self) -> int:
        """Bytes of memory held for backward now, host memory of the tiers included."""
        return self._nbytes + self._tiers.used_nbytes

    @property
    def here_nbytes(self) -> int:
        """The same without that of the tiers: what is held where the model is."""
        return self._nbytes

    def add(self, nbytes: int) -> None:
        """Notes that `nbytes` more (fewer, when negative) are held."""
        self._nbytes += nbytes
        if nbytes <= 0:
            return
        counters, held = self._counters, self._nbytes
        if held > self.recent_peak:
            self.recent_peak = held
            counters.peak_held_bytes = max(counters.peak_held_bytes, held)
        held += self._tiers.used_nbytes
        if held > counters.peak_saved_bytes:
            counters.peak_saved_bytes = held

    def recount(self, grave: Grave, kept_nbytes: int, loading_nbytes: int) -> None:
        """Counts anew, from what `grave` watches and what is kept or being read."""
        moved = grave.watched()
        copies = sum(one.copy.host_nbytes for one in moved if one.copy is not None)
        in_memory = sum(one.held_nbytes for one in moved)
        self._nbytes = in_memory + copies + kept_nbytes + loading_nbytes
        self.cached_nbytes = sum(one.cached_nbytes for one in moved) + loading_nbytes
        self.last_nbytes = sum(one.last_nbytes for one in moved)

    def cache(self, saved: SavedStorage) -> None:
        """Notes that `saved` is in memory beside a complete copy."""
        saved.cached = True
        self._cached[id(saved)] = weakref.ref(saved)
        self.cached_nbytes += saved.nbytes

    def stay(self, saved: SavedStorage) -> None:
        """Notes that `saved` is not moved because backward will soon want it."""
        saved.stays = True
        self.last_nbytes += saved.nbytes

    def reached(self, saved: SavedStorage) -> None:
        """Backward has come to `saved`: it is not ahead of it any more."""
        if saved.cached:
            self.drop(saved)
        elif saved.stays:
            saved.stays = False
            self.last_nbytes -= saved.nbytes

    def drop(self, saved: SavedStorage) -> None:
        """Lets the memory of a cached storage go."""
        saved.storage = None
        saved.cached = False
        self._cached.pop(id(saved), None)
        self.cached_nbytes -= saved.nbytes
        self.add(-saved.nbytes)
        if saved.tape is not None:
            saved.tape.given_up(saved.position)

    def evict(self, wanted_nbytes: int, limit: int) -> None:
        """Drops cached bytes, oldest first, until `wanted_nbytes` more fit `limit`."""
        while self._cached and self.cached_nbytes + wanted_nbytes > limit:
            key, ref = next(iter(self._cached.items()))
            saved = ref()
            if saved is None:
                del self._cached[key]
            else:
                self.drop(saved)
