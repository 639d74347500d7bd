"""Bytes of a device in host memory: to stay (the host tier) or on their way to and from disk.

A storage is copied to a page-aligned stretch of a pinned pool. In the host tier that is where it
stays; for the disk tier a thread waits for the copy and writes it, and the stretch goes back to
the pool. If that write fails the stretch is kept: the bytes are safe in host memory already.
"""

from __future__ import annotations

import errno
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

import torch

from dataeff import _core
from dataeff.ledger import Tier
from dataeff.memory import BufferPool, PooledBuffer
from dataeff.offload.disk import ALIGNMENT, SpillSet, Written, flat_bytes
from dataeff.offload.moments import Span, Times
from dataeff.offload.streams import Arrival, Event, Streams
from dataeff.offload.transfer import over
from dataeff.storage import StripedRead


class PinnedPool:
    """A pool of host memory registered with the device, with a count of what is out.

    Buffers that a device may still be copying to or from are handed in with `release_after`.
    """

    def __init__(self, nbytes: int, streams: Streams) -> None:
        self._pool = BufferPool(nbytes, inherited=False)  # children are refused: see `Process`
        self._streams = streams
        self._cooling: OrderedDict[PooledBuffer, tuple[Event, torch.UntypedStorage | None]] = (
            OrderedDict()
        )
        self._copying: deque[tuple[Event, object]] = deque()
        self._lock = threading.RLock()
        self._pageable: weakref.WeakSet[BufferPool] = weakref.WeakSet()
        self.peak_nbytes = 0
        streams.pin(self._pool.buffer)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole pool."""
        return self._pool.budget_nbytes

    def has_room(self, nbytes: int) -> bool:
        """Whether there is a buffer that waits for nothing."""
        self.sweep()
        return nbytes <= self._pool.largest_free_nbytes

    @property
    def used_nbytes(self) -> int:
        """Bytes of the buffers that are out, which the pools know: an interrupt loses none."""
        used = self._pool.used_nbytes
        return used + sum(pool.used_nbytes for pool in self._pageable) if self._pageable else used

    def acquire(self, nbytes: int) -> PooledBuffer:
        """A buffer to copy out to, at once. Raises OSError(ENOSPC) when there is none.

        Where the rest of the pool is taken it is one that the device has not done with: what is
        copied out from now on is queued behind that.
        """
        return self._acquire(nbytes, self._streams.reuse_after)

    def _acquire(self, nbytes: int, end: Callable[[Event], None]) -> PooledBuffer:
        """A buffer, perhaps after the `end` of copies that others were handed in with."""
        self.sweep()
        padded = -(-nbytes // ALIGNMENT) * ALIGNMENT
        while True:
            try:
                buffer = self._pool.acquire(padded, timeout_s=0)
            except (TimeoutError, ValueError) as error:
                if padded <= self.nbytes and self._end_oldest(end):
                    continue
                raise OSError(errno.ENOSPC, f"the host pool has no room: {error}") from error
            self.peak_nbytes = max(self.peak_nbytes, self.used_nbytes)
            return buffer

    def _end_oldest(self, end: Callable[[Event], None]) -> bool:
        """Takes back the buffer that was handed in first; false if there is none."""
        with self._lock:
            if not self._cooling:
                return False
            buffer, (event, source) = next(iter(self._cooling.items()))
            end(event)
            self.hold(event, source)
            del self._cooling[buffer]
        self.release(buffer)
        return True

    def hold(self, event: Event, memory: object) -> None:
        """Keeps memory until `event`, though an interrupt loses who has it."""
        with self._lock:
            self._copying.append((event, memory))
            while self._copying and self._copying[0][0].query():
                self._copying.popleft()

    def release(self, buffer: PooledBuffer) -> None:
        """Takes a buffer back that nobody reads or writes."""
        buffer.release()

    def release_after(
        self, event: Event, buffer: PooledBuffer, source: torch.UntypedStorage | None = None
    ) -> None:
        """Takes a buffer back once `event` is reached, and keeps `source` until then."""
        with self._lock:
            self._cooling[buffer] = event, source
        self.sweep()

    def sweep(self) -> None:
        """Takes back the buffers whose copies have ended."""
        with self._lock:
            cold = over(
                self._cooling, lambda buffer: self._cooling[buffer][0].query(), lambda buffer: self
            )
            entries = [self._cooling.pop(buffer) for buffer in cold]
        for buffer in cold:
            self.release(buffer)
        entries.clear()  # the sources go after the lock is given back

    def acquire_anyway(self, nbytes: int) -> PooledBuffer:
        """A buffer of the pool, or of pageable memory: a load must not fail for want of room.

        Waits for the device where it still copies from what was handed in.
        """
        try:
            return self._acquire(nbytes, lambda event: event.synchronize())
        except OSError:
            padded = -(-nbytes // ALIGNMENT) * ALIGNMENT
            pool = BufferPool(padded)
            self._pageable.add(pool)
            buffer = pool.acquire(padded)
            self.peak_nbytes = max(self.peak_nbytes, self.used_nbytes)
            return buffer

    def wait_for_copies(self) -> None:
        """Waits for the copies that buffers were handed in with."""
        with self._lock:
            events = [event for event, _ in (*self._cooling.values(), *self._copying)]
        for event in events:
            event.synchronize()
        with self._lock:
            while self._copying and self._copying[0][0].query():
                self._copying.popleft()
        self.sweep()

    def close(self) -> None:
        """Waits for the last copies and gives the memory back, also after a device is lost."""
        with ExitStack() as last:
            last.callback(self._pool.close)
            last.callback(self._streams.unpin, self._pool.buffer)
            self.wait_for_copies()


class DeviceCopy:
    """A device storage in host memory, or in a spill file by way of host memory.

    Attributes:
        tier: where it was sent.
        stayed: whether it did not get there: its write failed, or nobody wants it any more.
        doomed: to be released when its write has ended.
    """

    host_nbytes = 0  # the pool counts what it has out

    def __init__(
        self,
        storage: torch.UntypedStorage,
        pool: PinnedPool,
        streams: Streams,
        spill: tuple[SpillSet, ThreadPoolExecutor] | None,
        checksum: bool,
    ) -> None:
        self.device, self.nbytes = storage.device, storage.nbytes()
        self.doomed = self.stayed = False
        self.tier = Tier.HOST if spill is None else Tier.DISK
        self._pool, self._streams, self._checksum = pool, streams, checksum
        self.queue: Hashable = streams, self.tier
        self._crc: int | None = None
        self._write_end_ns: int | None = None
        self._source: torch.UntypedStorage | None = storage  # until no stream reads it unordered
        self._written: Written | None = None
        self._spilled: Future[Written] | None = None
        self._buffer: PooledBuffer | None = pool.acquire(self.nbytes)
        source = flat_bytes(storage)
        streams.share(source)
        self._copied = streams.copy_out(source, self._buffer.tensor()[: self.nbytes])
        pool.hold(self._copied, self._buffer)
        self._busy: Event = self._copied  # the last copy to or from the buffer
        if spill is not None:
            self._spilled = spill[1].submit(self._spill, spill[0], self._buffer)

    def _spill(self, spills: SpillSet, buffer: PooledBuffer) -> Written:
        """On the thread of the pool: the write begins when the device has copied."""
        self._copied.synchronize()
        if self._checksum:
            self._crc = _core.crc32c(buffer.data_ptr, self.nbytes)
        return spills.begin_write(buffer.data_ptr, buffer.nbytes, buffer)

    def done(self) -> bool:
        """Whether the device has copied, so that its memory can be reused at once."""
        return self._copied.query()

    def finish(self) -> Times:
        """Orders the device's memory behind the copy, without waiting."""
        self._streams.order_after(self._copied)
        self._source = None
        return self._copied.span if self._spilled is None else self._span_to_disk

    def _span_to_disk(self) -> Span | None:
        """From the begin of the device's copy to the end of the write."""
        copied = None if self._spilled is not None else self._copied.span()
        if copied is None or self._write_end_ns is None:
            return copied
        return copied[0], self._write_end_ns

    def cancel(self) -> bool:
        """Stops the write to disk, if it has not begun.

        The copy that is queued on a stream goes on, to a buffer that nobody will read.
        """
        if self._spilled is None or not self._spilled.cancel():
            return False
        self._spilled = None
        return True

    @property
    def trailing(self) -> bool:
        """Whether a write to disk is not settled yet."""
        return self._spilled is not None

    def written(self) -> bool:
        """Whether the write to disk, if there is one, has ended, well or not."""
        spilled = self._spilled
        if spilled is None or spilled.cancelled():
            return True
        return spilled.done() and (spilled.exception() is not None or spilled.result().done())

    def settle(self, wait: bool = False) -> OSError | None:
        """Ends a write that has ended, or waits for it; returns why it failed, if it did.

        The error has no traceback: its frames end in those that keep the error, a cycle that would
        keep the tensors of all of them until the next collection.
        """
        if self._spilled is None or not (wait or self.written()):
            return None
        if self._spilled.cancelled():  # and an interrupt cut off what `cancel` does next
            self._stay()
            return None
        try:
            written = self._spilled.result()
        except OSError as error:
            self._stay()
            return error.with_traceback(None)
        try:
            self._write_end_ns = written.finish()[1]
        except OSError as error:
            written.release()
            self._stay()
            return error.with_traceback(None)
        self._spilled, self._written = None, written
        assert self._buffer is not None
        self._pool.release_after(self._busy, self._buffer)
        self._buffer = None
        return None

    def _stay(self) -> None:
        self._spilled = None
        self.stayed = True

    def has_room(self) -> bool:
        """Whether what is on disk finds staging memory at once."""
        return self._buffer is not None or self._pool.has_room(self.nbytes)

    def load(self) -> DeviceLoad:
        """Begins to bring the bytes back into new device memory."""
        load = DeviceLoad(self, self._buffer)
        if load.event is not None:
            self._busy = load.event
        return load

    def release(self) -> None:
        """Gives back the buffer and the extent, when the write under way, if any, has ended."""
        if self._spilled is not None and self._spilled.cancel():
            self._stay()
        if self._spilled is not None:
            self.doomed = True
            return
        if self._written is not None:
            self._written.release()
        if self._buffer is not None:
            self._pool.release_after(self._busy, self._buffer, self._source)
        self._written = self._buffer = self._source = None


class DeviceLoad:
    """The way back of a `DeviceCopy`: from its buffer, or from disk into one first.

    All is queued beside the stream on which the bytes were saved, whichever is current: backward
    uses them there, so its allocator may give the memory out, and take it back, in its own order.

    Args:
        copy: whose bytes.
        buffer: that holds them; None when they are on disk.
    """

    shift = 0

    def __init__(self, copy: DeviceCopy, buffer: PooledBuffer | None) -> None:
        self._copy = copy
        self.queue = None if buffer is None else copy.queue
        self._begin_ns = time.perf_counter_ns() if buffer is None else None
        with copy._streams.beside(copy._copied):
            self._target = torch.empty(copy.nbytes, dtype=torch.uint8, device=copy.device)
        self.storage = self._target.untyped_storage()
        self.event: Event | None = None
        self._transfer: StripedRead | None = None
        self._buffer: PooledBuffer | None = None  # that this load gives back
        self._failure: OSError | None = None
        if buffer is not None:
            self._to_device(buffer)
        else:
            assert copy._written is not None
            self._buffer = copy._pool.acquire_anyway(copy.nbytes)
            self._transfer = copy._written.begin_read(self._buffer.data_ptr)

    def _to_device(self, buffer: PooledBuffer) -> None:
        copy = self._copy
        with copy._streams.beside(copy._copied):
            self.event = copy._streams.copy_in(buffer.tensor()[: copy.nbytes], self._target)
            copy._pool.hold(self.event, buffer)

    def done(self) -> bool:
        """Whether the bytes are on the device; what the disk has delivered is sent there.

        Until then the memory is not given up, and no stream has been told to wait: only who unpacks
        the tensor waits for it, not all that the device does beside its copy.
        """
        if self._buffer is not None and self._transfer is not None and self._transfer.done():
            self._forward()
        return self._failure is not None or (self.event is not None and self.event.query())

    def finish(self) -> Times:
        """Waits for the disk if need be, not for the device: `arrival` lets a stream do that.

        Raises OSError naming file and offset when the bytes cannot be read or fail their checksum.
        """
        if self._buffer is not None:
            self._forward()
        if self._failure is not None:
            raise self._failure
        assert self.event is not None
        return (
            self.event.span
            if self._begin_ns is None
            else partial(_since, self._begin_ns, self.event)
        )

    def _forward(self) -> None:
        """Sends what the disk has delivered to the device; what an interrupt cut off, once more."""
        buffer = self._buffer
        assert buffer is not None
        if self.event is None and self._failure is None:
            self._failure = self._failed_read(buffer)
            if self._failure is None:
                self._to_device(buffer)
        if self.event is not None:
            self._copy._pool.release_after(self.event, buffer)
        else:
            self._copy._pool.release(buffer)
        self._buffer = None

    @property
    def arrival(self) -> Arrival | None:
        """The end of the copy to the device, once that is queued."""
        return None if self.event is None else Arrival(self._copy._streams, self.event)

    def _failed_read(self, buffer: PooledBuffer) -> OSError | None:
        """Waits for the disk; why `buffer` does not hold the right bytes, if it does not."""
        copy = self._copy
        assert copy._written is not None and self._transfer is not None
        try:
            copy._written.check_read(self._transfer)
        except OSError as error:
            return error
        if copy._crc is not None and _core.crc32c(buffer.data_ptr, copy.nbytes) != copy._crc:
            return copy._written.failed_read(OSError(errno.EIO), "checksum mismatch")
        return None


def _since(begin_ns: int, event: Event) -> Span | None:
    """From `begin_ns`, when the disk was asked, to the end of the copy to the device."""
    span = event.span()
    return None if span is None else (begin_ns, span[1])
