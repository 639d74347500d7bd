"""The CUDA gather itself, kernel and launch, run on the host warp by warp (`cuda_on_host/`).

`test_gather_emulation.py` has the index arithmetic alone, at every row size; here are the loops
over the grid, the sums of a warp, the reports, and the ends of the pages.
"""

import ctypes
import mmap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataeff.features.quantised import ELEMENTS, FORMATS, STORED_DTYPES, dequantise, quantise

GUARD, SENTINEL, PAGE = 64, 0xA5, mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)


def pages(nbytes, at_end):
    """`nbytes` of whole pages, their first or their last, between two that nobody may touch."""
    size = -(-max(nbytes, 1) // PAGE) * PAGE
    memory = mmap.mmap(-1, size + 2 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    for guard in (0, size + PAGE):
        assert libc.mprotect(ctypes.c_void_p(whole.data_ptr() + guard), PAGE, 0) == 0
    begin = PAGE + (size - nbytes if at_end else 0)
    return whole[begin : begin + nbytes]


def in_pages(values, at_end):
    memory = pages(values.nbytes, at_end)
    return memory.view(values.dtype).view(values.shape).copy_(values) if values.numel() else values


@pytest.fixture(scope="module")
def gather(cuda_kernels):
    """As `_core.gather_cuda`; gives rows, the number of wrong indices, what was seen, hits."""
    pointer, number, small = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    function = cuda_kernels.run_gather
    function.argtypes = [
        *(pointer, number, number, number, pointer, number, small, pointer, pointer, pointer),
        *(small, small, pointer, pointer, number, number, pointer, pointer, small, small, pointer),
        ctypes.c_char_p,
    ]

    def address(x):
        return None if x is None else x.data_ptr()

    def run(
        table, ids, dtype=None, *, scales=None, hot=None, slots=None, places=None, skew=0,
        blocks=0, device=0, counted=True,
    ):  # fmt: skip
        dtype = dtype or table.dtype
        width, kept = table.shape[1], table.element_size()
        start = GUARD + skew * dtype.itemsize
        nbytes = len(ids) * width * dtype.itemsize
        frame = torch.full((start + nbytes + GUARD + 16,), SENTINEL, dtype=torch.uint8)
        frame = frame[-frame.data_ptr() % 16 :][: start + nbytes + GUARD]
        out = frame[start : start + nbytes].view(dtype).view(len(ids), width)
        bad, seen, hits = (torch.zeros(n, dtype=torch.int64) for n in (1, 3, 1))
        raw = dtype == table.dtype
        error = ctypes.create_string_buffer(256)
        used = function(
            *(address(table), len(table), width * kept, table.stride(0) * kept),
            *(address(ids), len(ids), ids.element_size(), address(out)),
            *(address(bad), address(seen), device, blocks, address(places)),
            *(address(hot), 0 if hot is None else len(hot), width * kept, address(slots)),
            *(address(hits) if counted and hot is not None else None,),
            *((-1, 0) if raw else (FORMATS[table.dtype], ELEMENTS[dtype])),
            *(address(scales), error),
        )
        if error.value:
            raise RuntimeError(error.value.decode())
        assert used == device or not len(ids)
        assert (frame[:start] == SENTINEL).all() and (frame[start + nbytes :] == SENTINEL).all()
        return out, int(bad), seen.tolist(), int(hits)

    return run


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("num_ids", [1, 2, 31, 700])
@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_every_id_is_gathered_once_and_no_other_page_is_touched(gather, at_end, num_ids, blocks):
    torch.manual_seed(num_ids)
    for row_nbytes in (1, 3, 16, 33, 100, 128, 160, 353, 512, 1100):
        table = in_pages(torch.randint(256, (40, row_nbytes), dtype=torch.uint8), at_end)
        for dtype in (torch.int32, torch.int64):
            ids = in_pages(torch.randint(-40, 40, (num_ids,), dtype=dtype), at_end)
            ids[0], ids[-1] = 39, -40
            rows, bad, seen, _ = gather(table, ids, blocks=blocks, skew=row_nbytes % 16)
            assert torch.equal(rows, table[ids.long()]) and bad == 0 and seen == [0, 0, 0]


@pytest.mark.parametrize("blocks", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_wrong_indices_are_counted_each_once_and_one_is_shown(gather, blocks, dtype):
    limits = torch.iinfo(dtype)
    for width in (1, 40, 200, 1100):  # rows that share a load, and rows over several
        table = in_pages(torch.randint(1, 256, (7, width), dtype=torch.uint8), True)
        ids = torch.randint(-7, 7, (300,), dtype=dtype)
        wrong = torch.randperm(300)[:4]
        ids[wrong] = torch.tensor([7, -8, limits.max, limits.min], dtype=dtype)
        rows, bad, seen, _ = gather(table, ids, blocks=blocks)
        assert bad == 4 and seen[0] == 1 and seen[1] in ids[wrong].tolist() and seen[2] == 7
        assert not rows[wrong].any()
        right = torch.ones(300, dtype=torch.bool).index_fill_(0, wrong, False)
        assert torch.equal(rows[right], table[ids[right].long()])
    empty = torch.zeros(0, 5, dtype=torch.uint8)
    rows, bad, *_ = gather(empty, torch.tensor([0, -1], dtype=dtype), blocks=blocks)
    assert bad == 2 and not rows.any()


@settings(max_examples=60, deadline=None)
@given(
    store=st.sampled_from([None, *STORED_DTYPES]),
    dtype=st.sampled_from(list(ELEMENTS)),
    width=st.integers(1, 300),
    num_hot=st.integers(0, 20),
    num_ids=st.integers(0, 400),
    blocks=st.sampled_from([0, 1, 2]),
    with_slots=st.booleans(),
    with_places=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_hot_small_and_reordered_rows(
    gather, store, dtype, width, num_hot, num_ids, blocks, with_slots, with_places, seed
):
    torch.manual_seed(seed)
    dtype = torch.float32 if store is None else dtype
    x = torch.randn(20, width)
    codes, scales = (x, None) if store is None else quantise(x, store)
    chosen = torch.randperm(20)[:num_hot] if with_slots else torch.arange(num_hot)
    slots = torch.full((20,), -1, dtype=torch.int32)
    slots[chosen] = torch.arange(num_hot, dtype=torch.int32)
    ids = torch.randint(-20, 20, (num_ids,))
    places = torch.randperm(num_ids) if with_places else None
    hot, cold = in_pages(codes[chosen], True), in_pages(codes, True)
    cold[chosen] = 0  # the table's own copies of hot rows must not be read
    rows, bad, _, hits = gather(
        *(cold, ids, dtype),
        scales=scales, hot=hot if num_hot else None, slots=slots if with_slots else None,
        places=places, skew=seed % 5, blocks=blocks, counted=seed % 7 > 0,
    )  # fmt: skip
    expected = dequantise(codes, scales, dtype)[ids]
    assert torch.equal(rows if places is None else rows[places], expected) and bad == 0
    counted = num_hot and seed % 7
    assert hits == ((slots[ids % 20] >= 0).sum() if counted else 0)


def test_a_gather_is_launched_on_its_device_and_leaves_the_current_one(gather):
    table, ids = torch.randint(256, (5, 40), dtype=torch.uint8), torch.tensor([4, 0])
    assert torch.equal(gather(table, ids, device=1)[0], table[ids])
    with pytest.raises(RuntimeError, match="choosing CUDA device 7 failed"):
        gather(table, ids, device=7)
    assert torch.equal(gather(table, ids)[0], table[ids])  # no error is left behind


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("row_nbytes", [8, 65])
def test_rows_of_a_table_beyond_any_memory(gather, tmp_path, dtype, row_nbytes):
    """Row numbers near the largest of int32, in a file of 140 GB that is nearly all holes."""
    num_rows = 2**31 - 1
    with open(tmp_path / "table", "wb") as file:
        file.truncate(num_rows * row_nbytes)
    storage = torch.from_file(
        str(tmp_path / "table"), shared=True, size=num_rows * row_nbytes, dtype=torch.uint8
    )
    table = storage.view(num_rows, row_nbytes)
    ids = torch.tensor([0, 2**31 - 2, -1, 2**30, -(2**31) + 1, 2**31 // row_nbytes], dtype=dtype)
    for id in ids.tolist():
        table[id] = torch.randint(1, 256, (row_nbytes,), dtype=torch.uint8)
    rows, bad, _, _ = gather(table, ids)
    assert torch.equal(rows, table[ids.long()]) and bad == 0 and rows.all()
