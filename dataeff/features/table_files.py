"""Files that hold one table: `.npy`, `.safetensors`, and the index of a striped one.

Each is read up to the first row; what comes out says where the rows are and how wide.
"""

from __future__ import annotations

import ast
import errno
import json
import math
import os
import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataeff.features.stripe_head import HEAD_NBYTES, check_stripe_head

STRIPES_FORMAT = "dataeff-stripes"
SUFFIXES = (".npy", ".safetensors", ".json")
_WRITE_AGAIN = "write it again, dataeff.convert(path, path, overwrite=True)"
MAX_HEADER_NBYTES = 100 << 20  # what the safetensors library takes, too

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class RowFiles:
    """A table in one file, or striped over several.

    Attributes:
        shape: [num_rows, ...].
        dtype: of the rows.
        paths: the files, absolute.
        offset: the byte of each file at which its first row begins.
        rows_per_extent: rows that go to one file before it is the next one's turn.
        table_id: what the files of a striped table say in their heads; None of other tables, and of
            striped ones of version 1, whose files have no head.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    paths: tuple[Path, ...]
    offset: int
    rows_per_extent: int
    table_id: str | None = None

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def rows_in_file(self, index: int) -> int:
        """How many rows the `index`th file holds."""
        whole, rest = divmod(self.shape[0], self.rows_per_extent * len(self.paths))
        rest = min(max(rest - index * self.rows_per_extent, 0), self.rows_per_extent)
        return whole * self.rows_per_extent + rest

    def check_sizes(self) -> None:
        """Raises ValueError naming the file and both sizes when one is too short for its rows."""
        for index, path in enumerate(self.paths):
            size = path.stat().st_size
            needed = self.offset + self.rows_in_file(index) * self.row_nbytes
            if size < needed:
                raise ValueError(
                    f"{path} is truncated: it has {size} bytes, and {self.rows_in_file(index)} "
                    f"rows of {self.row_nbytes} bytes from byte {self.offset} on need {needed}"
                )


def local_path(path: Any) -> Path:
    """The absolute path; TypeError or ValueError, with what helps, for what names no local file."""
    if not isinstance(path, (str, os.PathLike)):
        remedy = ": os.fsdecode(path)" if isinstance(path, bytes) else ""
        raise TypeError(f"a table's file is a str or pathlib path, got {path!r}{remedy}")
    if "://" in str(path):
        raise ValueError(f"{path} is a URL, and a table's files are local: download it first")
    return Path(path).absolute()


def check_file(path: Path) -> None:
    """Raises what names the path and what helps unless a regular file is there.

    Opening another kind may block for ever (a pipe), or give rows that no second read would.

    Raises:
        FileNotFoundError: nothing is there, or a symbolic link to nothing.
        IsADirectoryError: a directory is.
        ValueError: a pipe, a device or a socket is.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        if not path.is_symlink():
            raise
        what = f"the file it links to, {os.readlink(path)}, is not there: make the link anew"
        raise FileNotFoundError(error.errno, what, str(path)) from None
    if stat.S_ISDIR(mode):
        what = "a table is opened from files: name those in this directory"
        raise IsADirectoryError(errno.EISDIR, what, str(path))
    if not stat.S_ISREG(mode):
        kind = "pipe" if stat.S_ISFIFO(mode) else "socket" if stat.S_ISSOCK(mode) else "device"
        raise ValueError(
            f"{path} is a {kind}, and rows are read in any order, from a regular file: write what "
            "it gives to one first"
        )


def read_header(path: str | os.PathLike[str], name: str | None = None) -> RowFiles:
    """Where the rows of a file are.

    Args:
        path: `.npy` (any version, C order), `.safetensors`, or the `.json` index of a striped
            table.
        name: which tensor of a `.safetensors` file; not needed when it holds one.

    Raises:
        FileNotFoundError: it is missing, or a stripe of it.
        IsADirectoryError: a directory is there.
        ValueError: another suffix; a header that is damaged, or of a layout or dtype that no table
            has; a file too short for its rows.
        KeyError: no tensor of that name.
    """
    path = local_path(path)
    if path.is_dir():
        check_file(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"{path}: a table is opened from {', '.join(SUFFIXES)}; dataeff.convert makes one "
            "from tensors, arrays and Parquet"
        )
    if name is not None and path.suffix != ".safetensors":
        raise ValueError(f"name={name!r}: only a .safetensors file names tensors, not {path}")
    check_file(path)
    if path.suffix == ".npy":
        files = _npy(path)
    elif path.suffix == ".safetensors":
        files = _safetensors(path, name)
    else:
        files = _stripes(path)
    files.check_sizes()
    return files


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} has a damaged header: {what}")


# --- .npy ---------------------------------------------------------------------------------------


def _npy(path: Path) -> RowFiles:
    """The format is that of NumPy's NEP 1: magic, version, length, a Python dict, padding."""
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8 or start[:6] != b"\x93NUMPY":
            raise _damaged(path, f"it begins with {start[:6]!r}, a .npy file with b'\\x93NUMPY'")
        major = start[6]
        if major not in (1, 2, 3):
            raise _damaged(path, f"version {major}.{start[7]} of .npy is unknown")
        width = 2 if major == 1 else 4
        length = int.from_bytes(file.read(width), "little")
        if length > MAX_HEADER_NBYTES:
            raise _damaged(path, f"it claims to be {length} bytes long")
        text = file.read(length)
        if len(text) < length:
            raise _damaged(path, f"the file ends after {len(text)} of its {length} bytes")
    shape, dtype = _npy_fields(path, text.decode("utf-8" if major == 3 else "latin1"))
    return RowFiles(shape, dtype, (path,), 8 + width + length, max(shape[0], 1))


def _npy_fields(path: Path, text: str) -> tuple[tuple[int, ...], torch.dtype]:
    try:
        fields = ast.literal_eval(text.strip())
        shape, fortran, descr = fields["shape"], fields["fortran_order"], fields["descr"]
        found = np.dtype(descr)
    except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError) as error:
        raise _damaged(path, f"{text.strip()[:80]!r} ({error})") from None
    if not _is_shape(shape):
        raise _damaged(path, f"shape {shape!r}")
    if not shape:
        raise ValueError(f"{path} holds a 0-dimensional array: a table needs rows")
    if not isinstance(fortran, bool):
        raise _damaged(path, f"fortran_order {fortran!r}")
    if fortran and sum(size > 1 for size in shape) > 1:
        raise ValueError(
            f"{path} is in Fortran order, in which no row is contiguous: {_WRITE_AGAIN}"
        )
    if not found.isnative and found.itemsize > 1:
        raise ValueError(f"{path} holds {found.str}, the other byte order: {_WRITE_AGAIN}")
    return shape, torch_dtype(found, str(path))


def torch_dtype(dtype: np.dtype[Any], whose: str) -> torch.dtype:
    """The torch dtype of a NumPy one; ValueError naming `whose` when there is none."""
    try:
        return torch.from_numpy(np.empty(0, dtype)).dtype
    except TypeError:
        part = f"array[{dtype.names[0]!r}]" if dtype.names else "array.astype('float32')"
        raise ValueError(
            f"{whose} holds {dtype}, which no tensor has: write what is numbers, "
            f"dataeff.convert({part}, path)"
        ) from None


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, Sequence) and all(
        type(n) is int and 0 <= n <= sys.maxsize for n in shape
    )


# --- .safetensors -------------------------------------------------------------------------------


def safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """Tensor name -> dtype, shape and data_offsets; and the byte at which those count from 0."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_NBYTES):
            raise _damaged(path, f"it claims to be {length} bytes long, the file has {size}")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise _damaged(path, str(error)) from None
    if not isinstance(header, dict):
        raise _damaged(path, f"it is a {type(header).__name__}, not a dict")
    header.pop("__metadata__", None)
    return header, 8 + length


def _safetensors(path: Path, name: str | None) -> RowFiles:
    header, start = safetensors_header(path)
    if name is None:
        if not header:
            raise ValueError(f"{path} holds no tensor")
        if len(header) > 1:
            raise ValueError(f"{path} holds {len(header)} tensors: give name=, {_some(header)}")
        name = next(iter(header))
    if name not in header:
        raise KeyError(f"{path} holds no tensor {name!r}, but {_some(header)}")
    try:
        entry = header[name]
        kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        valid = isinstance(kind, str) and _is_shape(shape) and _is_shape((begin, end))
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"tensor {name!r}: {error!r}") from None
    if not valid:
        what = f"dtype {kind}, shape {shape} and offsets {[begin, end]}"
        raise _damaged(path, f"tensor {name!r} has {what}")
    if kind not in SAFETENSORS_DTYPES:
        raise ValueError(f"{path}: tensor {name!r} is {kind}, which no table holds")
    if not shape:
        raise ValueError(f"{path}: tensor {name!r} is 0-dimensional: a table needs rows")
    files = RowFiles(
        tuple(shape), SAFETENSORS_DTYPES[kind], (path,), start + begin, max(shape[0], 1)
    )
    if end - begin != shape[0] * files.row_nbytes:
        raise _damaged(path, f"tensor {name!r} has {end - begin} bytes for {kind} of shape {shape}")
    return files


def _some(header: dict[str, Any]) -> str:
    names = [repr(name) for name in list(header)[:5]]
    return "one of " + ", ".join(names) + (" ..." if len(header) > 5 else "")


# --- stripes ------------------------------------------------------------------------------------


def stripes_text(files: RowFiles, folder: Path) -> str:
    """The index of a striped table that will lie in `folder`; files below it by relative path."""
    inside = [p.relative_to(folder) if p.is_relative_to(folder) else p for p in files.paths]
    fields = {
        "format": STRIPES_FORMAT,
        "version": 2,
        "table": files.table_id,
        "dtype": str(files.dtype).removeprefix("torch."),
        "shape": list(files.shape),
        "rows_per_extent": files.rows_per_extent,
        "files": [str(path) for path in inside],
    }
    return json.dumps(fields, indent=1)


def _stripes(path: Path) -> RowFiles:
    try:
        fields = json.loads(path.read_text())
        version = fields["version"]
        if fields["format"] != STRIPES_FORMAT or version not in (1, 2):
            raise _damaged(path, f"format {fields['format']!r}, version {version!r}")
        table_id = str(fields["table"]) if version == 2 else None
        dtype = getattr(torch, fields["dtype"])
        shape, extent, names = fields["shape"], fields["rows_per_extent"], fields["files"]
        valid = _is_shape(shape) and shape and type(extent) is int and extent > 0 and names
        paths = tuple(path.parent / str(name) for name in names)
    except (
        KeyError,
        TypeError,
        AttributeError,
        UnicodeDecodeError,
        json.JSONDecodeError,
        RecursionError,
    ) as error:
        raise _damaged(path, f"it is no index of a striped table ({error!r})") from None
    if not valid or not isinstance(dtype, torch.dtype):
        raise _damaged(path, f"dtype {dtype}, shape {shape}, rows_per_extent {extent}")
    offset = 0 if table_id is None else HEAD_NBYTES
    files = RowFiles(tuple(shape), dtype, paths, offset, extent, table_id)
    _check_stripes(path, files)
    return files


def _check_stripes(index: Path, files: RowFiles) -> None:
    """ValueError for a stripe that is another's: a table's own have one head, and one size."""
    if len(set(files.paths)) < len(files.paths):
        raise _damaged(index, f"a stripe is named twice: {[str(path) for path in files.paths]}")
    for number, path in enumerate(files.paths):
        check_file(path)
        needed = files.offset + files.rows_in_file(number) * files.row_nbytes
        if path.stat().st_size > needed:
            raise ValueError(
                f"{path} is no stripe of {index}: it has {path.stat().st_size} bytes, and the "
                f"{files.rows_in_file(number)} rows there need {needed}"
            )
        if files.table_id is not None:
            check_stripe_head(path, index, files.table_id, number, len(files.paths))
