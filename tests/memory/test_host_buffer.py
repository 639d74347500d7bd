import ctypes
import mmap
import os
import resource

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataeff.memory import HostBuffer

SIZES = [0, 1, 4095, 4096, 4097, (2 << 20) - 1, 2 << 20, (4 << 20) + 12345]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("nbytes", SIZES)
def test_size_alignment_and_zeros(nbytes, shared):
    with HostBuffer(nbytes, shared=shared) as buffer:
        assert buffer.nbytes == nbytes
        assert buffer.data_ptr % mmap.PAGESIZE == 0
        assert buffer.capacity_nbytes % 4096 == 0
        assert 0 <= buffer.capacity_nbytes - nbytes <= 4096
        tensor = buffer.tensor()
        assert tensor.numel() == nbytes and not tensor.any()
        if nbytes:
            assert tensor.data_ptr() == buffer.data_ptr
        if nbytes >= 2 << 20 and not shared:
            assert buffer.data_ptr % (2 << 20) == 0


@given(
    dtype=st.sampled_from([torch.uint8, torch.float16, torch.bfloat16, torch.int64, torch.bool]),
    shape=st.lists(st.integers(0, 7), max_size=4),
)
@settings(deadline=None, max_examples=40)
def test_tensor_round_trip(dtype, shape):
    values = torch.randint(0, 2, shape).to(dtype)
    buffer = HostBuffer(values.nbytes)
    tensor = buffer.tensor(dtype, shape)
    tensor.copy_(values)
    assert tensor.shape == values.shape and tensor.dtype == dtype
    assert (
        bytes(memoryview(buffer))
        == values.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    )


def test_a_shape_too_large_is_refused():
    with pytest.raises(ValueError, match=r"needs 104 bytes, the buffer has 100"):
        HostBuffer(100).tensor(torch.float32, (2, 13))


def test_tensors_outlive_the_handle():
    buffer = HostBuffer(1 << 20)
    tensor = buffer.tensor(torch.int32)
    array = np.frombuffer(buffer, dtype=np.uint8)
    tensor.fill_(7)
    buffer.close()
    assert tensor.eq(7).all() and array[0] == 7
    assert buffer.closed
    with pytest.raises(ValueError, match="closed"):
        _ = buffer.data_ptr
    with pytest.raises((BufferError, ValueError), match="closed"):
        buffer.tensor()


def test_closing_gives_the_memory_back():
    def resident_bytes():
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize()

    before = resident_bytes()
    for _ in range(20):
        with HostBuffer(16 << 20) as buffer:
            buffer.tensor().fill_(1)
    assert resident_bytes() - before < 48 << 20


def test_closing_leaves_no_descriptor_and_no_mapping():
    def left():
        with open("/proc/self/maps") as maps:
            return len(os.listdir("/proc/self/fd")), sum("memfd:dataeff" in line for line in maps)

    before = left()
    for _ in range(3):
        with HostBuffer(8192, shared=True) as buffer:
            HostBuffer.attach(buffer.fd, 8192).close()
            assert left() != before
    assert left() == before


def test_shared_memory_is_seen_by_a_forked_child():
    buffer = HostBuffer(8192, shared=True)
    pid = os.fork()
    if pid == 0:
        memoryview(buffer)[5000] = 42
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert memoryview(buffer)[5000] == 42


def test_attach_maps_the_same_memory():
    buffer = HostBuffer(10_000, shared=True)
    other = HostBuffer.attach(buffer.fd, 10_000)
    other.tensor()[9_999] = 3
    assert buffer.tensor()[9_999] == 3
    assert HostBuffer(1).fd == -1
    with pytest.raises(ValueError, match="more than the 12288 bytes"):
        HostBuffer.attach(buffer.fd, 20_000)
    with pytest.raises(OSError, match="fd 9999"):
        HostBuffer.attach(9999, 1)


def test_impossible_sizes():
    with pytest.raises(ValueError, match="nbytes=-1"):
        HostBuffer(-1)
    with pytest.raises(OSError, match="bytes of host memory") as error:
        HostBuffer(1 << 60)
    assert error.value.errno is not None


@pytest.mark.parametrize("nbytes", [8192, 4 << 20])
@pytest.mark.parametrize("inherited", [True, False])
def test_what_children_do_not_inherit_they_leave_alone(nbytes, inherited):
    """Where it was, a child may have other memory by the time it gives up the buffer."""
    buffer = HostBuffer(nbytes, inherited=inherited)
    address, capacity = buffer.data_ptr, buffer.capacity_nbytes
    with open("/proc/self/smaps") as smaps:
        assert ("dc" in _flags(smaps, address)) != inherited
    pid = os.fork()
    if pid == 0:
        if not inherited:
            mapped = _mmap_at(address, capacity)
            buffer.close()
            ctypes.memset(mapped, 1, capacity)  # SIGSEGV if `close` has unmapped it
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    memoryview(buffer)[nbytes - 1] = 1


def _flags(smaps, address):
    within = False
    for line in smaps:
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            first, last = (int(part, 16) for part in head.split("-"))
            within = first <= address < last
        elif within and head == "VmFlags:":
            return line.split()[1:]
    raise AssertionError(f"nothing is mapped at {address:#x}")


def _mmap_at(address, nbytes):
    """Anonymous memory where nothing is mapped."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    fixed = 0x100000  # MAP_FIXED_NOREPLACE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | fixed
    mapped = libc.mmap(address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    assert mapped == address
    return mapped
