"""A file for temporary data, reused step after step, that no crash can leave behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import NamedTuple

from dataeff import _core

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
    again, best fit first. It is open as long as anything uses it, unless closed. Thread-safe.

    Args:
        directory: where; must exist.
        capacity_bytes: the most the file may take; the disk's limit when None.
        direct: asks for O_DIRECT, past the page cache. `self.direct` says whether the file system
            took it.
        faults: faults to inject into reservations, for tests.

    Attributes:
        direct: whether the file is open for direct I/O.
        path_hint: the directory, for messages.
        space: the extents, which the core hands out.

    Raises:
        OSError: the directory is missing, not writable, ...
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        capacity_bytes: int | None = None,
        direct: bool = True,
        faults: _core.FaultPlan | None = None,
    ) -> None:
        self.path_hint = Path(directory)
        try:
            self.space, self.direct = _open_unnamed(self.path_hint, direct, capacity_bytes, faults)
        except OSError as error:
            raise _refused(self.path_hint, error) from error

    @property
    def fd(self) -> int:
        """For `Engine.read` and `Engine.write`; -1 when the file is closed."""
        return self.space.fd

    @property
    def alignment(self) -> int:
        """What offsets and sizes of extents are multiples of."""
        return self.space.alignment

    @property
    def reserved(self) -> bool:
        """Whether the file system reserves blocks ahead."""
        return self.space.reserved

    def allocate(self, nbytes: int) -> Extent:
        """Space for `nbytes` bytes, rounded up to the alignment; the file grows when it must.

        Raises:
            OSError: one of `FULL` when the disk, a quota, a limit of the process or
                `capacity_bytes` is exhausted; nothing is changed then.
            ValueError: the file is closed.
        """
        return Extent(self.space.allocate(nbytes), self.space.rounded(nbytes))

    def free(self, extent: Extent) -> None:
        """Takes an extent back. No transfer may use it any more.

        Raises:
            ValueError: it was freed before, or is not of this file.
        """
        self.space.free(extent.offset)

    @property
    def used_nbytes(self) -> int:
        """Bytes of the extents that are out."""
        return self.space.used

    @property
    def peak_nbytes(self) -> int:
        """The most that was out at one time."""
        return self.space.peak

    @property
    def file_nbytes(self) -> int:
        """Size of the file."""
        return self.space.capacity

    def close(self) -> None:
        """Gives the space back to the file system. No transfer may be under way."""
        self.space.close()

    def __enter__(self) -> SpillFile:
        return self

    def __exit__(self, *exception: object) -> None:
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


def _open_unnamed(
    directory: Path, direct: bool, limit: int | None, faults: _core.FaultPlan | None
) -> tuple[_core.SpillSpace, bool]:
    """The space of an open file without a name, and whether it is open for direct I/O."""
    if direct:
        try:
            return _open_with(directory, os.O_DIRECT, limit, faults), True
        except OSError as error:
            if error.errno != errno.EINVAL:  # what a file system without direct I/O answers
                raise
    return _open_with(directory, 0, limit, faults), False


def _open_with(
    directory: Path, flags: int, limit: int | None, faults: _core.FaultPlan | None
) -> _core.SpillSpace:
    try:
        return _open(str(directory), flags, False, limit, faults)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):  # no O_TMPFILE here
            raise
    return _open(str(directory), flags, True, limit, faults)


# In one call of the core, which owns the file: an interrupt between opening and owning would leave
# its descriptor open, and one before it is unlinked its name on the disk.
_open = _core.SpillSpace.open
