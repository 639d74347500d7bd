"""A file for temporary data, reused step after step, that no crash can leave behind."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from dataeff import _core

BLOCK_BYTES = 4096  # every file system in use takes direct I/O in multiples of this
MIN_GROWTH_BYTES = 64 << 20
MAX_GROWTH_BYTES = 1 << 30
# No room: on the disk, within the user's quota, or within the process's limit (ulimit -f).
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Extent(NamedTuple):
    """A stretch of a spill file; `nbytes` is a multiple of the file's alignment."""

    offset: int
    nbytes: int


class SpillFile:
    """An unnamed file whose space is handed out in extents and taken back.

    The file is opened with O_TMPFILE (created and unlinked at once where the file system lacks
    that), so it vanishes with the process, even on SIGKILL. It grows by reserving blocks, so a
    full disk is found by `allocate` and not in the middle of a write, and freed extents are used
    again, best fit first. Thread-safe.

    Args:
        directory: where; must exist.
        capacity_bytes: the most the file may take; the disk's limit when None.
        direct: asks for O_DIRECT, past the page cache. `self.direct` says whether the file system
            took it.

    Attributes:
        fd: for `Engine.read` and `Engine.write`.
        direct: whether the file is open for direct I/O.
        alignment: what offsets and sizes of extents are multiples of.
        path_hint: the directory, for messages.
        reserved: whether the file system reserves blocks ahead.

    Raises:
        OSError: the directory is missing, not writable, ...
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        capacity_bytes: int | None = None,
        direct: bool = True,
    ) -> None:
        self.path_hint = Path(directory)
        self.capacity_bytes = capacity_bytes
        try:
            self.fd, self.direct = _open_unnamed(self.path_hint, direct)
        except OSError as error:
            raise _refused(self.path_hint, error) from error
        _, memory_alignment, block = _core.direct_alignment(self.fd)
        self.alignment = max(BLOCK_BYTES, memory_alignment, block)
        self.reserved = True
        self._extents = _core.ExtentMap(0, self.alignment)
        self._lock = threading.Lock()

    def allocate(self, nbytes: int) -> Extent:
        """Space for `nbytes` bytes, rounded up to the alignment; the file grows when it must.

        Raises:
            OSError: one of `FULL` when the disk, a quota, a limit of the process or
                `capacity_bytes` is exhausted; nothing is changed then.
            ValueError: the file is closed.
        """
        with self._lock:
            if self.fd < 0:
                raise ValueError(f"the spill file in {self.path_hint} is closed")
            offset = self._extents.allocate(nbytes)
            if offset is None:
                self._grow(self._extents.rounded(nbytes))
                offset = self._extents.allocate(nbytes)
                assert offset is not None
            return Extent(offset, self._extents.rounded(nbytes))

    def free(self, extent: Extent) -> None:
        """Takes an extent back. No transfer may use it any more.

        Raises:
            ValueError: it was freed before, or is not of this file.
        """
        with self._lock:
            self._extents.free(extent.offset)

    def _grow(self, nbytes: int) -> None:
        """Makes the free tail at least `nbytes` long, and longer where there is room."""
        size = self._extents.capacity
        needed = nbytes - self._extents.tail_free
        limit = self.capacity_bytes
        if limit is not None and size + needed > limit:
            raise OSError(
                errno.ENOSPC,
                f"{nbytes} bytes more than the spill file may take: {self._extents.used} of "
                f"{limit} in use",
                str(self.path_hint),
            )
        growth = max(needed, min(max(size, MIN_GROWTH_BYTES), MAX_GROWTH_BYTES))
        if limit is not None:
            growth = min(growth, limit // self.alignment * self.alignment - size)
        growth = max(growth, needed)
        try:
            self._reserve(size, growth)
        except OSError as error:
            if error.errno not in FULL or growth == needed:
                raise
            self._reserve(size, growth := needed)
        self._extents.grow(size + growth)

    def _reserve(self, offset: int, nbytes: int) -> None:
        try:
            self.reserved &= _core.reserve_file(self.fd, offset, nbytes)
        except OSError as error:
            os.ftruncate(self.fd, offset)  # a reservation that failed may keep a part
            why = f"{os.strerror(error.errno or 0)}, {error.strerror}"
            raise OSError(error.errno, why, str(self.path_hint)) from None

    @property
    def used_nbytes(self) -> int:
        """Bytes of the extents that are out."""
        with self._lock:
            return self._extents.used

    @property
    def peak_nbytes(self) -> int:
        """The most that was out at one time."""
        with self._lock:
            return self._extents.peak

    @property
    def file_nbytes(self) -> int:
        """Size of the file."""
        with self._lock:
            return self._extents.capacity

    def close(self) -> None:
        """Gives the space back to the file system. No transfer may be under way."""
        with self._lock:
            fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if hasattr(self, "_lock"):  # opening may have failed
            self.close()

    def __enter__(self) -> SpillFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _refused(directory: Path, error: OSError) -> OSError:
    """`error` again, with the directory that was asked for in it and what to do."""
    why, remedy = error.strerror or str(error), "name a directory on an SSD"
    if error.errno in FULL:
        remedy = "free some of it, or name another directory"
    elif error.errno in (errno.EMFILE, errno.ENFILE):
        remedy = "close some, or raise the limit: ulimit -n"
    elif not directory.exists():
        remedy = "make it first"
    elif directory.is_dir():
        why = f"no file can be made there: {why}"
    return OSError(error.errno, f"{why} ({remedy})", str(directory))


def _open_unnamed(directory: Path, direct: bool) -> tuple[int, bool]:
    """An open file without a name, and whether it is open for direct I/O."""
    if direct:
        try:
            return _open_with(directory, os.O_DIRECT), True
        except OSError as error:
            if error.errno != errno.EINVAL:  # what a file system without direct I/O answers
                raise
    return _open_with(directory, 0), False


def _open_with(directory: Path, flags: int) -> int:
    flags |= os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(directory, flags | os.O_TMPFILE, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):  # no O_TMPFILE here
            raise
    return _open_and_unlink(directory, flags)


def _open_and_unlink(directory: Path, flags: int) -> int:
    name = tempfile.mktemp(prefix=".dataeff-spill-", dir=directory)
    fd = os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.unlink(name)
    except OSError:
        os.close(fd)
        raise
    return fd
