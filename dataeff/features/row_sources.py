"""What a table on disk can be made from, as a shape, a dtype and chunks of rows in order."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dataeff.features.table import FeatureTable
from dataeff.features.table_files import SUFFIXES, check_file, torch_dtype

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

CHUNK_NBYTES = 16 << 20
_SEVERAL = (
    "make one table of several files, and convert that: FeatureTable.open(sorted(paths)); first "
    "convert each .parquet file into one that is opened"
)


@dataclass(frozen=True)
class RowSource:
    """Rows that are read once, from first to last.

    Attributes:
        shape: [num_rows, ...].
        dtype: of the rows.
        chunks: contiguous host tensors [some, ...] that follow one another.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: Iterator[Tensor]


def holds_names(source: Any) -> bool:
    """Whether a source is a file whose tensors have names."""
    return isinstance(source, (str, os.PathLike)) and Path(source).suffix == ".safetensors"


def row_source(
    source: Any, *, name: str | None = None, columns: Sequence[str] | None = None
) -> RowSource:
    """Rows of a tensor, an array or memmap, a table, or a file.

    Args:
        source: a tensor or array [num_rows, ...]; a `FeatureTable`; a path to `.npy`,
            `.safetensors`, `.parquet` or the `.json` index of a striped table.
        name: which tensor of a `.safetensors` file that holds several.
        columns: of a Parquet file; all of them by default.

    Raises:
        TypeError: of another kind.
        IsADirectoryError: a directory.
        ValueError: no rows, an option that the source has no use for, or a file that is damaged or
            whose columns make no table.
        ModuleNotFoundError: a Parquet file, without pyarrow.
    """
    is_path = isinstance(source, (str, os.PathLike))
    parquet = is_path and Path(source).suffix == ".parquet"
    if isinstance(columns, str):
        raise TypeError(f"columns={columns!r}: give a list of names, [{columns!r}]")
    if columns is not None and not parquet:
        raise ValueError(f"columns={list(columns)!r}: only a .parquet file has columns")
    if parquet:
        return _parquet(Path(source), columns)
    if is_path:
        return _of_file(Path(source), name)
    if isinstance(source, FeatureTable):
        return RowSource(tuple(source.shape), source.dtype, _slices(source))
    if isinstance(source, np.ndarray):
        return _of_array(source)
    if isinstance(source, Tensor):
        if source.dim() == 0:
            raise ValueError("a 0-dimensional tensor has no rows")
        if source.layout != torch.strided or source.is_quantized:
            kind = source.dtype if source.is_quantized else source.layout
            raise ValueError(
                f"a table is made from a dense tensor of numbers, got {kind}: use .to_dense() or "
                ".dequantize()"
            )
        return RowSource(tuple(source.shape), source.dtype, _slices(source.detach()))
    remedy = f": {_SEVERAL}" if isinstance(source, (list, tuple)) else ""
    raise TypeError(
        "a table is made from a tensor, an array, a FeatureTable or a path, "
        f"got {type(source).__name__}{remedy}"
    )


def _rows_per_chunk(shape: Sequence[int], itemsize: int) -> int:
    row_nbytes = itemsize
    for size in shape[1:]:
        row_nbytes *= size
    return max(CHUNK_NBYTES // max(row_nbytes, 1), 1)


def _slices(rows: Tensor | FeatureTable) -> Iterator[Tensor]:
    step = _rows_per_chunk(rows.shape, rows.dtype.itemsize)
    for begin in range(0, len(rows), step):
        yield rows[begin : begin + step].cpu().resolve_conj().resolve_neg().contiguous()


def _of_array(array: np.ndarray[Any, Any], whose: str = "the array") -> RowSource:
    if array.ndim == 0:
        raise ValueError(f"{whose} is 0-dimensional, and has no rows")
    if isinstance(array, np.ma.MaskedArray):
        raise ValueError("a masked array has values that are none: array.filled(...)")
    # A memmap may be read-only or of the other byte order: each chunk is copied, one at a time.
    native = array.dtype.newbyteorder("=")
    dtype = torch_dtype(native, whose)
    step = _rows_per_chunk(array.shape, array.dtype.itemsize)
    chunks = (
        torch.from_numpy(np.array(array[begin : begin + step], dtype=native, order="C"))
        for begin in range(0, len(array), step)
    )
    return RowSource(array.shape, dtype, chunks)


def _of_file(path: Path, name: str | None) -> RowSource:
    if path.suffix == ".npy":
        check_file(path)
        # NumPy's own reader: it also takes what a table is not opened from (Fortran order, ...).
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:  # NumPy names no file, and advises to unpickle it
            raise ValueError(f"{path} is damaged, or no .npy file of numbers") from error
        rows = _of_array(array, str(path))
        return replace(rows, chunks=_npy_chunks(path, array)) if array.size else rows
    if path.suffix not in SUFFIXES:
        if path.is_dir():
            raise IsADirectoryError(
                errno.EISDIR, f"rows are read from files: {_SEVERAL}", str(path)
            )
        known = ", ".join((*SUFFIXES, ".parquet"))
        raise ValueError(
            f"{path}: rows are read from {known}; of another file pass the array or tensor in it"
        )
    table = FeatureTable.open(path, name=name, cache_bytes=0)

    def chunks() -> Iterator[Tensor]:
        with table:
            yield from _slices(table)

    return RowSource(tuple(table.shape), table.dtype, chunks())


def _npy_chunks(path: Path, array: np.memmap[Any, Any]) -> Iterator[Tensor]:
    """What the mapping shows, by reads: a file cut off meanwhile is an error, not a SIGBUS."""
    step = _rows_per_chunk(array.shape, array.itemsize)
    fortran = not array.flags.c_contiguous
    with path.open("rb", buffering=0) as file:
        for begin in range(0, len(array), step):
            shape = (min(step, len(array) - begin), *array.shape[1:])
            rows = np.empty(shape, array.dtype, order="F" if fortran else "C")
            # In Fortran order a chunk has a piece in every column.
            pieces = rows.reshape(len(rows), -1, order="F").T if fortran else rows.reshape(1, -1)
            apart = len(array) * array.itemsize
            for number, piece in enumerate(pieces):
                first = begin if fortran else begin * rows[:1].size
                file.seek(array.offset + number * apart + first * array.itemsize)
                _read_all(path, file, piece)
            native = rows.dtype.newbyteorder("=")
            yield torch.from_numpy(np.asarray(rows, dtype=native, order="C"))


def _read_all(path: Path, file: FileIO, into: np.ndarray[Any, Any]) -> None:
    left = into.view(np.uint8).data
    while left:
        count = file.readinto(left)
        if not count:
            raise EOFError(f"{path} was cut off: it has nothing at byte {file.tell()}")
        left = left[count:]


# --- Parquet ------------------------------------------------------------------------------------


def _parquet(path: Path, columns: Sequence[str] | None) -> RowSource:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"reading {path} takes pyarrow, which is not installed: pip install pyarrow"
        ) from None
    check_file(path)
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is damaged or no Parquet: {error}") from None
    schema = file.schema_arrow
    chosen = list(schema.names if columns is None else columns)
    if missing := [column for column in chosen if column not in schema.names]:
        raise ValueError(f"{path} has no column {missing[0]!r}, but {', '.join(schema.names)}")
    if twice := [column for column in chosen if schema.names.count(column) > 1]:
        raise ValueError(
            f"{path} has several columns {twice[0]!r}: rename them, or choose others with columns="
        )
    if not chosen:
        raise ValueError(f"{path}: no column was chosen")
    with _reading(path):
        widths, dtype = _columns(path, file, chosen)
    # A lone column of single numbers is a vector, a lone column of lists their matrix.
    lone = len(chosen) == 1
    width = sum(1 if one is None else one for one in widths)
    shape = (file.metadata.num_rows, *(() if lone and widths[0] is None else (width,)))
    rows = _rows_per_chunk(shape, dtype.itemsize)
    # Lists of no number add nothing, and Arrow refuses to read what it wrote of them.
    read = [c for c in chosen if not _is_of_no_number(file.schema_arrow.field(c).type)]

    def chunks() -> Iterator[Tensor]:
        begin = 0
        with file, _reading(path):
            for batch in file.iter_batches(rows, columns=read) if read else ():
                arrays = [
                    _column(path, batch.column(column), column, width, begin)
                    for column, width in zip(chosen, widths, strict=True)
                    if column in read
                ]
                begin += len(batch)
                joined = arrays[0] if lone else np.column_stack(arrays)
                yield torch.from_numpy(np.array(joined, order="C")).reshape(len(batch), *shape[1:])

    return RowSource(shape, torch_dtype(dtype, str(path)), chunks())


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Arrow's own errors name no file."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged or cannot be read: {error}") from error


def _columns(
    path: Path, file: pyarrow.parquet.ParquetFile, chosen: list[str]
) -> tuple[list[int | None], np.dtype[Any]]:
    """Numbers per row of each column, None for those that are no lists, and the common dtype."""
    import pyarrow.types

    fields = [file.schema_arrow.field(column) for column in chosen]
    dtypes = []
    for field in fields:
        value = field.type.value_type if _is_list(field.type) else field.type
        kinds = pyarrow.types
        if not (kinds.is_integer(value) or kinds.is_floating(value) or kinds.is_boolean(value)):
            raise ValueError(
                f"{path}: column {field.name!r} is {field.type}: a table takes numbers, booleans "
                "and lists of them that have one length; choose others with columns="
            )
        dtypes.append(np.dtype(value.to_pandas_dtype()))
    if len(set(dtypes)) > 1:
        named = ", ".join(f"{f.name} {t}" for f, t in zip(fields, dtypes, strict=True))
        raise ValueError(f"{path}: the columns have several dtypes ({named}): cast them to one")
    return [_width(path, file, field) for field in fields], dtypes[0]


def _is_list(kind: pyarrow.DataType) -> bool:
    import pyarrow.types

    return bool(
        pyarrow.types.is_fixed_size_list(kind)
        or pyarrow.types.is_list(kind)
        or pyarrow.types.is_large_list(kind)
    )


def _is_of_no_number(kind: pyarrow.DataType) -> bool:
    import pyarrow.types

    return bool(pyarrow.types.is_fixed_size_list(kind) and kind.list_size == 0)


def _width(path: Path, file: pyarrow.parquet.ParquetFile, field: pyarrow.Field) -> int | None:
    import pyarrow.types

    if not _is_list(field.type):
        return None
    if pyarrow.types.is_fixed_size_list(field.type):
        return int(field.type.list_size)
    # The type of other lists says no length: the first row does, and the rest must follow it.
    for batch in file.iter_batches(1, columns=[field.name]):
        return len(batch.column(0)[0].as_py() or ())
    raise ValueError(
        f"{path}: column {field.name!r} is {field.type} and has no rows that would say its length: "
        "write it as a fixed_size_list"
    )


def _column(
    path: Path, column: pyarrow.Array, name: str, width: int | None, begin: int
) -> np.ndarray[Any, Any]:
    """The numbers of some rows, the first of which is row `begin` of the file."""
    values = column if width is None else column.flatten()
    if column.null_count or values.null_count:
        raise ValueError(
            f"{path}: column {name!r} ({column.type}) has nulls, which a table cannot hold: fill "
            "them or drop their rows"
        )
    numbers: np.ndarray[Any, Any] = values.to_numpy(zero_copy_only=False)
    if width is None:
        return numbers
    lengths = column.value_lengths().to_numpy(zero_copy_only=False)
    if (other := np.flatnonzero(lengths != width)).size:
        raise ValueError(
            f"{path}: column {name!r} ({column.type}) has lists of {width} and, in row "
            f"{begin + other[0]}, of {lengths[other[0]]}: pad or cut them to one length"
        )
    return numbers.reshape(len(column), width)
