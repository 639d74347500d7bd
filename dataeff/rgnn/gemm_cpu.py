"""Typed GEMM on CPU through ATen: one matrix product per segment, into rows of one output.

Rows are gathered in blocks that stay in the second-level cache, straight before the product that
reads them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

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
) -> Tensor:
    """`typed_gemm` with heads: x [N, heads, in], weight [types, heads, in, out]."""
    y = x.new_empty(num_rows, weight.shape[1], weight.shape[3])
    for t, begin, end, rows in _segments(x, seg_ptr, num_rows, gather):
        out = y[begin:end]
        if y.shape[1] == 1:
            torch.mm(rows[:, 0], weight[t, 0], out=out[:, 0])
        else:
            torch.bmm(rows.transpose(0, 1), weight[t], out=out.transpose(0, 1))
        if row_scale is not None:
            out.mul_(row_scale[begin:end].unsqueeze(-1))
    return y


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


def segment_bounds(seg_ptr: Tensor, num_rows: int) -> list[int]:
    """`seg_ptr` as a list, checked to ascend from 0 to `num_rows`."""
    bounds: list[int] = seg_ptr.tolist()
    if bounds[0] != 0 or bounds[-1] != num_rows:
        raise ValueError(
            f"seg_ptr must go from 0 to the {num_rows} rows, got {bounds[0]} to {bounds[-1]}"
        )
    for t, (begin, end) in enumerate(itertools.pairwise(bounds)):
        if begin > end:
            raise ValueError(f"seg_ptr must ascend, but type {t} goes from {begin} to {end}")
    return bounds


def _segments(
    x: Tensor, seg_ptr: Tensor, num_rows: int, gather: Tensor | None
) -> Iterator[tuple[int, int, int, Tensor]]:
    """Yields (type, begin, end, rows [end - begin, heads, in]); gathered rows share a buffer."""
    bounds = segment_bounds(seg_ptr, num_rows)
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
        wrong = low if low < 0 else high
        raise IndexError(f"gather holds {wrong}, but x has only the rows 0 to {x.shape[0] - 1}")
    return torch.index_select(x, 0, index, out=out)
