"""The gather of rows that are kept small, or partly in GPU memory, or read in another order."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dataeff import _core
from dataeff._ops import NO_REPLAY, check_index, library, overlap, row_table, runs_at_once
from dataeff._threads import loop_threads
from dataeff.features.quantised import ELEMENTS, FORMATS, LARGEST_CODE
from dataeff.memory.scratch import new_on_host

_SOURCE = (
    "Tensor table, Tensor? scales, Tensor? hot, Tensor? slots, Tensor(a!)? hits, Tensor? places,"
    " Tensor index"
)
library.define(f"gather_stored({_SOURCE}, ScalarType dtype) -> Tensor", tags=NO_REPLAY)
library.define(f"gather_stored_out({_SOURCE}, Tensor(b!) out) -> ()", tags=NO_REPLAY)


class Source(NamedTuple):
    """Where the rows of one gather are, and how they are kept.

    Attributes:
        table: [num_rows, ...], rows as they are kept, host memory.
        scales: [num_rows], float32, on the index's device, for int8 and float8 rows.
        hot: [num_hot, ...], copies of some rows on the index's device; CUDA alone.
        slots: [num_rows], int32: the place of each row in `hot`, negative for none; None when the
            first rows are the hot ones.
        hits: [1], int64, on the device: the number of rows found in `hot` is added to it.
    """

    table: Tensor
    scales: Tensor | None = None
    hot: Tensor | None = None
    slots: Tensor | None = None
    hits: Tensor | None = None


def gather_stored(
    source: Source,
    index: Tensor,
    dtype: torch.dtype,
    out: Tensor | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """`out[places[i]] = dequantise(table[index[i]], scales[index[i]], dtype)`.

    Args:
        source: the rows.
        index: any shape, int32 or int64, each in [-num_rows, num_rows).
        dtype: of the result: the table's own, or, for rows kept small, any of float16, bfloat16,
            float32 and float64.
        out: contiguous, [*index.shape, *table.shape[1:]], on the index's device; its dtype counts
            instead of `dtype`. New by default.
        places: a permutation of range(index.numel()), int64, on the index's device; by default row
            i of the index is row i of the result.

    Returns:
        `out`, or the new tensor.

    Raises:
        IndexError: an index is out of range; as in `gather`.
        TypeError: rows of this kind are not delivered as that dtype.
        ValueError: a wrong shape, device or layout.
    """
    what = (*source, places, index)
    if runs_at_once(source.table, index):
        if out is None:
            return _gather_cpu(*what, dtype)
        _gather_out_cpu(*what, out)
        return out
    if out is None:
        return torch.ops.dataeff.gather_stored(*what, dtype)  # type: ignore[no-any-return]
    torch.ops.dataeff.gather_stored_out(*what, out)
    return out


def coding(table: Tensor, scales: Tensor | None, dtype: torch.dtype) -> tuple[int, int]:
    """Numbers of the format and of the element type; -1 and 0 when bytes are copied as they are."""
    if scales is None and dtype == table.dtype:
        return -1, 0
    if dtype not in (known := deliveries(table, scales)):
        kinds = ", ".join(map(str, known))
        raise TypeError(f"rows kept as {table.dtype} are delivered as {kinds}; got {dtype}")
    return FORMATS[table.dtype], ELEMENTS[dtype]


def deliveries(table: Tensor, scales: Tensor | None) -> tuple[torch.dtype, ...]:
    """The dtypes that rows so kept are delivered as."""
    if table.dtype not in FORMATS or (table.dtype in LARGEST_CODE) != (scales is not None):
        return (table.dtype,)
    return tuple(ELEMENTS)


def _check(table: Tensor, scales: Tensor | None, index: Tensor, out: Tensor) -> tuple[int, int]:
    numbers = coding(table, scales, out.dtype)
    shape = (*index.shape, *table.shape[1:])
    if tuple(out.shape) != shape:
        raise ValueError(
            f"out has shape {tuple(out.shape)}; an index of shape {tuple(index.shape)} into a "
            f"table of shape {tuple(table.shape)} needs {shape}"
        )
    if out.device != index.device:
        raise ValueError(f"out is on {out.device} but the index is on {index.device}")
    if scales is not None:
        if scales.device != index.device:
            raise ValueError(f"scales is on {scales.device} but the index is on {index.device}")
        if scales.shape != (table.shape[0],) or not scales.is_contiguous():
            raise ValueError(f"scales must be [{table.shape[0]}], got {tuple(scales.shape)}")
    return numbers


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _gather_into_cpu(source: Source, places: Tensor | None, index: Tensor, out: Tensor) -> None:
    table, scales = source.table, source.scales
    if places is not None:
        rows = torch.empty_like(out)
        _gather_into_cpu(source, None, index, rows)
        flat = (index.numel(), *table.shape[1:])
        out.view(flat).index_copy_(0, places, rows.view(flat))
        return
    format, element = _check(table, scales, index, out)
    if format < 0:
        torch.ops.dataeff.gather_out(table, index, out)
        return
    index = check_index(index)
    where = (*row_table(table), index.data_ptr(), index.numel(), index.element_size())
    _core.gather_decoded_cpu(
        *where,
        out=out.data_ptr(),
        num_threads=loop_threads(),
        format=format,
        element=element,
        scales=_address(scales),
    )


def _gather_into_cuda(source: Source, places: Tensor | None, index: Tensor, out: Tensor) -> None:
    from dataeff.features.gather_cuda import launch_gather

    table, scales, hot, slots, hits = source
    format, element = _check(table, scales, index, out)
    hot_data, hot_rows, _, hot_stride = (0, 0, 0, 0) if hot is None else row_table(hot)
    launch_gather(
        table,
        index,
        out,
        places=_address(places),
        hot=hot_data,
        hot_rows=hot_rows,
        hot_stride=hot_stride,
        hot_slots=_address(slots),
        hot_hits=_address(hits),
        format=format,
        element=element,
        scales=_address(scales),
    )


def _new_rows(table: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    return index.new_empty((*index.shape, *table.shape[1:]), dtype=dtype)


def _gather_cpu(*arguments: Any) -> Tensor:
    *source, places, index, dtype = arguments
    out = new_on_host(index, (*index.shape, *source[0].shape[1:]), dtype)
    _gather_into_cpu(Source(*source), places, index, out)
    return out


def _gather_cuda(*arguments: Any) -> Tensor:
    *source, places, index, dtype = arguments
    out = _new_rows(source[0], index, dtype)
    _gather_into_cuda(Source(*source), places, index, out)
    return out


def _contiguous(out: Tensor) -> None:
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous; got strides {out.stride()}")


def _gather_out_cpu(*arguments: Any) -> None:
    *source, places, index, out = arguments
    _contiguous(out)
    ids = check_index(index).view(-1)
    if out.numel() and ids.numel() and (overlap(out, source[0]) or overlap(out, ids)):
        raise ValueError("out lies in the memory of the table or the index: pass another")
    _gather_into_cpu(Source(*source), places, index, out)


def _gather_out_cuda(*arguments: Any) -> None:
    *source, places, index, out = arguments
    _contiguous(out)
    _gather_into_cuda(Source(*source), places, index, out)


def _gather_fake(table: Tensor, scales: Tensor | None, *rest: Any) -> Tensor:
    *_, index, dtype = rest
    check_index(index)
    coding(table, scales, dtype)
    return _new_rows(table, index, dtype)


def _gather_out_fake(table: Tensor, scales: Tensor | None, *rest: Any) -> None:
    *_, index, out = rest
    check_index(index)
    _check(table, scales, index, out)


# An index on CUDA decides, wherever the table is.
library.impl("gather_stored", _gather_cpu, "CPU")
library.impl("gather_stored", _gather_cuda, "CUDA")
library.impl("gather_stored_out", _gather_out_cpu, "CPU")
library.impl("gather_stored_out", _gather_out_cuda, "CUDA")
torch.library.register_fake("dataeff::gather_stored", _gather_fake, lib=library)
torch.library.register_fake("dataeff::gather_stored_out", _gather_out_fake, lib=library)
