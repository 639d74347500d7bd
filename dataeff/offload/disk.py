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
import threading
from collections.abc import Callable, Sequence

import torch

from dataeff import _core
from dataeff.ledger import Tier
from dataeff.storage import Engine, Extent, SpillFile, Transfer

ALIGNMENT = 4096
SMALLEST_NBYTES = 16 * 1024  # below this the unaligned ends would be most of the storage


class SpillSet:
    """Spill files in several directories and the engine that serves them.

    Args:
        directories: where to spill; one unlinked file is opened in each.
        engine: what `dataeff.storage.open_engine` returned; closed with the set.
        capacity_bytes: the most that each file may take.
    """

    def __init__(
        self,
        directories: Sequence[str | os.PathLike[str]],
        engine: Engine,
        capacity_bytes: int | None = None,
    ) -> None:
        if not directories:
            raise ValueError("spill: at least one directory is needed")
        self.engine = engine
        self.names = [os.fspath(directory) for directory in directories]
        self.files: list[SpillFile] = []
        try:
            self.files.extend(SpillFile(name, capacity_bytes) for name in self.names)
        except OSError:
            self.close()
            raise
        self._lock = threading.Lock()
        self._in_flight = [0] * len(self.files)

    def begin_write(self, address: int, nbytes: int) -> Written:
        """Writes `nbytes` at `address` to the file with the least in flight.

        Raises OSError(ENOSPC) when no file has room.
        """
        order: Sequence[int] = (0,)
        if len(self.files) > 1:
            order = sorted(range(len(self.files)), key=lambda i: self._in_flight[i])
        for index in order:
            try:
                extent = self.files[index].allocate(nbytes)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                continue
            return Written(self, index, extent, address, nbytes)
        raise OSError(errno.ENOSPC, f"no room for {nbytes} bytes in any spill file", self.names[0])

    def count_in_flight(self, index: int, nbytes: int) -> None:
        """Notes that `nbytes` more are on their way to the file at `index`."""
        with self._lock:
            self._in_flight[index] += nbytes

    def close(self) -> None:
        """Closes the engine and the files; no transfer may be under way."""
        self.engine.close()
        while self.files:
            self.files.pop().close()


class Written:
    """One extent of one spill file, being written or complete."""

    def __init__(
        self, spills: SpillSet, index: int, extent: Extent, address: int, nbytes: int
    ) -> None:
        self._spills, self._index, self._extent = spills, index, extent
        self.nbytes = nbytes
        self._file = spills.files[index]
        self._transfer = spills.engine.write(self._file.fd, address, nbytes, extent.offset)
        # Whether the write has ended, well or not: asked at every hook, so the core's own method.
        self.done: Callable[[], bool] = self._transfer.done
        spills.count_in_flight(index, nbytes)

    def finish(self) -> tuple[int, int]:
        """Waits for the write; returns when it began and ended. Raises OSError if it failed."""
        try:
            self._transfer.wait()
        except OSError as error:
            self._end()
            raise self._named(error, "write") from error
        self._end()
        return self._transfer.start_ns, self._transfer.end_ns

    def cancel(self) -> bool:
        """Stops the write if it has not begun."""
        if not self._transfer.cancel():
            return False
        self._end()
        return True

    def begin_read(self, address: int) -> Transfer:
        """Begins to read the extent to `address`; returns the engine's transfer."""
        return self._spills.engine.read(self._file.fd, address, self.nbytes, self._extent.offset)

    def check_read(self, transfer: Transfer) -> None:
        """Waits for a read of this extent. Raises OSError with the file and the offset in it."""
        try:
            transfer.wait()
        except EOFError as error:
            raise self.failed_read(OSError(errno.EIO), str(error)) from error
        except OSError as error:
            raise self.failed_read(error) from error

    def failed_read(self, error: OSError, what: str = "") -> OSError:
        """`error` again, with the file and the offset in it."""
        return self._named(error, "read", what)

    def release(self) -> None:
        """Frees the extent for reuse."""
        self._file.free(self._extent)

    def _end(self) -> None:
        self._spills.count_in_flight(self._index, -self.nbytes)

    def _named(self, error: OSError, verb: str, what: str = "") -> OSError:
        number = error.errno or errno.EIO
        reason = what or os.strerror(number)
        return OSError(
            number,
            f"cannot {verb} {self.nbytes} bytes at offset {self._extent.offset} of the spill file "
            f"in {self._spills.names[self._index]}: {reason}",
        )


class DiskCopy:
    """A host storage on disk: the aligned middle in a spill file, the ends in memory."""

    tier = Tier.DISK

    def __init__(self, spills: SpillSet, storage: torch.UntypedStorage, checksum: bool) -> None:
        address, nbytes = storage.data_ptr(), storage.nbytes()
        lead = -address % ALIGNMENT
        body = (nbytes - lead) // ALIGNMENT * ALIGNMENT
        # Copied as bytes: tensors of a few bytes would cost more than the write's system call.
        self._head = ctypes.string_at(address, lead)
        self._tail = ctypes.string_at(address + lead + body, nbytes - lead - body)
        self.host_nbytes = nbytes - body
        self._crc = _core.crc32c(address + lead, body) if checksum else None
        self._source: torch.UntypedStorage | None = storage  # the engine reads it until finish()
        self._written = spills.begin_write(address + lead, body)
        self.done = self._written.done

    def finish(self) -> tuple[int, int]:
        """Waits for the write. Raises OSError naming the file when it failed."""
        try:
            return self._written.finish()
        finally:
            self._source = None

    def cancel(self) -> bool:
        """Stops the write if it has not begun."""
        if not self._written.cancel():
            return False
        self._source = None
        return True

    def load(self) -> DiskLoad:
        """Begins to read the bytes into a new storage."""
        return DiskLoad(self._written, self._head, self._tail, self._crc)

    def release(self) -> None:
        """Frees the extent."""
        self._written.release()


class DiskLoad:
    """The way back of a `DiskCopy`."""

    def __init__(
        self,
        written: Written,
        head: bytes,
        tail: bytes,
        crc: int | None,
    ) -> None:
        lead, body = len(head), written.nbytes
        self.storage = torch.UntypedStorage(lead + body + len(tail) + ALIGNMENT)
        address = self.storage.data_ptr()
        # Nothing has touched this memory: its first write is the read's, a page at a time.
        _core.prefer_huge_pages(address, self.storage.nbytes())
        self.shift = -(address + lead) % ALIGNMENT
        self._body = address + self.shift + lead
        ctypes.memmove(self._body - lead, head, lead)
        ctypes.memmove(self._body + body, tail, len(tail))
        self._written, self._crc = written, crc
        self._transfer = written.begin_read(self._body)
        self.done: Callable[[], bool] = self._transfer.done

    def order(self) -> None:
        """Host memory has no streams: `finish` was all."""

    def finish(self) -> tuple[int, int]:
        """Waits for the read. Raises OSError naming file and offset, also on a wrong checksum."""
        self._written.check_read(self._transfer)
        body = (self._body, self._written.nbytes)
        if self._crc is not None and _core.crc32c(*body) != self._crc:
            raise self._written.failed_read(OSError(errno.EIO), "checksum mismatch")
        return self._transfer.start_ns, self._transfer.end_ns


def flat_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    """All bytes of `storage`: [nbytes], uint8, the same memory."""
    empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return empty.set_(storage, 0, (storage.nbytes(),), (1,))
