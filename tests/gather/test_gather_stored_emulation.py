"""The CUDA gather of small, hot and reordered rows, its lanes run one by one on the host."""

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataeff.features.quantised import ELEMENTS, FORMATS, STORED_DTYPES, dequantise, quantise

NAMES = ("loads", "requests", "words", "bad", "stray_words", "hits")
GUARD = 64
SENTINEL = 0xA5


class Counts(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in NAMES]


@pytest.fixture(scope="module")
def emulate(native_library):
    function = native_library("emulation.cpp").emulate_stored
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer, number, number, pointer, number, pointer, pointer, number]
    function.argtypes += [pointer, pointer, ctypes.c_int, ctypes.c_int, pointer]
    function.argtypes += [ctypes.POINTER(Counts)]
    function.restype = None

    def run(codes, scales, ids, dtype, *, hot=None, slots=None, places=None, skew=0):
        """Gathers codes to `dtype`, `skew` elements behind a multiple of 16 bytes."""
        width = codes.shape[1]
        start = GUARD + skew * dtype.itemsize
        nbytes = len(ids) * width * dtype.itemsize
        frame = torch.full((start + nbytes + GUARD + 16,), SENTINEL, dtype=torch.uint8)
        align = -frame.data_ptr() % 16
        frame = frame[align : align + start + nbytes + GUARD]
        out = frame[start : start + nbytes].view(dtype).view(len(ids), width)
        counts = Counts()
        raw = dtype == codes.dtype
        function(
            *(codes.data_ptr(), len(codes), width * codes.element_size()),
            *(None, 0) if hot is None else (hot.data_ptr(), len(hot)),
            None if slots is None else slots.data_ptr(),
            *(ids.data_ptr(), len(ids), None if places is None else places.data_ptr()),
            out.data_ptr(),
            *(-1, 0) if raw else (FORMATS[codes.dtype], ELEMENTS[dtype]),
            *(None if scales is None else scales.data_ptr(), counts),
        )
        assert (frame[:start] == SENTINEL).all() and (frame[start + nbytes :] == SENTINEL).all()
        assert counts.stray_words == 0
        return out, counts

    return run


def unaligned(codes, offset):
    """The same codes, `offset` elements behind a multiple of 128 bytes."""
    room = torch.zeros(codes.numel() + offset + 256, dtype=codes.dtype)
    start = (-room.data_ptr() % 128) // codes.element_size() + offset
    copy = room[start : start + codes.numel()].view(codes.shape)
    return copy.copy_(codes)


@pytest.mark.parametrize("store", STORED_DTYPES)
@pytest.mark.parametrize("dtype", ELEMENTS)
def test_every_width_is_the_reference(emulate, store, dtype):
    torch.manual_seed(1)
    ids = torch.tensor([4, 0, -1, 2, 2, -7, 5])
    for width in [*range(1, 70), 127, 128, 129, 160, 161, 200, 300, 550, 1100]:
        codes, scales = quantise(torch.randn(7, width), store)
        expected = dequantise(codes, scales, dtype)[ids]
        for offset in (0, 1, 5, 16, 63):
            out, _ = emulate(unaligned(codes, offset), scales, ids, dtype, skew=offset % 3)
            assert torch.equal(out, expected), (width, offset)


def test_an_int8_row_of_128_is_one_request(emulate):
    codes, scales = quantise(torch.randn(50, 128), "int8")
    assert codes.data_ptr() % 128 == 0
    ids = torch.randperm(50)
    _, counts = emulate(codes, scales, ids, torch.float32)
    assert counts.requests == 50


@settings(max_examples=60, deadline=None)
@given(
    store=st.sampled_from([None, *STORED_DTYPES]),
    width=st.integers(1, 300),
    num_hot=st.integers(0, 20),
    with_slots=st.booleans(),
    with_places=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_hot_rows_and_places(emulate, store, width, num_hot, with_slots, with_places, seed):
    torch.manual_seed(seed)
    x = torch.randn(20, width)
    codes, scales = (x, None) if store is None else quantise(x, store)
    chosen = torch.randperm(20)[:num_hot] if with_slots else torch.arange(num_hot)
    slots = torch.full((20,), -1, dtype=torch.int32)
    slots[chosen] = torch.arange(num_hot, dtype=torch.int32)
    ids = torch.randint(-20, 20, (33,))
    places = torch.randperm(33) if with_places else None
    # The table's own copies of hot rows are spoilt: they must not be read.
    hot, cold = unaligned(codes[chosen], seed % 40), codes.clone()
    cold[chosen] = 0
    out, counts = emulate(
        *(cold, scales, ids, torch.float32),
        hot=hot,
        slots=slots if with_slots else None,
        places=places,
    )
    expected = dequantise(codes, scales, torch.float32)[ids]
    assert torch.equal(out if places is None else out[places], expected)
    assert counts.hits == (slots[ids % 20] >= 0).sum()
    if num_hot == 20:
        assert counts.requests == 0


@pytest.mark.parametrize("store", STORED_DTYPES)
def test_wrong_indices_give_zero_rows_hot_or_not(emulate, store):
    codes, scales = quantise(torch.randn(6, 50) + 9, store)
    ids = torch.tensor([1, 6, -7, 0, 2**62, -6, -(2**63)])
    out, counts = emulate(codes, scales, ids, torch.float32, hot=codes[:3])
    wrong = (ids < -6) | (ids >= 6)
    assert counts.bad == 4 and counts.hits == 3
    assert (out[wrong] == 0).all()
    assert torch.equal(out[~wrong], dequantise(codes, scales, torch.float32)[ids[~wrong]])


def test_places_past_32_bits(native_library, vast, far_rows):
    function = native_library("emulation.cpp").emulate_stored
    table, places = torch.arange(1, 22, dtype=torch.uint8).view(7, 3), far_rows % len(vast)
    ids, pointer, number = torch.arange(7), ctypes.c_void_p, ctypes.c_int64
    function(
        *(pointer(table.data_ptr()), number(7), number(3), None, number(0), None),
        *(pointer(ids.data_ptr()), number(7), pointer(places.data_ptr())),
        *(pointer(vast.data_ptr()), -1, 0, None, ctypes.byref(Counts())),
    )
    assert torch.equal(vast[places], table)
