"""The disk tier for tensors that live in host memory: their own pages go to the spill file.

O_DIRECT wants address, length and offset aligned. The aligned middle of a storage is written
straight from where it lies, without a copy; the few bytes before and after it stay in memory.
A storage read back gets an address with the same remainder, so its middle can be read in place
and every kernel finds the alignment it had before.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
from collections.abc import Callable, Hashable, Sequence

import torch

from dataeff import _core
from dataeff.ledger import Tier
from dataeff.memory import scratch
from dataeff.offload.moments import Span, Times
from dataeff.storage import FaultPlan, SpillFile, Stripe, StripedRead, StripedSpill
from dataeff.storage.striped import CHUNK_BYTES

ALIGNMENT = 4096
SMALLEST_NBYTES = 16 * 1024  # below this the unaligned ends would be most of the storage


class SpillSet:
    """Spill files in several directories, and an engine for each.

    Of several directories, each storage is striped over all, see `StripedSpill`.

    Args:
        directories: where to spill; one unlinked file is opened in each.
        capacity_bytes: the most that each file may take.
        kind: engine of each directory, as `dataeff.storage.open_engine` takes it.
        num_threads: of each directory, as `open_engine` takes it.
        faults: faults to inject, counted over all directories.

    Attributes:
        memory: what is read into; what a load has given up is found again by the next.
    """

    def __init__(
        self,
        directories: Sequence[str | os.PathLike[str]],
        capacity_bytes: int | None = None,
        kind: str = "threads",
        num_threads: int = 4,
        faults: FaultPlan | None = None,
    ) -> None:
        self._limit = capacity_bytes
        self._striped = StripedSpill(
            directories,
            capacity_bytes,
            chunk_nbytes=CHUNK_BYTES if len(directories) > 1 else None,
            kind=kind,
            num_threads=num_threads,
            faults=[faults] * len(directories),
        )
        self.memory = scratch.Scratch(scratch.kept_share())

    @property
    def files(self) -> list[SpillFile]:
        """The spill file of each directory."""
        return self._striped.files

    @property
    def peak_nbytes(self) -> int:
        """The most bytes that were in the files at once."""
        return self._striped.peak_nbytes

    @property
    def capacity_nbytes(self) -> int:
        """The most bytes that the files may have by now: as allowed, and as the disks have room."""
        total = 0
        for file in self.files:
            status = os.fstatvfs(file.fd)
            room = file.file_nbytes + status.f_bavail * status.f_frsize
            total += room if self._limit is None else min(room, self._limit)
        return total

    @property
    def free_nbytes(self) -> int:
        """Of these, the bytes that nothing takes."""
        return self.capacity_nbytes - self._striped.used_nbytes

    def begin_write(self, address: int, nbytes: int, source: object = None) -> Written:
        """Writes `nbytes` at `address` to where it will be done first.

        `source` is held until it is written. Raises OSError(ENOSPC) when no file has room.
        """
        return Written(self._striped.write(address, nbytes, source))

    def close(self) -> None:
        """Closes the engines and the files; no transfer may be under way."""
        self._striped.close()


class Written:
    """What one write stored, being written or complete."""

    def __init__(self, stripe: Stripe) -> None:
        self._stripe = stripe
        self.nbytes = stripe.nbytes
        # Whether the write has ended, well or not: asked at every hook, so the stripe's own method.
        self.done: Callable[[], bool] = stripe.done

    def finish(self) -> Span:
        """Waits for the write; returns when it began and ended. Raises OSError if it failed."""
        try:
            self._stripe.wait()
        except OSError as error:
            # Whoever settles writes keeps the error, but must not keep the frames it went by.
            error = error.with_traceback(None)
            raise self._named(*_by_limit(error), self._stripe.place) from error
        return self._stripe.start_ns, self._stripe.end_ns

    def cancel(self) -> bool:
        """Stops the write if it has not begun."""
        return self._stripe.cancel()

    def begin_read(self, address: int, target: object = None) -> StripedRead:
        """Begins to read the bytes to `address`; `target` is held while they may come."""
        return self._stripe.read(address, target)

    def check_read(self, read: StripedRead) -> None:
        """Waits for a read of these bytes. Raises OSError with the file and the offset in it."""
        try:
            read.wait()
        except EOFError as error:
            cause = OSError(errno.EIO)
            raise self._named(cause, "read", read.failed_place, str(error)) from error
        except OSError as error:
            raise self._named(error, "read", read.failed_place) from error

    def failed_read(self, error: OSError, what: str = "") -> OSError:
        """`error` again, with the file and the offset in it."""
        return self._named(error, "read", self._stripe.place, what)

    def release(self) -> None:
        """Frees the space for reuse."""
        self._stripe.free()

    def _named(self, error: OSError, verb: str, place: str, what: str = "") -> OSError:
        number = error.errno or errno.EIO
        reason = what or os.strerror(number)
        return OSError(number, f"cannot {verb} {self.nbytes} bytes at {place}: {reason}")


def _by_limit(error: OSError) -> tuple[OSError, str]:
    """`error` of a write, and what failed.

    Direct I/O that a limit on the size of files cuts to an odd length is refused as invalid.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if error.errno == errno.EINVAL and limit % ALIGNMENT and limit != resource.RLIM_INFINITY:
        what = f"past the {limit} bytes that a file may have (ulimit -f), write"
        return OSError(errno.EFBIG, os.strerror(errno.EFBIG)), what
    return error, "write"


class DiskCopy:
    """A host storage on disk: the aligned middle in a spill file, the ends in memory."""

    tier = Tier.DISK
    queue: Hashable = None

    def __init__(self, spills: SpillSet, storage: torch.UntypedStorage, checksum: bool) -> None:
        address, nbytes = storage.data_ptr(), storage.nbytes()
        lead = -address % ALIGNMENT
        body = (nbytes - lead) // ALIGNMENT * ALIGNMENT
        # Copied as bytes: tensors of a few bytes would cost more than the write's system call.
        self._head = ctypes.string_at(address, lead)
        self._tail = ctypes.string_at(address + lead + body, nbytes - lead - body)
        self.host_nbytes = nbytes - body
        self._crc = _core.crc32c(address + lead, body) if checksum else None
        self._memory = spills.memory
        self._written = spills.begin_write(address + lead, body, storage)
        self.done = self._written.done

    def finish(self) -> Times:
        """Waits for the write. Raises OSError naming the file when it failed."""
        span = self._written.finish()
        return lambda: span

    def cancel(self) -> bool:
        """Stops the write if it has not begun."""
        return self._written.cancel()

    def has_room(self) -> bool:
        """There is no other memory than that of the device."""
        return True

    def load(self) -> DiskLoad:
        """Begins to read the bytes into a new storage."""
        return DiskLoad(self._written, self._head, self._tail, self._crc, self._memory)

    def release(self) -> None:
        """Frees the extent."""
        self._written.release()


class DiskLoad:
    """The way back of a `DiskCopy`."""

    queue: Hashable = None
    arrival = None  # host memory has no streams: `finish` is all

    def __init__(
        self,
        written: Written,
        head: bytes,
        tail: bytes,
        crc: int | None,
        memory: scratch.Scratch,
    ) -> None:
        lead, body = len(head), written.nbytes
        nbytes = lead + body + len(tail) + ALIGNMENT
        if nbytes < scratch.SMALLEST_NBYTES:
            self.storage = torch.UntypedStorage(nbytes)
        else:
            self.storage = memory.lend(nbytes).untyped_storage()
        address = self.storage.data_ptr()
        self.shift = -(address + lead) % ALIGNMENT
        self._body = address + self.shift + lead
        ctypes.memmove(self._body - lead, head, lead)
        ctypes.memmove(self._body + body, tail, len(tail))
        self._written, self._crc = written, crc
        self._transfer = written.begin_read(self._body, self.storage)
        self.done: Callable[[], bool] = self._transfer.done

    def finish(self) -> Times:
        """Waits for the read. Raises OSError naming file and offset, also on a wrong checksum."""
        self._written.check_read(self._transfer)
        body = (self._body, self._written.nbytes)
        if self._crc is not None and _core.crc32c(*body) != self._crc:
            raise self._written.failed_read(OSError(errno.EIO), "checksum mismatch")
        span = self._transfer.start_ns, self._transfer.end_ns
        return lambda: span


def flat_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    """All bytes of `storage`: [nbytes], uint8, the same memory."""
    empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return empty.set_(storage, 0, (storage.nbytes(),), (1,))
