"""Launches the typed GEMM kernels: tile maps, schedules, index widths, precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dataeff.memory.cuda import current_device
from dataeff.rgnn.tilemap import TileMap, TileMaps, choose_tile_map, max_extra_tiles
from dataeff.rgnn.triton.tiles import GemmSchedule, Product, schedule_of

INT32_MAX = 2**31 - 1
# Elements that a program of the reduction of partial sums reads at a time: 16 a thread.
REDUCED = 4096


def interpreting() -> bool:
    """Whether the kernels run in Triton's interpreter and so take CPU tensors."""
    try:
        from dataeff.kernels import typed_gemm
        from dataeff.kernels.interpreter import is_interpreted
    except ImportError:  # Triton has no build for this platform
        return False
    return bool(is_interpreted(typed_gemm.typed_gemm_kernel))


def forward(
    x: Tensor,
    weight: Tensor,
    seg_ptr: Tensor,
    num_rows: int,
    gather: Tensor | None,
    row_scale: Tensor | None,
    tile_map: TileMap | TileMaps | None = None,
    overwrite_x: bool = False,
    tile: GemmSchedule | None = None,
) -> Tensor:
    """`typed_gemm` with heads: x [N, heads, in], weight [types, heads, in, out]."""
    from dataeff.kernels.typed_gemm import typed_gemm_kernel

    num_types, num_heads, num_in, num_out = weight.shape
    y = x.new_empty(num_rows, num_heads, num_out)
    if y.numel() == 0:
        return y
    if num_in == 0:
        return y.zero_()
    x = x if x.stride(2) == 1 else x.contiguous()
    product = Product(False, num_heads, num_in, num_out, num_rows, num_types)
    how = (product, x.dtype, float32_precision(), capability(x.device))
    schedule = schedule_of(*how, chosen=tile)
    tiles = choose_tile_map(tile_map, seg_ptr, num_rows, schedule.block_m)
    if tiles.block != schedule.block_m:
        schedule = schedule_of(*how, block_m=tiles.block)
    grid = (tiles.num_tiles * -(-num_out // schedule.block_n), num_heads)
    with current_device(x.device):
        typed_gemm_kernel[grid](
            x, weight, y, seg_ptr, tiles.types, tiles.rows, gather, row_scale,
            *x.stride()[:2], *weight.stride(), *y.stride()[:2],
            *_scale_strides(row_scale, num_heads),
            **_constants(num_in, num_out, gather, row_scale, x, y),
            BLOCK_M=schedule.block_m, BLOCK_N=schedule.block_n, BLOCK_K=schedule.block_k,
            **_options(schedule),
        )  # fmt: skip
    return y


def weight_gradient(
    x: Tensor,
    dy: Tensor,
    seg_ptr: Tensor,
    num_rows: int,
    gather: Tensor | None,
    row_scale: Tensor | None,
    chunk_map: TileMap | TileMaps | None = None,
    tile: GemmSchedule | None = None,
) -> Tensor:
    """`typed_gemm_dw` with heads: x [N, heads, in], dy [rows, heads, out]."""
    from dataeff.kernels.typed_gemm import reduce_partials_kernel, typed_gemm_dw_kernel

    num_types, (num_heads, num_in), num_out = seg_ptr.numel() - 1, x.shape[1:], dy.shape[2]
    size = num_heads * num_in * num_out
    dw = x.new_empty(num_types, num_heads, num_in, num_out)
    if dw.numel() == 0:
        return dw
    if num_rows == 0:
        return dw.zero_()
    x = x if x.stride(2) == 1 else x.contiguous()
    dy = dy if dy.stride(2) == 1 else dy.contiguous()
    product = Product(True, num_heads, num_in, num_out, num_rows, num_types)
    how = (product, x.dtype, float32_precision(), capability(x.device))
    schedule = schedule_of(*how, chosen=tile)
    chunk_rows = schedule.chunk_rows(num_rows)
    chunks = choose_tile_map(chunk_map, seg_ptr, num_rows, chunk_rows)
    sums = torch.float64 if x.dtype == torch.float64 else torch.float32
    first = dw if dw.dtype == sums else torch.empty_like(dw, dtype=sums)
    extra = dw.new_empty(max(max_extra_tiles(num_rows, chunks.block), 1), size, dtype=sums)
    blocks = -(-num_in // schedule.block_m) * -(-num_out // schedule.block_n)
    block = _reduction_block(size, num_types)
    with current_device(x.device):
        typed_gemm_dw_kernel[(chunks.num_tiles * blocks, num_heads)](
            x, dy, first, extra, seg_ptr, chunks.types, chunks.rows, chunks.extra_ptr,
            gather, row_scale, chunks.block, num_heads,
            *x.stride()[:2], *dy.stride()[:2], *_scale_strides(row_scale, num_heads),
            **_constants(num_in, num_out, gather, row_scale, x, dy),
            BLOCK_I=schedule.block_m, BLOCK_O=schedule.block_n, BLOCK_R=schedule.block_k,
            **_options(schedule.as_launched(gather is not None)),
        )  # fmt: skip
        # All on the grid's first axis: the others have no more than 65,535 programs.
        reduce_partials_kernel[(num_types * -(-size // block),)](
            first, extra, dw, seg_ptr, chunks.extra_ptr,
            SIZE=size, IN_PLACE=first is dw, PARTS=REDUCED // block, BLOCK=block,
            num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    return dw


def _reduction_block(size: int, num_types: int) -> int:
    """Elements of a weight that one program adds up, and so how many programs do.

    A few types of many chunks want many programs of many chunks at a time each; of many types most
    have one chunk, and nothing to add up.
    """
    block = 128
    while block < 1024 and num_types * -(-size // block) > 4096:
        block *= 2
    return min(block, 1 << (size - 1).bit_length())


def capability(device: torch.device) -> int:
    """Of a GPU, 90 for sm_90; the interpreter takes tiles as sm_90 does."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def float32_precision() -> str:
    """`tf32` or `ieee`, as torch's own matrix products would use on CUDA."""
    # "none", not set for matmul, already stands for torch's general setting.
    precision: str = torch.backends.cuda.matmul.fp32_precision
    return "tf32" if precision == "tf32" else "ieee"


def _constants(
    num_in: int, num_out: int, gather: Tensor | None, row_scale: Tensor | None, *rows: Tensor
) -> dict[str, Any]:
    return {
        "IN": num_in,
        "OUT": num_out,
        "HAS_GATHER": gather is not None,
        "HAS_SCALE": row_scale is not None,
        "INT64": any(_span(t) > INT32_MAX for t in (*rows, row_scale) if t is not None),
        "PRECISION": float32_precision() if rows[0].dtype == torch.float32 else "ieee",
    }


def _span(tensor: Tensor) -> int:
    """The largest element offset from the tensor's start, and one."""
    return sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1


def _scale_strides(row_scale: Tensor | None, num_heads: int) -> tuple[int, int]:
    if row_scale is None:
        return 0, 0
    return row_scale.stride(0), row_scale.stride(1) if row_scale.shape[1] == num_heads else 0


def _options(schedule: GemmSchedule) -> dict[str, Any]:
    # enable_fp_fusion: contraction to fused multiply-adds, said aloud because Triton 3.9 warns
    # that its default will change.
    return {
        "num_warps": schedule.num_warps,
        "num_stages": schedule.num_stages,
        "maxnreg": schedule.max_registers,
        "enable_fp_fusion": True,
    }
