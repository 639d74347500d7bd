"""The gather in one call: the rows where all is plain, and None, with nothing done, elsewhere."""

from array import array

import pytest
import torch
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode

from dataeff import _core
from dataeff.features.gather import gather, gather_reference
from dataeff.features.quantised import ELEMENTS, FORMATS, dequantise, quantise
from tests.gather.test_gather_cpu import SENTINEL, same_bits, tables_and_indices


class Watches(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def gathered(table, index, out=None):
    return _core.gather_tensors(table, index, out, 0)


@settings(max_examples=150, deadline=None)
@given(tables_and_indices())
def test_is_the_reference_or_nothing(case):
    """Tables of any layout and dtype, also such as are left to the long way."""
    table, index = case
    expected = gather_reference(table, index)
    rows = gathered(table, index)
    assert rows is None or same_bits(rows, expected)
    out = torch.empty_like(expected)
    assert gathered(table, index, out) is (None if rows is None else out)
    assert rows is None or same_bits(out, expected)


@pytest.mark.parametrize("width", [0, 1, 5, 64])
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (), (2, 3, 4), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_plain_calls_are_taken(width, shape, dtype):
    """Or nothing would be tested above."""
    table, index = torch.randn(9, 70)[:, :width], torch.randint(-9, 9, shape, dtype=dtype)
    rows = gathered(table, index)
    # Single numbers with gaps between them may be imaginary parts.
    assert (rows is None) == (width in (0, 1))
    assert rows is None or torch.equal(rows, table[index.long()])


def test_lazy_views_are_left_to_the_long_way():
    for shape in ((5,), (5, 1)):
        lazy = torch.randn(shape, dtype=torch.complex64).conj()
        for table in (lazy, lazy.imag):
            assert gathered(table, TWO) is None
            assert torch.equal(gather(table, TWO), table[TWO])


def test_rows_of_one_number_and_of_several_dimensions():
    for table in (torch.arange(5.0), torch.randn(5, 2, 3), torch.rand(5, 1) > 0.5):
        index = torch.tensor([4, -5, 1])
        assert same_bits(gathered(table, index), table[index])


def test_counts_what_it_gathers():
    tally = array("q", (5, 0, 0))
    table, index = torch.randn(9, 4), torch.tensor([[1, 2, 3]])
    at, _ = tally.buffer_info()
    _core.gather_tensors(table, index, None, at)
    assert tally.tolist() == [6, 3, 3 * 16]
    assert _core.gather_tensors(table, torch.tensor([9]), None, at) is None
    assert tally.tolist() == [6, 3, 3 * 16]


WHOLE = torch.arange(48.0).view(12, 4)
TWO = torch.tensor([1, 2])
NOT_PLAIN = {
    "out of range": (WHOLE, torch.tensor([1, 12]), (2, 4)),
    "below the range": (WHOLE, torch.tensor([1, -13]), (2, 4)),
    "another dtype of the index": (WHOLE, TWO.short(), (2, 4)),
    "unsigned": (WHOLE, TWO.to(torch.uint8), (2, 4)),
    "float": (WHOLE, TWO.double(), (2, 4)),
    "a mask": (WHOLE, torch.ones(12, dtype=torch.bool), (12, 4)),
    "index with gaps": (WHOLE, torch.arange(4)[::2], (2, 4)),
    "empty": (WHOLE, torch.empty(0, dtype=torch.int64), (0, 4)),
    "rows with gaps": (WHOLE[:, ::2], TWO, (2, 2)),
    "no rows": (WHOLE[:0], TWO, (2, 4)),
    "a number": (torch.tensor(1.0), TWO, (2,)),
    "conjugated": (torch.randn(12, 4, dtype=torch.complex64).conj(), TWO, (2, 4)),
    "negated": (torch.randn(12, dtype=torch.complex64).conj().imag, TWO, (2,)),
    "sparse": (WHOLE.to_sparse(), TWO, (2, 4)),
    "meta": (WHOLE.to("meta"), TWO, (2, 4)),
    "list": (WHOLE, [1, 2], (2, 4)),
    "another kind of tensor": (WHOLE, TWO.as_subclass(type("Kind", (torch.Tensor,), {})), (2, 4)),
}


@pytest.mark.parametrize("case", NOT_PLAIN)
def test_what_is_not_plain_is_left_alone(case):
    table, index, shape = NOT_PLAIN[case]
    out = torch.full(shape, SENTINEL, dtype=torch.float32)
    if case == "conjugated":
        out = out.to(torch.complex64)
    assert gathered(table, index) is None
    assert gathered(table, index, out) is None
    assert (out == SENTINEL).all()


OUTS = {
    "float64": torch.empty(2, 4, dtype=torch.float64),
    "int32": torch.empty(2, 4, dtype=torch.int32),
    "bfloat16": torch.empty(2, 4, dtype=torch.bfloat16),
    "more rows": torch.empty(3, 4),
    "wider": torch.empty(2, 5),
    "one dimension": torch.empty(8),
    "three dimensions": torch.empty(1, 2, 4),
    "transposed": torch.empty(4, 2).t(),
    "with gaps": torch.empty(2, 8)[:, :4],
    "meta": torch.empty(2, 4, device="meta"),
    "a string": "rows",
    "the table's first rows": WHOLE[:2],
    "the table's last rows": WHOLE[-2:],
    "across the table's rows": WHOLE.view(-1)[6:14].view(2, 4),
    "the index": TWO.view(torch.float32).view(2, 2),
}


@pytest.mark.parametrize("name", OUTS)
def test_an_out_that_does_not_fit_is_left_alone(name):
    out, table = OUTS[name], WHOLE
    if isinstance(out, torch.Tensor) and out.shape == (2, 2):
        table = torch.randn(12, 2)
    before, ids = table.clone(), TWO.clone()
    assert gathered(table, TWO, out) is None
    assert torch.equal(table, before)
    assert torch.equal(TWO, ids)


def test_an_out_beside_the_table_is_taken():
    whole = torch.randn(6, 4)
    expected = whole[:4][TWO]
    assert torch.equal(gathered(whole[:4], TWO, whole[4:]), expected)


def test_results_of_4_mib_and_more_are_left_to_what_finds_memory_for_them():
    table = torch.zeros(1, 1 << 10, dtype=torch.uint8)
    below, at = torch.zeros((4 << 10) - 1, dtype=torch.int32), torch.zeros(4 << 10).int()
    assert gathered(table, below).nbytes == (4 << 20) - (1 << 10)
    assert gathered(table, at) is None
    out = torch.ones(4 << 10, 1 << 10, dtype=torch.uint8)
    assert gathered(table, at, out) is out
    assert not out.any()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_whoever_watches_or_changes_operators_is_let_see_them():
    assert gathered(WHOLE, TWO) is not None
    with Watches():
        assert gathered(WHOLE, TWO) is None
    with torch.autograd.profiler.profile():
        assert gathered(WHOLE, TWO) is None
    seen = []
    torch.func.vmap(lambda x: seen.append(gathered(WHOLE, TWO)) or x)(torch.zeros(2))
    torch.jit.trace(
        lambda x: seen.append(gathered(WHOLE, TWO)) or x, torch.zeros(2), check_trace=False
    )
    assert seen
    assert not any(rows is not None for rows in seen)
    assert gathered(WHOLE, TWO) is not None


def test_the_long_way_says_what_is_wrong():
    with pytest.raises(IndexError, match="index 12 at position 1 is out of range"):
        gather(WHOLE, torch.tensor([1, 12]))
    assert torch.equal(gather(WHOLE, TWO), WHOLE[TWO])


STORES = ["fp16", "bf16", "int8", "fp8"]
DELIVERED = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def stored(codes, scales, index, out, element=None):
    tally = array("q", (0, 0, 0))
    at, _ = tally.buffer_info()
    element = element or out.dtype
    numbers, like = (FORMATS[codes.dtype], ELEMENTS[element]), torch.empty(0, dtype=element)
    rows = _core.gather_stored_tensors(codes, scales, index, out, like, *numbers, at)
    return rows, tally.tolist()


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("dtype", DELIVERED)
@pytest.mark.parametrize("shape", [(4,), (3, 5), ()])
@pytest.mark.parametrize("int32", [False, True])
def test_small_rows_are_widened(store, dtype, shape, int32):
    codes, scales = quantise(torch.randn(9, 3, 5), store)
    index = torch.randint(-9, 9, shape, dtype=torch.int32 if int32 else torch.int64)
    out = torch.empty(*shape, 3, 5, dtype=dtype)
    rows, tally = stored(codes, scales, index, out)
    assert rows is out
    assert same_bits(out, dequantise(codes, scales, dtype)[index.long()])
    row_nbytes = 15 * codes.element_size() + (0 if scales is None else 4)
    new, _ = stored(codes, scales, index, None, dtype)
    assert same_bits(new, out)
    assert tally == [1, index.numel(), index.numel() * row_nbytes]


def test_small_rows_that_are_not_plain_are_left_alone():
    codes, scales = quantise(torch.randn(12, 4), "int8")
    fit = torch.empty(2, 4)
    for wrong in (
        (codes, scales, torch.tensor([1, 12]), fit),
        (codes, scales, TWO.short(), fit),
        (codes, scales, TWO, torch.empty(2, 5)),
        (codes, scales, TWO, torch.empty(2, 8)[:, ::2]),
        (codes, scales, TWO, fit, torch.float64),
        (codes, scales, TWO, torch.empty(2, 4, dtype=torch.int32), torch.float32),
        (codes, scales[1:], TWO, fit),
        (codes, scales.double(), TWO, fit),
        (codes, torch.randn(24)[::2], TWO, fit),
        (codes.t().contiguous().t(), scales, TWO, fit),
        (codes, scales, TWO, codes.view(torch.float32).view(-1)[:8].view(2, 4)),
        (codes, scales, TWO, "rows", torch.float32),
        (codes, scales, torch.zeros(1 << 18).int(), None, torch.float32),  # 4 MiB
    ):
        assert stored(*wrong) == (None, [0, 0, 0])
    with Watches():
        assert stored(codes, scales, TWO, fit) == (None, [0, 0, 0])
    assert stored(codes, scales, TWO, fit)[0] is fit


def test_parameters_are_read_as_what_they_hold():
    weight = torch.nn.Parameter(WHOLE.clone())
    rows = gathered(weight, TWO)
    assert type(rows) is torch.Tensor
    assert not rows.requires_grad
    assert torch.equal(rows, WHOLE[TWO])
