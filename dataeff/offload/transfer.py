"""What the tensor cache asks of a transfer and of the tiers, whatever they are made of."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

import torch

from dataeff.ledger import Tier
from dataeff.offload.moments import Moment, Times
from dataeff.offload.streams import Arrival

T = TypeVar("T")

_MOST_UNDER_WAY = 16


def over(
    transfers: Iterable[T],
    is_over: Callable[[T], bool],
    queue_of: Callable[[T], Hashable] = lambda transfer: None,
) -> list[T]:
    """Those of `transfers`, oldest first, that are over, up to the 16th that is not.

    They end in nearly the order in which they began. Looking at all of them at every hook would
    take a pass of many small storages time that grows with the square of their number.

    Args:
        transfers: oldest first.
        is_over: asks, which of a device takes microseconds.
        queue_of: what else a transfer is in order with: behind one that is not over, none is, nor
            is it asked. None for what is in order with nothing.
    """
    found, num_under_way, waiting = list[T](), 0, set[Hashable]()
    for transfer in transfers:
        if not waiting or queue_of(transfer) not in waiting:
            if is_over(transfer):
                found.append(transfer)
                continue
            if (queue := queue_of(transfer)) is not None:
                waiting.add(queue)
        num_under_way += 1
        if num_under_way == _MOST_UNDER_WAY:
            break
    return found


class WriteCapError(OSError):
    """A bound on what may be written to disk is reached: the tensor is to stay in memory."""


class Load(Protocol):
    """Bytes on their way back into a new storage."""

    storage: torch.UntypedStorage
    shift: int  # where in `storage` the first byte of the saved one is
    queue: Hashable  # of those with the same one, `done` is true in the order of begin; or None

    def done(self) -> bool:
        """Whether `finish` would return without waiting."""

    def finish(self) -> Times:
        """Waits for the bytes; returns what tells when the transfer began and ended.

        A device's copy may still be under way: see `arrival`. Raises OSError when the bytes cannot
        be had; `Copy.load` may then be tried again.
        """

    @property
    def arrival(self) -> Arrival | None:
        """After `finish`: what to `order` before the bytes are used or given up; None if they are.

        It holds none of them.
        """


class Copy(Protocol):
    """The bytes of one storage in another tier, or on their way there."""

    tier: Tier
    host_nbytes: int  # host memory that the copy takes
    queue: Hashable  # of those with the same one, `done` is true in the order of begin; or None

    def done(self) -> bool:
        """Whether `finish` would return without waiting."""

    def finish(self) -> Times:
        """Waits until the copy is complete; returns what tells when it began and ended.

        Raises OSError when it could not be made.
        """

    def cancel(self) -> bool:
        """Stops a transfer that has not begun; true when there will be no copy."""

    def has_room(self) -> bool:
        """Whether there is the host memory that `load` takes, so that it need not wait for it."""

    def load(self) -> Load:
        """Begins to bring the bytes back. The copy stays."""

    def release(self) -> None:
        """Gives the space back. No transfer may be under way."""


Exposed = Callable[[str, torch.device], AbstractContextManager[None]]


class Tiers(Protocol):
    """What the cache asks of the tiers below it (`dataeff.offload.tiers`)."""

    def moment(self, device: torch.device) -> Moment:
        """When the compute of `device` has done what it was given so far."""

    @property
    def used_nbytes(self) -> int:
        """Host memory that copies take now."""

    @property
    def devices(self) -> Sequence[torch.device]:
        """GPUs that copies may be under way to or from."""

    def moves(self, device: torch.device) -> bool:
        """Whether there is a tier that would free memory of `device`."""

    def store(self, storage: torch.UntypedStorage, prefer: Tier | None, exposed: Exposed) -> Copy:
        """Begins the copy of a storage, perhaps after a wait for room, which `exposed` enters.

        Raises OSError when there is none.
        """

    def fall_back(self, storage: torch.UntypedStorage) -> Copy | None:
        """Begins a copy in memory of what could not be written; None where there is no room."""

    def not_written(self, nbytes: int) -> None:
        """Hears that a copy to disk was stopped or failed."""

    def poll(self) -> list[tuple[int, OSError | None]]:
        """Bytes of copies that were counted as stored and failed later, or were stopped (None)."""

    def drain(self) -> None:
        """Waits for the writes under way."""

    def close(self) -> None:
        """Gives everything back."""
