"""Writing tables that `FeatureTable.open` reads: whole, or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataeff._flags import checked_bool
from dataeff.features.row_sources import RowSource, holds_names, row_source
from dataeff.features.stripe_head import HEAD_NBYTES, STRIPE_SUFFIX, stripe_head
from dataeff.features.stripe_note import noted_stripes, remove_left_stripes
from dataeff.features.table_files import (
    SAFETENSORS_DTYPES,
    SUFFIXES,
    RowFiles,
    local_path,
    stripes_text,
)
from dataeff.features.whole_files import whole_file

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
    SIGKILL nothing is left of it, and a target that was there is as it was. (What SIGKILL leaves in
    the moment of naming stripes, and where a file system has no files without a name, as NFS, goes
    with the next conversion to the same target.)

    Args:
        source: a tensor or array [num_rows, ...] (a memmap, too), a `FeatureTable`, or a path to
            `.npy`, `.safetensors`, `.parquet` (with pyarrow) or a striped table. Of several files
            `FeatureTable.open(paths)` makes one.
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
        IsADirectoryError: the target is a directory, or the source.
        FileNotFoundError: the source is missing, or the target's folder.
        OSError: no space, or the target cannot be written.
        EOFError: the source was cut off meanwhile.
        TypeError: a source of another kind; one name or directory where a list of them goes; an
            `overwrite` that is no bool.
        ValueError: a target of another suffix; a dtype that `.npy` lacks; a damaged source, a
            sparse tensor, a masked array; a `name` without a `.safetensors` file, or `columns`
            without a `.parquet` one.
    """
    target, overwrite = local_path(target), checked_bool("overwrite", overwrite)
    _check_target(target, stripes, overwrite)
    named = holds_names(source)
    if not (name is None or named or target.suffix == ".safetensors"):
        raise ValueError(f"name={name!r}: only a .safetensors file names tensors")
    rows = row_source(source, name=name if named else None, columns=columns)
    # Only now: the source may be the very file that is replaced.
    if stripes:
        _write_stripes(rows, target, [Path(d).absolute() for d in stripes], overwrite, progress)
    else:
        head = _npy_head(rows) if target.suffix == ".npy" else _safetensors_head(rows, name or "x")
        with ExitStack() as stack:
            file = stack.enter_context(whole_file(target, len(head) + _nbytes(rows), overwrite))
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
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "the target is a directory: name a file", str(target))
    if os.path.lexists(target) and not overwrite:
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
    names = [f"{target.stem}.{table_id[:8]}.{i}-of-{count}{STRIPE_SUFFIX}" for i in range(count)]
    paths = tuple(folder / name for folder, name in zip(folders, names, strict=True))
    files = RowFiles(rows.shape, rows.dtype, paths, HEAD_NBYTES, extent, table_id)
    remove_left_stripes(target)
    with noted_stripes(target, table_id, paths) as note:
        _fill_stripes(rows, target, files, overwrite, progress, note)


def _fill_stripes(
    rows: RowSource,
    target: Path,
    files: RowFiles,
    overwrite: bool,
    progress: Callable[[int, int], object] | None,
    note: Callable[[], None],
) -> None:
    index = stripes_text(files, target.parent).encode()
    extent_nbytes, written = files.rows_per_extent * files.row_nbytes, 0
    with ExitStack() as stack:
        # Left last, so that the index appears after the files it names.
        stack.enter_context(whole_file(target, len(index), overwrite)).write(index)
        parts = []
        for number, path in enumerate(files.paths):
            size = files.offset + files.rows_in_file(number) * files.row_nbytes
            parts.append(stack.enter_context(whole_file(path, size, overwrite=False)))
            parts[-1].write(stripe_head(str(files.table_id), number, len(files.paths)))
        named = any(part.named for part in parts)
        if named:
            note()
        for chunk in _reported(rows, progress):
            while chunk:
                number, inside = divmod(written, extent_nbytes)
                piece = chunk[: extent_nbytes - inside]
                parts[number % len(parts)].write(piece)
                written += len(piece)
                chunk = chunk[len(piece) :]
        if not named:  # they are about to be
            note()
