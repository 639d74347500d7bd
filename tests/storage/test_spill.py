import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from dataeff.memory import HostBuffer
from dataeff.storage import FaultPlan, SpillFile, open_engine
from dataeff.storage import spill as spill_module
from tests.offload import interrupts


def test_the_file_has_no_name(tmp_path):
    with SpillFile(tmp_path) as spill:
        assert spill.allocate(5000).nbytes == 8192
        assert list(tmp_path.iterdir()) == []
        assert os.fstat(spill.fd).st_nlink == 0


@pytest.mark.parametrize("flag", ["O_TMPFILE", "O_DIRECT"])
def test_file_systems_that_lack_something(tmp_path, monkeypatch, flag):
    real, named = spill_module._open, []
    refusal = {"O_TMPFILE": errno.EOPNOTSUPP, "O_DIRECT": errno.EINVAL}[flag]

    def refusing(path, flags, has_name, *args):
        if flags & os.O_DIRECT if flag == "O_DIRECT" else not has_name:
            raise OSError(refusal, os.strerror(refusal))
        named.append(has_name)
        return real(path, flags, has_name, *args)

    monkeypatch.setattr(spill_module, "_open", refusing)
    with SpillFile(tmp_path) as spill, open_engine() as engine:
        assert spill.direct == (flag != "O_DIRECT") and named == [flag == "O_TMPFILE"]
        assert list(tmp_path.iterdir()) == []
        assert os.fstat(spill.fd).st_nlink == 0
        buffer = HostBuffer(10_000)
        buffer.tensor().fill_(9)
        extent = spill.allocate(10_000)
        engine.write(spill.fd, buffer.data_ptr, 10_000, extent.offset).wait()
        buffer.tensor().zero_()
        engine.read(spill.fd, buffer.data_ptr, 10_000, extent.offset).wait()
        assert buffer.tensor().eq(9).all()


def test_a_thousand_steps_do_not_grow(tmp_path):
    with SpillFile(tmp_path) as spill:
        sizes = [1 + 98_765 * i % 900_000 for i in range(40)]
        num_fds = len(os.listdir("/proc/self/fd"))
        for step in range(1000):
            extents = [spill.allocate(size) for size in sizes]
            for extent in extents if step % 2 else reversed(extents):
                spill.free(extent)
            if step == 0:
                first = spill.file_nbytes
        assert spill.file_nbytes == first
        assert spill.used_nbytes == 0
        assert len(os.listdir("/proc/self/fd")) <= num_fds  # garbage of others may go meanwhile


def test_growth_is_reserved_on_the_disk(tmp_path):
    with SpillFile(tmp_path) as spill:
        spill.allocate(1 << 20)
        if spill.reserved:
            assert os.fstat(spill.fd).st_blocks * 512 >= spill.file_nbytes


def test_the_budget(tmp_path):
    with SpillFile(tmp_path, capacity_bytes=100_000) as spill:
        extents = [spill.allocate(20_000) for _ in range(4)]
        with pytest.raises(OSError, match="81920 of 100000 in use") as error:
            spill.allocate(20_000)
        assert error.value.errno == errno.ENOSPC
        assert error.value.filename == str(tmp_path)
        assert spill.file_nbytes <= 100_000
        spill.free(extents[1])
        assert spill.allocate(20_000) == extents[1]


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_found_by_allocate(tmp_path, reason):
    # Each asks for more than it needs first, and is refused; the third also for what it needs.
    full = FaultPlan().add("reserve", error=reason, every=2)
    full.add("reserve", error=reason, nth=6, times=1)
    with SpillFile(tmp_path, faults=full) as spill:
        extents = [spill.allocate(4 << 20) for _ in range(2)]
        with pytest.raises(OSError, match=f"{os.strerror(reason)}, reserving 4194304") as error:
            spill.allocate(4 << 20)
        assert error.value.errno == reason and error.value.filename == str(tmp_path)
        assert os.fstat(spill.fd).st_size == spill.file_nbytes == 8 << 20
        assert spill.allocate(2 << 20).offset == 8 << 20
        spill.free(extents[0])
        assert spill.allocate(4 << 20) == extents[0]


def test_a_real_limit_on_the_size_of_files(tmp_path):
    script = f"""
    import errno, os, resource
    from dataeff.storage import SpillFile
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 << 20, resource.RLIM_INFINITY))
    with SpillFile({str(tmp_path)!r}) as spill:
        extents = [spill.allocate(4 << 20) for _ in range(2)]
        try:
            spill.allocate(4 << 20)
        except OSError as error:
            assert error.errno == errno.EFBIG, error
        assert spill.allocate(2 << 20).offset == 8 << 20
        assert os.fstat(spill.fd).st_size == spill.file_nbytes == 10 << 20
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=60)


def test_what_a_failed_reservation_took_is_given_back(tmp_path):
    takes_a_part = FaultPlan().add("reserve", error=errno.ENOSPC, max_nbytes=1 << 20, nth=2)
    with SpillFile(tmp_path, faults=takes_a_part) as spill:
        spill.allocate(4096)
        before = os.fstat(spill.fd).st_size
        with pytest.raises(OSError, match="No space left on device, reserving"):
            spill.allocate(2 * before)
        assert os.fstat(spill.fd).st_size == before


def test_bad_directories(tmp_path):
    with pytest.raises(FileNotFoundError):
        SpillFile(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        SpillFile(tmp_path / "file")


def test_misuse(tmp_path):
    spill = SpillFile(tmp_path)
    extent = spill.allocate(1)
    spill.free(extent)
    with pytest.raises(ValueError, match="freed before"):
        spill.free(extent)
    spill.close()
    spill.close()
    with pytest.raises(ValueError, match="closed"):
        spill.allocate(1)


def test_a_killed_process_leaves_nothing(tmp_path):
    script = f"""
    import os, signal, torch
    from dataeff.storage import SpillFile, open_engine
    spill, engine = SpillFile({str(tmp_path)!r}), open_engine()
    x = torch.ones(4 << 20)
    for _ in range(4):
        engine.write(spill.fd, x.data_ptr(), x.nbytes, spill.allocate(x.nbytes).offset)
    os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], timeout=60)
    assert done.returncode == -9
    assert list(Path(tmp_path).iterdir()) == []


@pytest.mark.parametrize("named", [False, True])
def test_an_interrupt_while_it_is_opened_leaves_nothing_open(tmp_path, monkeypatch, named):
    real = spill_module._open

    def refusing(path, flags, has_name, *args):
        if named and not has_name:
            raise OSError(errno.EOPNOTSUPP, "")
        return real(path, flags, has_name, *args)

    monkeypatch.setattr(spill_module, "_open", refusing)

    def opened():
        with SpillFile(tmp_path):
            pass

    opened()
    num_fds = len(os.listdir("/proc/self/fd"))
    num_struck = 0
    for place, count in interrupts.places_in(opened).items():
        for nth in range(1, count + 1):
            num_struck += interrupts.interrupt(opened, place, nth)
            assert len(os.listdir("/proc/self/fd")) <= num_fds, interrupts.named(place)
            assert list(tmp_path.iterdir()) == []
    assert num_struck > 5
