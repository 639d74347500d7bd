"""Typed GEMM: rows sorted by type, each multiplied with its type's weight.

    Y[i, h] = scale[i, h] * X[gather[i], h] @ W[type(i), h]          typed_gemm_kernel
    dW[t, h] = sum of scale[i, h] * X[gather[i], h]^T @ dY[i, h]     typed_gemm_dw_kernel, then
               over the rows i of type t                             reduce_partials_kernel

A program takes one tile of the map (`dataeff.rgnn.tilemap`): rows of one type. Rows are gathered on
the way in and stored contiguously, so nothing is scattered and no sum uses atomics; sums are held
in float32 (float64 for float64). Axis 1 of the grid is the head.

Moved per tile, in elements: BLOCK_M * IN of X for each block of output columns, IN * OUT of W, and
BLOCK_M * OUT of Y; 2 * BLOCK_M * IN * OUT flops.
"""

import triton
import triton.language as tl


@triton.jit
def typed_gemm_kernel(
    X,
    W,
    Y,
    SegPtr,
    TileType,
    TileRow,
    Gather,
    RowScale,
    stride_x_row,
    stride_x_head,
    stride_w_type,
    stride_w_head,
    stride_w_in,
    stride_w_out,
    stride_y_row,
    stride_y_head,
    stride_s_row,
    stride_s_head,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    HAS_GATHER: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Multiplies one tile of rows with its type's weight, for BLOCK_N output columns."""
    num_n: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // num_n
    head = tl.program_id(1).to(tl.int64)
    row_type = tl.load(TileType + tile).to(tl.int64)
    if row_type < 0:  # padding: the host launches an upper bound of the number of tiles
        return
    row_begin = tl.load(TileRow + tile)
    row_end = tl.load(SegPtr + row_type + 1)
    rows = row_begin + tl.arange(0, BLOCK_M)
    inside = rows < row_end
    # Rows beyond the type's end read its first row of this tile again: no mask in the loop.
    source = tl.where(inside, rows, row_begin)
    if HAS_GATHER:
        source = tl.load(Gather + source)
    if INT64:
        source = source.to(tl.int64)
        rows = rows.to(tl.int64)
    cols = (tl.program_id(0) % num_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_ptr = X + head * stride_x_head + source[:, None] * stride_x_row + k[None, :]
    w_ptr = W + row_type * stride_w_type + head * stride_w_head
    w_ptr += k[:, None] * stride_w_in + cols[None, :] * stride_w_out
    ACC: tl.constexpr = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for start in range(0, IN, BLOCK_K):
        k_left = IN - start
        if IN % BLOCK_K == 0:
            x = tl.load(x_ptr)
        else:
            x = tl.load(x_ptr, mask=k[None, :] < k_left, other=0.0)
        if IN % BLOCK_K == 0 and OUT % BLOCK_N == 0:
            w = tl.load(w_ptr)
        else:
            w = tl.load(w_ptr, mask=(k[:, None] < k_left) & (cols[None, :] < OUT), other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION, out_dtype=ACC)
        x_ptr += BLOCK_K
        w_ptr += BLOCK_K * stride_w_in
    if HAS_SCALE:
        scale_ptr = RowScale + rows * stride_s_row + head * stride_s_head
        acc *= tl.load(scale_ptr, mask=inside, other=0.0).to(ACC)[:, None]
    y_ptr = Y + head * stride_y_head + rows[:, None] * stride_y_row + cols[None, :]
    tl.store(y_ptr, acc.to(Y.dtype.element_ty), mask=inside[:, None] & (cols[None, :] < OUT))


@triton.jit
def typed_gemm_dw_kernel(
    X,
    DY,
    First,
    Extra,
    SegPtr,
    TileType,
    TileRow,
    ExtraPtr,
    Gather,
    RowScale,
    chunk,
    num_heads,
    stride_x_row,
    stride_x_head,
    stride_dy_row,
    stride_dy_head,
    stride_s_row,
    stride_s_head,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    HAS_GATHER: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Sums x^T dy over one chunk of rows, for a BLOCK_I x BLOCK_O block of the weight.

    A type's first chunk goes to `First` [types, heads, IN, OUT], the others to their own slots of
    `Extra`: big types are split over many programs and the order of the sum stays fixed.
    """
    num_o: tl.constexpr = (OUT + BLOCK_O - 1) // BLOCK_O
    num_blocks: tl.constexpr = num_o * ((IN + BLOCK_I - 1) // BLOCK_I)
    tile = tl.program_id(0) // num_blocks
    block = tl.program_id(0) % num_blocks
    head = tl.program_id(1).to(tl.int64)
    row_type = tl.load(TileType + tile).to(tl.int64)
    if row_type < 0:
        return
    row_begin = tl.load(TileRow + tile)
    type_begin = tl.load(SegPtr + row_type)
    row_end = tl.minimum(tl.load(SegPtr + row_type + 1), row_begin + chunk)
    i = (block // num_o) * BLOCK_I + tl.arange(0, BLOCK_I)
    o = (block % num_o) * BLOCK_O + tl.arange(0, BLOCK_O)
    ACC: tl.constexpr = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros((BLOCK_I, BLOCK_O), dtype=ACC)
    for start in range(row_begin, row_end, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        inside = rows < row_end
        source = rows
        if HAS_GATHER:
            source = tl.load(Gather + rows, mask=inside, other=0)
        if INT64:
            source = source.to(tl.int64)
            rows = rows.to(tl.int64)
        x_ptr = X + head * stride_x_head + source[:, None] * stride_x_row + i[None, :]
        x = tl.load(x_ptr, mask=inside[:, None] & (i[None, :] < IN), other=0.0)
        dy_ptr = DY + head * stride_dy_head + rows[:, None] * stride_dy_row + o[None, :]
        dy = tl.load(dy_ptr, mask=inside[:, None] & (o[None, :] < OUT), other=0.0)
        if HAS_SCALE:
            scale_ptr = RowScale + rows * stride_s_row + head * stride_s_head
            scale = tl.load(scale_ptr, mask=inside, other=0.0).to(ACC)
            dy = (dy.to(ACC) * scale[:, None]).to(X.dtype.element_ty)
        acc = tl.dot(tl.trans(x), dy, acc, input_precision=PRECISION, out_dtype=ACC)
    part = (row_begin - type_begin) // chunk
    at = i[:, None] * OUT + o[None, :]
    mask = (i[:, None] < IN) & (o[None, :] < OUT)
    if part == 0:
        tl.store(First + (row_type * num_heads + head) * (IN * OUT) + at, acc, mask=mask)
    else:
        slot = (tl.load(ExtraPtr + row_type) + part - 1).to(tl.int64)
        tl.store(Extra + (slot * num_heads + head) * (IN * OUT) + at, acc, mask=mask)


@triton.jit
def reduce_partials_kernel(
    First,
    Extra,
    Out,
    SegPtr,
    ExtraPtr,
    SIZE: tl.constexpr,
    IN_PLACE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds a type's extra partial sums to its first; types with no rows get zeros.

    Every PARTS-th chunk is added up in order, and what that leaves once more, so that loads of
    PARTS chunks are under way together: one after another, each sum would wait for its own.
    SIZE = heads * IN * OUT elements per type. IN_PLACE: `Out` is `First`.
    """
    num_blocks: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    row_type = (tl.program_id(0) // num_blocks).to(tl.int64)
    at = (tl.program_id(0) % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = at < SIZE
    begin = tl.load(ExtraPtr + row_type)
    end = tl.load(ExtraPtr + row_type + 1)
    has_rows = tl.load(SegPtr + row_type) < tl.load(SegPtr + row_type + 1)
    if IN_PLACE and (has_rows & (begin == end)):
        return
    part = tl.arange(0, PARTS)
    extra_ptr = Extra + (begin + part).to(tl.int64)[:, None] * SIZE + at[None, :]
    sums = tl.zeros((PARTS, BLOCK), dtype=Extra.dtype.element_ty)
    for start in range(begin, end, PARTS):
        inside = (start + part < end)[:, None] & mask[None, :]
        sums += tl.load(extra_ptr, mask=inside, other=0.0)
        extra_ptr += PARTS * SIZE
    # `First` holds nothing for a type without rows: it was never written.
    acc = tl.load(First + row_type * SIZE + at, mask=at < tl.where(has_rows, SIZE, 0), other=0.0)
    acc += tl.sum(sums, 0)
    tl.store(Out + row_type * SIZE + at, acc.to(Out.dtype.element_ty), mask=mask)
