"""The way back: loads that backward waits for, and those begun before it asks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

import torch

from dataeff.offload.account import Account
from dataeff.offload.held import HeldBytes
from dataeff.offload.identity import StorageTable, revive
from dataeff.offload.outgoing import Outgoing
from dataeff.offload.passes import Passes
from dataeff.offload.saved import SavedStorage
from dataeff.offload.schedule import Tape
from dataeff.offload.transfer import over


class Incoming:
    """Loads under way and the prefetches that the order of backward suggests.

    Guarded by the cache's lock.

    Args:
        table: is told which storage holds what came back.
        held: counts, and makes room for, the memory that loads take.
        outgoing: stores that a prefetch makes needless.
        passes: chooses the budget when none is given.
        budget: the most bytes brought back before backward has asked for them.
        account: where what happened is entered.
    """

    def __init__(
        self,
        table: StorageTable,
        held: HeldBytes,
        outgoing: Outgoing,
        passes: Passes,
        budget: int | None,
        account: Account,
    ) -> None:
        self._table, self._held, self._outgoing = table, held, outgoing
        self._passes, self.budget, self._account = passes, budget, account
        self._loading: OrderedDict[SavedStorage, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._loading)

    @property
    def loading_nbytes(self) -> int:
        """Bytes being brought back."""
        return sum(saved.nbytes for saved in self._loading)

    def begin(self, saved: SavedStorage) -> None:
        """Begins to bring `saved` back, dropping cached bytes that the budget has no room for."""
        assert saved.copy is not None
        self._held.evict(saved.nbytes, self._passes.limit(self.budget, saved.tape))
        saved.load = saved.copy.load()
        self._loading[saved] = None
        self._held.add(saved.nbytes)
        self._held.cached_nbytes += saved.nbytes

    def fetch(self, saved: SavedStorage) -> None:
        """Begins to read back what backward waits for.

        Where a device has no memory for it, what was brought ahead is given up: it can be read
        again. Raises torch.OutOfMemoryError when that was not enough.
        """
        try:
            self.begin(saved)
        except torch.OutOfMemoryError:
            if not self._held.cached_nbytes:
                raise
            self.drain()
            self._held.evict(saved.nbytes, 0)
            self.begin(saved)

    def wait_for(self, saved: SavedStorage) -> torch.UntypedStorage:
        """The bytes of `saved`, whose load has begun. Raises OSError when they cannot be read."""
        if saved.storage is None:
            self._end(saved)
        assert saved.storage is not None
        return saved.storage

    def prefetch(self, tape: Tape) -> None:
        """Begins the loads that backward is expected to ask for next, within the budget."""
        limit = self._passes.limit(self.budget, tape)
        for saved in tape.upcoming():
            if saved.storage is not None or saved.load is not None:
                # What is wanted this soon need not be written: the disk is free for reads. A copy
                # to host memory goes on, and is in the way of none that comes back.
                if saved.writing and not self._outgoing.cancel(saved) and not saved.to_host:
                    break
                tape.fetched(saved.position)
                continue
            while over_limit := self._ahead_nbytes + saved.nbytes > limit:
                if not self._outgoing.give_up_used():
                    break
            if over_limit:
                break
            if revive(saved.weak, saved.shift + saved.nbytes) is None:
                if saved.copy is not None and not saved.copy.has_room():
                    break  # it would wait for what is wanted before
                try:
                    self.begin(saved)
                except torch.OutOfMemoryError:
                    break  # it is not wanted yet; when it is, more will have been given up
            tape.fetched(saved.position)

    @property
    def _ahead_nbytes(self) -> int:
        """What was brought back, or is as good: forward has left it, or is about to store it."""
        return self._held.cached_nbytes + self._held.last_nbytes + self._outgoing.nbytes

    def settle(self) -> None:
        """Settles the loads that have ended."""
        for saved in over(self._loading, _is_over, _queue_of):
            self._settle(saved)

    def drain(self) -> None:
        """Waits for every load. Failed ones are left to whoever asks for them."""
        for saved in list(self._loading):
            self._settle(saved)
            if saved.arrival is not None:
                saved.arrival.order()

    def _settle(self, saved: SavedStorage) -> None:
        try:
            self._end(saved)
        except OSError:
            # Nobody is waiting for these bytes yet. The copy is still there: whoever unpacks the
            # tensor reads again, and gets the error if it persists.
            self._account.counters.num_load_errors += 1

    def _end(self, saved: SavedStorage) -> None:
        assert saved.load is not None and saved.copy is not None
        # In this order: an interrupt in between leaves a load that somebody will ask for, or that
        # ends with what it is of, and nothing in the queue that has none.
        load = saved.load
        self._loading.pop(saved, None)
        saved.load = None
        self._held.cached_nbytes -= saved.nbytes
        try:
            times = load.finish()
        except OSError:
            self._held.add(-saved.nbytes)
            raise
        saved.restore(load)
        self._table.adopt(load.storage, saved, load.shift)
        self._held.cache(saved)
        self._account.counters.bytes_read += saved.nbytes
        self._account.moved("load", times, saved.nbytes)
        self._account.ledger.transfer(saved.copy.tier, saved.home, saved.nbytes)


def _is_over(saved: SavedStorage) -> bool:
    assert saved.load is not None
    return saved.load.done()


def _queue_of(saved: SavedStorage) -> Hashable:
    return None if saved.load is None else saved.load.queue
