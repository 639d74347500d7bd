"""Calls the compiled C++ typed GEMM: addresses, strides, chunk sizes, errors."""

from __future__ import annotations

import ctypes
import functools
import warnings

import torch
from torch import Tensor

from dataeff.memory.huge_pages import on_huge_pages
from dataeff.rgnn.cpp import gemm_source
from dataeff.rgnn.cpp.gemm_source import Arguments
from dataeff.rgnn.cpp.toolchain import CompilerMissing, compile_cpp


def available(dtype: torch.dtype) -> bool:
    """Whether the C++ path takes this dtype here: float32 or float64, and there is a compiler."""
    return dtype in (torch.float32, torch.float64) and library_for(dtype, torch.int32) is not None


def forward(
    x: Tensor,
    weight: Tensor,
    seg_ptr: Tensor,
    num_rows: int,
    gather: Tensor | None,
    row_scale: Tensor | None,
    overwrite_x: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """`typed_gemm` with heads: x [N, heads, in], weight [types, heads, in, out]."""
    num_types, num_heads, num_in, num_out = weight.shape
    if overwrite_x and gather is None and num_in == num_out and x.is_contiguous():
        y = x
    elif out is not None:
        y = out
    else:
        y = on_huge_pages(x.new_empty(num_rows, num_heads, num_out))
    x = x if x.stride(2) == 1 else x.contiguous()
    _run(
        "typed_gemm", x, weight, y, seg_ptr, gather, row_scale, None,
        num_rows=num_rows, num_types=num_types, num_heads=num_heads, num_in=num_in,
        num_out=num_out, x_row=x.stride(0), x_head=x.stride(1), w_type=weight.stride(0),
        w_head=weight.stride(1), w_in=weight.stride(2), w_out=weight.stride(3),
        y_row=y.stride(0), y_head=y.stride(1),
    )  # fmt: skip
    return y


def added_up(
    x: Tensor,
    weight: Tensor,
    seg_ptr: Tensor,
    target: Tensor,
    out: Tensor,
    gather: Tensor | None,
    add: bool,
) -> None:
    """`typed_gemm_sum` with heads: x [N, heads, in], weight [types, heads, in, out]."""
    num_types, num_heads, num_in, num_out = weight.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    _run(
        "typed_gemm_sum", x, weight, out, seg_ptr, gather, None, None, target,
        num_rows=target.numel(), num_types=num_types, num_heads=num_heads, num_in=num_in,
        num_out=num_out, x_row=x.stride(0), x_head=x.stride(1), w_type=weight.stride(0),
        w_head=weight.stride(1), w_in=weight.stride(2), w_out=weight.stride(3),
        y_row=num_heads * num_out, y_head=num_out, num_sums=out.shape[0], add=int(add),
    )  # fmt: skip


def weight_gradient(
    x: Tensor,
    dy: Tensor,
    seg_ptr: Tensor,
    num_rows: int,
    gather: Tensor | None,
    row_scale: Tensor | None,
) -> Tensor:
    """`typed_gemm_dw` with heads: x [N, heads, in], dy [rows, heads, out]."""
    num_types, (num_heads, num_in), num_out = seg_ptr.numel() - 1, x.shape[1:], dy.shape[2]
    dw = on_huge_pages(x.new_empty(num_types, num_heads, num_in, num_out))
    x = x if x.stride(2) == 1 else x.contiguous()
    dy = dy if dy.stride(2) == 1 else dy.contiguous()
    chunk = chunk_rows(num_rows)
    extra = x.new_empty(max(num_rows - 1, 0) // chunk, num_heads * num_in * num_out)
    _run(
        "typed_gemm_dw", x, dy, dw, seg_ptr, gather, row_scale, extra,
        num_rows=num_rows, num_types=num_types, num_heads=num_heads, num_in=num_in,
        num_out=num_out, x_row=x.stride(0), x_head=x.stride(1), w_in=dy.stride(0),
        w_head=dy.stride(1), chunk=chunk,
    )  # fmt: skip
    return dw


def sum_by_type(x: Tensor, seg_ptr: Tensor, gather: Tensor | None) -> Tensor:
    """The sum of the rows of each type, [types, width]; x [N, width] is read through `gather`."""
    num_rows = x.shape[0] if gather is None else gather.numel()
    y = x.new_empty(seg_ptr.numel() - 1, x.shape[1])
    x = x.contiguous()
    _run(
        "typed_sum", x, x, y, seg_ptr, gather, None, None,
        num_rows=num_rows, num_types=y.shape[0], num_in=x.shape[1], x_row=x.stride(0),
        chunk=chunk_rows(num_rows),
    )  # fmt: skip
    return y


def chunk_rows(num_rows: int) -> int:
    """Rows whose outer products one thread adds up: by the row count alone, so the bits are too."""
    return min(max(num_rows // 64, 1024), 65536)


def _run(
    entry: str,
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    seg_ptr: Tensor,
    gather: Tensor | None,
    row_scale: Tensor | None,
    extra: Tensor | None,
    target: Tensor | None = None,
    **sizes: int,
) -> None:
    bounds = seg_ptr.to(torch.int64).contiguous()
    gather = gather if gather is None else gather.contiguous()
    scale = row_scale if row_scale is None else row_scale.to(x.dtype)
    if gather is not None and gather.numel() and x.shape[0] == 0:
        raise outside(int(gather[0]), x)  # the C++ reads row 0 where an index is wrong
    bad = ctypes.c_int64(-1)
    arguments = Arguments(
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        y=y.data_ptr(),
        seg_ptr=bounds.data_ptr(),
        gather=0 if gather is None else gather.data_ptr(),
        row_scale=0 if scale is None else scale.data_ptr(),
        extra=0 if extra is None else extra.data_ptr(),
        bad=ctypes.addressof(bad),
        target=0 if target is None else target.data_ptr(),
        num_source=x.shape[0],
        s_row=0 if scale is None else scale.stride(0),
        s_head=0 if scale is None or scale.shape[1] == 1 else scale.stride(1),
        num_threads=torch.get_num_threads(),
        **sizes,
    )
    indices = next((i for i in (gather, target) if i is not None), None)
    library = library_for(x.dtype, torch.int32 if indices is None else indices.dtype)
    if library is None:
        raise RuntimeError("the C++ path was called without a compiler")
    getattr(library, entry)(ctypes.byref(arguments))
    if bad.value >= 0 and gather is not None:
        raise outside(int(gather[bad.value]), x)


def outside(index: int, x: Tensor) -> IndexError:
    """The error for an entry of `gather` that is no row of x."""
    return IndexError(f"gather holds {index}, but x has {x.shape[0]} rows, counted from 0")


@functools.cache
def library_for(value: torch.dtype, index: torch.dtype) -> ctypes.CDLL | None:
    """The compiled products of values and indices of these dtypes; None without a compiler."""
    names = (str(value).removeprefix("torch."), str(index).removeprefix("torch."))
    try:
        return compile_cpp(gemm_source.source(*names))
    except CompilerMissing as missing:
        warnings.warn(f"typed products run on plain PyTorch: {missing}", stacklevel=2)
        return None
