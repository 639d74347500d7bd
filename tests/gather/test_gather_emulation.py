"""The CUDA gather's index logic, run on the host lane by lane, and the bus requests it makes."""

import ctypes
import itertools

import numpy as np
import pytest
import torch

from dataeff import _core

LINE = 128
SENTINEL = 0xA5


class Counts(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("loads", "requests", "words", "bad", "stray_words", "hits")
    ]


@pytest.fixture(scope="module")
def emulation(native_library):
    function = native_library("emulation.cpp").emulate_gather
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer, number, number, number, pointer, number, ctypes.c_int]
    function.argtypes += [pointer, ctypes.POINTER(Counts)]
    function.restype = None
    return function


def aligned_bytes(nbytes: int) -> np.ndarray:
    raw = np.random.default_rng(0).integers(256, size=nbytes + LINE, dtype=np.uint8)
    skip = -raw.ctypes.data % LINE
    return raw[skip : skip + nbytes]


ARENA, OUT = aligned_bytes(1 << 20), aligned_bytes(1 << 20)


def run(emulation, row_nbytes, offset, ids, *, num_rows, stride=None, out_offset=0):
    """Gathers in emulation; returns the table, the rows, the counts and every row's address."""
    stride = row_nbytes if stride is None else stride
    table = np.lib.stride_tricks.as_strided(
        ARENA[offset + LINE :], (num_rows, row_nbytes), (stride, 1)
    )
    nbytes = len(ids) * row_nbytes
    frame = OUT[: nbytes + 2 * LINE + out_offset]
    frame[:] = SENTINEL
    out = frame[LINE + out_offset : LINE + out_offset + nbytes]
    counts = Counts()
    emulation(
        *(table.ctypes.data, num_rows, row_nbytes, stride),
        *(ids.ctypes.data, len(ids), ids.itemsize),
        *(out.ctypes.data, counts),
    )
    assert (frame[: LINE + out_offset] == SENTINEL).all(), "wrote before the rows"
    assert (frame[LINE + out_offset + nbytes :] == SENTINEL).all(), "wrote behind the rows"
    assert counts.stray_words == 0
    return table, out.reshape(len(ids), row_nbytes), counts


def lines_of_rows(table, ids):
    """128-byte lines that the rows of `ids` touch, row by row: the fewest possible requests."""
    begin = table.ctypes.data + ids.astype(np.int64) % len(table) * table.strides[0]
    return ((begin + table.shape[1] - 1) // LINE - begin // LINE + 1).sum()


@pytest.mark.parametrize("first", range(1, 1101, 100))
def test_every_row_size_and_alignment_by_the_fewest_requests(emulation, first):
    ids = np.array([4, 0, -1, 2, 1, -4, 5], dtype=np.int64)
    for row_nbytes in range(first, first + 100):
        stride = row_nbytes + 2 * LINE  # no two rows share a line
        for offset in range(LINE):
            # Of any 32 row sizes, each residue by 16 meets every pair of source and target's.
            out_offset = (offset + offset // 16 * 2 + row_nbytes // 16) % 16
            table, out, counts = run(
                *(emulation, row_nbytes, offset, ids),
                num_rows=7,
                stride=stride,
                out_offset=out_offset,
            )
            assert np.array_equal(out, table[ids]), (row_nbytes, offset)
            where = (table.ctypes.data, 7, row_nbytes, stride, ids.ctypes.data, 7, 8)
            shifted, unshifted = _core.count_requests(*where)  # what the benchmark's table prints
            fewest = lines_of_rows(table, ids)
            assert unshifted >= fewest == counts.requests == shifted, (row_nbytes, offset)


def test_short_rows_without_gaps_never_fetch_a_line_twice(emulation):
    ids = np.array([4, 0, -1, 2, 2, -7, 5], dtype=np.int32)
    for row_nbytes in range(1, 162):
        for offset in range(LINE):
            table, out, counts = run(
                emulation, row_nbytes, offset, ids, num_rows=7, out_offset=offset * 5 % 16
            )
            assert np.array_equal(out, table[ids]), (row_nbytes, offset)
            # Rows that share a load may share a line.
            assert counts.requests <= lines_of_rows(table, ids), (row_nbytes, offset)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_every_pair_of_alignments_of_source_and_target(emulation, dtype):
    ids = np.array([1, -2], dtype=dtype)
    for row_nbytes in (*range(1, 162), 200, 256, 353, 512, 1000, 1100):
        for offset, out_offset in itertools.product(range(16), range(16)):
            table, out, _ = run(
                emulation, row_nbytes, offset, ids, num_rows=3, out_offset=out_offset
            )
            assert np.array_equal(out, table[ids]), (row_nbytes, offset, out_offset)


@pytest.mark.parametrize(
    ("row_nbytes", "rows_per_load"), [(4, 32), (16, 32), (32, 16), (64, 8), (128, 4), (48, 10)]
)
def test_short_aligned_rows_share_a_load(emulation, row_nbytes, rows_per_load):
    ids = np.arange(3 * rows_per_load, dtype=np.int64) * 5
    *_, counts = run(emulation, row_nbytes, 0, ids, num_rows=500)
    assert counts.loads == 3


@pytest.mark.parametrize("row_nbytes", [512, 1024])
@pytest.mark.parametrize("offset", [0, 16, 64, 112])
def test_no_lane_is_idle_when_words_fill_lines(emulation, row_nbytes, offset):
    # The shift of a row that begins in mid-line costs no extra load and leaves no lane idle.
    ids = np.array([0, 7, 3, 1], dtype=np.int64)
    *_, counts = run(emulation, row_nbytes, offset, ids, num_rows=8)
    assert counts.words == counts.loads * 32 == len(ids) * row_nbytes // 16


@pytest.mark.parametrize("row_nbytes", [1, 3, 16, 100, 129, 400, 1100])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_wrong_indices_give_zero_rows_and_are_counted(emulation, row_nbytes, dtype):
    extreme = np.iinfo(dtype)
    ids = np.array([1, 6, -7, 0, extreme.max, -6, extreme.min], dtype=dtype)
    table, out, counts = run(emulation, row_nbytes, 3, ids, num_rows=6)
    assert counts.bad == 4
    wrong = (ids < -6) | (ids >= 6)
    assert (out[wrong] == 0).all()
    assert np.array_equal(out[~wrong], table[ids[~wrong]])


@pytest.mark.parametrize("stride", [0, 40, 1, -400])
def test_rows_that_overlap_repeat_or_run_backwards(emulation, stride):
    ids = np.array([0, 3, -1, 2], dtype=np.int64)
    offset = 2000 if stride < 0 else 9
    table = np.lib.stride_tricks.as_strided(ARENA[offset + LINE :], (4, 177), (stride, 1))
    out, counts = np.zeros((4, 177), np.uint8), Counts()
    emulation(table.ctypes.data, 4, 177, stride, ids.ctypes.data, 4, 8, out.ctypes.data, counts)
    assert np.array_equal(out, table[ids])


def test_rows_and_bytes_past_32_bits(emulation, vast, far_rows):
    rows = np.arange(1, 22, dtype=np.uint8).reshape(7, 3)
    vast[far_rows % len(vast)] = torch.from_numpy(rows)
    ids = np.append(far_rows.numpy(), [len(vast), -len(vast) - 1])
    out, counts = np.full((9, 3), SENTINEL, np.uint8), Counts()
    emulation(vast.data_ptr(), len(vast), 3, 3, ids.ctypes.data, 9, 8, out.ctypes.data, counts)
    assert (out[:7] == rows).all() and (out[7:] == 0).all()
    assert counts.bad == 2 and counts.stray_words == 0
