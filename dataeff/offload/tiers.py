"""Where a storage goes: pinned host memory while there is room, then disk."""

from __future__ import annotations

import errno
import statistics
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace

import torch

from dataeff._worker import worker
from dataeff.ledger import Tier
from dataeff.memory import HostBuffer
from dataeff.offload.direct import DirectCopy, DirectPath
from dataeff.offload.disk import DiskCopy, SpillSet, Written
from dataeff.offload.moments import HostMoment, Moment
from dataeff.offload.planner import TierRate
from dataeff.offload.report import Peaks
from dataeff.offload.staging import DeviceCopy, PinnedPool
from dataeff.offload.streams import CudaStreams, Event, Streams
from dataeff.offload.transfer import Copy, Exposed, WriteCapError, over
from dataeff.offload.wear import Endurance, Wear

_PROBE_BYTES = 32 << 20
_PROBE_PARTS = 4
_LEAST_PROBE_BYTES = 1 << 20
_NUM_PROBES = 5  # each way, of which the median counts

StreamsOf = Callable[[torch.device], "Streams | None"]


def cuda_streams(device: torch.device) -> Streams | None:
    """Side streams for a CUDA device; None for host memory, whose pages go to disk in place."""
    return CudaStreams(device) if device.type == "cuda" else None


class Tiers:
    """The host tier and the disk tier, either or both, each within its budget.

    Args:
        spills: the disk tier.
        host_bytes: size of the host tier, pinned at first use; 0 for none.
        staging_bytes: pinned memory through which a device's bytes go to disk and come back; a
            storage that is larger takes twice its own size.
        checksum: keep a CRC-32C of what goes to disk.
        streams_of: the streams of a device, or None where tensors are in host memory already.
        wear: bounds what is written to disk.
        cufile: the engines of `spills` are cuFile, which moves the memory of a device itself.
    """

    def __init__(
        self,
        spills: SpillSet | None,
        host_bytes: int,
        staging_bytes: int,
        checksum: bool,
        streams_of: StreamsOf = cuda_streams,
        wear: Wear | None = None,
        cufile: bool = False,
    ) -> None:
        self._direct = DirectPath(spills) if cufile and spills is not None else None
        self._spills, self._checksum = spills, checksum
        self.wear = wear or Wear(Endurance())
        self.disk_nbytes = 0  # sent to disk so far
        self._host_bytes, self._staging_bytes = host_bytes, staging_bytes
        self._streams_of = streams_of
        self._streams: dict[torch.device, Streams | None] = {}
        self._movable: dict[torch.device, bool] = {}
        self._host: PinnedPool | None = None
        self._staging: PinnedPool | None = None
        self._outgrown: list[PinnedPool] = []  # what went to disk through them comes back through
        self._refused_nbytes = sys.maxsize  # of the smallest storage that there was no staging for
        self._writer: ThreadPoolExecutor | None = None
        self._trailing: OrderedDict[DeviceCopy, None] = OrderedDict()
        self._unwritten: list[tuple[int, OSError | None]] = []
        self._closed = False

    @property
    def used_nbytes(self) -> int:
        """Host memory that copies take now."""
        host, staging = self._host, self._staging  # asked at every hook: no list is made
        used = 0 if host is None else host.used_nbytes
        for pool in self._outgrown:
            used += pool.used_nbytes
        return used if staging is None else used + staging.used_nbytes

    @property
    def devices(self) -> list[torch.device]:
        """GPUs that copies may be under way to or from."""
        return [device for device in self._streams if device.type == "cuda"]

    def peaks(self) -> Peaks:
        """The most bytes that were in host memory, and in files."""
        host = sum(pool.peak_nbytes for pool in self._pools())
        return Peaks(host, 0 if self._spills is None else self._spills.peak_nbytes)

    def moment(self, device: torch.device) -> Moment:
        """When the compute of `device` has done what it was given so far."""
        streams = self._of(device)
        return HostMoment() if streams is None else streams.moment()

    def moves(self, device: torch.device) -> bool:
        """Whether there is a tier that would free memory of `device`."""
        movable = self._movable.get(device)  # asked for every storage
        if movable is None:
            movable = self._movable[device] = self._can_move(device)
        return movable

    def _can_move(self, device: torch.device) -> bool:
        if self._of(device) is None:
            on_disk = self._spills is not None and self._direct is None
            return on_disk and device.type == "cpu"
        return self._spills is not None or self._host_bytes > 0

    def store(
        self,
        storage: torch.UntypedStorage,
        prefer: Tier | None = None,
        exposed: Exposed = lambda name, device: nullcontext(),
    ) -> Copy:
        """Begins to copy `storage`: to the host tier while it has room, unless disk is preferred.

        Preferred, but full, failing at once or worn enough, disk gives way to the host tier.

        Raises OSError(ENOSPC) when no tier has room, WriteCapError when the disks are worn enough.
        """
        streams = self._of(storage.device)
        if streams is None:
            return self._store_on_disk(storage, streams, exposed)
        if self._host_bytes and (prefer is not Tier.DISK or self._spills is None):
            try:
                return DeviceCopy(storage, self._host_pool(streams), streams, None, False)
            except OSError as error:
                if error.errno != errno.ENOSPC or self._spills is None:
                    raise
        try:
            return self._store_on_disk(storage, streams, exposed)
        except OSError:
            copy = self.fall_back(storage) if prefer is Tier.DISK else None
            if copy is None:
                raise
            return copy

    def fall_back(self, storage: torch.UntypedStorage) -> Copy | None:
        """Begins to copy to the host tier what no disk took; None where that has no room either."""
        streams = self._of(storage.device)
        if streams is None or not self._host_bytes:
            return None
        try:
            return DeviceCopy(storage, self._host_pool(streams), streams, None, False)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return None

    def not_written(self, nbytes: int) -> None:
        """Takes back from the wear of the disks what was to be written and was not."""
        self.disk_nbytes -= nbytes

    def _store_on_disk(
        self, storage: torch.UntypedStorage, streams: Streams | None, exposed: Exposed
    ) -> Copy:
        assert self._spills is not None
        nbytes = storage.nbytes()
        if not self.wear.allows(self.disk_nbytes, nbytes):
            raise WriteCapError(errno.EDQUOT, "no more may be written to disk")
        copy: Copy
        if streams is None:
            copy = DiskCopy(self._spills, storage, self._checksum)
        elif self._direct is not None:
            try:
                copy = DirectCopy(storage, self._direct, streams)
            except torch.OutOfMemoryError as error:  # to keep it takes none
                why = "the device has no memory for what fills no whole block"
                raise OSError(errno.ENOMEM, why) from error
        else:
            copy = self._store_through_staging(storage, streams, exposed)
        self.disk_nbytes += nbytes
        return copy

    def poll(self) -> list[tuple[int, OSError | None]]:
        """Settles writes that have ended; returns the bytes of those that will never be written.

        With the error of those that failed, None for those that nobody wanted any more.
        """
        if self._host is None and self._staging is None:
            return []  # bytes went nowhere yet, or straight from their pages to disk
        for copy in over(self._trailing, DeviceCopy.written):
            self._settle(copy, wait=False)
        for pool in self._pools():
            pool.sweep()
        unwritten, self._unwritten = self._unwritten, []
        return unwritten

    def _settle(self, copy: DeviceCopy, wait: bool) -> None:
        error = copy.settle(wait)
        if copy.trailing:
            return
        del self._trailing[copy]
        if copy.stayed:
            self.not_written(copy.nbytes)
            self._unwritten.append((copy.nbytes, error))
        if copy.doomed:
            copy.release()

    def measure(self, device: torch.device) -> dict[Tier, TierRate]:
        """What each tier can do for tensors of `device`, by moving a few MiB there and back.

        Of a disk that is full, failing or worn enough it can do nothing, nor of any tier where the
        device has no memory to try it with.
        """
        streams, rates = self._of(device), {}
        if self._spills is not None and self.wear.allows(self.disk_nbytes, _PROBE_BYTES):
            room = self._spills.free_nbytes
            # Who stores says so, and counts it.
            with suppress(OSError, torch.OutOfMemoryError):
                if room >= _LEAST_PROBE_BYTES:
                    nbytes = min(_PROBE_BYTES, room // _LEAST_PROBE_BYTES * _LEAST_PROBE_BYTES)
                    rate = self._measure_disk(device, streams, nbytes)
                    rates[Tier.DISK] = replace(rate, capacity=float(self._spills.capacity_nbytes))
        if self._host_bytes and streams is not None:
            with suppress(torch.OutOfMemoryError):
                rates[Tier.HOST] = self._measure_host(device, streams)
        return rates

    def _measure_disk(self, device: torch.device, streams: Streams | None, nbytes: int) -> TierRate:
        assert self._spills is not None
        if self._direct is None:
            with HostBuffer(nbytes) as buffer:
                return _measure_files(self._spills, buffer.tensor())
        memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        assert streams is not None
        return _measure_files(self._spills, memory, streams)

    def _measure_host(self, device: torch.device, streams: Streams) -> TierRate:
        nbytes = min(_PROBE_BYTES, self._host_bytes)
        pool = self._host_pool(streams)
        there = torch.ones(nbytes, dtype=torch.uint8, device=device)
        try:
            buffer = pool.acquire(nbytes)
        except OSError:  # full: pageable memory tells a lower rate, never a higher one
            buffer = pool.acquire_anyway(nbytes)
        here = buffer.tensor()[:nbytes]
        write_s = _seconds_of_copy(lambda: streams.copy_out(there, here))
        read_s = _seconds_of_copy(lambda: streams.copy_in(here, there))
        pool.release(buffer)
        return TierRate(nbytes / write_s, nbytes / read_s, float(self._host_bytes))

    def end_step(self) -> None:
        """Gives back the memory that loads find again within a step: forward has none of it."""
        if self._spills is not None:
            self._spills.memory.clear()

    def drain(self) -> None:
        """Waits for the writes under way, and for the copies of buffers handed back."""
        for copy in list(self._trailing):
            self._settle(copy, wait=True)
        if self._writer is not None and not self._closed:
            with suppress(RuntimeError):  # at the interpreter's exit it has ended, all done
                self._writer.submit(int).result()  # behind what an interrupt has lost
        for pool in self._pools():
            pool.wait_for_copies()

    def close(self) -> None:
        """Gives everything back, whatever fails; no load may be under way."""
        with ExitStack() as last:  # in the order from below
            if self._spills is not None:
                last.callback(self._spills.close)
            for pool in self._pools():
                last.callback(pool.close)
            if self._direct is not None:
                last.callback(self._direct.close)
            if self._writer is not None:
                last.callback(self._writer.shutdown)
            try:
                self.drain()
            finally:
                self._closed = True

    def _store_through_staging(
        self, storage: torch.UntypedStorage, streams: Streams, exposed: Exposed
    ) -> Copy:
        if self._writer is None:
            self._writer = worker("dataeff-offload", kept=True)
        staging = self._staging_for(storage.nbytes(), streams)
        assert self._spills is not None and self._writer is not None
        while True:
            try:
                spill = (self._spills, self._writer)
                copy = DeviceCopy(storage, staging, streams, spill, self._checksum)
            except OSError:
                # Every copy that has staging memory and is on its way to disk gives it back soon.
                if not self._trailing:
                    raise
                with exposed("wait for store", storage.device):
                    self._settle(next(iter(self._trailing)), wait=True)
                continue
            self._trailing[copy] = None
            return copy

    def _staging_for(self, nbytes: int, streams: Streams) -> PinnedPool:
        """Staging memory with room for `nbytes`, twice as much where the present one has none.

        Raises OSError(ENOSPC) when no more memory can be had, or pinned.
        """
        if self._staging is not None and nbytes <= self._staging.nbytes:
            return self._staging
        if nbytes <= self._staging_bytes:
            self._staging = PinnedPool(self._staging_bytes, streams)
            return self._staging
        cause: Exception | None = None
        if nbytes < self._refused_nbytes:
            try:
                larger = PinnedPool(2 * nbytes, streams)
            except (OSError, RuntimeError) as error:
                self._refused_nbytes, cause = nbytes, error
            else:
                if self._staging is not None:
                    self._outgrown.append(self._staging)
                self._staging = larger
                return larger
        raise OSError(
            errno.ENOSPC,
            f"{nbytes} bytes go to disk through twice as many of pinned memory, more than "
            f"staging_bytes={self._staging_bytes}, and these cannot be had",
        ) from cause

    def _pools(self) -> list[PinnedPool]:
        pools = (self._host, self._staging, *self._outgrown)
        return [pool for pool in pools if pool is not None]

    def _host_pool(self, streams: Streams) -> PinnedPool:
        if self._host is None:
            self._host = PinnedPool(self._host_bytes, streams)
        return self._host

    def _of(self, device: torch.device) -> Streams | None:
        if device not in self._streams:
            self._streams[device] = self._streams_of(device)
        return self._streams[device]


def _measure_files(
    spills: SpillSet, memory: torch.Tensor, streams: Streams | None = None
) -> TierRate:
    """What the spill files can do for `memory`: some whole MiB, uint8."""
    part = memory.nbytes // _PROBE_PARTS
    memory.fill_(1)
    if streams is not None:
        streams.mark().synchronize()
    places = [memory.data_ptr() + i * part for i in range(_PROBE_PARTS)]
    written: list[Written] = []

    def write() -> None:
        written.extend(spills.begin_write(place, part, memory) for place in places)
        for extent in written[-_PROBE_PARTS:]:
            extent.finish()

    def read() -> None:
        pairs = zip(written[-_PROBE_PARTS:], places, strict=True)
        reads = [(extent, extent.begin_read(place, memory)) for extent, place in pairs]
        for extent, transfer in reads:
            extent.check_read(transfer)

    write_s, read_s = _seconds(write), _seconds(read)
    for extent in written:
        extent.release()
    return TierRate(memory.nbytes / write_s, memory.nbytes / read_s)


def _seconds_of_copy(copy: Callable[[], Event]) -> float:
    """By the device's time stamps: what it takes to queue a copy and to wake up is not the bus's.

    The first copy also maps and warms.
    """
    copies = [copy() for _ in range(1 + _NUM_PROBES)][1:]
    copies[-1].synchronize()  # in a stream, so all have ended
    spans = [span for span in (one.span() for one in copies) if span is not None]
    return max(1e-9, statistics.median(end_ns - begin_ns for begin_ns, end_ns in spans) / 1e9)


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
