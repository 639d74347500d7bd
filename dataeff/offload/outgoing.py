"""The way out: stores that are under way, settled, cancelled or failed."""

from __future__ import annotations

import errno
import warnings
from collections import OrderedDict
from collections.abc import Hashable

import torch

from dataeff.ledger import Tier
from dataeff.offload.account import Account
from dataeff.offload.held import HeldBytes
from dataeff.offload.passes import Passes, in_backward
from dataeff.offload.saved import SavedStorage
from dataeff.offload.transfer import Tiers, WriteCapError, over
from dataeff.storage.spill import FULL


class Outgoing:
    """Stores in the order they began, within a budget of bytes; guarded by the cache's lock.

    Args:
        tiers: where storages go.
        held: counts the memory that stores take and free.
        passes: chooses the budget when none is given.
        budget: the most bytes that may wait for their store to end.
        account: where what happened is entered.
    """

    def __init__(
        self, tiers: Tiers, held: HeldBytes, passes: Passes, budget: int | None, account: Account
    ) -> None:
        self._tiers, self._held, self._passes = tiers, held, passes
        self.budget, self._account = budget, account
        self._queue: OrderedDict[SavedStorage, None] = OrderedDict()
        self._used: OrderedDict[SavedStorage, None] = OrderedDict()  # see `used`
        self.nbytes = 0  # of the stores under way
        self._warned: set[str] = set()

    def __len__(self) -> int:
        return len(self._queue)

    def begin(
        self, saved: SavedStorage, storage: torch.UntypedStorage, prefer: Tier | None
    ) -> None:
        """Begins to store `saved`, waiting for the oldest stores while the budget is spent."""
        limit = self._passes.limit(self.budget, saved.tape)
        while self._queue and self.nbytes + self._held.last_nbytes + saved.nbytes > limit:
            with self._account.exposed("wait for store", saved.device):
                self._end_oldest()
        try:
            saved.copy = self._tiers.store(storage, prefer, self._account.exposed)
        except WriteCapError:
            self._account.counters.bytes_capped += saved.nbytes
            return
        except OSError as error:
            self._failed(saved.nbytes, error)
            return
        self._sent(saved)

    def cancel(self, saved: SavedStorage) -> bool:
        """Stops the store of `saved` if it has not begun; true when there will be no copy."""
        assert saved.copy is not None
        if not saved.copy.cancel():
            return False
        self._take_off(saved)
        self._account.counters.bytes_cancelled += saved.nbytes
        self._discard_copy(saved)
        self._held.stay(saved)
        return True

    def used(self, saved: SavedStorage) -> None:
        """Notes that what is being stored is not needed in memory: backward has done with it.

        A host that is ahead of a device does not see the store end, and would hold the memory.
        """
        assert saved.copy is not None
        if saved.copy.tier is Tier.HOST and saved in self._queue:
            self._used[saved] = None

    def give_up_used(self) -> bool:
        """Frees memory that backward has used, in the order of the device; false if there is none.

        Compute waits for the store, if that has not ended by then; the host does not.
        """
        if not self._used:
            return False
        self._end(next(reversed(self._used)))  # of what was used in backward's order, stored first
        return True

    def _sent(self, saved: SavedStorage) -> None:
        """Notes that `saved.copy` is under way."""
        assert saved.copy is not None
        self._held.add(saved.copy.host_nbytes)
        saved.writing = True
        self._queue[saved] = None
        self.nbytes += saved.nbytes

    def _take_off(self, saved: SavedStorage) -> None:
        """Takes what is written no more off the queue."""
        self._queue.pop(saved, None)
        self._used.pop(saved, None)
        saved.writing = False
        self.nbytes -= saved.nbytes

    def settle(self) -> None:
        """Settles the stores that have ended; stops those that nobody wants any more."""
        for nbytes, error in self._tiers.poll():
            self._account.counters.bytes_written -= nbytes
            if error is None:
                self._account.counters.bytes_cancelled += nbytes
            else:
                self._failed(nbytes, error)
        # Before forward came on, compute has done a backward since: it waits for none of these.
        while self._used and not in_backward():
            self.give_up_used()
        for saved in over(self._queue, _is_over, _queue_of) if self._queue else ():
            if saved.copy is not None and saved.copy.done():
                self._end(saved)
            else:
                self.cancel(saved)

    def recount(self) -> None:
        """Counts anew what is under way."""
        self.nbytes = sum(saved.nbytes for saved in self._queue)

    def drain(self) -> None:
        """Waits for every store."""
        while self._queue:
            self._end_oldest()

    def _end_oldest(self) -> None:
        self._end(next(iter(self._queue)))

    def _end(self, saved: SavedStorage) -> None:
        """Settles a store, waiting for it if need be."""
        assert saved.copy is not None
        account = self._account
        try:
            # On the queue until it has ended: what an interrupt here would take off it could die,
            # and its extent be used again, while it is still written.
            times = saved.copy.finish()
        except OSError as error:
            self._take_off(saved)
            self._discard_copy(saved)
            if error.errno == errno.ECANCELED:  # and an interrupt cut off what `cancel` does next
                account.counters.bytes_cancelled += saved.nbytes
                return
            self._failed(saved.nbytes, error)
            self._fall_back(saved)
            return
        self._take_off(saved)
        if saved.copy.tier is Tier.DISK:
            account.counters.bytes_written += saved.nbytes
        else:
            account.counters.bytes_host += saved.nbytes
        account.moved("store", times, saved.nbytes)
        account.ledger.transfer(saved.home, saved.copy.tier, saved.nbytes)
        if saved.storage is not None:
            self._held.cache(saved)
            if not saved.in_use:
                self._held.drop(saved)

    def _fall_back(self, saved: SavedStorage) -> None:
        """Sends to the host tier what could not be written, unless backward has come already."""
        assert saved.storage is not None
        if saved.wanted and not saved.in_use:
            saved.copy = self._tiers.fall_back(saved.storage)
        if saved.copy is not None:
            self._account.counters.bytes_failed -= saved.nbytes
            self._sent(saved)

    def _discard_copy(self, saved: SavedStorage) -> None:
        assert saved.copy is not None
        if saved.copy.tier is Tier.DISK:
            self._tiers.not_written(saved.nbytes)
        self._held.add(-saved.copy.host_nbytes)
        saved.copy.release()
        saved.copy = None

    def _failed(self, nbytes: int, error: OSError) -> None:
        self._account.counters.bytes_failed += nbytes
        self._account.counters.num_store_errors += 1
        kind = "full" if error.errno in FULL else "failing"
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(
                f"activation offload: a tier is {kind} ({error}); the tensors that do not get in "
                "go to the host tier while it has room, or stay in memory, and results do not "
                "change. This is said once; report() counts.",
                RuntimeWarning,
                stacklevel=2,
            )


def _is_over(saved: SavedStorage) -> bool:
    """Whether the store has ended, or nobody wants what it stores and it may be stopped."""
    assert saved.copy is not None
    return saved.copy.done() or not (saved.wanted or saved.to_host)


def _queue_of(saved: SavedStorage) -> Hashable:
    return None if saved.copy is None else saved.copy.queue
