import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dataeff.rgnn.tilemap import TileMaps, build_tile_map, max_extra_tiles, max_tiles


def expected_tiles(counts, block):
    tiles, begin = [], 0
    for row_type, count in enumerate(counts):
        tiles += [(row_type, begin + start) for start in range(0, count, block)]
        begin += count
    return tiles


@given(
    counts=st.lists(st.integers(0, 2) | st.integers(0, 300), max_size=40),
    block=st.sampled_from([1, 16, 32, 64, 128]),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_tiles_cover_every_row_once_and_no_two_types(counts, block, dtype):
    seg_ptr = torch.tensor([0, *counts]).cumsum(0).to(dtype)
    tile_map = build_tile_map(seg_ptr, sum(counts), block)
    tiles = expected_tiles(counts, block)
    assert tile_map.num_tiles == max_tiles(sum(counts), len(counts), block) >= len(tiles)
    padding = [(-1, -1)] * (tile_map.num_tiles - len(tiles))
    made = list(zip(tile_map.types.tolist(), tile_map.rows.tolist(), strict=True))
    assert made == tiles + padding
    extra = [max(-(-count // block) - 1, 0) for count in counts]
    assert tile_map.extra_ptr.diff().tolist() == extra
    assert sum(extra) <= max_extra_tiles(sum(counts), block)
    assert tile_map.rows.dtype == dtype and tile_map.types.dtype == torch.int32


@pytest.mark.parametrize(
    ("num_rows", "num_types", "block"), [(50, 7, 16), (7, 50, 16), (33, 1, 32)]
)
def test_bound_is_reached(num_rows, num_types, block):
    single = min(num_rows, num_types) - 1
    counts = [1] * single + [num_rows - single]
    assert len(expected_tiles(counts, block)) == max_tiles(num_rows, num_types, block)


def test_nothing_is_read_back():
    # Meta tensors hold no values: whatever needs one fails here.
    tile_map = build_tile_map(torch.zeros(9, dtype=torch.int32, device="meta"), 1000, 64)
    assert tile_map.types.device.type == "meta"
    assert tile_map.num_tiles == 8 + 992 // 64
    assert tile_map.nbytes == 8 * tile_map.num_tiles + 4 * 9


def test_bad_input_is_refused():
    with pytest.raises(TypeError, match="float32"):
        build_tile_map(torch.zeros(3), 0, 16)
    with pytest.raises(ValueError, match=r"\[0\]"):
        build_tile_map(torch.zeros(0, dtype=torch.int32), 0, 16)
    with pytest.raises(ValueError, match="got 0"):
        build_tile_map(torch.zeros(3, dtype=torch.int32), 0, 0)


def test_maps_of_each_block_are_kept():
    maps = TileMaps(torch.tensor([0, 40, 41]), 41)
    small, large = maps.of_block(16), maps.of_block(64)
    assert (small.block, large.block) == (16, 64)
    assert maps.of_block(16) is small and maps.of_block(64) is large
    assert maps.nbytes == small.nbytes + large.nbytes
