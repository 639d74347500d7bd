"""cuFile is used when a probe proves it, and refused with the reason otherwise.

The library is a fake that does the same with system calls; "device" memory is host memory.
"""

import errno
import os
import subprocess
import sys

import pytest
import torch
from fake_cufile import SOURCE, build

from dataeff import _core
from dataeff.memory import HostBuffer
from dataeff.storage import SpillFile, cufile_library, cufile_refusal, open_engine


@pytest.fixture
def library(cufile_path):
    return cufile_path


@pytest.fixture
def fake(fake_cufile):
    return fake_cufile


@pytest.fixture
def spill(tmp_path):
    with SpillFile(tmp_path) as spill:
        if not spill.direct:
            pytest.skip("no direct I/O here")
        yield spill


def test_a_library_that_works_is_taken(fake, library, tmp_path):
    assert cufile_refusal(tmp_path, "cpu", str(library)) is None
    assert fake.num_reads > 0 and fake.num_writes > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("switches", "reason"),
    [
        ({"open_error": 5022}, "driver does not open: cuFile error 5022"),
        ({"nvfs_major": 0}, "compatibility mode"),
        ({"register_error": 1}, "Operation not supported"),
        ({"result": -5030}, "Input/output error"),
        ({"result": -1, "errno": errno.EPERM}, "Operation not permitted"),
        ({"corrupt": 1}, "other bytes"),
    ],
)
def test_what_does_not_work_is_refused_with_the_reason(fake, library, tmp_path, switches, reason):
    fake.set(**switches)
    assert reason in cufile_refusal(tmp_path, "cpu", str(library))


def test_a_library_that_is_no_library(tmp_path):
    (wrong := tmp_path / "libcufile.so.0").write_bytes(b"nothing")
    assert "cannot be loaded" in cufile_refusal(tmp_path, "cpu", str(wrong))


def test_a_library_without_a_function_is_named(tmp_path):
    library = build(tmp_path, "-DcuFileRead=cuFileReadOfOld")
    assert "has no function cuFileRead" in cufile_refusal(tmp_path, "cpu", str(library))


def test_no_gpu_or_no_library_is_said(monkeypatch, tmp_path, library):
    monkeypatch.setattr("dataeff.storage.cufile.cufile_library", lambda: None)
    assert "neither on the system" in cufile_refusal(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cufile_refusal(tmp_path, "cuda", str(library)) == "there is no CUDA device"


@pytest.mark.parametrize(("nbytes", "shift"), [(1, 0), (4096, 1), (3 * 2**20 + 17, 513), (0, 0)])
def test_bytes_of_any_size_and_address_go_straight(fake, library, spill, nbytes, shift):
    """The file is opened without O_DIRECT for the fake's sake: it has no bounce of its own."""
    fd = os.open(f"/proc/self/fd/{spill.fd}", os.O_RDWR)
    source, target = HostBuffer(nbytes + shift), HostBuffer(nbytes + shift + 64)
    source.tensor().random_(0, 255)
    target.tensor().fill_(77)
    with _core.make_cufile_engine(str(library), 3) as engine:
        assert engine.name == "cufile"
        engine.write(fd, source.data_ptr + shift, nbytes, 8192).wait()
        engine.read(fd, target.data_ptr + shift, nbytes, 8192).wait()
        assert fake.num_registered == (1 if nbytes else 0)
    got = target.tensor()
    assert torch.equal(got[shift : shift + nbytes], source.tensor()[shift:])
    assert got[:shift].eq(77).all() and got[shift + nbytes :].eq(77).all()
    os.close(fd)


def test_a_descriptor_used_again_is_registered_again(fake, library, tmp_path):
    with _core.make_cufile_engine(str(library), 1) as engine, HostBuffer(4096) as buffer:
        for letter in (b"a", b"b"):
            fd = os.open(tmp_path / letter.decode(), os.O_RDWR | os.O_CREAT)
            memoryview(buffer)[:] = letter * 4096
            engine.write(fd, buffer.data_ptr, 4096, 0).wait()
            os.close(fd)  # the next file is given the same number
        assert fake.num_registered == 1
    assert (tmp_path / "a").read_bytes() == b"a" * 4096
    assert (tmp_path / "b").read_bytes() == b"b" * 4096


def test_an_error_names_the_file_and_the_offset(fake, library, spill):
    with _core.make_cufile_engine(str(library), 1) as engine, HostBuffer(4096) as buffer:
        extent = spill.allocate(4096)
        fake.set(result=-5030)
        with pytest.raises(OSError, match="write of 4096 bytes at offset 0") as caught:
            engine.write(spill.fd, buffer.data_ptr, 4096, extent.offset).wait()
        assert caught.value.errno == errno.EIO


IN_NO_CONTEXT = """
import ctypes, os, sys

folder, has_context = sys.argv[1], int(sys.argv[2])
driver = ctypes.CDLL(f"{folder}/libcuda.so.1", ctypes.RTLD_GLOBAL)
retained = ctypes.c_int.in_dll(driver, "fake_num_retained")
ctypes.c_int.in_dll(driver, "fake_pointer_context").value = has_context

from dataeff import _core
from dataeff.memory import HostBuffer

fd = os.open(f"{folder}/rows", os.O_RDWR | os.O_CREAT)
with HostBuffer(4096) as buffer:
    memoryview(buffer)[:] = b"a" * 4096
    with _core.make_cufile_engine(f"{folder}/libcufile.so.0", 3) as engine:
        for row in range(8):  # all threads of the engine
            engine.write(fd, buffer.data_ptr, 4096, 4096 * row).wait()
        assert retained.value == (0 if has_context else 1), retained.value
    del engine
assert retained.value == 0 and os.fstat(fd).st_size == 8 * 4096
"""


@pytest.mark.parametrize("has_context", [0, 1])
def test_memory_of_no_context_is_moved_in_that_of_its_device(tmp_path, has_context):
    """That of torch's expandable segments; the threads of the engine have none of their own."""
    build(tmp_path)
    build(tmp_path, source=SOURCE.with_name("fake_cuda_driver.c"), name="libcuda.so.1")
    command = [sys.executable, "-c", IN_NO_CONTEXT, str(tmp_path), str(has_context)]
    subprocess.run(command, check=True, timeout=120)


def test_open_engine_finds_it(fake, library, monkeypatch):
    monkeypatch.setattr("dataeff.storage.engine.cufile_library", lambda: str(library))
    with open_engine("cufile") as engine:
        assert engine.name == "cufile" and fake.num_open == 1
    del engine
    with pytest.raises(ValueError, match="faults"):
        open_engine("cufile", faults=_core.FaultPlan())


def test_library_from_a_package_that_does_not_load_is_not_counted(monkeypatch, tmp_path):
    library = tmp_path / "nvidia/cu13/lib/libcufile.so.0"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"not a library")
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert cufile_library() in (None, "libcufile.so.0")
