"""The disk tier of a device by cuFile: straight between device memory and the spill file.

cuFile is ordered with no stream. A thread therefore waits until the device has made the bytes that
are to be written, or is done with the memory that they are to be read into, before the transfer
begins. Blocks of direct I/O are 4 KiB: the bytes behind the last whole one stay on the device, so
that no transfer has to go through a buffer of cuFile's own for them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

from dataeff._worker import worker
from dataeff.ledger import Tier
from dataeff.offload.disk import ALIGNMENT, SpillSet, Written, flat_bytes
from dataeff.offload.moments import Times
from dataeff.offload.streams import Event, Streams
from dataeff.storage import StripedRead

T = TypeVar("T")


class DirectPath:
    """Starts the transfers between the devices and the spill files, in the order of asking.

    Args:
        spills: spill files whose engines are of the kind `cufile`.
    """

    def __init__(self, spills: SpillSet) -> None:
        self.spills = spills
        # Waiting for a device holds up only what goes the same way.
        self._out = worker("dataeff-cufile-out", kept=True)
        self._in = worker("dataeff-cufile-in", kept=True)

    def write(self, after: Event, source: torch.UntypedStorage, nbytes: int) -> Future[Written]:
        """Begins to write the first bytes of device memory once `after` is reached.

        It is held until it is written, whoever loses the copy.
        """
        begin = self.spills.begin_write
        return self._out.submit(_once, after, begin, source.data_ptr(), nbytes, source)

    def read(
        self, after: Event, written: Written, target: torch.UntypedStorage
    ) -> Future[StripedRead]:
        """Begins to read into device memory once `after` is reached; it is held as long."""
        return self._in.submit(_once, after, written.begin_read, target.data_ptr(), target)

    def close(self) -> None:
        """Ends the threads; no transfer may be under way."""
        self._out.shutdown()
        self._in.shutdown()


def _once(after: Event, begin: Callable[..., T], *args: Any) -> T:
    after.synchronize()
    return begin(*args)


class DirectCopy:
    """A device storage on disk: whole blocks in a spill file, the bytes behind them on the device.

    Attributes:
        host_nbytes: those bytes; what is left in memory of the storage.
        made: when the device has made the bytes.
    """

    tier = Tier.DISK
    queue: Hashable = None

    def __init__(self, storage: torch.UntypedStorage, path: DirectPath, streams: Streams) -> None:
        self.device, self.nbytes = storage.device, storage.nbytes()
        self.body = self.nbytes // ALIGNMENT * ALIGNMENT
        self.host_nbytes = self.nbytes - self.body
        self.path, self.streams = path, streams
        source = flat_bytes(storage)
        streams.share(source)
        self.tail = source[self.body :].clone()
        self._source: torch.UntypedStorage | None = storage  # cuFile reads it until finish()
        self.made = streams.mark()
        self._begun = path.write(self.made, storage, self.body)
        self.written: Written | None = None

    def done(self) -> bool:
        """Whether the write has ended, well or not."""
        begun = self._begun
        return begun.done() and (begun.exception() is not None or begun.result().done())

    def finish(self) -> Times:
        """Waits for the write. Raises OSError when there was no room, or the write failed."""
        try:
            self.written = self._begun.result()
            span = self.written.finish()
        finally:
            self._source = None
        return lambda: span

    def cancel(self) -> bool:
        """Stops the write if it has not begun."""
        if not self._begun.cancel():
            if not self._begun.done() or self._begun.exception() is not None:
                return False
            if not self._begun.result().cancel():
                return False
            self.written = self._begun.result()
        self._source = None
        return True

    def has_room(self) -> bool:
        """It takes no host memory."""
        return True

    def load(self) -> DirectLoad:
        """Begins to read the bytes into new device memory."""
        assert self.written is not None
        return DirectLoad(self, self.written)

    def release(self) -> None:
        """Frees the extent."""
        if self.written is not None:
            self.written.release()


class DirectLoad:
    """The way back of a `DirectCopy`."""

    shift = 0
    queue: Hashable = None
    arrival = None  # the read begins when the tail is there, and has ended after `finish`

    def __init__(self, copy: DirectCopy, written: Written) -> None:
        self._written = written
        # On the stream of the pack, where backward uses the bytes: the memory comes from its order
        # and goes back to it.
        with copy.streams.beside(copy.made):
            target = torch.empty(copy.nbytes, dtype=torch.uint8, device=copy.device)
            target[copy.body :] = copy.tail
            # What used this memory before may still be queued; so is the copy of the tail.
            free = copy.streams.mark()
        self.storage = target.untyped_storage()
        self._begun = copy.path.read(free, written, self.storage)

    def done(self) -> bool:
        """Whether the read has ended, well or not."""
        begun = self._begun
        return begun.done() and (begun.exception() is not None or begun.result().done())

    def finish(self) -> Times:
        """Waits for the read. Raises OSError naming file and offset."""
        read = self._begun.result()
        self._written.check_read(read)
        span = read.start_ns, read.end_ns
        return lambda: span
