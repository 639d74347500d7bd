import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataeff._core import ExtentMap


@given(
    alignment=st.sampled_from([1, 64, 4096]),
    actions=st.lists(st.integers(-20, 20_000), max_size=120),
)
@settings(deadline=None)
def test_extents_are_disjoint_aligned_and_coalesced(alignment, actions):
    """A non-negative action allocates that many bytes, a negative one frees the i-th extent."""
    extents = ExtentMap(1 << 17, alignment)
    out = []
    for action in actions:
        if action >= 0:
            offset = extents.allocate(action)
            if offset is None:
                assert extents.largest_free < extents.rounded(action)
            else:
                out.append((offset, extents.rounded(action)))
        elif out:
            extents.free(out.pop(action % len(out))[0])
        ends = [
            (offset + nbytes, other)
            for (offset, nbytes), (other, _) in zip(sorted(out), sorted(out)[1:], strict=False)
        ]
        assert all(end <= start for end, start in ends)
        assert all(offset % alignment == 0 and offset + n <= 1 << 17 for offset, n in out)
        assert extents.used == sum(nbytes for _, nbytes in out)
        assert extents.num_free <= len(out) + 1  # neighbouring holes are one hole
    for offset, _ in out:
        extents.free(offset)
    assert extents.used == 0 and extents.num_used == 0
    assert extents.num_free == 1 and extents.largest_free == 1 << 17
    assert extents.peak <= 1 << 17


def test_best_fit_takes_the_smallest_hole():
    extents = ExtentMap(100, 1)
    a, _b, c, _d = (extents.allocate(n) for n in (30, 10, 20, 40))
    extents.free(a)
    extents.free(c)
    assert extents.allocate(15) == c
    assert extents.allocate(25) == a


def test_growth_extends_the_last_hole():
    extents = ExtentMap(0, 10)
    assert extents.allocate(1) is None
    extents.grow(25)  # a partial unit serves nobody
    assert (extents.capacity, extents.tail_free) == (20, 20)
    first = extents.allocate(10)
    extents.grow(40)
    assert extents.tail_free == 30 and extents.allocate(30) == 10
    extents.free(first)
    assert extents.tail_free == 0


def test_misuse():
    extents = ExtentMap(100, 10)
    offset = extents.allocate(10)
    extents.free(offset)
    with pytest.raises(ValueError, match="offset 0: it was freed before"):
        extents.free(offset)
    with pytest.raises(ValueError, match="capacity=50"):
        extents.grow(50)
    with pytest.raises(ValueError, match="alignment=0"):
        ExtentMap(1, 0)
    with pytest.raises(ValueError, match="nbytes=-1"):
        extents.allocate(-1)
