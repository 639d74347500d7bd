"""Tile sizes, warps and stages of the typed GEMM kernels, from shapes; and what tuning chooses."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Choice:
    """What `rgnn.tune` chooses for one layer on graphs of about one size and shape.

    Attributes:
        disabled: optional passes that are left out.
        block_elements: elements of the widest value that a generated Triton traversal holds at a
            time: rows of a block times their padded width.
        parts_per_thread: pieces that a C++ traversal's rows are handed to each thread in.
    """

    disabled: tuple[str, ...] = ()
    block_elements: int = 2048
    parts_per_thread: int = 16


@dataclass(frozen=True)
class GemmSchedule:
    """One kernel's tiles: block_m x block_n of the result, block_k along the sum.

    `max_registers` a thread are said aloud where the assembler's own choice spills.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    def chunk_rows(self, num_rows: int, num_types: int) -> int:
        """Rows that one program of the weight gradient sums: a multiple of block_k.

        Enough chunks to fill the largest GPUs some times over, few enough that a chunk's rows
        outweigh the partial result it writes.
        """
        even = -(-num_rows // 512)
        blocks = max(-(-even // self.block_k), 8)
        return self.block_k * (1 << (blocks - 1).bit_length())


def gemm_schedule(
    dtype: torch.dtype,
    num_in: int,
    num_out: int,
    num_rows: int,
    num_types: int,
    block_m: int | None = None,
) -> GemmSchedule:
    """The forward kernel's schedule; `block_m` is that of a tile map already built."""
    if block_m is None:
        mean_rows = num_rows / max(num_types, 1)
        block_m = 64 if mean_rows >= 48 else 32 if mean_rows >= 24 else 16
    wide = dtype.itemsize >= 4
    block_n = min(_tile(num_out), 64 if wide else 128)
    block_k = min(_tile(num_in), 32 if wide else 64)
    # Exact float32 needs up to 96 registers on 32 rows and 168 on 64: left to itself, the assembler
    # stays at 80 for some widths on sm_90 and sm_100, and spills up to 16 bytes.
    most = 168 if block_m > 32 else 128
    max_registers = most if wide and block_m > 16 else None
    return GemmSchedule(block_m, block_n, block_k, 4, 3, max_registers)


def dw_schedule(
    dtype: torch.dtype, num_in: int, num_out: int, precision: str = "ieee"
) -> GemmSchedule:
    """The weight gradient's schedule: block_m over inputs, block_n over outputs, block_k rows."""
    block_m, block_n = min(_tile(num_in), 64), min(_tile(num_out), 64)
    if dtype.itemsize >= 4 and precision == "ieee":
        # Exact float32 keeps both operands of each multiply-add in registers: 32 rows on 4 warps
        # spill on sm_80 to sm_100, 16 rows on 8 warps take 128 registers.
        return GemmSchedule(block_m, block_n, 16, num_warps=8, num_stages=3)
    return GemmSchedule(block_m, block_n, 128 // dtype.itemsize, num_warps=4, num_stages=3)


def _tile(features: int) -> int:
    """The power of two that holds these features, no less than tensor cores take."""
    return max(16, 1 << (features - 1).bit_length())
