"""Tiles, warps and stages of the typed GEMM kernels: which there are, and which the model prefers.

A program multiplies one tile: `block_m` x `block_n` results over `depth` terms, `block_k` at a
time. The model counts what its tile moves and does, in whole tiles, padding included:

    stage  = (block_m + block_n) * block_k * item size      bytes of both operands
    nbytes = ceil(depth / block_k) * stage + block_m * block_n * item size
    flops  = 2 * block_m * block_n * block_k * ceil(depth / block_k)

Programs stay on a multiprocessor together as its shared memory holds `num_stages` stages of each
and its registers their threads. All but the stage being multiplied are under way, and memory is
only as fast as the bytes under way cover its latency:

    resident  = min(shared bytes / (num_stages * stage), registers / (threads * registers each))
    bandwidth = BYTES_S * min(1, resident * max(num_stages - 1, 1) * stage / (LATENCY_S * BYTES_S))

where BYTES_S, FLOPS_S are one multiprocessor's. The busiest one runs ceil(programs / number of
multiprocessors) programs, each as long as the slower of its bytes and its flops takes. The rates
rank tiles and promise nothing: `rgnn.tune` measures.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from dataeff.rgnn.aot import shared_limit
from dataeff.rgnn.profile import nearby


class GemmSchedule(NamedTuple):
    """One kernel's tiles: block_m x block_n of the result, block_k along the sum.

    `max_registers` a thread are said aloud where the assembler's own choice spills.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    def chunk_rows(self, num_rows: int) -> int:
        """Rows that one program of the weight gradient sums: a multiple of block_k.

        Enough chunks to fill the largest GPUs some times over, few enough that a chunk's rows
        outweigh the partial result it writes.
        """
        even = -(-num_rows // 512)
        blocks = max(-(-even // self.block_k), 8)
        return self.block_k * (1 << (blocks - 1).bit_length())

    def as_launched(self, gathered: bool) -> GemmSchedule:
        """With the stages to ask Triton for, in a loop that gathers rows by row numbers it loads.

        Triton shares the stages out: rows that wait for their numbers get half of those ahead.
        """
        return self._replace(num_stages=2 * self.num_stages - 1) if gathered else self

    def __str__(self) -> str:
        return (
            f"{self.block_m} x {self.block_n} x {self.block_k}, {self.num_warps} warps,"
            f" {self.num_stages} stages"
        )


class Product(NamedTuple):
    """A typed product or, with `gradient`, the gradient of its weight, in sizes."""

    gradient: bool
    num_heads: int
    num_in: int
    num_out: int
    num_rows: int
    num_types: int


# Exact float32 takes up to 96 registers on 32 rows and more than 168 on 64 with two stages: left to
# itself, the assembler stays at 80 for some widths and spills up to 16 bytes. A weight gradient
# keeps both operands of each exact multiply-add in registers: 32 rows on 4 warps spill, 16 rows on
# 8 warps take 128.
_WIDE = (
    GemmSchedule(64, 64, 32, 4, 3, 168),
    GemmSchedule(64, 64, 32, 4, 2, 200),
    GemmSchedule(64, 64, 16, 4, 4, 168),
    GemmSchedule(64, 64, 32, 8, 3, 168),
    GemmSchedule(64, 32, 32, 4, 3, 168),
    GemmSchedule(32, 64, 32, 4, 3, 128),
    GemmSchedule(32, 32, 32, 4, 3, 128),
    GemmSchedule(16, 64, 32, 4, 3),
)
_HALF = (
    GemmSchedule(64, 128, 64, 4, 3),
    GemmSchedule(64, 128, 32, 4, 4),
    GemmSchedule(64, 64, 64, 4, 3),
    GemmSchedule(128, 128, 64, 8, 3),
    GemmSchedule(128, 64, 64, 4, 3),
    GemmSchedule(32, 128, 64, 4, 3, 128),  # 64 wide its own choice, 56, spills 8 bytes on sm_90
    GemmSchedule(16, 128, 64, 4, 3),
)
_EXACT_GRADIENT = (
    GemmSchedule(64, 64, 16, 8, 3),
    GemmSchedule(64, 64, 16, 8, 2),
    GemmSchedule(32, 64, 16, 8, 3),
    GemmSchedule(32, 32, 16, 4, 3),
)
_TF32_GRADIENT = (
    GemmSchedule(64, 64, 32, 4, 3, 168),  # its own choice, 64, spills 24 bytes on sm_100
    GemmSchedule(64, 64, 32, 8, 3),
    GemmSchedule(64, 64, 16, 4, 4),
    GemmSchedule(32, 64, 32, 4, 3),
)
_HALF_GRADIENT = (
    GemmSchedule(64, 64, 64, 4, 3, 168),  # its own choice, 96, spills 8 bytes on sm_100 at 16 wide
    GemmSchedule(64, 64, 32, 4, 4, 168),  # likewise, 64, and on sm_80 48 at 32 wide
    GemmSchedule(64, 128, 64, 8, 3, 128),
    GemmSchedule(32, 64, 64, 4, 3),
)

# Multiprocessors by compute capability; registers of each.
_PROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148}
_REGISTERS = 65536
_BYTES_S, _LATENCY_S = 2e12, 8e-7
_FLOPS_S = {"exact": 30e12, "tf32": 150e12, "half": 300e12}


def ranked_tiles(
    product: Product, dtype: torch.dtype, precision: str = "ieee", capability: int = 90
) -> list[GemmSchedule]:
    """The tiles for one product that fit the GPU, by the model's time; the first is the default.

    Args:
        product: its sizes. Blocks are cut to its features.
        dtype: of the operands.
        precision: of float32 products, `ieee` or `tf32`.
        capability: of the GPU, 90 for sm_90.
    """
    return list(_ranked(product, dtype, precision, capability))


def schedule_of(
    product: Product,
    dtype: torch.dtype,
    precision: str = "ieee",
    capability: int = 90,
    *,
    chosen: GemmSchedule | None = None,
    block_m: int | None = None,
) -> GemmSchedule:
    """The tile that a launch takes.

    Args:
        product: its sizes.
        dtype: of the operands.
        precision: of float32 products, `ieee` or `tf32`.
        capability: of the GPU, 90 for sm_90.
        chosen: what `rgnn.tune` chose, cut to the product. It gives way to the model's where it is
            no candidate: TF32 was switched since.
        block_m: the rows of a tile map already built.
    """
    # Sizes that plans round too: the same call has the same tile, and the ranking is found again.
    product = product._replace(num_rows=nearby(product.num_rows))
    ranked = _ranked(product, dtype, precision, capability)
    if chosen is not None and _cut(chosen, product) in ranked:
        return _cut(chosen, product)
    if block_m is None:
        return ranked[0]
    return next((t for t in ranked if t.block_m == block_m), ranked[0]._replace(block_m=block_m))


def modelled_s(
    tile: GemmSchedule,
    product: Product,
    dtype: torch.dtype,
    precision: str = "ieee",
    capability: int = 90,
) -> float:
    """Seconds that the model expects of one product on this tile, all programs together."""
    programs, depth = _programs(tile, product)
    steps = -(-depth // tile.block_k)
    stage = _stage_nbytes(tile, dtype)
    nbytes = steps * stage + tile.block_m * tile.block_n * dtype.itemsize
    flops = 2 * tile.block_m * tile.block_n * tile.block_k * steps
    threads = 32 * tile.num_warps
    sums = tile.block_m * tile.block_n * max(dtype.itemsize // 4, 1) // threads
    registers = tile.max_registers or min(sums + 64, 255)
    shared = shared_limit(capability)
    resident = min(shared // (tile.num_stages * stage), _REGISTERS // (threads * registers))
    processors = _PROCESSORS.get(capability, 132)
    rounds = -(-programs // processors)
    under_way = min(max(resident, 1), rounds) * min(max(tile.num_stages - 1, 1), steps) * stage
    bytes_s = _BYTES_S / processors
    bytes_s *= min(1.0, under_way / (_LATENCY_S * bytes_s))
    flops_s = _FLOPS_S[_kind(dtype, precision)] / processors
    return rounds * max(nbytes / bytes_s, flops / flops_s)


@lru_cache(maxsize=1024)
def _ranked(
    product: Product, dtype: torch.dtype, precision: str, capability: int
) -> tuple[GemmSchedule, ...]:
    table = {
        ("exact", False): _WIDE,
        ("tf32", False): _WIDE,
        ("half", False): _HALF,
        ("exact", True): _EXACT_GRADIENT,
        ("tf32", True): _TF32_GRADIENT,
        ("half", True): _HALF_GRADIENT,
    }[_kind(dtype, precision), product.gradient]
    limit = shared_limit(capability)
    if dtype == torch.float64:  # two registers for each of float32
        few = None if product.gradient else 128  # 16 rows spill 8 bytes at 72, its own choice
        table = tuple(
            t._replace(block_k=16, max_registers=255 if t.max_registers else few) for t in table
        )
    cut = dict.fromkeys(_cut(tile, product) for tile in table)
    fitting = [t for t in cut if t.num_stages * _stage_nbytes(t, dtype) <= limit]
    times = {t: modelled_s(t, product, dtype, precision, capability) for t in fitting}
    return tuple(sorted(fitting, key=times.__getitem__))  # stable: the usual ones first


def _kind(dtype: torch.dtype, precision: str) -> str:
    if dtype.itemsize < 4:
        return "half"
    return "tf32" if dtype == torch.float32 and precision == "tf32" else "exact"


def _cut(tile: GemmSchedule, product: Product) -> GemmSchedule:
    """The tile without what lies beyond the product's features."""
    num_in, num_out = _tile(product.num_in), _tile(product.num_out)
    tile = tile._replace(block_n=min(tile.block_n, num_out))
    if product.gradient:
        return tile._replace(block_m=min(tile.block_m, num_in))
    return tile._replace(block_k=min(tile.block_k, num_in))


def _programs(tile: GemmSchedule, product: Product) -> tuple[int, int]:
    """How many programs run, and the terms that each of them sums."""
    blocks = -(-product.num_out // tile.block_n) * product.num_heads
    rows, depth = tile.block_m, product.num_in
    if product.gradient:
        blocks *= -(-product.num_in // tile.block_m)
        rows = depth = tile.chunk_rows(product.num_rows)
        depth = min(depth, max(product.num_rows // max(product.num_types, 1), 1))
    # Each type's last tile is half full on average, and is at least one.
    types = max(min(product.num_types, product.num_rows), 1)
    tiles = types * max(product.num_rows / (types * rows) + 0.5, 1.0)
    return max(round(tiles * blocks), 1), depth


def _stage_nbytes(tile: GemmSchedule, dtype: torch.dtype) -> int:
    return (tile.block_m + tile.block_n) * tile.block_k * dtype.itemsize


def _tile(features: int) -> int:
    """The power of two that holds these features, no less than tensor cores take."""
    return max(16, 1 << max(features - 1, 0).bit_length())
