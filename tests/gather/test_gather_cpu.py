"""The CPU gather and scatter against their plain-PyTorch definitions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataeff.features.gather import gather, gather_reference, scatter_, scatter_reference

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int16,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.int64,
    torch.float64,
    torch.complex128,
    torch.float8_e4m3fn,
]
INDEX_DTYPES = [torch.int32, torch.int64]
SENTINEL = 0xA5


def random_bits(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random bytes seen as `dtype` (bool: valid ones), so that NaN payloads must survive too."""
    if dtype == torch.bool:
        return torch.randint(2, shape, dtype=torch.uint8).bool()
    itemsize = torch.empty((), dtype=dtype).element_size()
    return (
        torch.randint(256, (math.prod(shape) * itemsize,), dtype=torch.uint8)
        .view(dtype)
        .view(shape)
    )


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bytes_of(a) == bytes_of(b)


def bytes_of(x: torch.Tensor) -> bytes:
    return x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b""


@st.composite
def tables(draw):
    torch.manual_seed(draw(st.integers(0, 1000)))
    dtype = draw(st.sampled_from(DTYPES))
    num_rows = draw(st.integers(1, 40))
    width = draw(st.integers(0, 130))
    offset, padding, step = (
        draw(st.integers(0, 3)),
        draw(st.integers(0, 3)),
        draw(st.integers(1, 3)),
    )
    whole = random_bits(num_rows * step, offset + width + padding, dtype=dtype)
    return whole[::step, offset : offset + width]


@st.composite
def tables_and_indices(draw):
    table = draw(tables())
    shape = draw(st.sampled_from([(0,), (1,), (7,), (100,), (), (3, 5), (2, 0, 4)]))
    num_rows = table.shape[0]
    index = torch.randint(-num_rows, num_rows, shape, dtype=draw(st.sampled_from(INDEX_DTYPES)))
    return table, index


@settings(max_examples=150, deadline=None)
@given(tables_and_indices())
def test_gather_is_the_reference(case):
    table, index = case
    assert same_bits(gather(table, index), gather_reference(table, index))


@settings(max_examples=100, deadline=None)
@given(tables_and_indices())
def test_gather_out_writes_every_byte_and_no_other(case):
    table, index = case
    expected = gather_reference(table, index)
    nbytes = expected.numel() * expected.element_size()
    guard = 64
    raw = torch.full((nbytes + 2 * guard,), SENTINEL, dtype=torch.uint8)
    out = raw[guard : guard + nbytes].view(table.dtype).view(expected.shape)
    assert gather(table, index, out=out) is out
    assert same_bits(out, expected)
    assert (raw[:guard] == SENTINEL).all() and (raw[guard + nbytes :] == SENTINEL).all()


@settings(max_examples=100, deadline=None)
@given(tables_and_indices())
def test_scatter_is_the_reference(case):
    table, index = case
    rows = random_bits(*index.shape, *table.shape[1:], dtype=table.dtype)
    expected = table.clone()
    scatter_reference(expected, index, rows)
    scatter_(table, index, rows)
    assert same_bits(table, expected)


@pytest.mark.parametrize(
    "row_nbytes", [1, 2, 3, 4, 7, 8, 12, 16, 32, 48, 63, 64, 128, 129, 192, 520, 1000, 4096, 5000]
)
@pytest.mark.parametrize("misaligned", [0, 1, 16])
@pytest.mark.parametrize("mib", [17, 33])
def test_large_gathers_that_stream_and_run_in_threads(row_nbytes, misaligned, mib):
    num_rows = (1 << 20) // row_nbytes
    raw = torch.randint(256, (misaligned + num_rows * row_nbytes,), dtype=torch.uint8)
    table = raw[misaligned:].view(num_rows, row_nbytes)
    # Past 32 MiB, or 16 by stores of a line, whole lines are written around the caches.
    nbytes = (mib << 20 if row_nbytes >= 64 else 1 << 20) // row_nbytes * row_nbytes
    index = torch.randint(-num_rows, num_rows, (nbytes // row_nbytes,))
    room = torch.full((nbytes + misaligned + 64,), SENTINEL, dtype=torch.uint8)
    out = room[misaligned : misaligned + nbytes].view(-1, row_nbytes)
    gather(table, index, out=out)
    assert torch.equal(out, torch.index_select(table, 0, index % num_rows))
    assert (room[:misaligned] == SENTINEL).all() and (room[misaligned + nbytes :] == SENTINEL).all()


@pytest.mark.parametrize("row_nbytes", [64, 65, 100, 112, 128, 192, 256, 1000, 1024])
@pytest.mark.parametrize("misaligned", [0, 1])
@pytest.mark.parametrize("mib", [1, 2])  # with 1.5 MiB a table is taken to be in the caches
def test_rows_of_tables_in_the_caches_and_past_them(row_nbytes, misaligned, mib):
    num_rows = (mib << 20) // row_nbytes
    raw = torch.randint(256, (misaligned + num_rows * row_nbytes,), dtype=torch.uint8)
    table = raw[misaligned:].view(num_rows, row_nbytes)
    for size, dtype in [(1, torch.int64), (700, torch.int32), (5000, torch.int64)]:
        index = torch.randint(-num_rows, num_rows, (size,), dtype=dtype)
        room = torch.full((misaligned + size * row_nbytes + 64,), SENTINEL, dtype=torch.uint8)
        out = room[misaligned:-64].view(size, row_nbytes)
        gather(table, index, out=out)
        assert torch.equal(out, torch.index_select(table, 0, index % num_rows))
        assert (room[:misaligned] == SENTINEL).all() and (room[-64:] == SENTINEL).all()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_last_row_stays_whatever_the_number_of_threads(threads):
    table = torch.zeros(1000, 33)
    index = torch.randint(-1000, 1000, (20_000,))
    rows = torch.arange(20_000.0)[:, None].expand(-1, 33)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        scatter_(table, index, rows)
    finally:
        torch.set_num_threads(before)
    last = dict(zip((index % 1000).tolist(), range(20_000), strict=True))
    for row, position in last.items():
        assert (table[row] == position).all()


@pytest.mark.parametrize("dtype", INDEX_DTYPES)
@pytest.mark.parametrize("bad", [10, -11, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63)])
def test_the_first_wrong_index_is_named_and_out_is_untouched(dtype, bad):
    if dtype == torch.int32 and abs(bad) > 2**31:
        pytest.skip("does not fit int32")
    table, out = torch.rand(10, 4), torch.full((70_000, 4), 7.0)
    index = torch.zeros(70_000, dtype=dtype)
    index[66_000] = bad
    index[69_000] = 12
    with pytest.raises(IndexError, match=f"index {bad} at position 66000 .* table of 10 rows"):
        gather(table, index, out=out)
    assert (out == 7.0).all()
    kept = table.clone()
    with pytest.raises(IndexError, match=f"index {bad} "):
        scatter_(table, index, out)
    assert torch.equal(table, kept)


@pytest.mark.parametrize("dtype", INDEX_DTYPES)
@pytest.mark.parametrize("bad", [10, -11, 2**31 - 1, -(2**31)])
def test_a_wrong_index_is_found_among_right_ones(dtype, bad):
    index = torch.arange(-10, 10, dtype=dtype).repeat(10)
    index[123] = bad
    with pytest.raises(IndexError, match=f"index {bad} at position 123 "):
        gather(torch.rand(10, 4), index)


@pytest.mark.parametrize("threads", [1, 2])
def test_of_many_wrong_indices_the_first_is_named(threads):
    index = torch.zeros(400_000, dtype=torch.long)
    index[[70_000, 150_000, 399_999]] = torch.tensor([11, 12, 13])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with pytest.raises(IndexError, match="index 11 at position 70000 "):
            gather(torch.rand(10, 1), index)
    finally:
        torch.set_num_threads(before)


def test_a_table_without_rows_has_no_valid_index():
    empty = torch.zeros(0, 3)
    assert gather(empty, torch.zeros(0, dtype=torch.long)).shape == (0, 3)
    with pytest.raises(IndexError, match=r"index 0 at position 0 .* 0 rows"):
        gather(empty, torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8, torch.int16])
def test_an_index_of_another_dtype_is_a_type_error(dtype):
    with pytest.raises(TypeError, match=str(dtype)):
        gather(torch.rand(4, 2), torch.zeros(3, dtype=dtype))


def test_out_must_fit():
    table, index = torch.rand(4, 2), torch.zeros(3, dtype=torch.long)
    with pytest.raises(TypeError, match=r"float64 but the table is torch\.float32"):
        gather(table, index, out=torch.zeros(3, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"\(2, 3\).*needs \(3, 2\)"):
        gather(table, index, out=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="contiguous"):
        gather(table, index, out=torch.zeros(2, 3).t())


def test_rows_that_are_not_contiguous_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"strides \(1, 4\): pass table\.contiguous\(\)"):
        gather(torch.rand(3, 4).t(), torch.tensor([0]))
    with pytest.raises(ValueError, match="0-dimensional"):
        gather(torch.tensor(1.0), torch.tensor([0]))


def test_rows_that_share_memory_can_be_read_but_not_written():
    shared = torch.rand(1, 5).expand(9, 5)
    index = torch.tensor([8, -9, 3])
    assert torch.equal(gather(shared, index), shared[index])
    with pytest.raises(ValueError, match="share memory"):
        scatter_(shared, index, torch.zeros(3, 5))


def test_operators_pass_opcheck():
    table, index = torch.rand(10, 4), torch.randint(10, (3, 2))
    torch.library.opcheck(torch.ops.dataeff.gather, (table, index))
    torch.library.opcheck(torch.ops.dataeff.gather_out, (table, index, torch.zeros(3, 2, 4)))
    torch.library.opcheck(torch.ops.dataeff.scatter_rows_, (table, index, torch.rand(3, 2, 4)))


def test_compiles_as_one_graph():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(table, index, rows):
        scatter_(table, index, rows)
        return gather(table, index) * 2

    table, index = torch.rand(10, 4), torch.tensor([1, 9, -10])
    rows = torch.rand(3, 4)
    assert torch.equal(step(table, index, rows), rows * 2)
    assert torch.equal(table[index], rows)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_rows_and_bytes_past_32_bits(vast, far_rows, num_threads):
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        rows = torch.arange(1, 22, dtype=torch.uint8).view(7, 3)
        scatter_(vast, far_rows, rows)
        assert torch.equal(vast[far_rows], rows)
        index = far_rows.repeat(1000)
        assert torch.equal(gather(vast, index), rows.repeat(1000, 1))
    finally:
        torch.set_num_threads(before)
    with pytest.raises(IndexError, match=f"index {3 * 2**30} at position 0"):
        gather(vast, torch.tensor([3 * 2**30]))
