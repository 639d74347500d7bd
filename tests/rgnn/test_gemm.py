import contextlib
import itertools
from dataclasses import dataclass
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dataeff.kernels import interpreter
from dataeff.kernels import typed_gemm as kernels
from dataeff.memory.cuda import current_device
from dataeff.rgnn.cpp import gemm as gemm_native
from dataeff.rgnn.gemm import (
    typed_gemm,
    typed_gemm_dw,
    typed_gemm_dw_reference,
    typed_gemm_reference,
    typed_gemm_sum,
    typed_sum,
)
from dataeff.rgnn.structure import MOST_IN_INT32
from dataeff.rgnn.tilemap import build_tile_map
from dataeff.rgnn.triton import gemm as gemm_triton
from dataeff.rgnn.triton.gemm import float32_precision
from dataeff.rgnn.triton.tiles import Product, ranked_tiles

TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.bfloat16: 3e-2,
    torch.float16: 4e-3,
}


@dataclass
class Case:
    x: Tensor
    weight: Tensor
    dy: Tensor
    seg_ptr: Tensor
    options: dict[str, Tensor]


def make_case(
    counts, num_in, num_out, dtype, heads=0, gather=False, scale=False, seed=0, index=torch.int32
):
    torch.manual_seed(seed)
    rows, shape = sum(counts), [heads] if heads else []
    table = max(rows // 2, 1) if gather else rows
    options = {}
    if gather:
        options["gather"] = torch.randint(table, (rows,), dtype=index)
    if scale:
        options["row_scale"] = torch.rand(rows, *shape)
        if dtype == torch.float64:
            options["row_scale"] = options["row_scale"].double()
    return Case(
        torch.randn(table, *shape, num_in, dtype=dtype),
        torch.randn(len(counts), *shape, num_in, num_out, dtype=dtype) / max(num_in, 1) ** 0.5,
        torch.randn(rows, *shape, num_out, dtype=dtype),
        torch.tensor([0, *counts], dtype=index).cumsum(0, dtype=index),
        options,
    )


cases = st.builds(
    make_case,
    counts=st.lists(st.integers(0, 3) | st.integers(0, 40), min_size=1, max_size=6),
    num_in=st.integers(1, 40),
    num_out=st.integers(1, 40),
    dtype=st.sampled_from(list(TOLERANCE)),
    heads=st.sampled_from([0, 0, 1, 3]),
    gather=st.booleans(),
    scale=st.booleans(),
    seed=st.integers(0, 1000),
    index=st.sampled_from([torch.int32, torch.int64]),
)


@contextlib.contextmanager
def backend(name):
    if name == "cpu":
        yield
    elif name == "aten":
        with mock.patch.object(gemm_native, "available", lambda dtype: False):
            yield
    else:
        with interpreter.interpreted(kernels):
            yield


def assert_close(actual, expected, scale):
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(
        actual, expected, rtol=TOLERANCE[actual.dtype], atol=TOLERANCE[actual.dtype] * scale
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("num_in", [8, 32, 48, 20])  # 20 fill no vector
@pytest.mark.parametrize("num_out", [1, 3])
def test_gradients_of_narrow_weights_read_inputs_in_vectors(num_out, num_in, gather, dtype):
    for heads, scale in ((0, False), (2, True)):
        case = make_case([70, 0, 5, 200], num_in, num_out, dtype, heads, gather, scale)
        expected = typed_gemm_dw_reference(case.x, case.dy, case.seg_ptr, **case.options)
        actual = typed_gemm_dw(case.x, case.dy, case.seg_ptr, **case.options)
        assert_close(actual, expected, scale=50)


@pytest.mark.parametrize("name", ["cpu", "aten", "triton"])
@settings(max_examples=25, deadline=None)
@given(case=cases)
def test_forward_equals_reference(name, case):
    expected = typed_gemm_reference(case.x, case.weight, case.seg_ptr, **case.options)
    with backend(name):
        actual = typed_gemm(case.x, case.weight, case.seg_ptr, **case.options)
    assert_close(actual, expected, scale=4)


@pytest.mark.parametrize("name", ["cpu", "aten", "triton"])
@settings(max_examples=25, deadline=None)
@given(case=cases)
def test_weight_gradient_equals_reference(name, case):
    wide = case.x.dtype.itemsize == 2
    x, dy = (case.x.float(), case.dy.float()) if wide else (case.x, case.dy)
    expected = typed_gemm_dw_reference(x, dy, case.seg_ptr, **case.options).to(case.x.dtype)
    with backend(name):
        actual = typed_gemm_dw(case.x, case.dy, case.seg_ptr, **case.options)
    assert_close(actual, expected, scale=20)


def test_references_are_each_others_derivatives():
    case = make_case([3, 0, 5], 4, 3, torch.float64, heads=2, gather=True, scale=True)
    weight = case.weight.requires_grad_()
    y = typed_gemm_reference(case.x, weight, case.seg_ptr, **case.options)
    (expected,) = torch.autograd.grad(y, weight, case.dy)
    actual = typed_gemm_dw_reference(case.x, case.dy, case.seg_ptr, **case.options)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", ["cpu", "aten", "triton"])
@pytest.mark.parametrize("counts", [[0], [0, 0, 0], [1], [0] * 30 + [2] + [0] * 9, [1] * 25])
def test_few_or_no_rows(name, counts):
    case = make_case(counts, 5, 7, torch.float32, gather=True, scale=True)
    with backend(name):
        y = typed_gemm(case.x, case.weight, case.seg_ptr, **case.options)
        dw = typed_gemm_dw(case.x, case.dy, case.seg_ptr, **case.options)
    assert_close(y, typed_gemm_reference(case.x, case.weight, case.seg_ptr, **case.options), 1)
    expected = typed_gemm_dw_reference(case.x, case.dy, case.seg_ptr, **case.options)
    assert_close(dw, expected, 1)


@pytest.mark.parametrize("name", ["cpu", "aten", "triton"])
def test_no_types_and_no_features(name):
    empty = torch.zeros(1, dtype=torch.int32)
    with backend(name):
        y = typed_gemm(torch.zeros(0, 4), torch.zeros(0, 4, 3), empty)
        no_in = typed_gemm(torch.zeros(6, 0), torch.zeros(1, 0, 3), torch.tensor([0, 6]))
        dw = typed_gemm_dw(torch.zeros(6, 4), torch.zeros(6, 0), torch.tensor([0, 6]))
    assert y.shape == (0, 3)
    torch.testing.assert_close(no_in, torch.zeros(6, 3))
    assert dw.shape == (1, 4, 0)


@pytest.mark.parametrize("name", ["cpu", "aten", "triton"])
def test_strided_inputs_are_read_in_place_or_copied(name):
    case = make_case([7, 20, 4], 12, 10, torch.float32)
    transposed = case.weight.transpose(1, 2).contiguous().transpose(1, 2)
    columns = torch.randn(31, 24)[:, ::2]
    wide = torch.randn(31, 40)[:, 5:17]
    for x in (columns, wide, columns.t().contiguous().t()):
        with backend(name):
            y = typed_gemm(x, transposed, case.seg_ptr)
            dw = typed_gemm_dw(x, case.dy, case.seg_ptr)
        assert_close(y, typed_gemm_reference(x, case.weight, case.seg_ptr), 4)
        assert_close(dw, typed_gemm_dw_reference(x, case.dy, case.seg_ptr), 20)


@pytest.mark.parametrize("name", ["cpu", "aten", "triton"])
def test_same_inputs_give_the_same_bits(name):
    case = make_case([300, 0, 41], 9, 6, torch.float32, gather=True)
    with backend(name):
        first, second = (
            typed_gemm_dw(case.x, case.dy, case.seg_ptr, **case.options) for _ in range(2)
        )
    assert torch.equal(first, second)


@pytest.mark.parametrize("block", [16, 64])
def test_split_relations_and_kept_maps(block):
    case = make_case([0, 400, 3, 65, 64], 20, 17, torch.float32, gather=True, scale=True)
    chunks = build_tile_map(case.seg_ptr, 532, block)
    with backend("triton"):
        dw = typed_gemm_dw(case.x, case.dy, case.seg_ptr, chunk_map=chunks, **case.options)
        y = typed_gemm(case.x, case.weight, case.seg_ptr, tile_map=chunks, **case.options)
    expected = typed_gemm_dw_reference(case.x, case.dy, case.seg_ptr, **case.options)
    assert_close(dw, expected, 20)
    assert_close(y, typed_gemm_reference(case.x, case.weight, case.seg_ptr, **case.options), 4)


def test_more_chunks_than_a_reduction_reads_at_a_time():
    """32 at a time of 128 elements: 66 beyond the first of a type, exactly 32, one, none."""
    case = make_case([1060, 528, 0, 20, 7], 20, 17, torch.float32)
    chunks = build_tile_map(case.seg_ptr, 1615, 16)
    assert gemm_triton.REDUCED // 128 == 32 and chunks.extra_ptr.diff().tolist() == [
        66,
        32,
        0,
        1,
        0,
    ]
    with backend("triton"):
        dw = typed_gemm_dw(case.x, case.dy, case.seg_ptr, chunk_map=chunks)
    assert_close(dw, typed_gemm_dw_reference(case.x, case.dy, case.seg_ptr), 50)


@pytest.mark.parametrize(
    ("num_types", "width", "block"), [(1, 64, 128), (128, 64, 128), (535, 64, 1024), (535, 3, 16)]
)
def test_few_types_are_reduced_by_many_programs_each(num_types, width, block):
    """One type of 64 x 64 by 32 programs; not 17,120 for 535, of which most have one chunk."""
    assert gemm_triton._reduction_block(width * width, num_types) == block


@pytest.mark.parametrize("gradient", [False, True], ids=["product", "gradient"])
@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.float32, "ieee"), (torch.float32, "tf32"), (torch.half, "ieee")]
)
def test_every_tile_gives_the_same(dtype, precision, gradient, monkeypatch):
    monkeypatch.setattr(gemm_triton, "float32_precision", lambda: precision)
    case = make_case([70, 0, 3], 33, 40, dtype, gather=True, scale=True)
    call, reference, right = typed_gemm, typed_gemm_reference, case.weight
    if gradient:
        call, reference, right = typed_gemm_dw, typed_gemm_dw_reference, case.dy
    wide = case.x.float(), right.float(), case.seg_ptr
    want = reference(*wide, **case.options).to(dtype)
    tiles = ranked_tiles(Product(gradient, 1, 33, 40, 73, 3), dtype, precision)
    assert len(set(tiles)) > 2
    for tile in tiles:
        launched = mock.Mock(wraps=gemm_triton._options)
        monkeypatch.setattr(gemm_triton, "_options", launched)
        with backend("triton"):
            have = call(case.x, right, case.seg_ptr, tile=tile, **case.options)
        launched.assert_called_once_with(tile.as_launched(gathered=gradient))
        assert_close(have, want, scale=20 if gradient else 4)


def test_large_values_stay_in_their_own_rows():
    # A tile's padded lanes read a row of the same tile: inf there must reach no other row.
    x = torch.ones(5, 4)
    x[1] = torch.inf
    x[3] = torch.nan
    seg_ptr = torch.tensor([0, 2, 5])
    with backend("triton"):
        y = typed_gemm(x, torch.ones(2, 4, 3), seg_ptr)
        dw = typed_gemm_dw(torch.ones(5, 4), y, seg_ptr)
    assert y[[0, 2, 4]].eq(4).all() and y[1].isinf().all() and y[3].isnan().all()
    assert dw[0].isinf().all() and dw[1].isnan().all()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"weight": torch.zeros(2, 5, 3)}, ValueError, "input features"),
        ({"weight": torch.zeros(3, 4, 3)}, ValueError, "3 entries for 3 types"),
        ({"weight": torch.zeros(4, 3)}, ValueError, r"\[4, 3\]"),
        ({"weight": torch.zeros(2, 4, 3).double()}, TypeError, "float32 and torch.float64"),
        ({"x": torch.zeros(6, 4).long()}, TypeError, "int64"),
        ({"seg_ptr": torch.tensor([0.0, 2.0, 6.0])}, TypeError, "float32"),
        ({"seg_ptr": torch.tensor([0, 2, 7])}, ValueError, "0 to 7"),
        ({"seg_ptr": torch.tensor([0, 8, 6])}, ValueError, "type 1 goes from 8 to 6"),
        ({"gather": torch.zeros(6)}, TypeError, "float32"),
        ({"gather": torch.tensor([0, 1, 2, 3, 4, 6])}, IndexError, "holds 6.*x has 6 rows"),
        ({"gather": torch.tensor([0, 1, -2, 3, 4, 5])}, IndexError, "holds -2"),
        ({"row_scale": torch.zeros(5)}, ValueError, r"\[5\]"),
        ({"x": torch.zeros(6, 4, device="meta")}, ValueError, "meta.*weight on cpu"),
    ],
)
def test_bad_input_is_refused(change, error, words):
    given_ = {
        "x": torch.zeros(6, 4),
        "weight": torch.zeros(2, 4, 3),
        "seg_ptr": torch.tensor([0, 2, 6]),
    }
    with pytest.raises(error, match=words):
        typed_gemm(**(given_ | change))


def test_weight_gradient_refuses_other_row_counts():
    with pytest.raises(ValueError, match="dy has 5 rows, x or gather 6"):
        typed_gemm_dw(torch.zeros(6, 4), torch.zeros(5, 3), torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="heads"):
        typed_gemm_dw(torch.zeros(6, 2, 4), torch.zeros(6, 3, 3), torch.tensor([0, 6]))


def test_precision_follows_torch():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for precision in ("tf32", "ieee"):
            matmul.fp32_precision = precision
            assert float32_precision() == precision
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("name", ["cpu", "aten"])
def test_gathering_from_no_rows_is_refused(name):
    empty = torch.zeros(0, 4)
    with backend(name), pytest.raises(IndexError, match="holds 0, but x has 0 rows"):
        typed_gemm(empty, torch.zeros(1, 4, 3), torch.tensor([0, 2]), gather=torch.tensor([0, 0]))


@pytest.mark.parametrize("name", ["cpu", "aten"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_chunks_and_wide_features(name, dtype):
    case = make_case([5000, 3, 0, 2300], 150, 130, dtype, gather=True, scale=True)
    with backend(name):
        dw = typed_gemm_dw(case.x, case.dy, case.seg_ptr, **case.options)
        y = typed_gemm(case.x, case.weight, case.seg_ptr, **case.options)
    begin, end = 5003, 7303
    rows = case.x[case.options["gather"].long()] * case.options["row_scale"].unsqueeze(1)
    parts = [(0, 0, 5000), (1, 5000, 5003), (3, begin, end)]
    for t, start, stop in parts:
        assert_close(dw[t], rows[start:stop].to(dtype).T @ case.dy[start:stop], 100)
        assert_close(y[start:stop], rows[start:stop].to(dtype) @ case.weight[t], 4)
    assert not dw[2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "widths", [(256, 256), (300, 20), (20, 300), (513, 130), (256, 3)], ids=str
)
def test_rows_that_a_cache_would_put_on_few_sets(widths, dtype):
    for heads, gather in ((0, True), (2, False)):
        case = make_case([97, 0, 5, 200], *widths, dtype, heads, gather, scale=heads > 0)
        expected = typed_gemm_dw_reference(case.x, case.dy, case.seg_ptr, **case.options)
        actual = typed_gemm_dw(case.x, case.dy, case.seg_ptr, **case.options)
        assert_close(actual, expected, 20.0)


@pytest.mark.parametrize("widths", [(256, 256), (300, 20), (20, 300), (7, 65)], ids=str)
def test_weights_that_are_read_by_columns(widths):
    case = make_case([97, 0, 5, 200], *widths[::-1], torch.float64)
    weight, dy = case.weight.transpose(-1, -2), case.dy
    found = typed_gemm(dy, weight, case.seg_ptr)
    assert_close(found, typed_gemm_reference(dy, weight, case.seg_ptr), 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_weights_are_packed_for_many_rows_and_read_where_they_are_for_few(dtype):
    case = make_case([400, 5, 0, 97, 16], 20, 512, dtype, gather=True)
    for _ in range(2):
        found = typed_gemm(case.x, case.weight, case.seg_ptr, **case.options)
        want = typed_gemm_reference(case.x, case.weight, case.seg_ptr, **case.options)
        assert_close(found, want, 1.0)
        case.weight += 1  # where it is: what was packed of it is not what it holds


def test_the_bits_do_not_depend_on_the_number_of_threads():
    case = make_case([4000, 700, 1], 24, 20, torch.float32, gather=True)
    before = torch.get_num_threads()
    try:
        made = []
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            y = typed_gemm(case.x, case.weight, case.seg_ptr, **case.options)
            made.append((y, typed_gemm_dw(case.x, case.dy, case.seg_ptr, **case.options)))
    finally:
        torch.set_num_threads(before)
    for y, dw in made[1:]:
        assert torch.equal(y, made[0][0]) and torch.equal(dw, made[0][1])


def test_without_a_compiler_one_warning_and_the_same_result(monkeypatch, tmp_path):
    case = make_case([5, 9], 6, 7, torch.float32)
    expected = typed_gemm_reference(case.x, case.weight, case.seg_ptr)
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    gemm_native.library_for.cache_clear()
    try:
        with pytest.warns(UserWarning, match="no-compiler"):
            assert_close(typed_gemm(case.x, case.weight, case.seg_ptr), expected, 4)
        assert_close(typed_gemm(case.x, case.weight, case.seg_ptr), expected, 4)
    finally:
        gemm_native.library_for.cache_clear()


@pytest.mark.parametrize("width", [3, 16, 70])  # 70 floats are more than one panel of columns
@pytest.mark.parametrize("heads", [(), (2,)])
def test_a_product_may_take_the_memory_of_its_rows(width, heads):
    seg_ptr = torch.tensor([0, 0, 5, 400, 401])
    x = torch.randn(401, *heads, width, dtype=torch.float64)
    weight = torch.randn(4, *heads, width, width, dtype=torch.float64).transpose(-1, -2)
    expected = typed_gemm_reference(x, weight, seg_ptr)
    start = x.data_ptr()
    found = typed_gemm(x, weight, seg_ptr, overwrite_x=True)
    torch.testing.assert_close(found, expected)
    if gemm_native.available(x.dtype):
        assert found.data_ptr() == start


@pytest.mark.parametrize("current", [0, 1])
def test_kernels_are_launched_on_the_device_of_their_tensors(current, monkeypatch):
    """Triton launches on the current device, whatever its arguments are on."""
    gpu, entered = torch.device("cuda", 1), []

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *error):
            entered.append("left")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", Device)
    with current_device(gpu), current_device(torch.device("cpu")):
        inside = list(entered)
    assert (inside, entered) == (([], []) if current == 1 else ([gpu], [gpu, "left"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 3, 64])
@pytest.mark.parametrize("counts", [[], [0, 0], [5000, 0, 3, 70_000], [1] * 40])
def test_sums_by_type(counts, width, dtype):
    total = sum(counts)
    g = torch.Generator().manual_seed(total + width)
    ptr = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
    x = torch.rand(total + 7, width, generator=g, dtype=dtype)  # all of one sign: errors add up
    order = torch.randperm(total + 7, generator=g)[:total].int()
    types = torch.repeat_interleave(torch.tensor(counts, dtype=torch.long))
    want = x.new_zeros(len(counts), width, dtype=torch.float64)
    want.index_add_(0, types, x[order.long()].double())
    got = typed_sum(x, ptr, gather=order)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=0)
    with mock.patch.object(gemm_native, "available", lambda dtype: False):
        other = typed_sum(x, ptr, gather=order)
    torch.testing.assert_close(other.double(), want, rtol=20 * tolerance, atol=0)
    plain = typed_sum(x[order.long()], ptr)
    assert torch.equal(got, plain)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(typed_sum(x, ptr, gather=order), got)
    finally:
        torch.set_num_threads(before)


def test_sums_of_a_row_that_is_not_there_are_refused():
    with pytest.raises(IndexError, match="gather holds 9, but x has 4 rows"):
        typed_sum(torch.ones(4, 2), torch.tensor([0, 1]), gather=torch.tensor([9]))


def sums_case(counts, num_sums, num_in, num_out, dtype, heads, transposed, gather, seed):
    g = torch.Generator().manual_seed(seed)
    counts = [min(n, num_sums) for n in counts]
    target = [torch.randperm(num_sums, generator=g)[:n].sort().values for n in counts]
    target = torch.cat(target).int()
    inner = [heads] if heads else []
    rows = target.numel()
    weight = torch.randn(len(counts), *inner, num_in, num_out, dtype=dtype, generator=g)
    if transposed:
        weight = weight.mT.contiguous().mT
    table = max(rows // 2, 1) if gather else rows
    index = torch.randint(table, (rows,), dtype=torch.int32, generator=g) if gather else None
    x = torch.randn(table, *inner, num_in, dtype=dtype, generator=g)
    return x, weight, torch.tensor([0, *counts]).cumsum(0), target, index


@settings(deadline=None, max_examples=60)
@given(
    counts=st.lists(st.integers(0, 3) | st.integers(0, 300), min_size=1, max_size=6),
    num_sums=st.integers(1, 200),
    num_in=st.integers(1, 40),
    num_out=st.integers(1, 140),
    dtype=st.sampled_from(list(TOLERANCE)),
    heads=st.sampled_from([0, 0, 1, 3]),
    transposed=st.booleans(),
    gather=st.booleans(),
    add=st.booleans(),
    compiled=st.booleans(),
)
def test_products_are_added_up(
    counts, num_sums, num_in, num_out, dtype, heads, transposed, gather, add, compiled
):
    how = num_in, num_out, dtype, heads, transposed, gather, len(counts)
    x, weight, seg_ptr, target, index = sums_case(counts, num_sums, *how)
    width = [heads, num_out] if heads else [num_out]
    around = torch.full((num_sums + 2, *width), 7.0, dtype=dtype)
    out = around[1:-1].normal_()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    want = out.to(wide) if add else torch.zeros_like(out, dtype=wide)
    products = typed_gemm_reference(x.to(wide), weight.to(wide), seg_ptr, gather=index)
    want = want.index_add(0, target, products)
    with backend("cpu" if compiled else "aten"):
        found = typed_gemm_sum(x, weight, seg_ptr, target, out, gather=index, add=add)
    assert found is out
    scale = products.abs().amax() if products.numel() else 1
    allowed = TOLERANCE[dtype] * float(scale) * 8
    torch.testing.assert_close(out.to(wide), want, rtol=TOLERANCE[dtype], atol=allowed)
    assert (around[0] == 7).all() and (around[-1] == 7).all()


@pytest.mark.skipif(not gemm_native.available(torch.float32), reason="no C++ compiler")
def test_sums_of_products_have_the_same_bits_on_any_number_of_threads():
    # Threads share rows out otherwise, so that other ones are the last of a tile; the last panel of
    # columns is a vector wide.
    torch.manual_seed(0)
    shape = 3000, 24, 70, torch.float32, 0, True, False, 1
    x, weight, seg_ptr, target, _ = sums_case([2500, 0, 9, 3000, 1200], *shape)
    found, threads = [], torch.get_num_threads()
    try:
        for number in (1, 2, 3, 4, 5, 6, 7):
            torch.set_num_threads(number)
            found.append(typed_gemm_sum(x, weight, seg_ptr, target, torch.empty(3000, 70)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_sums_of_products_refuse_what_does_not_fit():
    x, weight, seg_ptr = torch.randn(3, 4), torch.randn(1, 4, 5), torch.tensor([0, 3])
    target, out = torch.arange(3, dtype=torch.int32), torch.zeros(3, 5)
    with pytest.raises(ValueError, match=r"target is torch.int32 \[2\] for 3 rows"):
        typed_gemm_sum(x, weight, seg_ptr, target[:2], out)
    with pytest.raises(ValueError, match=r"out is torch.float32 \[3, 4\]"):
        typed_gemm_sum(x, weight, seg_ptr, target, torch.zeros(3, 4))
    with pytest.raises(TypeError, match=r"gather is torch\.int64, but target torch\.int32"):
        typed_gemm_sum(x, weight, seg_ptr, target, out, gather=torch.arange(3))


@pytest.mark.parametrize("far", ["x", "row_scale", "dy"])
def test_rows_further_apart_than_32_bits_count(tmp_path, far):
    """Offsets of more than 2^31 elements, over a file that holds next to nothing."""
    case, step = make_case([25, 15], 16, 16, torch.float16, scale=True), 1 << 26
    case.options["row_scale"] = case.options["row_scale"].half()
    held = case.options if far == "row_scale" else vars(case)
    width = held[far].stride(0)
    size = 39 * step + width
    memory = np.memmap(tmp_path / "far", dtype=np.float16, mode="w+", shape=(size,))
    spread = torch.from_numpy(memory).as_strided(held[far].shape, (step, *held[far].stride()[1:]))
    expected = typed_gemm_reference(case.x, case.weight, case.seg_ptr, **case.options)
    gradient = typed_gemm_dw_reference(case.x, case.dy, case.seg_ptr, **case.options)
    held[far] = spread.copy_(held[far])
    with backend("triton"):
        y = typed_gemm(case.x, case.weight, case.seg_ptr, **case.options)
        dw = typed_gemm_dw(case.x, case.dy, case.seg_ptr, **case.options)
    assert_close(y, expected, 1)
    assert_close(dw, gradient, 10)


def test_grids_stay_within_what_cuda_launches(monkeypatch):
    """65,535 programs on all axes but the first."""
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **options: None

    for name in ("typed_gemm_kernel", "typed_gemm_dw_kernel", "reduce_partials_kernel"):
        monkeypatch.setattr(kernels, name, Kernel())
    x, seg_ptr = torch.zeros(2, 8200), torch.tensor([0, 2])
    weight = torch.empty(1, 8200, 8200)
    gemm_triton.forward(x[:, None], weight[:, None], seg_ptr, 2, None, None)
    gemm_triton.weight_gradient(x[:, None], x[:, None], seg_ptr, 2, None, None)
    assert len(grids) == 3 and all(n < 1 << 16 for grid in grids for n in grid[1:])


def test_32_bit_row_numbers_leave_room_for_what_kernels_add():
    largest = MOST_IN_INT32
    for dtype, precision in itertools.product(TOLERANCE, ("ieee", "tf32")):
        product = Product(True, 1, 64, 64, largest, 1)
        for tile in ranked_tiles(product, dtype, precision):
            assert largest + tile.chunk_rows(largest) + tile.block_k < 2**31
