import errno
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataeff.memory import HostBuffer
from dataeff.storage import FaultPlan, SpillFile, open_engine, uring_refusal

PIECE = 1 << 20


def filled(nbytes, seed=0):
    buffer = HostBuffer(nbytes)
    generator = torch.Generator().manual_seed(seed)
    buffer.tensor().copy_(torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator))
    return buffer


@pytest.fixture(params=[True, False], ids=["direct", "cached"])
def spill(request, tmp_path):
    with SpillFile(tmp_path, direct=request.param) as spill:
        yield spill


@given(nbytes=st.integers(0, 3 * PIECE + 5), shift=st.sampled_from([0, 1, 64, 513, 4096]))
@settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_round_trip_of_any_size_and_address(engine, spill, nbytes, shift):
    source, target = filled(nbytes + shift, nbytes), HostBuffer(nbytes + shift + 64)
    target.tensor().fill_(77)
    extent = spill.allocate(nbytes)
    engine.write(spill.fd, source.data_ptr + shift, nbytes, extent.offset).wait()
    transfer = engine.read(spill.fd, target.data_ptr + shift, nbytes, extent.offset)
    transfer.wait()
    got = target.tensor()
    assert torch.equal(got[shift : shift + nbytes], source.tensor()[shift:])
    assert got[:shift].eq(77).all() and got[shift + nbytes :].eq(77).all()
    assert transfer.done() and not transfer.failed() and transfer.nbytes == nbytes
    assert transfer.start_ns <= transfer.end_ns <= time.perf_counter_ns()
    spill.free(extent)


def test_a_part_of_a_block_is_filled_with_zeros_and_not_with_earlier_bytes(engine, tmp_path):
    block = 4096
    source, target = HostBuffer(block + 1), HostBuffer(block)
    source.tensor().fill_(255)
    at = source.data_ptr + 1  # by way of memory of the engine's that is aligned
    with SpillFile(tmp_path) as spill:
        if not spill.direct:
            pytest.skip("no direct I/O here")
        extent = spill.allocate(2 * block)
        for transfer in [engine.write(spill.fd, at, block, extent.offset) for _ in range(64)]:
            transfer.wait()
        engine.write(spill.fd, at, 100, extent.offset + block).wait()
        engine.read(spill.fd, target.data_ptr, block, extent.offset + block).wait()
    assert target.tensor()[:100].eq(255).all() and target.tensor()[100:].eq(0).all()


def test_many_transfers_at_once(engine, spill):
    sizes = [1 + 37_777 * i % (2 * PIECE) for i in range(60)]
    sources = [filled(size, i) for i, size in enumerate(sizes)]
    extents = [spill.allocate(size) for size in sizes]
    rounds = [
        engine.write(spill.fd, source.data_ptr, source.nbytes, extent.offset)
        for source, extent in zip(sources, extents, strict=True)
    ]
    for transfer in reversed(rounds):
        transfer.wait()
    targets = [HostBuffer(size) for size in sizes]
    rounds = [
        engine.read(spill.fd, target.data_ptr, target.nbytes, extent.offset)
        for target, extent in zip(targets, extents, strict=True)
    ]
    for transfer, source, target in zip(rounds, sources, targets, strict=True):
        transfer.wait(timeout_s=60)
        assert torch.equal(source.tensor(), target.tensor())


def test_reading_past_the_end_raises_and_names_the_place(engine, spill):
    buffer = filled(3 * PIECE)
    path = os.readlink(f"/proc/self/fd/{spill.fd}")
    os.ftruncate(spill.fd, 10_000)
    for nbytes in (10_001, 3 * PIECE):
        transfer = engine.read(spill.fd, buffer.data_ptr, nbytes, 0)
        with pytest.raises(EOFError, match=f"read of {nbytes} bytes at offset 0 of .* ends there"):
            transfer.wait()
        assert transfer.failed() and path.split(" ")[0] in repr(transfer)
    engine.read(spill.fd, buffer.data_ptr, 10_000, 0).wait()
    assert not buffer.tensor()[:10_000].any()


def test_bad_requests_are_refused_at_once(engine, tmp_path):
    with SpillFile(tmp_path) as spill:
        buffer = HostBuffer(4096)
        with pytest.raises(OSError, match="fd 9999 is not open") as error:
            engine.read(9999, buffer.data_ptr, 1, 0)
        assert error.value.errno == errno.EBADF
        with pytest.raises(ValueError, match="nbytes=-1"):
            engine.read(spill.fd, buffer.data_ptr, -1, 0)
        with pytest.raises(ValueError, match="from address 0"):
            engine.write(spill.fd, 0, 1, 0)
        if spill.direct:
            with pytest.raises(ValueError, match="offset=100 must be a multiple of"):
                engine.write(spill.fd, buffer.data_ptr, 1, 100)


def test_a_file_that_cannot_be_written(engine, tmp_path):
    path = tmp_path / "read-only"
    path.write_bytes(b"x" * 4096)
    fd = os.open(path, os.O_RDONLY)
    buffer = HostBuffer(4096)
    with pytest.raises(OSError, match=r"write of 4096 bytes at offset 0 of .*read-only") as error:
        engine.write(fd, buffer.data_ptr, 4096, 0).wait()
    os.close(fd)
    assert error.value.errno == errno.EBADF
    assert path.read_bytes() == b"x" * 4096


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_real_full_disk(engine):
    fd = os.open("/dev/full", os.O_WRONLY)
    buffer = HostBuffer(4096)
    with pytest.raises(OSError, match="No space left") as error:
        engine.write(fd, buffer.data_ptr, 4096, 0).wait()
    os.close(fd)
    assert error.value.errno == errno.ENOSPC


def test_timeout_then_success(kind, spill):
    faults = FaultPlan().add("write", delay_s=0.3)
    with open_engine(kind, faults=faults) as engine:
        source = filled(4096)
        transfer = engine.write(spill.fd, source.data_ptr, 4096, spill.allocate(4096).offset)
        with pytest.raises(TimeoutError, match="is not done yet"):
            transfer.wait(timeout_s=0.01)
        with pytest.raises(TimeoutError):
            transfer.wait(timeout_s=0)
        transfer.wait(timeout_s=60)


def test_cancel_only_what_has_not_begun(kind, spill):
    faults = FaultPlan().add("write", delay_s=0.2, times=1)
    source = filled(4096)
    extents = [spill.allocate(4096) for _ in range(3)]
    with open_engine(kind, num_threads=1, queue_depth=1, faults=faults) as engine:
        first, second, third = (
            engine.write(spill.fd, source.data_ptr, 4096, extent.offset) for extent in extents
        )
        while not first.start_ns:
            time.sleep(0.001)
        assert not first.cancel()
        if second.cancel():  # an engine may begin several at once
            assert second.cancel() and second.done() and second.cancelled()
            with pytest.raises(OSError, match="was cancelled") as error:
                second.wait()
            assert error.value.errno == errno.ECANCELED
            assert faults.num_writes < 3
        third.wait()
        assert not third.cancel()
        first.wait()


def test_closing_finishes_what_was_asked(kind, spill):
    engine = open_engine(kind, num_threads=2, queue_depth=2)
    source, extents = filled(PIECE), [spill.allocate(PIECE) for _ in range(20)]
    transfers = [
        engine.write(spill.fd, source.data_ptr, PIECE, extent.offset) for extent in extents
    ]
    engine.close()
    engine.close()
    assert engine.closed and all(transfer.done() for transfer in transfers)
    for transfer in transfers:
        transfer.wait()
    with pytest.raises(ValueError, match="closed"):
        engine.write(spill.fd, source.data_ptr, 1, 0)


def test_closing_with_cancel_leaves_nothing_pending(kind, spill):
    faults = FaultPlan().add("any", delay_s=0.05)
    engine = open_engine(kind, num_threads=1, queue_depth=1, faults=faults)
    source, extents = filled(100), [spill.allocate(100) for _ in range(50)]
    transfers = [engine.write(spill.fd, source.data_ptr, 100, extent.offset) for extent in extents]
    engine.close(cancel=True)
    assert all(transfer.done() for transfer in transfers)
    assert sum(transfer.cancelled() for transfer in transfers) >= 48


def test_waiting_releases_the_interpreter_and_hears_signals(kind, spill):
    faults = FaultPlan().add("write", delay_s=1.5)
    with open_engine(kind, faults=faults) as engine:
        source = filled(4096)
        transfer = engine.write(spill.fd, source.data_ptr, 4096, spill.allocate(4096).offset)
        ticks = []
        ticker = threading.Thread(
            target=lambda: [(time.sleep(0.005), ticks.append(1)) for _ in range(20)]
        )
        ticker.start()
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            transfer.wait()
        assert ticks and not transfer.done()  # how many says how busy the machine is
        ticker.join()
        timer.join()
        transfer.wait()


def test_a_forked_child_is_refused(engine, spill):
    source = filled(4096)
    extent = spill.allocate(4096)
    engine.write(spill.fd, source.data_ptr, 4096, extent.offset).wait()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            engine.read(spill.fd, source.data_ptr, 4096, extent.offset)
        except RuntimeError as error:
            if "a fork copies none of its threads" in str(error):
                engine.close()
                code = 0
        os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    engine.read(spill.fd, source.data_ptr, 4096, extent.offset).wait()


def test_a_child_that_waits_or_drops_the_engine_does_not_hang(kind, spill):
    faults = FaultPlan().add("write", delay_s=0.5)
    engine = open_engine(kind, faults=faults)
    source = filled(4096)
    transfer = engine.write(spill.fd, source.data_ptr, 4096, spill.allocate(4096).offset)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            transfer.wait()
        except RuntimeError as error:
            code = 0 if "ends only in the parent" in str(error) else 2
        del engine
        os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    transfer.wait()
    engine.close()


def test_the_interpreter_exits_with_work_in_flight(kind, tmp_path):
    script = f"""
    import torch
    from dataeff.memory import HostBuffer
    from dataeff.storage import FaultPlan, SpillFile, open_engine, uring_refusal
    spill = SpillFile({str(tmp_path)!r})
    engine = open_engine({kind!r}, faults=FaultPlan().add("any", delay_s=0.002))
    tensors = [torch.ones(300_000) for _ in range(50)]
    transfers = [engine.write(spill.fd, t.data_ptr(), t.nbytes, spill.allocate(t.nbytes).offset)
                 for t in tensors]
    print("leaving")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "leaving\n", "")
    assert not list(tmp_path.iterdir())


def test_unknown_kinds_and_numbers():
    with pytest.raises(ValueError, match="kind='carrier pigeon'"):
        open_engine("carrier pigeon")
    with pytest.raises(ValueError, match="num_threads=0"):
        open_engine("threads", num_threads=0)
    with pytest.raises(ValueError, match="queue_depth=0"):
        open_engine("io_uring", queue_depth=0)


@pytest.mark.parametrize(
    ("code", "text"),
    [(errno.EPERM, "forbidden to this process"), (errno.ENOSYS, "has no io_uring")],
)
def test_a_kernel_that_refuses_io_uring(code, text, tmp_path):
    done = run_without_io_uring(code, tmp_path)
    if done.returncode == 77:
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stderr
    assert text in done.stdout and done.stdout.endswith("threads\n")


def run_without_io_uring(code, directory):
    """A process whose seccomp filter answers io_uring_setup with `code`, as containers do."""
    script = f"""
    import ctypes, struct, sys
    filters = b"".join(struct.pack("HBBI", *row) for row in [
        (0x20, 0, 0, 0),              # load the system call's number
        (0x15, 0, 1, 425),            # io_uring_setup?
        (0x06, 0, 0, 0x00050000 | {code}),  # answer with the errno
        (0x06, 0, 0, 0x7FFF0000),     # allow
    ])
    buffer = ctypes.create_string_buffer(filters, len(filters))
    program = struct.pack("HxxxxxxP", 4, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, program, 0, 0):
        print("seccomp filters are not allowed here")
        sys.exit(77)
    from dataeff.storage import open_engine, uring_refusal
    print(uring_refusal())
    try:
        open_engine("io_uring")
    except OSError as error:
        assert error.errno == {code}, error
    from dataeff.storage import choose_engine
    print(choose_engine(sys.argv[1], nbytes=1 << 22, max_seconds=0.01).kind)
    """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(directory)],
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.skipif(uring_refusal() is not None, reason="no io_uring here")
def test_a_ring_that_the_kernel_refuses_gives_way_to_blocking_calls(tmp_path):
    script = f"""
    import os, threading
    import torch
    from dataeff.memory import HostBuffer
    from dataeff.storage import SpillFile, open_engine

    engine = open_engine("io_uring", queue_depth=4)
    source, target = HostBuffer(64 << 20), HostBuffer(64 << 20)
    source.tensor().random_(256)
    spill = SpillFile({str(tmp_path)!r})
    extents = [spill.allocate(4 << 20) for _ in range(16)]

    def each(call, buffer):
        start, nbytes = buffer.data_ptr, 4 << 20
        places = enumerate(extents)
        return [call(spill.fd, start + i * nbytes, nbytes, e.offset) for i, e in places]

    writes = each(engine.write, source)
    writes[0].wait()
    rings = [fd for fd in os.listdir("/proc/self/fd")
             if os.path.islink(f"/proc/self/fd/{{fd}}")
             and "io_uring" in os.readlink(f"/proc/self/fd/{{fd}}")]
    nothing = os.open("/dev/null", os.O_RDWR)
    for fd in rings:
        os.dup2(nothing, int(fd))  # from now on io_uring_enter answers EOPNOTSUPP
    assert rings
    for transfer in writes:
        transfer.wait(30)
    for transfer in each(engine.read, target):
        transfer.wait(30)
    assert torch.equal(source.tensor(), target.tensor())
    engine.close()
    print("same bytes")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "same bytes\n", (done.returncode, done.stderr)


@pytest.mark.skipif(uring_refusal() is not None, reason="no io_uring here")
def test_a_ring_without_descriptors_says_what_helps_and_a_closed_one_holds_none():
    def rings():
        links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        return [link for link in links if os.path.lexists(link) and "uring" in os.readlink(link)]

    before = rings()
    used = [int(fd) for fd in os.listdir("/proc/self/fd")]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(used) + 1, limits[1]))
    taken = []
    try:
        while True:
            try:
                taken.append(os.dup(0))
            except OSError:
                break
        with pytest.raises(OSError, match=r"Too many open files; a ring takes two .*ulimit -n"):
            open_engine("io_uring")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in taken:
            os.close(fd)
    engine = open_engine("io_uring")
    assert len(rings()) == len(before) + 1
    engine.close()
    assert rings() == before
