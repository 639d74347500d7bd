"""Which rows of a type-sorted matrix each GPU program works on, computed without a host sync.

Rows are sorted by type; `seg_ptr[t]:seg_ptr[t + 1]` are those of type t. No tile crosses a type, so
a program multiplies with one weight. How many tiles there are depends on device data; the host
launches an upper bound of them and the programs beyond find type -1 and stop. That suits sampled
blocks and CUDA graphs; for a fixed graph `TileMaps` keeps each map from its first use on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dataeff.memory.stream_order import StreamOrder
from dataeff.rgnn.capture import refuse_capture


@dataclass(frozen=True)
class TileMap:
    """Tiles of at most `block` rows, each inside one type.

    Attributes:
        types: the tile's type, or -1 for padding, [num_tiles], int32.
        rows: the tile's first row, or -1 for padding, [num_tiles], dtype of `seg_ptr`.
        extra_ptr: exclusive prefix sum over types of the tiles beyond each type's first,
            [num_types + 1], int32. A reduction over tiles keeps its partial results there.
        block: rows per tile.
    """

    types: Tensor
    rows: Tensor
    extra_ptr: Tensor
    block: int

    @property
    def num_tiles(self) -> int:
        """Programs to launch: the bound, padding included."""
        return self.types.numel()

    @property
    def nbytes(self) -> int:
        """Bytes held by the three index arrays."""
        return sum(t.numel() * t.element_size() for t in (self.types, self.rows, self.extra_ptr))


class TileMaps:
    """The tile maps of one `seg_ptr`, built at the first use of each block size and kept.

    Args:
        seg_ptr: first row of each type, and the end, [num_types + 1], int32 or int64.
        num_rows: rows in total.
    """

    def __init__(self, seg_ptr: Tensor, num_rows: int) -> None:
        self.seg_ptr = seg_ptr
        self.num_rows = num_rows
        self._of_block: dict[int, TileMap] = {}
        self._order = StreamOrder(seg_ptr.device)

    def of_block(self, block: int) -> TileMap:
        """The map with tiles of at most `block` rows.

        Raises:
            RuntimeError: it would be built while a CUDA graph is captured.
        """
        if block not in self._of_block:
            refuse_capture(self.seg_ptr.device, f"the map of tiles of {block} rows")
            made = build_tile_map(self.seg_ptr, self.num_rows, block)
            self._order.made()
            self._of_block[block] = made
        self._order.read()
        return self._of_block[block]

    def __del__(self) -> None:
        if "_order" in self.__dict__:
            self._order.let_go()

    @property
    def nbytes(self) -> int:
        """Bytes held by the maps built so far."""
        return sum(tile_map.nbytes for tile_map in self._of_block.values())


def max_tiles(num_rows: int, num_types: int, block: int) -> int:
    """The most tiles that `num_rows` rows in `num_types` types can need: known on the host.

    A new type costs at most one tile, each further `block` rows one more:
    `min(rows, types + (rows - types) // block)` once there are as many rows as types.
    """
    if num_rows <= num_types:
        return num_rows
    return num_types + (num_rows - num_types) // block


def max_extra_tiles(num_rows: int, block: int) -> int:
    """The most tiles beyond the first of their type: each has a full tile before it."""
    return max(num_rows - 1, 0) // block


def build_tile_map(seg_ptr: Tensor, num_rows: int, block: int) -> TileMap:
    """Cuts every type's rows into tiles, on the device of `seg_ptr`, with no host sync.

    Args:
        seg_ptr: first row of each type, and the end, [num_types + 1], int32 or int64, ascending
            from 0 to `num_rows`.
        num_rows: rows in total, as the host knows it from a shape.
        block: rows per tile.

    Raises:
        TypeError: `seg_ptr` is not int32 or int64.
        ValueError: `seg_ptr` is not one-dimensional with at least one entry, or `block` is not
            positive.
    """
    check_seg_ptr(seg_ptr)
    if block <= 0:
        raise ValueError(f"block must be positive, got {block}")
    tiles = (seg_ptr.diff() + (block - 1)).div(block, rounding_mode="floor")
    tile_ptr = _exclusive_sum(tiles)
    extra_ptr = _exclusive_sum((tiles - 1).clamp_(min=0))
    slots = torch.arange(
        max_tiles(num_rows, tiles.numel(), block), device=seg_ptr.device, dtype=tile_ptr.dtype
    )
    # right=True skips empty types: their tile_ptr equals the next one's.
    types = torch.searchsorted(tile_ptr, slots, right=True, out_int32=True) - 1
    padding = slots >= tile_ptr[-1]
    types.masked_fill_(padding, 0)
    rows = seg_ptr[types] + (slots - tile_ptr[types]).to(seg_ptr.dtype) * block
    return TileMap(
        types.masked_fill_(padding, -1), rows.masked_fill_(padding, -1), extra_ptr, block
    )


def choose_tile_map(
    kept: TileMap | TileMaps | None, seg_ptr: Tensor, num_rows: int, block: int
) -> TileMap:
    """The map that was handed over, the kept one of a block size, or one built for this call."""
    if isinstance(kept, TileMap):
        return kept
    return build_tile_map(seg_ptr, num_rows, block) if kept is None else kept.of_block(block)


def check_seg_ptr(seg_ptr: Tensor) -> None:
    """Refuses what cannot be a segment pointer by its dtype or shape; the values stay unread."""
    if seg_ptr.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"seg_ptr must be int32 or int64, got {seg_ptr.dtype}")
    if seg_ptr.dim() != 1 or seg_ptr.numel() == 0:
        raise ValueError(f"seg_ptr must have the shape [num_types + 1], got {list(seg_ptr.shape)}")


def _exclusive_sum(counts: Tensor) -> Tensor:
    """[n] -> [n + 1], int32: tile counts are bounded by rows / 16 and always fit."""
    sums = counts.new_zeros(counts.numel() + 1, dtype=torch.int32)
    torch.cumsum(counts, 0, dtype=torch.int32, out=sums[1:])
    return sums
