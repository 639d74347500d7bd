"""Files and folders that appear under their names when they are whole, and not before."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dataeff import _core


class PartialFile:
    """Sequential writes that continue after short ones.

    Attributes:
        path: the name it will have.
        named: whether it has another name already.
    """

    def __init__(self, path: Path, fd: int, named: bool) -> None:
        self.path, self._fd, self.named = path, fd, named

    def write(self, data: bytes | memoryview) -> None:
        """Appends all of the bytes, or raises OSError naming the file."""
        left = memoryview(data)
        try:
            while left:
                left = left[os.write(self._fd, left) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None


@contextmanager
def whole_file(path: Path, nbytes: int, overwrite: bool) -> Iterator[PartialFile]:
    """A file that takes the name `path`, on the disk, when the block ends without error.

    Until then it has no name, so that not even SIGKILL leaves it behind; where the file system has
    no such files, and for the moment in which it takes the place of another, it is a `.partial` one
    beside `path`, which is locked while anyone writes it: the next conversion removes what is not.
    """
    remove_left(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        fd = open_without_name(path.parent)
        named = fd is None
        if fd is None:
            fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    try:
        lock(fd)
        if nbytes:
            _reserve(fd, nbytes, path)
        yield PartialFile(path, fd, named)
        os.fsync(fd)
        if not named:
            partial.unlink(missing_ok=True)  # of a process that had this number
            _name(fd, partial if overwrite else path)
        if overwrite:
            partial.replace(path)
        elif named:
            os.link(partial, path)  # unlike a rename it refuses a target that came meanwhile
            partial.unlink()
        sync_folder(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to write files in, which takes the name `path`, on the disk, when the block ends.

    After an error nothing of it is left. Until its end it is a hidden `.partial` one beside `path`,
    which is locked while anyone writes it: where one was killed, the next takes its place.

    Raises:
        FileExistsError: another process is writing it.
    """
    partial = path.with_name(f".{path.name}.partial")
    with _locked_folder(partial):
        try:
            for left in partial.iterdir():
                left.unlink()
            yield partial
            partial.rename(path)
            sync_folder(path.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def _locked_folder(path: Path) -> Iterator[None]:
    """Makes the folder, or has it where it is there and nobody holds it."""
    there = path.exists()
    path.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        held = lock(fd) or not there  # some file systems have no locks
        # Another may have ended meanwhile and given it its name.
        if not (held and path.exists() and os.path.samestat(os.fstat(fd), path.stat())):
            raise FileExistsError(
                errno.EEXIST, "another process is writing here; if none is, remove it", str(path)
            )
        yield
    finally:
        os.close(fd)


def remove_left(path: Path) -> None:
    """Removes what conversions to `path` left that were killed."""
    for partial in left_beside(path, ".partial"):
        partial.unlink(missing_ok=True)


def left_beside(path: Path, suffix: str) -> Iterator[Path]:
    """Hidden files beside `path` that no conversion under way has; each is locked in its turn."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{suffix}"):
        try:
            fd = os.open(left, os.O_RDWR | os.O_CLOEXEC)
        except (FileNotFoundError, PermissionError):  # gone meanwhile, or another user's
            continue
        try:
            if lock(fd):
                yield left
        finally:
            os.close(fd)


def lock(fd: int) -> bool:
    """Whether a file is locked now: False where a conversion under way has it, or none can be."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        return False
    return True


def open_without_name(folder: Path) -> int | None:
    """A file that no folder lists, or None where there are none, or none that can be named."""
    try:
        fd = os.open(folder, os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
        return None
    if not _entry(fd).exists():  # no /proc here
        os.close(fd)
        return None
    return fd


def _entry(fd: int) -> Path:
    return Path(f"/proc/self/fd/{fd}")


def _name(fd: int, path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Given a folder Python calls linkat, which follows /proc's link to the file; link does not.
        os.link(_entry(fd), path.name, dst_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


def _reserve(fd: int, nbytes: int, path: Path) -> None:
    try:
        _core.reserve_file(fd, 0, nbytes)
    except OSError as error:
        raise OSError(
            error.errno, f"no space for {nbytes} bytes: {os.strerror(error.errno or 0)}", str(path)
        ) from None


def sync_folder(folder: Path) -> None:
    """Puts the names of a folder on the disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
