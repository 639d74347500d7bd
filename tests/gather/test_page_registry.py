"""Registration of host pages: rounding, sharing, chunks and rollback, without a GPU."""

import ctypes

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

PAGE, CHUNK = 16, 64


@pytest.fixture(scope="module")
def library(native_library):
    library = native_library("page_registry_double.cpp", "memory/page_registry.cpp")
    number, handle = ctypes.c_int64, ctypes.c_void_p
    library.harness_new.restype, library.harness_new.argtypes = handle, [number, number]
    library.acquire.restype, library.acquire.argtypes = number, [handle, number, number]
    library.num_pins.restype = number
    library.covers.argtypes = [handle, number, number]
    for name in ("release", "fail_after"):
        getattr(library, name).argtypes = [handle, number]
    library.pins.argtypes = [handle, ctypes.POINTER(number)]
    for name in ("harness_free", "misused", "num_pins"):
        getattr(library, name).argtypes = [handle]
    return library


class Registry:
    def __init__(self, library):
        self._library, self._handle = library, library.harness_new(PAGE, CHUNK)

    def __getattr__(self, name):
        return lambda *args: getattr(self._library, name)(self._handle, *args)

    def ranges(self):
        flat = (ctypes.c_int64 * (2 * self.num_pins()))()
        self.pins(flat)
        return list(zip(flat[::2], flat[1::2], strict=True))


@pytest.fixture
def registry(library):
    registry = Registry(library)
    yield registry
    assert not registry.misused()
    registry.harness_free()


def test_whole_pages_in_bounded_chunks(registry):
    which = registry.acquire(100, 150)
    assert registry.ranges() == [(96, 64), (160, 64), (224, 32)]
    assert registry.covers(96, 160)
    assert not registry.covers(95, 2)
    assert not registry.covers(250, 7)
    registry.release(which)
    assert registry.ranges() == []


def test_tables_that_share_pages(registry):
    first, second = registry.acquire(16, 20), registry.acquire(40, 40)
    assert registry.ranges() == [(16, 32), (48, 32)]
    registry.release(first)
    assert registry.covers(40, 40)
    registry.release(second)
    assert registry.ranges() == []


def test_no_bytes_register_nothing(registry):
    registry.release(registry.acquire(33, 0))
    assert registry.ranges() == []


def test_a_refused_part_leaves_everything_as_it_was(registry):
    kept = registry.acquire(160, 16)
    registry.fail_after(2)
    assert registry.acquire(0, 400) == -1
    assert registry.ranges() == [(160, 16)]
    registry.fail_after(-1)
    registry.release(kept)
    assert registry.ranges() == []


actions = st.lists(
    st.tuples(st.integers(0, 300), st.integers(0, 300), st.integers(-1, 4), st.booleans()),
    max_size=30,
)


@settings(max_examples=200, deadline=None)
@given(actions=actions)
def test_any_order_of_tables(library, actions):
    registry, held = Registry(library), []
    for begin, nbytes, successes, let_go in actions:
        before = registry.ranges()
        registry.fail_after(successes)
        which = registry.acquire(begin, nbytes)
        if which < 0:
            assert registry.ranges() == before
        else:
            held.append((which, begin, nbytes))
        if let_go and held:
            registry.release(held.pop(len(held) // 2)[0])
        assert all(registry.covers(begin, nbytes) for _, begin, nbytes in held)
        assert all(begin % PAGE == 0 and 0 < size <= CHUNK for begin, size in registry.ranges())
    for which, *_ in held:
        registry.release(which)
    assert registry.ranges() == []
    assert not registry.misused()
    registry.harness_free()
