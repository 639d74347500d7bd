"""Rows kept smaller than they are delivered: the formats, their definition and their making."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from dataeff import _core
from dataeff._ops import row_table

Store: TypeAlias = Literal["fp16", "bf16", "int8", "fp8"]

STORED_DTYPES: dict[str, torch.dtype] = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
# Numbers of RowFormat and Element in csrc/gather/row_format.h.
FORMATS = {torch.float16: 0, torch.bfloat16: 1, torch.int8: 2, torch.float8_e4m3fn: 3}
ELEMENTS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}

LARGEST_CODE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
SMALLEST_SCALE = 2.0**-126
LARGEST_FINITE = 2.0**128 - 2.0**105  # float32's largest but one: room for a rounding up
LINE_NBYTES = 128


def quantise_reference(x: Tensor, store: Store) -> tuple[Tensor, Tensor | None]:
    """What `quantise` gives, in plain PyTorch: the definition.

    `fp16` and `bf16` are `x.to(dtype)`. `int8` and `fp8` are, per row and in float32,

        scale = max(max|row| / largest, 2^-126)      largest: 127 for int8, 448 for fp8 (e4m3)
        code  = round(row * (1 / scale))             to the nearest, ties to even
    """
    dtype = stored_dtype(x, store)
    if dtype not in LARGEST_CODE:
        return x.to(dtype), None
    values = x.float().reshape(x.shape[0], -1)
    if not bool(values.isfinite().all()):
        raise ValueError("a row holds a NaN, an infinity or a value that is one as float32")
    largest = values.abs().amax(1) if values.shape[1] else values.new_zeros(len(values))
    limit = (
        torch.tensor(LARGEST_FINITE, dtype=torch.float32, device="cpu") / LARGEST_CODE[dtype]
    )  # largest code times it is finite
    scales = (largest / LARGEST_CODE[dtype]).clamp(SMALLEST_SCALE, float(limit))
    scaled = values * (1 / scales)[:, None]
    codes = scaled.round().to(dtype) if dtype == torch.int8 else scaled.to(dtype)
    return codes.reshape(x.shape), scales


def dequantise(codes: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The rows that codes stand for: `(code * scale).to(dtype)`, the product in float32."""
    values = codes.float()
    if scales is not None:
        values = values * scales.view(-1, *[1] * (codes.dim() - 1))
    return values.to(dtype)


def quantise(x: Tensor, store: Store) -> tuple[Tensor, Tensor | None]:
    """Makes rows small: codes, and for int8 and fp8 one scale a row.

    The scales are an array of their own, so that an int8 row of 128 elements stays one 128-byte
    line, one request over the bus; the codes begin at a multiple of 128 bytes.

    What becomes of a value v of a row with largest magnitude M, `v'` its delivery in float32:

    | store | bound on abs(v - v') |
    |---|---|
    | `fp16` | abs(v) 2^-11, or 2^-25 where abs(v) < 2^-14; from 65520 on, infinity |
    | `bf16` | abs(v) 2^-8 (abs(v) >= 2^-126) |
    | `int8` | M / 254 (1 + 2^-14) |
    | `fp8` (e4m3) | max(abs(v) 2^-4, M / 448 2^-10) (1 + 2^-14) |

    For M < 127 * 2^-126 (fp8: 448 * 2^-126) the scale is 2^-126, and M / 127 (M / 448) in the
    bounds becomes 2^-126: rows of zeros and of denormals are no special case. `fp16` and `bf16`
    keep NaN, infinity and the sign of zero; `int8` and `fp8` refuse rows that are not finite, since
    no scale carries them, and int8 delivers -0.0 as 0.0. A delivery in a narrower dtype than
    float32 is rounded once more.

    Args:
        x: [num_rows, ...], float16, bfloat16, float32 or float64, host memory; each row contiguous.
        store: `"fp16"`, `"bf16"`, `"int8"` or `"fp8"`.

    Returns:
        codes, [num_rows, ...], of the dtype of the format; scales, [num_rows], float32, or None.

    Raises:
        TypeError: `x` is not of these dtypes.
        ValueError: an unknown `store`, or a row for int8 or fp8 that is not finite (named).
    """
    dtype = stored_dtype(x, store)
    if dtype not in LARGEST_CODE:
        return aligned_empty(x.shape, dtype).copy_(x), None
    codes = aligned_empty(x.shape, dtype)
    scales = torch.empty(x.shape[0], dtype=torch.float32, device="cpu")
    _core.encode_rows(
        *row_table(x),
        element=ELEMENTS[x.dtype],
        format=FORMATS[dtype],
        codes=codes.data_ptr(),
        scales=scales.data_ptr(),
        num_threads=torch.get_num_threads(),
    )
    return codes, scales


def stored_dtype(x: Tensor, store: Store) -> torch.dtype:
    """The dtype of the codes; ValueError or TypeError when there are none for `x`."""
    if store not in STORED_DTYPES:
        raise ValueError(f"store={store!r} is not one of {', '.join(map(repr, get_args(Store)))}")
    if x.dtype not in ELEMENTS:
        kinds = ", ".join(str(dtype) for dtype in ELEMENTS)
        raise TypeError(f"store={store!r} keeps rows of {kinds}; x is {x.dtype}")
    return STORED_DTYPES[store]


def aligned_empty(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """An uninitialised host tensor that begins at a multiple of 128 bytes, on huge pages."""
    nbytes = shape.numel() * dtype.itemsize
    room = torch.empty(nbytes + LINE_NBYTES, dtype=torch.uint8, device="cpu")
    _core.prefer_huge_pages(room.data_ptr(), room.nbytes)
    skip = -room.data_ptr() % LINE_NBYTES
    return room[skip : skip + nbytes].view(dtype).view(shape)
