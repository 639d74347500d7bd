import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataeff import _core

FUNCTIONS = [_core.crc32c, _core.crc32c_by_table]


def reference(data, crc=0):
    """Bit by bit: divides by the Castagnoli polynomial, lowest bit first."""
    crc ^= 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def call(function, data, initial=0):
    array = np.frombuffer(data, dtype=np.uint8)
    return function(array.ctypes.data, array.nbytes, initial)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),  # this and the next: RFC 3720, appendix B.4
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
    ],
)
def test_published_values(function, data, crc):
    assert call(function, data) == crc == reference(data)


@given(data=st.binary(max_size=300), split=st.integers(0, 300))
@settings(deadline=None)
def test_equals_the_reference_in_one_part_or_two(data, split):
    for function in FUNCTIONS:
        assert call(function, data) == reference(data)
        assert call(function, data[split:], call(function, data[:split])) == reference(data)


@given(nbytes=st.integers(0, 100_000), start=st.integers(0, 16), seed=st.integers(0, 5))
@settings(deadline=None, max_examples=60)
def test_both_ways_agree_on_long_inputs(nbytes, start, seed):
    data = np.random.default_rng(seed).bytes(nbytes + start)[start:]
    assert call(_core.crc32c, data) == call(_core.crc32c_by_table, data)


def test_every_single_bit_matters():
    data = bytearray(b"activation" * 3000)
    before = call(_core.crc32c, bytes(data))
    for position in (0, 12_287, 12_288, 29_999):
        data[position] ^= 0x10
        assert call(_core.crc32c, bytes(data)) != before
        data[position] ^= 0x10


def test_misuse():
    with pytest.raises(ValueError, match="nbytes=-1"):
        _core.crc32c(0, -1)
    with pytest.raises(ValueError, match="nbytes=5 at address 0"):
        _core.crc32c(0, 5)
