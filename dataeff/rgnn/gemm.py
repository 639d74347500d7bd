"""Typed GEMM and its weight gradient: rows sorted by type, each with its type's weight.

    y[i] = row_scale[i] * (x[gather[i]] @ weight[t(i)])
    dW[t] = sum over the rows i of type t of  row_scale[i] * outer(x[gather[i]], dy[i])

`t(i)` is the type whose segment `seg_ptr[t]:seg_ptr[t + 1]` holds row i. This is the GEMM template
of Hector (ASPLOS'24, section 3.4) with gathered rows; a gathered copy of x is never stored whole.
CPU tensors go to `gemm_cpu`, CUDA tensors to the Triton kernels through `triton.gemm`. Both are
deterministic. Nothing here records gradients: the compiled layer calls both from its own backward.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from dataeff.rgnn import gemm_cpu
from dataeff.rgnn.cpp import gemm as gemm_native
from dataeff.rgnn.tilemap import TileMap, TileMaps, check_seg_ptr
from dataeff.rgnn.triton import gemm as gemm_triton
from dataeff.rgnn.triton.tiles import GemmSchedule

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def typed_gemm(
    x: Tensor,
    weight: Tensor,
    seg_ptr: Tensor,
    *,
    gather: Tensor | None = None,
    row_scale: Tensor | None = None,
    tile_map: TileMap | TileMaps | None = None,
    overwrite_x: bool = False,
    out: Tensor | None = None,
    tile: GemmSchedule | None = None,
) -> Tensor:
    """Multiplies every row with the weight of its type.

    Args:
        x: rows, or the table that `gather` picks them from, [num_rows or N, in], floating point;
            with heads [.., heads, in].
        weight: one matrix per type, [types, in, out], dtype of x, any strides (a transposed view
            is read in place); with heads [types, heads, in, out].
        seg_ptr: first row of each type and the end, [types + 1], int32 or int64.
        gather: the row of x that output row i reads, [num_rows], int32 or int64.
        row_scale: factor of output row i, [num_rows], or [num_rows, heads] with heads.
        tile_map: `build_tile_map(seg_ptr, num_rows, block)`, or `TileMaps(seg_ptr, num_rows)` that
            keeps what calls build. CUDA only; built and dropped here when missing.
        overwrite_x: x is not needed afterwards. Compiled C++ then returns the result in its memory
            where the shapes allow it, which saves as much memory; others leave x as it is.
        out: memory of the result's shape that it may be put into, as compiled C++ does.
        tile: the Triton kernel's tile; the cost model's if None.

    Returns:
        y, [num_rows, out] or [num_rows, heads, out], contiguous, dtype of x. Sums are taken in
        float32 (float64 for float64); float32 products follow torch's TF32 flag.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: shapes or devices that do not fit, or, on CPU, a `seg_ptr` that does not ascend
            from 0 to num_rows.
        IndexError: on CPU, an entry of `gather` outside x. On CUDA nothing is read back: gathers
            are maps of an `rgnn.Graph`, which finds wrong ids before it makes any.
    """
    num_rows = _check(x, weight, seg_ptr, gather, row_scale)
    heads = weight.dim() == 4
    backend = _backend(x)
    memory = {"out": out if heads or out is None else out.unsqueeze(1)}
    y: Tensor = backend.forward(
        x if heads else x.unsqueeze(1),
        weight if heads else weight.unsqueeze(1),
        seg_ptr,
        num_rows,
        gather,
        _heads(row_scale),
        tile_map,
        overwrite_x,
        **(memory if backend is gemm_cpu else {"tile": tile}),
    )
    return y if heads else y.squeeze(1)


def typed_gemm_dw(
    x: Tensor,
    dy: Tensor,
    seg_ptr: Tensor,
    *,
    gather: Tensor | None = None,
    row_scale: Tensor | None = None,
    chunk_map: TileMap | TileMaps | None = None,
    tile: GemmSchedule | None = None,
) -> Tensor:
    """The gradient of `typed_gemm` in its weight: one ragged sum of outer products per type.

    Args:
        x: as in `typed_gemm`, [num_rows or N, in] or [.., heads, in].
        dy: gradient of y, [num_rows, out] or [num_rows, heads, out], dtype of x.
        seg_ptr: first row of each type and the end, [types + 1], int32 or int64.
        gather: the row of x that row i read, [num_rows], int32 or int64.
        row_scale: factor of row i, [num_rows], or [num_rows, heads] with heads.
        chunk_map: as `tile_map` of `typed_gemm`; a block is the rows that one program sums.
        tile: the Triton kernel's tile; the cost model's if None.

    Returns:
        dW, [types, in, out] or [types, heads, in, out], dtype of x; zero for types without rows.

    Raises:
        TypeError, ValueError, IndexError: as `typed_gemm`.
    """
    num_rows = _check_dw(x, dy, seg_ptr, gather, row_scale)
    heads = x.dim() == 3
    backend = _backend(x)
    dw: Tensor = backend.weight_gradient(
        x if heads else x.unsqueeze(1),
        dy if heads else dy.unsqueeze(1),
        seg_ptr,
        num_rows,
        gather,
        _heads(row_scale),
        chunk_map,
        **({} if backend is gemm_cpu else {"tile": tile}),
    )
    return dw if heads else dw.squeeze(1)


def typed_gemm_sum(
    x: Tensor,
    weight: Tensor,
    seg_ptr: Tensor,
    target: Tensor,
    out: Tensor,
    *,
    gather: Tensor | None = None,
    add: bool = False,
) -> Tensor:
    """Adds the products of `typed_gemm` up in `out`, without storing them.

    `out.index_add_(0, target, typed_gemm(x, weight, seg_ptr, gather=gather))`, from zero unless
    `add` is set; each row of `out` adds its products up in the order of types. On the CPU only.

    Args:
        x: as in `typed_gemm`.
        weight: as in `typed_gemm`.
        seg_ptr: as in `typed_gemm`.
        gather: as in `typed_gemm`.
        target: the row of `out` that each product is added to, [num_rows], int32 or int64, in
            range. Within a type targets ascend, and none comes twice.
        out: [sums, out] or [sums, heads, out], contiguous, dtype of x.
        add: keep what `out` holds.

    Returns:
        `out`.

    Raises:
        TypeError, ValueError, IndexError: as `typed_gemm`.
    """
    num_rows = _check(x, weight, seg_ptr, gather, None)
    if target.shape != (num_rows,) or target.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"target is {target.dtype} {list(target.shape)} for {num_rows} rows")
    if gather is not None and gather.dtype != target.dtype:
        raise TypeError(f"gather is {gather.dtype}, but target {target.dtype}")
    width = (*weight.shape[1:-2], weight.shape[-1])
    if out.shape[1:] != width or out.dtype != x.dtype or not out.is_contiguous():
        raise ValueError(f"out is {out.dtype} {list(out.shape)}, products are {x.dtype} {width}")
    heads = weight.dim() == 4
    gemm_cpu.added_up(
        x if heads else x.unsqueeze(1),
        weight if heads else weight.unsqueeze(1),
        seg_ptr,
        target,
        out if heads else out.unsqueeze(1),
        gather,
        add,
    )
    return out


def typed_sum(
    x: Tensor, seg_ptr: Tensor, *, gather: Tensor | None = None, chunk_map: TileMaps | None = None
) -> Tensor:
    """The sum of the rows of each type, in chunks that are added in a fixed order.

    `index_add_` runs on one thread of a CPU and in no fixed order on a GPU. Where compiled C++
    does not run, sums are a weight gradient of rows that are all one.

    Args:
        x: rows [N, width].
        seg_ptr: rows `seg_ptr[t]:seg_ptr[t + 1]` of `gather` (or of x) have type t, [types + 1].
        gather: the row of x behind each row, [rows], int32 or int64.
        chunk_map: the tile maps of `seg_ptr`, if they are kept.

    Returns:
        [types, width]; zero for types without rows.
    """
    if _backend(x) is gemm_cpu and gemm_native.available(x.dtype):
        gemm_cpu.check_bounds(seg_ptr, x.shape[0] if gather is None else gather.numel())
        return gemm_native.sum_by_type(x, seg_ptr, gather)
    rows = x if gather is None else x.index_select(0, gather)
    ones = x.new_ones(1, 1).expand(rows.shape[0], 1)
    return typed_gemm_dw(ones, rows, seg_ptr, chunk_map=chunk_map).squeeze(1)


def typed_gemm_reference(
    x: Tensor,
    weight: Tensor,
    seg_ptr: Tensor,
    *,
    gather: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:
    """What `typed_gemm` means, in plain differentiable PyTorch: a copy of the weight per row."""
    rows = x if gather is None else x[gather.long()]
    types = torch.repeat_interleave(seg_ptr.diff().long())
    y = torch.einsum("n...i,n...io->n...o", rows, weight[types])
    return y if row_scale is None else (y * row_scale.unsqueeze(-1)).to(x.dtype)


def typed_gemm_dw_reference(
    x: Tensor,
    dy: Tensor,
    seg_ptr: Tensor,
    *,
    gather: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:
    """What `typed_gemm_dw` means: the outer product of every row, added up by type."""
    rows = x if gather is None else x[gather.long()]
    scaled = dy if row_scale is None else dy * row_scale.unsqueeze(-1)
    outer = torch.einsum("n...i,n...o->n...io", rows, scaled.to(x.dtype))
    types = torch.repeat_interleave(seg_ptr.diff().long())
    zeros = outer.new_zeros(seg_ptr.numel() - 1, *outer.shape[1:])
    return zeros.index_add_(0, types, outer)


def _backend(x: Tensor) -> ModuleType:
    return gemm_triton if x.is_cuda or gemm_triton.interpreting() else gemm_cpu


def _heads(row_scale: Tensor | None) -> Tensor | None:
    return row_scale.unsqueeze(1) if row_scale is not None and row_scale.dim() == 1 else row_scale


def _check(
    x: Tensor, weight: Tensor, seg_ptr: Tensor, gather: Tensor | None, row_scale: Tensor | None
) -> int:
    """Refuses what does not fit together; returns the number of rows."""
    if weight.dim() not in (3, 4) or x.dim() != weight.dim() - 1:
        raise ValueError(
            "typed_gemm takes x [rows, in] with weight [types, in, out], or x [rows, heads, in] "
            f"with weight [types, heads, in, out]; got {list(x.shape)} and {list(weight.shape)}"
        )
    if tuple(x.shape[1:]) != tuple(weight.shape[1:-1]):
        raise ValueError(
            f"x {list(x.shape)} and weight {list(weight.shape)} differ in heads or input features"
        )
    if seg_ptr.numel() != weight.shape[0] + 1:
        raise ValueError(
            f"seg_ptr has {seg_ptr.numel()} entries for {weight.shape[0]} types: it needs "
            f"{weight.shape[0] + 1}"
        )
    return _check_rows(x, weight, "weight", seg_ptr, gather, row_scale)


def _check_dw(
    x: Tensor, dy: Tensor, seg_ptr: Tensor, gather: Tensor | None, row_scale: Tensor | None
) -> int:
    """Refuses what does not fit together; returns the number of rows."""
    if x.dim() not in (2, 3) or dy.dim() != x.dim() or dy.shape[1:-1] != x.shape[1:-1]:
        raise ValueError(
            "typed_gemm_dw takes x [rows, in] with dy [rows, out], or both with the same heads in "
            f"between; got {list(x.shape)} and {list(dy.shape)}"
        )
    num_rows = _check_rows(x, dy, "dy", seg_ptr, gather, row_scale)
    if dy.shape[0] != num_rows:
        raise ValueError(f"dy has {dy.shape[0]} rows, x or gather {num_rows}")
    return num_rows


def _check_rows(
    x: Tensor,
    other: Tensor,
    name: str,
    seg_ptr: Tensor,
    gather: Tensor | None,
    row_scale: Tensor | None,
) -> int:
    check_seg_ptr(seg_ptr)
    if x.dtype not in DTYPES or other.dtype != x.dtype:
        raise TypeError(
            f"x and {name} must have one dtype among {[str(dtype) for dtype in DTYPES]}, got "
            f"{x.dtype} and {other.dtype}"
        )
    if gather is not None and gather.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"gather must be int32 or int64, got {gather.dtype}")
    if gather is not None and gather.dim() != 1:
        raise ValueError(f"gather must have one dimension, got {list(gather.shape)}")
    num_rows = x.shape[0] if gather is None else gather.numel()
    allowed = {(num_rows,), (num_rows, *x.shape[1:-1])}
    if row_scale is not None and tuple(row_scale.shape) not in allowed:
        raise ValueError(
            f"row_scale has shape {list(row_scale.shape)}, not that of the rows, {sorted(allowed)}"
        )
    given = {name: other, "seg_ptr": seg_ptr, "gather": gather, "row_scale": row_scale}
    for what, tensor in given.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"x is on {x.device} but {what} on {tensor.device}")
    return num_rows
