"""The torch operators of dataeff: `torch.ops.dataeff.*`, each with a fake implementation.

Operators are registered with `torch.library.Library.define/impl`, which costs 1 to 2 microseconds a
call (`torch.library.custom_op` costs about 14). Autograd is added where the operator is used, by a
`torch.autograd.Function`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dataeff import _core
from dataeff._threads import loop_threads, share_torch_threads
from dataeff.memory.scratch import new_on_host

share_torch_threads()
library = torch.library.Library("dataeff", "DEF")
# Operators that read host memory, or a graph by its token, look them up at each call: a CUDA graph
# that Inductor makes of its own accord (mode="reduce-overhead") would replay those of its capture.
# Who captures by hand knows what stays. So Inductor runs these outside of its CUDA graphs.
NO_REPLAY = (torch.Tag.cudagraph_unsafe,)

# rgnn: a whole layer is one operator; dataeff.rgnn.operators implements them when it is imported.
library.define(
    "rgnn_forward(Tensor[] inputs, Tensor token, int layer_id, str spec, SymInt[] sizes,"
    " int wanted) -> (Tensor[], Tensor[])",
    tags=NO_REPLAY,
)
library.define(
    "rgnn_backward(Tensor?[] grads, Tensor[] inputs, Tensor?[] outputs, Tensor[] saved,"
    " Tensor token, int layer_id, str spec, SymInt[] sizes, int wanted) -> Tensor[]",
    tags=NO_REPLAY,
)

# --- features: row gather and scatter ---------------------------------------------------------

library.define("gather(Tensor table, Tensor index) -> Tensor", tags=NO_REPLAY)
library.define("gather_out(Tensor table, Tensor index, Tensor(a!) out) -> ()", tags=NO_REPLAY)
library.define("scatter_rows_(Tensor(a!) table, Tensor index, Tensor rows) -> ()")

INDEX_DTYPES = (torch.int32, torch.int64)
_num_modes = torch._C._len_torch_dispatch_stack
_transform = torch._C._functorch.peek_interpreter_stack
_tracer = torch._C._get_tracing_state
_is_compiling = torch.compiler.is_compiling
_is_profiled = torch._C._autograd._profiler_enabled
# What the dispatcher is there for, beside a compiler: where one of these is, nothing is gathered
# past it.
_core.use_tensors(
    torch.Tensor.__dlpack_c_exchange_api__,
    (torch.Tensor, torch.nn.Parameter),
    (_tracer, _transform, _num_modes, _is_profiled),
    torch.get_num_threads,
)


def row_table(table: Tensor) -> tuple[int, int, int, int]:
    """Address, number of rows, bytes of a row, bytes from one row to the next.

    Raises:
        ValueError: the table has no dimension, or rows that are not contiguous.
    """
    contiguous = table.is_contiguous()
    if contiguous and table.dim() and (num_rows := table.shape[0]):
        row_nbytes = table.nbytes // num_rows
        return table.data_ptr(), num_rows, row_nbytes, row_nbytes
    if table.dim() == 0:
        raise ValueError(
            "a table needs at least one dimension, its rows; got a 0-dimensional tensor"
        )
    if not (contiguous or _rows_contiguous(table)):
        raise ValueError(
            f"each row of a table must be contiguous; got shape {tuple(table.shape)} with strides "
            f"{table.stride()}: pass table.contiguous()"
        )
    itemsize = table.element_size()
    num_rows = table.shape[0]
    row_nbytes = table.shape[1:].numel() * itemsize
    row_stride = table.stride(0) * itemsize if num_rows > 1 else row_nbytes
    return table.data_ptr(), num_rows, row_nbytes, row_stride


def row_span(table: Tensor) -> tuple[int, int]:
    """The first address of a table's memory and the bytes to its last."""
    data, num_rows, row_nbytes, row_stride = row_table(table)
    if not num_rows or not row_nbytes:
        return data, 0
    return data, (num_rows - 1) * row_stride + row_nbytes


def _rows_contiguous(table: Tensor) -> bool:
    expected = 1
    for size, stride in zip(reversed(table.shape[1:]), reversed(table.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def check_index(index: Tensor) -> Tensor:
    """The index in memory order; TypeError when it is neither int32 nor int64."""
    if index.dtype not in INDEX_DTYPES:
        # .long() of a mask would be rows 0 and 1.
        remedy = "mask.nonzero().view(-1)" if index.dtype == torch.bool else "index.long()"
        raise TypeError(f"an index is int32 or int64, got {index.dtype}: use {remedy}")
    return index.contiguous()


def check_rows(rows: Tensor, table: Tensor, index: Tensor, name: str) -> None:
    """TypeError or ValueError unless `rows` is [*index.shape, *table.shape[1:]] of the dtype."""
    if rows.dtype != table.dtype:
        raise TypeError(f"{name} is {rows.dtype} but the table is {table.dtype}")
    shape = index.shape + table.shape[1:]
    if rows.shape != shape:
        raise ValueError(
            f"{name} has shape {tuple(rows.shape)}; an index of shape {tuple(index.shape)} into a "
            f"table of shape {tuple(table.shape)} needs {tuple(shape)}"
        )
    if not (rows.is_cpu and index.is_cpu) and rows.device != index.device:
        raise ValueError(f"{name} is on {rows.device} but the index is on {index.device}")


def with_memory(x: Tensor, name: str) -> Tensor:
    """A tensor whose elements are where it says: of a wrapper like PyG's `EdgeIndex` what it wraps.

    Raises:
        TypeError: of another wrapper, whose address is null.
    """
    if type(x) is Tensor:
        return x
    held: Tensor = x.as_tensor() if hasattr(x, "as_tensor") else x
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        return held  # a stand-in without memory; it calls the operators
    try:
        lost = held.device.type in ("cpu", "cuda") and held.numel() > 0 and not held.data_ptr()
    except RuntimeError:  # a tracer's, which names no address; it calls the operators
        return held
    if lost:
        raise TypeError(
            f"{name} is a {type(x).__name__}, which has no memory of its own: pass the tensor that "
            "it wraps"
        )
    return held


def overlap(x: Tensor, y: Tensor) -> bool:
    """Whether two contiguous tensors, or tables, in host memory have a byte in common."""
    (x_begin, x_nbytes), (y_begin, y_nbytes) = row_span(x), row_span(y)
    return x_begin < y_begin + y_nbytes and y_begin < x_begin + x_nbytes


def _check_on_host(table: Tensor, index: Tensor) -> None:
    if not table.is_cpu:
        raise ValueError(
            f"the table is on {table.device} but the index is on {index.device}: move the index"
        )


def runs_at_once(table: Tensor, index: Tensor) -> bool:
    """Whether a gather on the host may be called as a function, past the dispatcher.

    The dispatcher takes longer than a hundred rows do. What it is there for must be absent: a
    tracer, a mode that intercepts, a transform (vmap), a profiler, another kind of tensor, a lazy
    view (conjugated, negated).
    """
    return (
        type(table) is Tensor
        and type(index) is Tensor
        and table.is_cpu
        and index.is_cpu
        and not _is_compiling()
        and not (table.is_conj() or table.is_neg())
        and _tracer() is None
        and _transform() is None
        and not _num_modes()
        and not _is_profiled()
    )


def new_rows(table: Tensor, index: Tensor) -> Tensor:
    """An uninitialised tensor for the rows, on the index's device."""
    return index.new_empty((*index.shape, *table.shape[1:]), dtype=table.dtype)


def gather_on_host(table: Tensor, index: Tensor, out: Tensor | None = None) -> Tensor:
    """What the operators `gather` and `gather_out` do for an index on the CPU."""
    _check_on_host(table, index)
    rows = row_table(table)
    index = check_index(index)
    if out is None:
        out = new_on_host(table, (*index.shape, *table.shape[1:]), table.dtype)
    else:
        check_rows(out, table, index, "out")
        if not out.is_contiguous():
            raise ValueError(f"out must be contiguous; got strides {out.stride()}")
        data, num_rows, row_nbytes, row_stride = rows
        begin, end = out.data_ptr(), out.data_ptr() + out.nbytes
        ids = index.data_ptr()
        # Not by `overlap`: small calls would take half as long again.
        if (begin < data + (num_rows - 1) * row_stride + row_nbytes and data < end) or (
            begin < ids + index.nbytes and ids < end
        ):
            raise ValueError("out lies in the memory of the table or the index: pass another")
    _core.gather_cpu(
        *rows,
        index.data_ptr(),
        index.numel(),
        index.element_size(),
        out.data_ptr(),
        loop_threads(),
    )
    return out


def _gather_out_cpu(table: Tensor, index: Tensor, out: Tensor) -> None:
    gather_on_host(table, index, out)


def _scatter_rows_cpu(table: Tensor, index: Tensor, rows: Tensor) -> None:
    _check_on_host(table, index)
    index = check_index(index)
    check_rows(rows, table, index, "rows")
    if table.shape[0] > 1 and table.stride(0) == 0 and table.numel():
        raise ValueError("the table's rows share memory (stride 0): pass table.clone()")
    rows = rows.contiguous()
    if rows.dim() and overlap(rows, table):
        rows = rows.clone()  # or a row would be read after another was written over it
    _core.scatter_cpu(
        *row_table(table),
        index.data_ptr(),
        index.numel(),
        index.element_size(),
        rows.data_ptr(),
        loop_threads(),
    )


def _gather_fake(table: Tensor, index: Tensor) -> Tensor:
    check_index(index)
    return new_rows(table, index)


def _gather_out_fake(table: Tensor, index: Tensor, out: Tensor) -> None:
    check_index(index)
    check_rows(out, table, index, "out")


def _scatter_rows_fake(table: Tensor, index: Tensor, rows: Tensor) -> None:
    check_index(index)
    check_rows(rows, table, index, "rows")


library.impl("gather", gather_on_host, "CPU")
library.impl("gather_out", _gather_out_cpu, "CPU")
library.impl("scatter_rows_", _scatter_rows_cpu, "CPU")
torch.library.register_fake("dataeff::gather", _gather_fake, lib=library)
torch.library.register_fake("dataeff::gather_out", _gather_out_fake, lib=library)
torch.library.register_fake("dataeff::scatter_rows_", _scatter_rows_fake, lib=library)
