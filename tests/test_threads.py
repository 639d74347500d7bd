"""The core's loops run on torch's threads, and go on in a forked child."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from dataeff._threads import loop_threads, torch_gomp_parallel
from dataeff.features.pipeline import pipelined

COUNT = """
import os, torch
from dataeff.features.gather import gather
torch.set_num_threads(4)
x, ids = torch.randn(100_000, 64), torch.randint(100_000, (50_000,))
expected = torch.index_select(x, 0, ids)
(torch.randn(10_000, 100) * 2).sum()  # torch's threads are there now
before = len(os.listdir("/proc/self/task"))
assert torch.equal(gather(x, ids), expected)
print(len(os.listdir("/proc/self/task")) - before)
"""

FORK = (
    COUNT
    + """
pid = os.fork()
if pid == 0:
    # NumPy compares: operators of torch would wait for the parent's OpenMP threads.
    os._exit(0 if (gather(x, ids).numpy() == expected.numpy()).all() else 1)
print(os.waitpid(pid, 0)[1])
"""
)


def run(source: str) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=120, check=True
    )
    return [int(line) for line in done.stdout.split()]


@pytest.mark.skipif(torch_gomp_parallel() is None, reason="torch brings another OpenMP")
def test_a_gather_starts_no_threads_of_its_own() -> None:
    assert run(COUNT) == [0]


def test_a_forked_child_gathers() -> None:
    assert run(FORK)[-1] == 0


@pytest.mark.skipif(torch_gomp_parallel() is None, reason="torch brings another OpenMP")
@pytest.mark.parametrize("gpu", [False, True])
def test_a_loader_s_threads_leave_the_training_its_team(monkeypatch, gpu) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        ask = partial(map, lambda how_many: how_many(), (torch.get_num_threads, loop_threads))
        told = pipelined(range(4), lambda _: tuple(ask()), num_threads=2, depth=4)
        assert set(told) == {(4 if gpu else 1, 2)}
        with ThreadPoolExecutor(1) as others:  # nobody else's is touched
            assert tuple(ask()) == others.submit(lambda: tuple(ask())).result() == (4, 4)
    finally:
        torch.set_num_threads(before)
