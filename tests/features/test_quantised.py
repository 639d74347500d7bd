"""Rows kept small: their definition, their error bounds, and tables of them."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import dataeff
from dataeff.features.gather_stored import Source, gather_stored
from dataeff.features.quantised import (
    ELEMENTS,
    STORED_DTYPES,
    dequantise,
    quantise,
    quantise_reference,
)

STORES = list(STORED_DTYPES)
SMALLEST = 2.0**-126
SLACK = 1 + 2**-14
floats = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(-1, 1, width=32),
    st.sampled_from([0.0, -0.0, 1e-45, -1e-40, SMALLEST, 3.4028235e38, 65504.0, 65520.0]),
)
matrices = st.tuples(st.integers(1, 6), st.integers(1, 40)).flatmap(
    lambda shape: arrays("float32", shape, elements=floats)
)


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def bound(x, store):
    """The bound of `quantise`'s docstring, in float64."""
    v = x.double().abs()
    largest = v.amax(1, keepdim=True)
    if store == "fp16":
        error = torch.where(v < 2.0**-14, 2.0**-25, v * 2.0**-11)
        return error.masked_fill(v >= 65520, float("inf"))
    if store == "bf16":
        error = torch.where(v < SMALLEST, 2.0**-134, v * 2.0**-8)
        return error.masked_fill(v > 3.38e38, float("inf"))
    if store == "int8":
        return torch.maximum(largest / 127, torch.tensor(SMALLEST)) / 2 * SLACK + 0 * v
    scale = torch.maximum(largest / 448, torch.tensor(SMALLEST))
    return torch.maximum(v * 2.0**-4, scale * 2.0**-10) * SLACK


@pytest.mark.parametrize("store", STORES)
@settings(max_examples=80, deadline=None)
@given(values=matrices)
def test_errors_are_within_the_bounds(store, values):
    x = torch.from_numpy(values)
    codes, scales = quantise(x, store)
    rows = dataeff.FeatureTable(x, store=store)[torch.arange(len(x))]
    assert same_bits(rows, dequantise(codes, scales, torch.float32))
    error = (rows.double() - x.double()).abs()
    error[rows.isinf()] = float("inf")
    assert (error <= bound(x, store)).all(), (error - bound(x, store)).max()


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("dtype", ELEMENTS)
def test_codes_and_rows_are_the_reference_to_the_bit(store, dtype):
    torch.manual_seed(0)
    low, high = (-7, 4) if dtype == torch.float16 else (-44, 38)
    sizes = torch.logspace(low, high, 700, dtype=torch.float64)[:, None]
    x = (torch.rand(700, 77, dtype=torch.float64) * 2 - 1).mul(sizes).to(dtype)
    codes, scales = quantise(x, store)
    expected, expected_scales = quantise_reference(x, store)
    assert same_bits(codes, expected)
    assert (scales is None) == (expected_scales is None)
    assert scales is None or torch.equal(scales, expected_scales)
    index = torch.randint(-700, 700, (500,), dtype=torch.int32)
    for out in ELEMENTS:
        rows = gather_stored(Source(codes, scales), index, out)
        assert same_bits(rows, dequantise(codes, scales, out)[index.long()])


WIDE = 33  # elements of a row: two whole vectors of sixteen and one more


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("code", [torch.float16, torch.bfloat16])
def test_every_16_bit_code_is_widened_as_torch_does(code, dtype):
    table = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(code)[:, None]
    table = table.repeat(1, WIDE)
    rows = gather_stored(Source(table), torch.arange(65536), dtype)
    torch.testing.assert_close(rows, table.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("code", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("scale", [1.0, 0.1, 2.0**-126, 1e36, 2.0**100, 2.0**119])
def test_every_8_bit_code_and_large_and_small_scales(code, scale):
    table = torch.arange(-128, 128).to(torch.int8).view(code)[:, None].repeat(1, WIDE)
    scales = torch.full((256,), scale)
    for dtype in ELEMENTS:
        rows = gather_stored(Source(table, scales), torch.arange(256), dtype)
        expected = dequantise(table, scales, dtype)
        torch.testing.assert_close(rows, expected, rtol=0, atol=0, equal_nan=True)


def test_special_values():
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), -0.0, 1e-45]])
    for store in ("fp16", "bf16"):
        rows = dataeff.FeatureTable(x, store=store)[[0]]
        assert rows.isnan().tolist() == [[True, False, False, False, False]]
        assert rows[0, 1:3].tolist() == [float("inf"), -float("inf")]
        assert rows[0, 3].signbit()
    zero = dataeff.FeatureTable(torch.zeros(3, 5), store="int8")[:]
    assert torch.equal(zero, torch.zeros(3, 5))


@pytest.mark.parametrize("store", ["int8", "fp8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39])
def test_rows_that_are_not_finite_are_refused_by_name(store, value):
    x = torch.rand(5000, 64, dtype=torch.float64)
    x[4321, 7] = x[4999, 0] = value
    with pytest.raises(ValueError, match="row 4321 holds a NaN"):
        dataeff.FeatureTable(x, store=store)
    table = dataeff.FeatureTable(x[:100], store=store)
    before = table[:]
    with pytest.raises(ValueError, match="row 1 holds"):
        table.scatter_(torch.tensor([3, 4]), x[[0, 4321]])
    assert torch.equal(table[:], before)


@pytest.mark.parametrize("store", STORES)
def test_delivers_what_is_asked_and_counts_what_moved(store):
    x = torch.randn(30, 4, 6)
    table = dataeff.FeatureTable(x, store=store)
    assert (table.shape, table.dtype) == (x.shape, torch.float32)
    index = torch.tensor([[3, -1], [0, 3]])
    expected = dequantise(*quantise(x, store), torch.float32)[index]
    assert torch.equal(table[index], expected)
    assert torch.equal(table.prefetch(index).wait(), expected)
    assert table.gather(index, dtype=torch.bfloat16).dtype == torch.bfloat16
    out = torch.empty(2, 2, 4, 6, dtype=torch.float64)
    assert table.gather(index, out=out) is out
    assert torch.equal(out, expected.double())
    itemsize = STORED_DTYPES[store].itemsize
    scale = 4 if itemsize == 1 else 0
    assert table.stats().nbytes == {"host->host": 4 * 4 * (24 * itemsize + scale)}
    table.close()


@pytest.mark.parametrize("store", STORES)
def test_scatter_narrows_the_rows(store):
    torch.manual_seed(2)
    x, rows = torch.randn(20, 9), torch.randn(3, 9) * 50
    table = dataeff.FeatureTable(x, store=store)
    table.scatter_(torch.tensor([4, -1, 4]), rows)
    kept = dequantise(*quantise(rows, store), torch.float32)
    assert torch.equal(table[[4, 19]], kept[[2, 1]])
    assert torch.equal(table[[0]], dequantise(*quantise(x[:1], store), torch.float32))
    with pytest.raises(TypeError, match="float64"):
        table.scatter_(torch.tensor([0]), rows[:1].double())
    with pytest.raises(ValueError, match="needs"):
        table.scatter_(torch.tensor([0]), rows)
    with pytest.raises(IndexError, match="20"):
        table.scatter_(torch.tensor([20]), rows[:1])


def test_bad_input_is_named():
    x = torch.rand(4, 3)
    with pytest.raises(ValueError, match="'int4' is not one of 'fp16', 'bf16', 'int8', 'fp8'"):
        dataeff.FeatureTable(x, store="int4")
    with pytest.raises(TypeError, match="int64"):
        dataeff.FeatureTable(torch.arange(4), store="int8")
    table = dataeff.FeatureTable(x, store="int8")
    for error, words, call in (
        (TypeError, "int32", lambda: table.gather(torch.tensor([0]), dtype=torch.int32)),
        (IndexError, "index 4 .* 4 rows", lambda: table[4]),
        (TypeError, "float32", lambda: table.gather(torch.tensor([0.0]))),
        (ValueError, "needs", lambda: table.gather(torch.tensor([0]), out=torch.empty(2, 3))),
        (ValueError, "both", lambda: table.gather(torch.tensor([0]), x[:1], dtype=x.dtype)),
        (TypeError, "table was made of", lambda: table.x),
    ):
        with pytest.raises(error, match=words):
            call()
    with pytest.raises(TypeError, match="float16"):
        dataeff.FeatureTable(x).gather(torch.tensor([0]), dtype=torch.float16)


@pytest.mark.parametrize("many", [False, True])
def test_rows_are_not_widened_into_the_memory_that_they_are_read_from(many):
    room = torch.zeros(4000)
    x = room.view(torch.float16)[:4000].view(1000, 4).copy_(torch.rand(1000, 4))
    table, before = dataeff.FeatureTable(x, store="fp16"), x.clone()
    ids = torch.zeros(4000, dtype=torch.int64)
    index = ids[: 900 if many else 3]
    for memory in (room, ids.view(torch.float32)):
        with pytest.raises(ValueError, match="in the memory of the table or the index"):
            table.gather(index, out=memory[: 4 * len(index)].view(-1, 4))
    assert torch.equal(x, before) and not index.any()


def test_rows_that_have_the_format_already_stay_in_place():
    x = torch.rand(6, 3).half()
    table = dataeff.FeatureTable(x, store="fp16")
    assert table.x.data_ptr() == x.data_ptr()
    x[2] = 7
    assert table.gather(torch.tensor([2]), dtype=torch.float32).tolist() == [[7.0] * 3]


@pytest.mark.parametrize("shape", [(0, 4), (5, 0), (5,), (1, 1)])
@pytest.mark.parametrize("store", STORES)
def test_small_and_empty_shapes(shape, store):
    x = torch.rand(shape)
    table = dataeff.FeatureTable(x, store=store)
    rows = table[torch.arange(shape[0])]
    assert rows.shape == x.shape and rows.dtype == x.dtype
    assert table[torch.arange(0)].shape == (0, *shape[1:])


def test_strided_sources_pickles_and_compiled_graphs():
    x = torch.randn(40, 10)[::2, 1:8]
    table = dataeff.FeatureTable(x, store="int8")
    expected = dequantise(*quantise_reference(x, "int8"), torch.float32)
    assert torch.equal(table[:], expected)
    assert torch.equal(pickle.loads(pickle.dumps(table))[[3, 4]], expected[3:5])
    step = torch.compile(lambda i: table[i] * 2, fullgraph=True, backend="aot_eager")
    index = torch.tensor([1, -1])
    assert torch.equal(step(index), expected[index] * 2)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("store", ["fp16", "int8"])
def test_inductor_compiles_it(store):
    table = dataeff.FeatureTable(torch.randn(40, 10), store=store)
    index = torch.tensor([[1, -1]])
    step = torch.compile(lambda i: table[i] * 2, fullgraph=True)
    assert torch.equal(step(index), table[index] * 2)
    half = torch.compile(lambda i: table.gather(i, dtype=torch.float16) * 2, fullgraph=True)
    assert torch.equal(half(index), table.gather(index, dtype=torch.float16) * 2)


def test_operators_pass_opcheck():
    codes, scales = quantise(torch.rand(10, 4), "int8")
    index = torch.randint(10, (3, 2))
    none = (None, None, None, None)
    torch.library.opcheck(
        torch.ops.dataeff.gather_stored, (codes, scales, *none, index, torch.float32)
    )
    torch.library.opcheck(
        torch.ops.dataeff.gather_stored_out, (codes, scales, *none, index, torch.empty(3, 2, 4))
    )


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(("width", "num_ids"), [(100, 30_000), (128, 70_000)])
def test_large_gathers_run_in_threads_and_stream(store, width, num_ids):
    x = torch.randn(20_000, width)
    index = torch.randint(-20_000, 20_000, (num_ids,))
    expected = dequantise(*quantise_reference(x, store), torch.float32)[index]
    table = dataeff.FeatureTable(x, store=store)
    assert torch.equal(table[index], expected)
    out = torch.empty(num_ids * width + 1)[1:].view(num_ids, width)  # begins inside a line
    assert torch.equal(table.gather(index, out=out), expected)
