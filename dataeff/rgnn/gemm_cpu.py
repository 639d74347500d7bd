"""Typed GEMM on CPU: the compiled C++ where it runs, else one ATen product per segment.

ATen serves half precision and machines without a compiler; its rows are gathered in blocks that
stay in the second-level cache, straight before the product that reads them.

Measured on one core of a Zen 4 machine (MKL: 74 GF/s on 1024 x 1024), float32, 4096 rows in 4
types, GF/s at widths 32 / 64 / 128 / 256:

    one torch.mm over all rows, no gather      66 / 74 / 70 / 82
    C++, gathered rows                         61 / 80 / 69 / 87
    ATen, per segment, gathered rows           42 / 68 / 65 / 67
    C++, gathered weight gradient              59 / 84 / 58 / 73
    ATen, gathered weight gradient             23 / 61 / 74 / 53

With 1000 types of 5 rows the loop over ATen calls costs 34 ms and C++ 1.3 ms.

Gather and product together, skewed segments as in real graphs, ms (interleaved, least of 12):

    types, rows, width    C++    index_select + mm per type   + grouped_mm   + one mm
    90, 53956, 64         6.8    8.8                          8.4            8.5
    474, 67763, 64        9.3    14.5                         12.9           10.3
    206, 63901, 64        8.5    11.8                         10.9           10.1
    8, 4092, 512          22.3   26.2                         25.9           25.5
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from dataeff.rgnn.cpp import gemm as gemm_native

# Bytes of gathered rows that a product reads from cache: half of a common 1 MiB second level.
GATHER_BLOCK_NBYTES = 512 << 10


def forward(
    x: Tensor,
    weight: Tensor,
    seg_ptr: Tensor,
    num_rows: int,
    gather: Tensor | None,
    row_scale: Tensor | None,
    tile_map: object = None,
    overwrite_x: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """`typed_gemm` with heads: x [N, heads, in], weight [types, heads, in, out]."""
    check_bounds(seg_ptr, num_rows)
    if gemm_native.available(x.dtype):
        how = (gather, row_scale, overwrite_x, out)
        return gemm_native.forward(x, weight, seg_ptr, num_rows, *how)
    y = x.new_empty(num_rows, weight.shape[1], weight.shape[3])
    for t, begin, end, rows in _segments(x, seg_ptr, num_rows, gather):
        part = y[begin:end]
        if y.shape[1] == 1:
            torch.mm(rows[:, 0], weight[t, 0], out=part[:, 0])
        else:
            torch.bmm(rows.transpose(0, 1), weight[t], out=part.transpose(0, 1))
        if row_scale is not None:
            part.mul_(row_scale[begin:end].unsqueeze(-1))
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
    check_bounds(seg_ptr, target.numel())
    if gemm_native.available(x.dtype):
        gemm_native.added_up(x, weight, seg_ptr, target, out, gather, add)
        return
    products = forward(x, weight, seg_ptr, target.numel(), gather, None)
    if not add:
        out.zero_()
    out.index_add_(0, target, products)


def weight_gradient(
    x: Tensor,
    dy: Tensor,
    seg_ptr: Tensor,
    num_rows: int,
    gather: Tensor | None,
    row_scale: Tensor | None,
    chunk_map: object = None,
) -> Tensor:
    """`typed_gemm_dw` with heads: x [N, heads, in], dy [rows, heads, out]."""
    check_bounds(seg_ptr, num_rows)
    if gemm_native.available(x.dtype):
        return gemm_native.weight_gradient(x, dy, seg_ptr, num_rows, gather, row_scale)
    # Half precision is summed in float32 over the blocks of a segment.
    sums = torch.float64 if x.dtype == torch.float64 else torch.float32
    num_heads, num_in, num_out = x.shape[1], x.shape[2], dy.shape[2]
    dw = x.new_zeros(seg_ptr.numel() - 1, num_heads, num_in, num_out, dtype=sums)
    for t, begin, end, rows in _segments(x, seg_ptr, num_rows, gather):
        left, right = rows.to(sums).permute(1, 2, 0), dy[begin:end].to(sums)
        if row_scale is not None:
            right = right * row_scale[begin:end].unsqueeze(-1)
        if num_heads == 1:
            dw[t, 0].addmm_(left[0], right[:, 0])
        else:
            dw[t].baddbmm_(left, right.transpose(0, 1))
    return dw.to(x.dtype)


def check_bounds(seg_ptr: Tensor, num_rows: int) -> None:
    """Refuses a `seg_ptr` that does not ascend from 0 to `num_rows`."""
    bounds = seg_ptr.tolist()
    if bounds[0] != 0 or bounds[-1] != num_rows:
        raise ValueError(
            f"seg_ptr must go from 0 to the {num_rows} rows, got {bounds[0]} to {bounds[-1]}"
        )
    for t, (begin, end) in enumerate(itertools.pairwise(bounds)):
        if begin > end:
            raise ValueError(f"seg_ptr must ascend, but type {t} goes from {begin} to {end}")


def _segments(
    x: Tensor, seg_ptr: Tensor, num_rows: int, gather: Tensor | None
) -> Iterator[tuple[int, int, int, Tensor]]:
    """Yields (type, begin, end, rows [end - begin, heads, in]); gathered rows share a buffer."""
    bounds = seg_ptr.tolist()
    width = x[0].numel() * x.element_size() if x.shape[0] else 1
    block = max(GATHER_BLOCK_NBYTES // max(width, 1), 64)
    buffer = x.new_empty(min(block, num_rows), *x.shape[1:])
    for t, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if gather is None:
            if start < stop:
                yield t, start, stop, x[start:stop]
            continue
        for begin in range(start, stop, block):
            end = min(begin + block, stop)
            yield t, begin, end, _gather_rows(x, gather[begin:end], buffer[: end - begin])


def _gather_rows(x: Tensor, index: Tensor, out: Tensor) -> Tensor:
    low, high = (int(bound) for bound in index.aminmax())
    if low < 0 or high >= x.shape[0]:
        raise gemm_native.outside(low if low < 0 else high, x)
    return torch.index_select(x, 0, index, out=out)
