"""Tensors in shared memory: in place, one mapping, one copy, passed by descriptor."""

import copy
import fcntl
import gc
import multiprocessing
import os
import pickle
import signal
import socket
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataeff.memory import HostBuffer, SharedTensor, new_shared, share_, share_among_ranks
from dataeff.memory.shared import attach_shared, shared_buffer

sys.path.insert(0, str(Path(__file__).parent))
import buffer_processes as processes


@given(
    dtype=st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.complex128]),
    shape=st.lists(st.integers(0, 5), max_size=3),
    transposed=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_share_moves_the_memory_and_nothing_else(dtype, shape, transposed):
    x = torch.randint(0, 2, shape).to(dtype)
    x = x.mT if transposed and x.dim() > 1 else x
    before = x.clone()
    assert share_(x) is x
    assert torch.equal(x, before) and x.dtype == dtype
    if x.numel():
        place = x.data_ptr()
        assert shared_buffer(x).fd >= 0
        assert share_(x).data_ptr() == place
        assert shared_buffer(x.reshape(-1)[1:] if x.is_contiguous() else x) is shared_buffer(x)
    again = SharedTensor(x).tensor()
    assert torch.equal(again, x) and again.stride() == x.stride()


def test_share_keeps_a_parameter():
    weight = torch.nn.Parameter(torch.ones(3, 2))
    share_(weight)
    weight.sum().backward()
    with torch.no_grad():
        weight -= weight.grad
    assert weight.requires_grad and shared_buffer(weight) is not None
    assert torch.equal(SharedTensor(weight).tensor(), torch.zeros(3, 2))


def test_what_is_not_shared_is_refused():
    with pytest.raises(TypeError, match="a tensor is shared, got a list"):
        share_([1.0])
    with pytest.raises(ValueError, match=r"meta.*x\.cpu"):
        share_(torch.empty(3, device="meta"))
    with pytest.raises(ValueError, match=r"x\.detach"):
        share_(torch.ones(3, requires_grad=True) * 2)
    assert shared_buffer(torch.ones(3)) is None
    with pytest.raises(TypeError, match="shared=True"):
        multiprocessing.reduction.ForkingPickler.dumps(HostBuffer(10))
    for copied in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="memory, not a value"):
            copied(HostBuffer(10, shared=True))


def test_one_mapping_per_process():
    x = new_shared((1000,), torch.int32)
    buffer = shared_buffer(x)
    assert attach_shared(buffer.fd, buffer.nbytes) is buffer
    with pytest.raises(OSError, match="Bad file descriptor"):
        attach_shared(10_000, 1)
    inode = os.fstat(buffer.fd).st_ino
    del x, buffer
    gc.collect()
    links = [Path(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    assert inode not in {link.stat().st_ino for link in links if link.exists()}


def test_nobody_can_shrink_it():
    buffer = HostBuffer(1 << 20, shared=True)
    for size in (0, 1 << 21):
        with pytest.raises(PermissionError):
            os.ftruncate(buffer.fd, size)
    future_write = 0x10  # F_SEAL_FUTURE_WRITE of linux/fcntl.h
    with pytest.raises(PermissionError):  # nor forbid writing to the others
        fcntl.fcntl(buffer.fd, fcntl.F_ADD_SEALS, future_write)


@pytest.mark.parametrize("method", ["fork", "forkserver"])  # which pickles as a spawn does
def test_four_processes_hold_one_copy(method, rank_context):
    context = rank_context if method == "forkserver" else multiprocessing.get_context(method)
    nbytes, count = 48 << 20, 4
    x = new_shared((nbytes,), torch.uint8).fill_(1)
    barrier, answers = context.Barrier(count, timeout=60), context.Queue()
    arguments = (SharedTensor(x), None, barrier, answers)
    workers = [
        context.Process(daemon=True, target=processes.touch_all, args=arguments)
        for _ in range(count)
    ]
    for worker in workers:
        worker.start()
    found = [answers.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(timeout=100)
    # This process maps it too: a copy each would make every share grow by all of it.
    assert [total for total, _, _ in found] == [nbytes] * count
    assert all(grown < nbytes / 3 for _, grown, _ in found), found
    assert all(worker.exitcode == 0 for worker in workers)


@pytest.mark.parametrize("method", ["fork"])
def test_a_killed_process_takes_nothing_with_it(method):
    context = multiprocessing.get_context(method)
    before = set(os.listdir("/dev/shm"))
    x = new_shared((1 << 20,), torch.uint8)
    worker = context.Process(daemon=True, target=processes.write_and_die, args=(SharedTensor(x),))
    worker.start()
    worker.join()
    assert worker.exitcode == -signal.SIGKILL
    assert x[7] == 42
    assert not {name for name in set(os.listdir("/dev/shm")) - before if "dataeff" in name}


def test_a_descriptor_travels_both_ways_and_outlives_its_maker():
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    x = new_shared((3000,), torch.float64)
    x[5] = 1.5
    worker = context.Process(
        daemon=True, target=processes.send_back, args=(theirs, SharedTensor(x))
    )
    worker.start()
    back = ours.recv()
    assert back.buffer is shared_buffer(x)  # it was mapped here already
    assert back.tensor()[5] == 1.5
    ours.send(None)
    worker.join()
    assert worker.exitcode == 0


@pytest.mark.parametrize("fail", [False, True])
def test_ranks_share_what_the_first_makes(tmp_path, fail, rank_context):
    answers = rank_context.Queue()
    ranks = [
        rank_context.Process(
            daemon=True, target=processes.run_rank, args=(rank, tmp_path / "store", answers, fail)
        )
        for rank in range(3)
    ]
    for rank in ranks:
        rank.start()
    found = sorted((answers.get(timeout=100) for _ in ranks), key=lambda answer: answer[0])
    for rank in ranks:
        rank.join(timeout=100)
    assert [made for _, made, _ in found] == [[0], [], []]
    if fail:
        assert "FileNotFoundError" in found[0][2]
        for _, _, words in found[1:]:
            assert "RuntimeError: rank 0" in words and "no such features" in words
    else:
        expected = torch.arange(20.0).view(10, 2)[2:]
        expected[:3] = -torch.arange(3.0)[:, None]
        assert all(x == expected.tolist() for _, _, x in found)


def test_alone_it_is_just_shared():
    x = share_among_ranks(lambda: torch.ones(4))
    assert x.tolist() == [1] * 4 and shared_buffer(x) is not None


def test_a_rank_that_does_not_come_is_named():
    from dataeff.memory.ranks import _answer_all, _listening_socket, _receive_from

    with _listening_socket() as listener:
        with pytest.raises(TimeoutError, match=r"1 of this machine's 1 other ranks"):
            _answer_all(listener, 1, 0.05, "", [torch.ones(1)])
        with pytest.raises(TimeoutError, match="rank 4 of this machine"):
            _receive_from(listener.getsockname(), 4, 0.05)


def test_a_leader_that_ends_early_is_named():
    from threading import Thread

    from dataeff.memory.ranks import _listening_socket, _receive_from

    with _listening_socket() as listener:

        def hang_up():
            listener.accept()[0].close()

        thread = Thread(target=hang_up)
        thread.start()
        with pytest.raises((RuntimeError, ConnectionError), match=r"it ended|reset"):
            _receive_from(listener.getsockname(), 0, 10)
        thread.join()
    assert isinstance(listener, socket.socket)
