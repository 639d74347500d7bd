"""Writing tables that `FeatureTable.open` reads: whole, or not at all."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataeff import _core
from dataeff.features.row_sources import RowSource, row_source
from dataeff.features.stripe_head import HEAD_NBYTES, stripe_head
from dataeff.features.table_files import (
    SAFETENSORS_DTYPES,
    SUFFIXES,
    RowFiles,
    local_path,
    read_header,
    stripes_text,
)

PathLike = str | os.PathLike[str]
PAGE_NBYTES = 4096
EXTENT_NBYTES = 1 << 20


def convert(
    source: Any,
    target: PathLike,
    *,
    name: str | None = None,
    columns: Sequence[str] | None = None,
    stripes: Sequence[PathLike] = (),
    overwrite: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Path:
    """Writes rows into a file, or stripes them over several directories, for `FeatureTable.open`.

    Rows are read and written chunk by chunk, so source and target may be larger than memory. The
    target appears when it is complete and on the disk: after an error (a full disk), Ctrl-C or
    SIGKILL nothing is left of it, and a target that was there is as it was. (Where a file system
    has no files without a name, as NFS, SIGKILL leaves a `.partial` file.)

    Args:
        source: a tensor or array [num_rows, ...] (a memmap, too), a `FeatureTable`, or a path to
            `.npy`, `.safetensors`, `.parquet` (with pyarrow) or a striped table.
        target: `.npy`; `.safetensors`, for bfloat16 and float8 too; or, with `stripes`, `.json`.
        name: which tensor of a `.safetensors` source; a `.safetensors` target holds it under this
            name, or `x`.
        columns: of a Parquet source, numbers, booleans or lists of one length, of one dtype; all by
            default.
        stripes: directories, best on different disks, that take extents of about 1 MiB by turns;
            `target` becomes their index. Each file begins with a page that says of which table it
            is and which part, which `open` checks.
        overwrite: replaces a target that is there.
        progress: called with the bytes written so far and the bytes in all.

    Returns:
        The target's absolute path.

    Raises:
        FileExistsError: the target is there and `overwrite` is false.
        FileNotFoundError: the source is missing, or the target's folder.
        OSError: no space, or the target cannot be written.
        EOFError: the source was cut off meanwhile.
        TypeError: a source of another kind; one name or directory where a list of them goes.
        ValueError: a target of another suffix; a dtype that `.npy` lacks; a damaged source, a
            sparse tensor, a masked array; `name` or `columns` for a source that has none.
    """
    target = local_path(target)
    _check_target(target, stripes, overwrite)
    rows = row_source(source, name=name, columns=columns)
    # Only now: the source may be the very file that is replaced.
    if stripes:
        _write_stripes(rows, target, [Path(d).absolute() for d in stripes], overwrite, progress)
    else:
        head = _npy_head(rows) if target.suffix == ".npy" else _safetensors_head(rows, name or "x")
        with ExitStack() as stack:
            file = stack.enter_context(_whole_file(target, len(head) + _nbytes(rows), overwrite))
            file.write(head)
            for chunk in _reported(rows, progress):
                file.write(chunk)
    return target


def _check_target(target: Path, stripes: Sequence[PathLike], overwrite: bool) -> None:
    if target.suffix not in SUFFIXES:
        raise ValueError(f"{target}: a table is written to {', '.join(SUFFIXES)}")
    if isinstance(stripes, (str, os.PathLike)):
        raise TypeError(f"stripes={str(stripes)!r}: give a list of directories")
    if bool(stripes) != (target.suffix == ".json"):
        raise ValueError(
            f"{target}: a .json target is the index of stripes and needs their directories, "
            f"another takes none; got stripes={[str(d) for d in stripes]}"
        )
    if not target.parent.is_dir():
        raise FileNotFoundError(
            errno.ENOENT, "there is no folder to write the table in", str(target.parent)
        )
    if target.exists() and not overwrite:
        raise FileExistsError(
            errno.EEXIST, "the target exists: remove it or overwrite", str(target)
        )


def _nbytes(rows: RowSource) -> int:
    return math.prod(rows.shape) * rows.dtype.itemsize


def _reported(
    rows: RowSource, progress: Callable[[int, int], object] | None
) -> Iterator[memoryview]:
    """The bytes of each chunk; ValueError when the source has not the rows it promised."""
    total, done = _nbytes(rows), 0
    for chunk in rows.chunks:
        done += chunk.nbytes
        if done > total:
            break
        yield _bytes_of(chunk)
        if progress is not None:
            progress(done, total)
    if done != total:
        raise ValueError(f"the source gave {done} bytes of rows and had promised {total}")


def _bytes_of(chunk: Tensor) -> memoryview:
    return chunk.reshape(-1).view(torch.uint8).numpy().data


# --- heads --------------------------------------------------------------------------------------


def _npy_head(rows: RowSource) -> bytes:
    try:
        descr = np.lib.format.dtype_to_descr(
            torch.empty(0, dtype=rows.dtype, device="cpu").numpy().dtype
        )
    except TypeError:
        raise ValueError(f"NumPy has no {rows.dtype}: write it to a .safetensors target") from None
    text = repr({"descr": descr, "fortran_order": False, "shape": rows.shape})
    # Rows begin on a page, so that whole rows of a page are whole pages of the file.
    text = text.ljust(PAGE_NBYTES - 10 - 1) + "\n"
    return b"\x93NUMPY\x01\x00" + (PAGE_NBYTES - 10).to_bytes(2, "little") + text.encode("latin1")


def _safetensors_head(rows: RowSource, name: str) -> bytes:
    kinds = [kind for kind, dtype in SAFETENSORS_DTYPES.items() if dtype == rows.dtype]
    if not kinds:
        raise ValueError(f".safetensors has no {rows.dtype}: write it to a .npy target")
    entry = {"dtype": kinds[0], "shape": list(rows.shape), "data_offsets": [0, _nbytes(rows)]}
    text = json.dumps({name: entry}).encode()
    text = text.ljust(-(-(len(text) + 8) // PAGE_NBYTES) * PAGE_NBYTES - 8)
    return len(text).to_bytes(8, "little") + text


# --- files that appear when they are whole ------------------------------------------------------


class _PartialFile:
    """Sequential writes that continue after short ones."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path, self._fd = path, fd

    def write(self, data: bytes | memoryview) -> None:
        left = memoryview(data)
        try:
            while left:
                left = left[os.write(self._fd, left) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None


@contextmanager
def _whole_file(path: Path, nbytes: int, overwrite: bool) -> Iterator[_PartialFile]:
    """A file that takes the name `path`, on the disk, when the block ends without error.

    Until then it has no name, so that not even SIGKILL leaves it behind; where the file system has
    no such files, and for the moment in which it takes the place of another, it is a `.partial` one
    beside `path`, which is locked while anyone writes it: the next conversion removes what is not.
    """
    _remove_left(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        fd = _open_without_name(path.parent)
        named = fd is None
        if fd is None:
            fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    try:
        _lock(fd)
        if nbytes:
            _reserve(fd, nbytes, path)
        yield _PartialFile(path, fd)
        os.fsync(fd)
        if not named:
            partial.unlink(missing_ok=True)  # of a process that had this number
            _name(fd, partial if overwrite else path)
        if overwrite:
            partial.replace(path)
        elif named:
            os.link(partial, path)  # unlike a rename it refuses a target that came meanwhile
            partial.unlink()
        _sync_folder(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def _remove_left(path: Path) -> None:
    """Removes what conversions to `path` left that were killed."""
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        try:
            fd = os.open(partial, os.O_WRONLY | os.O_CLOEXEC)
        except (FileNotFoundError, PermissionError):  # gone meanwhile, or another user's
            continue
        try:
            if _lock(fd):
                partial.unlink(missing_ok=True)
        finally:
            os.close(fd)


def _lock(fd: int) -> bool:
    """Whether a file is locked now: False where a conversion under way has it, or none can be."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        return False
    return True


def _open_without_name(folder: Path) -> int | None:
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
            error.errno, f"no space for {nbytes} bytes ({error.strerror})", str(path)
        ) from None


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# --- stripes ------------------------------------------------------------------------------------


def _write_stripes(
    rows: RowSource,
    target: Path,
    folders: list[Path],
    overwrite: bool,
    progress: Callable[[int, int], object] | None,
) -> None:
    if len(set(folders)) < len(folders):
        raise ValueError(f"stripes names a directory twice: {[str(f) for f in folders]}")
    row_nbytes = math.prod(rows.shape[1:]) * rows.dtype.itemsize
    # Extents of whole pages: no page then holds rows of two extents.
    aligned = PAGE_NBYTES // math.gcd(row_nbytes or PAGE_NBYTES, PAGE_NBYTES)
    extent = max(EXTENT_NBYTES // max(row_nbytes * aligned, 1), 1) * aligned
    # Names of their own: an index that is replaced goes on naming its old stripes until the end.
    table_id, count = os.urandom(16).hex(), len(folders)
    names = [f"{target.stem}.{table_id[:8]}.{i}-of-{count}.rows" for i in range(count)]
    paths = tuple(folder / name for folder, name in zip(folders, names, strict=True))
    files = RowFiles(rows.shape, rows.dtype, paths, HEAD_NBYTES, extent, table_id)
    old = _stripes_of(target) if overwrite else ()
    try:
        _fill_stripes(rows, target, files, overwrite, progress)
    except BaseException:
        for path in paths:
            path.unlink(missing_ok=True)
        raise
    for path in old:
        path.unlink(missing_ok=True)


def _stripes_of(target: Path) -> tuple[Path, ...]:
    """The files that an index names which is about to be replaced."""
    try:
        return read_header(target).paths
    except (ValueError, FileNotFoundError):  # none there, or none that can be read
        return ()


def _fill_stripes(
    rows: RowSource,
    target: Path,
    files: RowFiles,
    overwrite: bool,
    progress: Callable[[int, int], object] | None,
) -> None:
    index = stripes_text(files, target.parent).encode()
    extent_nbytes, written = files.rows_per_extent * files.row_nbytes, 0
    with ExitStack() as stack:
        # Left last, so that the index appears after the files it names.
        stack.enter_context(_whole_file(target, len(index), overwrite)).write(index)
        parts = []
        for number, path in enumerate(files.paths):
            size = files.offset + files.rows_in_file(number) * files.row_nbytes
            parts.append(stack.enter_context(_whole_file(path, size, overwrite=False)))
            parts[-1].write(stripe_head(str(files.table_id), number, len(files.paths)))
        for chunk in _reported(rows, progress):
            while chunk:
                number, inside = divmod(written, extent_nbytes)
                piece = chunk[: extent_nbytes - inside]
                parts[number % len(parts)].write(piece)
                written += len(piece)
                chunk = chunk[len(piece) :]
