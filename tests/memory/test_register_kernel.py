"""register.cu itself, compiled for the host, over a runtime that writes down what it is asked."""

import ctypes
import itertools
import mmap
import resource

import pytest

PAGE, GIB = mmap.PAGESIZE, 1 << 30
FREE = 1 << 40  # an address that nothing looks at
NO_MEMORY, TAKEN, CAPTURING = 2, 712, 900
READ_ONLY = 8


class Cuda:
    """The registration, and the state of the runtime under it."""

    def __init__(self, library):
        self._library = library
        library.open_registration.restype = ctypes.c_void_p
        self.set()

    def set(self, devices=1, host_pointer=1, read_only=1, fails_at=-1, error=NO_MEMORY):
        self._library.set_runtime(devices, host_pointer, read_only, fails_at, error)

    def open(self, data, nbytes):
        error = ctypes.create_string_buffer(512)
        span = ctypes.c_uint64(data), ctypes.c_int64(nbytes)
        found = self._library.open_registration(*span, error)
        assert self._library.error_left_behind() == 0
        if error.value:
            raise RuntimeError(error.value.decode())
        return found

    def close(self, registration):
        self._library.close_registration(ctypes.c_void_p(registration))
        assert self._library.error_left_behind() == 0

    def knows(self, data, nbytes):
        return bool(
            self._library.memory_is_registered(ctypes.c_uint64(data), ctypes.c_int64(nbytes))
        )

    def elsewhere(self, data, nbytes):
        self._library.register_elsewhere(ctypes.c_void_p(data), ctypes.c_int64(nbytes))

    def gone_elsewhere(self, data):
        self._library.unregister_elsewhere(ctypes.c_void_p(data))

    def set_wsl(self, is_there):
        self._library.set_wsl(ctypes.c_bool(is_there))

    def ranges(self):
        flat = (ctypes.c_int64 * 48)()
        number = self._library.registrations(flat, 16)
        return [tuple(flat[3 * i : 3 * i + 3]) for i in range(number)]


@pytest.fixture
def cuda(cuda_kernels):
    found = Cuda(cuda_kernels)
    yield found
    assert found.ranges() == []
    found.set(devices=2)


def test_whole_pages_are_registered_once_for_all_who_share_them(cuda):
    first, second = cuda.open(FREE + 5, 10), cuda.open(FREE + 100, PAGE)
    assert [pair[:2] for pair in cuda.ranges()] == [
        (FREE, FREE + PAGE),
        (FREE + PAGE, FREE + 2 * PAGE),
    ]
    cuda.close(first)
    assert cuda.knows(FREE + 100, PAGE) and not cuda.knows(FREE, 3 * PAGE)
    cuda.close(second)


def test_a_pool_that_is_copied_from_and_to_is_one_registration(cuda):
    pool = cuda.open(FREE, 100 * GIB)
    assert [pair[:2] for pair in cuda.ranges()] == [(FREE, FREE + 100 * GIB)]
    cuda.close(pool)


def test_more_than_cuda_takes_at_once_goes_in_parts_and_all_or_none(cuda):
    table = cuda.open(FREE, 600 * GIB)
    assert len(cuda.ranges()) == 3 and cuda.knows(FREE, 600 * GIB)
    cuda.close(table)
    cuda.set(fails_at=2)
    with pytest.raises(RuntimeError, match=f"registering {88 * GIB} bytes .*cudaErrorOfTheHost"):
        cuda.open(FREE, 600 * GIB)
    assert cuda.ranges() == [] and not cuda.knows(FREE, 1)
    cuda.close(cuda.open(FREE, 600 * GIB))  # nothing is left that stands in the way


def test_memory_of_its_allocator_is_left_to_it(cuda):
    cuda.elsewhere(FREE, PAGE)
    cuda.close(cuda.open(FREE, PAGE))
    assert len(cuda.ranges()) == 1
    with pytest.raises(RuntimeError, match="registered by other code"):
        cuda.open(FREE, 2 * PAGE)
    cuda.gone_elsewhere(FREE)


def test_memory_between_two_tables_is_registered_when_a_third_begins_and_ends_in_theirs(cuda):
    first, last = cuda.open(FREE, 2 * PAGE), cuda.open(FREE + 10 * PAGE, 2 * PAGE)
    assert not cuda.knows(FREE, 12 * PAGE)
    whole = cuda.open(FREE, 12 * PAGE)
    assert cuda.knows(FREE + 5 * PAGE, 1) and cuda.knows(FREE, 12 * PAGE)
    cuda.close(first), cuda.close(last)
    assert cuda.knows(FREE, 12 * PAGE)
    cuda.close(whole)


def test_arrays_that_lie_back_to_back_are_all_registered(cuda):
    """As those of a file: the middle one begins and ends in pages of its neighbours."""
    bounds = [FREE + 40 + i * (9 * PAGE + 16) for i in range(4)]
    spans = [(begin, end - begin) for begin, end in itertools.pairwise(bounds)]
    tables = [cuda.open(*spans[i]) for i in (0, 2, 1)]
    assert [cuda.knows(begin + 5 * PAGE, 1) for begin, _ in spans] == [True] * 3
    for table in tables:
        cuda.close(table)


def test_a_registration_that_went_with_its_context_is_no_error(cuda):
    table = cuda.open(FREE, PAGE)
    cuda.gone_elsewhere(FREE)
    cuda.close(table)


def test_a_read_only_mapping_is_registered_as_one_or_refused_with_the_remedy(cuda, tmp_path):
    path = tmp_path / "rows"
    path.write_bytes(bytes(PAGE))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    with path.open("rb") as file:
        length = ctypes.c_size_t(PAGE)
        at = libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_PRIVATE, file.fileno(), 0)
    table = cuda.open(at, PAGE)
    assert cuda.ranges()[0][2] & READ_ONLY
    cuda.close(table)
    cuda.set(read_only=0, fails_at=0)
    with pytest.raises(RuntimeError, match=r"mapped read-only.*x\.clone"):
        cuda.open(at, PAGE)
    libc.munmap(ctypes.c_void_p(at), length)


def test_reasons_and_remedies(cuda):
    cuda.set(devices=0)
    with pytest.raises(RuntimeError, match="no usable NVIDIA driver or GPU"):
        cuda.open(FREE, PAGE)
    cuda.set(host_pointer=0)
    with pytest.raises(RuntimeError, match=r"host address.*pin_memory"):
        cuda.open(FREE, PAGE)
    cuda.set(fails_at=0, error=TAKEN)
    with pytest.raises(RuntimeError, match="registered by other code"):
        cuda.open(FREE, PAGE)
    cuda.set(fails_at=0, error=CAPTURING)
    with pytest.raises(RuntimeError, match="another thread is capturing a CUDA graph: register be"):
        cuda.open(FREE, PAGE)
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (PAGE, hard))
    try:
        cuda.set(fails_at=0)
        with pytest.raises(RuntimeError, match=rf"may lock {PAGE} bytes: .*ulimit -l"):
            cuda.open(FREE, 2 * PAGE)
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))


def test_where_no_memory_that_exists_can_be_registered_pinned_memory_is_named(cuda):
    cuda.set(fails_at=0)
    cuda.set_wsl(True)
    try:
        with pytest.raises(RuntimeError, match=r"WSL cannot register .*x\.pin_memory"):
            cuda.open(FREE, PAGE)
    finally:
        cuda.set_wsl(False)


def test_what_has_no_reason_of_its_own_names_who_else_takes_memory(cuda):
    cuda.set(fails_at=0)  # of one page, which any process may lock
    with pytest.raises(RuntimeError, match="other users of memory and for a limit of the contain"):
        cuda.open(FREE, 1)


def test_no_bytes_register_nothing(cuda):
    cuda.close(cuda.open(FREE, 0))
    assert cuda.ranges() == [] and cuda.knows(FREE, 0)
