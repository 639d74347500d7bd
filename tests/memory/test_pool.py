import threading

import pytest
import torch

from dataeff.memory import BufferPool


def test_sizes_are_exact_not_powers_of_two():
    with BufferPool(10 << 20) as pool:
        buffers = [pool.acquire((1 << 20) + 4096) for _ in range(9)]
        assert pool.used_nbytes == 9 * ((1 << 20) + 4096)
        assert len({buffer.data_ptr for buffer in buffers}) == 9
        for i, buffer in enumerate(buffers):
            buffer.tensor().fill_(i)
        assert all(buffer.tensor().eq(i).all() for i, buffer in enumerate(buffers))


def test_steps_reuse_the_same_places():
    sizes = [5000, 70_000, 1, 300_000, 4096]
    with BufferPool(1 << 20) as pool:
        places = None
        for _ in range(100):
            buffers = [pool.acquire(size) for size in sizes]
            if places is not None:
                assert [buffer.offset for buffer in buffers] == places
            places = [buffer.offset for buffer in buffers]
            for buffer in reversed(buffers):
                buffer.release()
        assert pool.used_nbytes == 0
        assert pool.peak_nbytes == 8192 + 73_728 + 4096 + 303_104 + 4096
        pool.acquire(pool.budget_nbytes, timeout_s=0).release()  # in one piece again


def test_a_full_pool_times_out_and_says_why():
    with BufferPool(8192) as pool, pool.acquire(5000):
        with pytest.raises(TimeoutError, match="8192 of 8192 in use"):
            pool.acquire(1, timeout_s=0)
        assert pool.num_waits == 0
        with pytest.raises(TimeoutError):
            pool.acquire(1, timeout_s=0.01)
        assert pool.num_waits == 1


def test_waiting_ends_when_memory_comes_back():
    pool = BufferPool(8192)
    held = pool.acquire(8192)
    timer = threading.Timer(0.05, held.release)
    timer.start()
    assert pool.acquire(8192, timeout_s=30).nbytes == 8192
    timer.join()


def test_more_than_the_budget_is_refused_at_once():
    with BufferPool(8192) as pool, pytest.raises(ValueError, match="8193 bytes are more"):
        pool.acquire(8193)


def test_released_and_closed():
    pool = BufferPool(8192)
    buffer = pool.acquire(100)
    tensor = buffer.tensor(torch.int32)
    buffer.release()
    buffer.release()
    with pytest.raises(ValueError, match="released"):
        buffer.tensor()
    pool.close()
    tensor.fill_(1)  # still mapped
    with pytest.raises(ValueError, match="closed"):
        pool.acquire(1)


def test_closing_wakes_who_waits():
    pool = BufferPool(4096)
    held = pool.acquire(1)
    raised = []

    def wait():
        try:
            pool.acquire(1)
        except ValueError as error:
            raised.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    while not pool.num_waits:
        pass
    pool.close()
    thread.join(30)
    assert len(raised) == 1 and held.nbytes == 1


def test_a_buffer_that_is_dropped_goes_back():
    pool = BufferPool(4096)
    held = pool.acquire(1)
    timer = threading.Timer(0.05, lambda: holders.clear())
    holders = [held]
    del held
    timer.start()
    assert pool.acquire(4096, timeout_s=30).nbytes == 4096  # and who waits hears of it
    timer.join()
    assert pool.used_nbytes == 0


def test_many_threads_never_share_a_byte():
    pool = BufferPool(64 * 4096)
    errors = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(200):
            nbytes = int(torch.randint(1, 12 * 4096, (), generator=generator))
            with pool.acquire(nbytes) as buffer:
                tensor = buffer.tensor()
                tensor.fill_(seed)
                if not tensor.eq(seed).all():
                    errors.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and pool.used_nbytes == 0
